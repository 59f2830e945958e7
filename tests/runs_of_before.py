"""Run directories as they were when training from scratch and distillation had a trainer each."""

import shutil
from typing import Any, NamedTuple

import jax.numpy as jnp
from orbax.checkpoint.experimental.v1 import training as orbax


class State(NamedTuple):
    """What a checkpoint held."""

    params: Any
    optimizer: Any
    step: Any


def as_before(directory, step, params, moves):
    """Write a run's checkpoint again, in the form that it had. moves: its optimizer, written out."""
    place = (directory / "checkpoints").resolve()
    like = State(params, moves.init(params), jnp.int32(0))
    with orbax.Checkpointer(place) as saved:
        state = saved.load(step, like)
    assert int(state.step) == step
    shutil.rmtree(place)
    with orbax.Checkpointer(place) as saved:
        saved.save(step, state)
