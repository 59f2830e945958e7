"""dInfer with a cache: threshold 0.8, smoothing, vicinity 16/16 after 4 warm-up forwards, block 64 (arXiv 2510.08666).

    djax generate --preset dinfer_vicinity "..."

The paper's row "KV": 53.96 mean score at 3.87 tokens a forward with LLaDA-MoE.
"""

from djax.caching import Vicinity
from djax.decoding import Threshold
from djax.decoding.smoothing import Smoothing

PRESET = dict(
    decoder=Threshold(0.8),
    cache=Vicinity(before=16, after=16, warmup=4),
    smoothing=Smoothing(),
    block_length=64,
)
