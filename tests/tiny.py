"""Models of one or two layers with random weights: for laws that need many programs, each compiled in about a second."""

import jax

from djax.models import FAMILIES, llada, llada2, llada_moe
from djax.models.model import Model

SHARED = dict(vocab=48, width=16, rope_theta=10000.0, eps=1e-5, max_positions=256, mask_id=47, eos_id=46)
CONFIG = llada_moe.Config(
    **SHARED, layers=1, heads=2, groups=1, head_dim=8, expert_width=8, experts=4, top=2, renormalise=False
)
DENSE = llada.Config(**SHARED, layers=2, heads=2, groups=2, head_dim=8, mlp_width=24)
LLADA2 = llada2.Config(
    **SHARED,
    layers=2,
    heads=4,
    groups=2,
    head_dim=8,
    rotated=4,
    dense_layers=1,
    dense_width=24,
    expert_width=8,
    experts=8,
    top=2,
    expert_groups=4,
    top_groups=2,
    router_scale=2.5,
)


def tiny_model(seed=0, config=CONFIG):
    """Sharp enough (the head is scaled up) that confidences are anywhere between 0 and 1."""
    family = next(family for family in FAMILIES.values() if type(config) is family.config_type)
    params = family.init(config, jax.random.key(seed))
    return Model(family, config, params | {"head": 4 * params["head"]}, None, {}, {})
