"""Fast-dLLM with its prefix cache: threshold 0.9, block 32 (arXiv 2505.22618, sections 3.2 and 3.3, and its released code).

    djax generate --preset fast_dllm_prefix "..."

The refresh on entering a block is the block's first step and no window follows it in the same turn; the surest token goes
alone where none reaches the threshold; blocks start at the end of the prompt and the whole canvas is decoded. dInfer's own
prefix cache differs in all three: `Prefix()`, `Threshold(0.9)`, `align_blocks=True`.
"""

from djax.caching import Prefix
from djax.decoding import Threshold

PRESET = dict(
    decoder=Threshold(0.9, slack=0.0),
    cache=Prefix(surplus=False),
    block_length=32,
    align_blocks=False,
    early_stop=False,
)
