"""Which keys a query sees: a few integers a position and one predicate, for fresh and for cached keys alike.

A key has a rank. A query sees the shared context of lower rank than its `context`, and keys of its own copy of lower rank than
its `own`. That covers bidirectional windows, blocks that see what is before them, causal order (of positions or of any other
order), and several drafts or noisy copies that see the context and themselves alone. Kernels read these vectors; no array of
queries x keys is made for them.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

# The rank of a key that nobody sees, and the limit of a query that sees all others.
HIDDEN_RANK = 2**30

# Of a family: a position sees all positions; its block of positions and those before; itself and the positions before.
Visibility = Literal["all", "blocks", "past"]


class Sight(NamedTuple):
    """What the W positions of a window see, and as what they are seen.

    rank:    int32 `[B, W]`, of each position as a key; `HIDDEN_RANK` hides it from everybody.
    context: int32 `[B, W]`, each query's limit for shared keys, cached ones and those of copy 0; None: no limit.
    copy:    int32 `[B, W]`, which copy a position belongs to, 0 for the shared context; None: all are shared.
    own:     int32 `[B, W]`, each query's limit for keys of its own copy; None: no limit. Means nothing without copies.
    """

    rank: jax.Array
    context: jax.Array | None = None
    copy: jax.Array | None = None
    own: jax.Array | None = None

    @property
    def valid(self) -> jax.Array:
        """Bool `[B, W]`: the positions that somebody may see; the others are padding."""
        return self.rank < HIDDEN_RANK

    def sees_fresh(self) -> jax.Array:
        """Bool `[B, W, W]`, or `[B, 1, W]` where all queries see the same: whether query w sees the window's key."""
        rank = self.rank[:, None, :]
        shared = rank < (HIDDEN_RANK if self.context is None else self.context[:, :, None])
        if self.copy is None:
            return shared
        mine, theirs = self.copy[:, :, None], self.copy[:, None, :]
        own = rank < (HIDDEN_RANK if self.own is None else self.own[:, :, None])
        return ((theirs == 0) & shared) | ((theirs == mine) & own)

    def sees_cached(self, rank: jax.Array) -> jax.Array:
        """Bool `[B, W, L]` or `[B, 1, L]`: whether query w sees the cached key, whose ranks are int32 `[B, L]`."""
        return rank[:, None, :] < (HIDDEN_RANK if self.context is None else self.context[:, :, None])


def rank_keys(visibility: Visibility, at: jax.Array, shown: jax.Array, block: jax.Array | int) -> jax.Array:
    """Ranks of the keys at canvas positions `at` int32 `[B, W]` in a family; those that are not `shown` bool `[B, W]` are
    hidden. block: positions a block, counted from the canvas' start; used where blocks matter alone."""
    order = _order(visibility, at, block)
    return jnp.where(shown, 0 if order is None else order, HIDDEN_RANK)


def see(visibility: Visibility, at: jax.Array, valid: jax.Array, block: jax.Array | int) -> Sight:
    """The sight of a plain window over canvas positions `at` int32 `[B, W]`: all of one copy."""
    order = _order(visibility, at, block)
    if order is None:
        return Sight(jnp.where(valid, 0, HIDDEN_RANK))
    return see_in_order(valid, order)


def see_in_order(valid: jax.Array, order: jax.Array) -> Sight:
    """Each position sees those of its order, int32 `[B, W]` from 0, and lower."""
    return Sight(jnp.where(valid, order, HIDDEN_RANK), order + 1)


def _order(visibility: Visibility, at: jax.Array, block: jax.Array | int) -> jax.Array | None:
    if visibility == "all":
        return None
    # What is before the canvas is padding, whose queries see something nevertheless.
    at = jnp.maximum(at, 0)
    return at // block if visibility == "blocks" else at
