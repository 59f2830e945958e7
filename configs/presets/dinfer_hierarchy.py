"""dInfer with its hierarchical decoder: 0.92 / 0.62, smoothing, vicinity 16/16 after 4 warm-up forwards, block 64.

    djax generate --preset dinfer_hierarchy "..."

The paper's row for the distilled model, LLaDA-MoE-TD (arXiv 2510.08666): 52.72 mean score at 5.67 tokens a forward.
"""

from djax.caching import Vicinity
from djax.decoding import Hierarchy
from djax.decoding.smoothing import Smoothing

PRESET = dict(
    decoder=Hierarchy(high=0.92, low=0.62),
    cache=Vicinity(before=16, after=16, warmup=4),
    smoothing=Smoothing(),
    block_length=64,
)
