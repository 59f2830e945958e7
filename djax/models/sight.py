"""What a position sees in a family, as the `Sight` that attention reads."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from djax.kernels.sight import HIDDEN_RANK, Sight

# Of a family: a position sees all positions; its block of positions and those before; itself and the positions before.
Visibility = Literal["all", "blocks", "past"]
Size = jax.Array | np.int32 | int


def rank_keys(visibility: Visibility, at: jax.Array, shown: jax.Array, block: Size) -> jax.Array:
    """Ranks of the keys at canvas positions `at` int32 `[B, W]` in a family; those that are not `shown` bool `[B, W]` are
    hidden. block: positions a block, counted from the canvas' start; used where blocks matter alone."""
    order = _order(visibility, at, block)
    return jnp.where(shown, 0 if order is None else order, HIDDEN_RANK)


def see(visibility: Visibility, at: jax.Array, valid: jax.Array, block: Size | None) -> Sight:
    """The sight of a plain window over canvas positions `at` int32 `[B, W]`: all of one copy.

    block: as in `rank_keys`; None where blocks do not matter."""
    order = _order(visibility, at, block)
    if order is None:
        return Sight(jnp.where(valid, 0, HIDDEN_RANK))
    return see_in_order(valid, order)


def see_in_order(valid: jax.Array, order: jax.Array) -> Sight:
    """Each position sees those of its order, int32 `[B, W]` from 0, and lower."""
    return Sight(jnp.where(valid, order, HIDDEN_RANK), order + 1)


def _order(visibility: Visibility, at: jax.Array, block: Size | None) -> jax.Array | None:
    if visibility == "all":
        return None
    # What is before the canvas is padding, whose queries see something nevertheless.
    at = jnp.maximum(at, 0)
    if visibility == "past":
        return at
    assert block is not None, "a family whose blocks matter has blocks"
    return at // block
