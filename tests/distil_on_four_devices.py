"""Run by test_distill_training.py in a process of its own: ten updates on one device and on four, parameters within 1e-5."""

import dataclasses
import tempfile

import jax
import numpy as np
from test_distill_training import RECIPE, trajectories
from tiny import CONFIG, tiny_model

from djax import distill
from djax.benchmarks import devices
from djax.distill.trainer import Examples
from djax.runtime import sharding
from djax.training import trainer

RECIPE = dataclasses.replace(RECIPE, steps=10, rate=1e-3)
ONE = tiny_model(config=dataclasses.replace(CONFIG, groups=2))


def trained(model, recipe):
    with tempfile.TemporaryDirectory() as directory:
        return distill.train(model, trajectories(), recipe, directory)


def same_masks(recipe, mesh):
    rows = Examples.of(trajectories(), recipe).batch(3)
    keys = jax.random.split(jax.random.key(0), recipe.rows)
    show = jax.jit(jax.vmap(lambda k, r: tuple(o.views(k, r, 0.0, 47) for o in recipe.objectives)))
    for a, b in zip(jax.tree.leaves(show(keys, rows)), jax.tree.leaves(show(keys, trainer.place(rows, mesh))), strict=True):
        np.testing.assert_array_equal(a, b)


def stopped_and_resumed(model, recipe, whole):
    """A restart on the same devices gives the same bits: also where each lies is restored."""
    with tempfile.TemporaryDirectory() as directory:
        append = trainer.append

        def stop(file, entry):
            append(file, entry)
            if entry["step"] == 8:
                raise InterruptedError

        trainer.append = stop
        try:
            distill.train(model, trajectories(), recipe, directory)
        except InterruptedError:
            trainer.append = append
        again = distill.train(model, trajectories(), recipe, directory)
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(a, b)


for name, shape, change in (
    ("data=4", dict(data=4), {}),
    ("data=2,model=2", dict(data=2, model=2), {}),
    ("data=2,accumulate=2", dict(data=2), dict(accumulate=2)),
):
    recipe = dataclasses.replace(RECIPE, **change)
    wanted = trained(ONE, recipe)
    many = devices.spread(ONE, sharding.mesh(**shape))
    found = trained(many, recipe)
    worst = 0.0
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(wanted.params), strict=True):
        worst = max(worst, float(np.abs(np.asarray(a) - np.asarray(b)).max()))
    assert worst < 1e-5, (name, worst)
    moved = max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max())
        for a, b in zip(*map(jax.tree.leaves, (wanted.params, ONE.params)), strict=True)
    )
    assert moved > 1e-3, "the training does something"
    same_masks(recipe, many.mesh)
    stopped_and_resumed(many, recipe, found)
    print(f"{name}: equal, largest difference {worst:.1e}, largest change {moved:.1e}")
