"""Fast-dLLM with its dual cache: threshold 0.9, block 32 (arXiv 2505.22618, sections 3.2 and 3.3, and its released code).

    djax generate --preset fast_dllm_dual "..."

The steps of a block are those of `fast_dllm_prefix`; only the block itself is run between refreshes.
"""

from djax.caching import Dual
from djax.decoding import Threshold

PRESET = dict(
    decoder=Threshold(0.9, slack=0.0),
    cache=Dual(surplus=False),
    block_length=32,
    align_blocks=False,
    early_stop=False,
)
