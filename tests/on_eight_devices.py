"""Run by test_sharding.py in a process of its own, where XLA simulates eight devices: the same tokens on one and on all."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tiny import DENSE, LLADA2

import djax
from djax.benchmarks import devices
from djax.kernels import experts, experts_gpu
from djax.models import moe
from djax.runtime import sharding

# Every decoder and every cache at least once, with and without smoothing; `djax bench devices` takes all pairs and more meshes.
COMBINATIONS = [
    (djax.Hierarchy(0.6, 0.2), djax.Dual(every=3), djax.Smoothing()),
    (djax.Credit(djax.Threshold(0.5)), djax.Vicinity(3, 5, warmup=2), djax.Smoothing()),
    (djax.Factor(2.0), djax.Vicinity(0, 4, warmup=0, every=4), None),
    (djax.Entropy(1.0), djax.Prefix(), None),
    (djax.Fixed(2), None, None),
]
MESHES = [dict(model=8), dict(model=2, data=4)]
CREDIT = djax.Credit(djax.Threshold(0.5))
RUNS = [
    (devices.CONFIG, MESHES, COMBINATIONS),
    # Wide enough for djax's own C++.
    (replace(devices.CONFIG, vocab=128, width=64, head_dim=32, expert_width=32), MESHES, COMBINATIONS[1:2] + COMBINATIONS[3:4]),
    # The other families, in sizes that eight devices divide.
    (replace(DENSE, heads=8, groups=8), MESHES[:1], [(CREDIT, djax.Vicinity(3, 5), None)]),
    (replace(LLADA2, heads=16, groups=8, experts=16), MESHES, [(CREDIT, djax.Block(), None)]),
]


def same_tokens() -> None:
    for config, meshes, combinations in RUNS:
        for line in devices.measure(meshes, combinations, note=print, config=config):
            assert line["different"] == [], line
            assert line["collectives_per_layer"] == [2], line
            assert line["bytes_per_device"] < line["bytes"]


def same_logits() -> None:
    one = devices.tiny()
    many = devices.spread(one, sharding.mesh(model=8))
    split = many.params["layer_0"]["w_in"].addressable_shards[0].data
    assert split.shape[0] == 1, "each device has its own expert and no others"
    tokens = np.random.default_rng(0).integers(0, one.config.eos_id, (2, 12))
    np.testing.assert_allclose(djax.logits(many, tokens), djax.logits(one, tokens), atol=1e-5)


def same_experts() -> None:
    """The GPU's kernels, interpreted, each device for its own experts."""
    keys = iter(jax.random.split(jax.random.key(0), 4))
    shapes = (40, 64), (64, 16), (16, 64, 128), (16, 64, 64)
    x, router, w_in, w_out = (jax.random.normal(next(keys), shape) / 8 for shape in shapes)
    routing, valid = moe.route(x, router, 3, renormalise=False), jnp.arange(40) < 33
    chosen = partial(experts.grouped, summed=partial(experts_gpu.summed, interpret=True))
    for kernels in (chosen, partial(experts.dense_kernel, interpret=True)):
        with jax.set_mesh(sharding.mesh(model=8)):
            got = jax.jit(kernels)(x, routing, w_in, w_out, valid)
        np.testing.assert_allclose(got[:33], experts.plain(x, routing, w_in, w_out, valid)[:33], atol=1e-5)


def same_int8() -> None:
    """Scales lie with the weights they belong to."""
    path = Path(__file__).parent / "goldens" / "moe_a"
    one, many = (djax.load(path, quantize="int8", mesh=mesh) for mesh in (None, sharding.mesh(model=2)))
    assert many.bytes_per_device < 0.6 * one.parameter_bytes
    tokens = np.random.default_rng(0).integers(0, one.config.eos_id, (2, 12))
    np.testing.assert_allclose(djax.logits(many, tokens), djax.logits(one, tokens), atol=1e-4)


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    same_experts()
    same_int8()
    same_logits()
    same_tokens()
