"""Run by test_sharding.py in a process of its own: bfloat16, int8 and a training step on two and eight devices."""

import dataclasses
import tempfile
from itertools import product

import jax
import numpy as np
from flax import traverse_util
from test_distill_training import RECIPE, trajectories
from tiny import DENSE, LLADA2, tiny_model

import djax
from djax import distill
from djax.benchmarks import devices
from djax.checkpoints.checkpoint import abstract
from djax.models import quantized
from djax.runtime import sharding

FAMILIES = {
    "llada_moe": (devices.CONFIG, djax.Vicinity(3, 5)),
    "llada": (dataclasses.replace(DENSE, heads=8, groups=8), djax.Dual()),
    "llada2": (dataclasses.replace(LLADA2, heads=16, groups=8, experts=16), djax.Block()),
}
MESHES = dict(model=2), dict(model=8), dict(model=2, data=4)
TOKENS = np.random.default_rng(0).integers(0, 46, (4, 24))


def held(model, dtype, quantize=None, mesh=None):
    """The model as `djax.load` with these options holds it."""
    flat = {path: np.asarray(a).astype(dtype) for path, a in traverse_util.flatten_dict(model.params).items()}
    if quantize is not None:
        flat = dict(part for path, leaf in flat.items() for part in quantized.quantize(path, leaf))
    tree = traverse_util.unflatten_dict(flat)
    places = abstract(model.family, model.config, np.dtype(dtype), mesh, quantize)
    return dataclasses.replace(model, params=jax.device_put(tree, jax.tree.map(lambda a: a.sharding, places)), mesh=mesh)


def decodes_as_one_device(name, config, cache, quantize):
    bfloat16 = jax.numpy.bfloat16
    model = devices.tiny(config)
    one = held(model, bfloat16, quantize)
    wanted = np.asarray(djax.logits(one, TOKENS))
    for axes in MESHES:
        many = held(model, bfloat16, quantize, sharding.mesh(**axes))
        # Sums over devices round elsewhere than sums on one do; near a tie the router then takes another expert.
        worst = np.abs(djax.logits(many, TOKENS) - wanted).max(axis=-1)
        assert np.mean(worst < 0.06 * np.abs(wanted).max()) > 0.9, worst
        if axes == dict(model=8):
            continue  # its program differs from two devices' in sizes alone
        answers = djax.generate(many, [[1, 2, 3], [4] * 9], gen_length=16, block_length=8, cache=cache, early_stop=False)
        for answer in answers:
            assert answer.canvas.max() < config.vocab and (answer.canvas != config.mask_id).all()
            assert 0 < answer.forwards <= 40
    print(f"{name} {quantize or 'bfloat16'}: close")


def trains_as_one_device(name, config, dtype):
    recipe = dataclasses.replace(RECIPE, steps=2, rate=1e-3, dtype=dtype, remat=True)
    model = tiny_model(config=config)
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        wanted = distill.train(model, trajectories(), recipe, a)
        many = devices.spread(model, sharding.mesh(model=2, data=2))
        found = distill.train(many, trajectories(), recipe, b)
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(wanted.params), strict=True):
        # Adam divides by a gradient's size: one near 0 may turn, and moves by twice the rate an update.
        np.testing.assert_allclose(a, b, atol=5e-3 if dtype == "bfloat16" else 1e-5)
    print(f"{name} {dtype}: trained")


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    for (name, (config, cache)), quantize in product(FAMILIES.items(), (None, "int8")):
        decodes_as_one_device(name, config, cache, quantize)
    # The family with everything: a dense layer, experts and one that all tokens share.
    trains_as_one_device("llada2", FAMILIES["llada2"][0], "bfloat16")
