"""A LLaDA-MoE of one layer with random weights: for laws that need many programs, each compiled in about a second."""

import jax

from djax.model import Model
from djax.models import llada_moe

CONFIG = llada_moe.Config(
    vocab=48,
    width=16,
    layers=1,
    heads=2,
    groups=1,
    head_dim=8,
    expert_width=8,
    experts=4,
    top=2,
    renormalise=False,
    rope_theta=10000.0,
    eps=1e-5,
    max_positions=256,
    mask_id=47,
    eos_id=46,
)


def tiny_model(seed=0, config=CONFIG):
    """Sharp enough (the head is scaled up) that confidences are anywhere between 0 and 1."""
    params = llada_moe.init(config, jax.random.key(seed))
    return Model(llada_moe, config, params | {"head": 4 * params["head"]}, None, {}, {})
