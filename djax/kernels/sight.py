"""Which keys a query sees: a few integers a position and one predicate, for fresh and for cached keys alike.

A key has a rank. A query sees the shared context of lower rank than its `context`, and keys of its own copy of lower rank than
its `own`. That covers bidirectional windows, blocks that see what is before them, causal order (of positions or of any other
order), and several drafts or noisy copies that see the context and themselves alone. Kernels read these vectors; no array of
queries x keys is made for them. `djax.models.sight` makes them from what a family says.
"""

from typing import NamedTuple

import jax

# The rank of a key that nobody sees, and the limit of a query that sees all others.
HIDDEN_RANK = 2**30


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
