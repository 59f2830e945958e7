"""dInfer without a cache: credit over threshold 0.8, smoothing, block 64 (arXiv 2510.08666; credit: arXiv 2510.06133).

    djax generate --preset dinfer_credit "..."

The paper's row "no KV": 54.33 mean score at 4.29 tokens a forward with LLaDA-MoE.
"""

from djax.decoding import Credit, Threshold
from djax.decoding.smoothing import Smoothing

PRESET = dict(
    decoder=Credit(Threshold(0.8)),
    cache=None,
    smoothing=Smoothing(),
    block_length=64,
)
