"""dInfer without a cache: credit over threshold 0.8, smoothing, block 64 (arXiv 2510.08666; credit: arXiv 2510.06133).

    djax generate --preset dinfer_credit "..."

The paper's row "no KV": 54.33 mean score at 4.29 tokens a forward with LLaDA-MoE.
"""

import djax

PRESET = dict(
    decoder=djax.Credit(djax.Threshold(0.8)),
    cache=None,
    smoothing=djax.Smoothing(),
    block_length=64,
)
