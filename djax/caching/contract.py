"""The contract every cache policy keeps: which forwards a row runs in each turn of the loop.

The cache holds keys and values of the whole canvas and is read-only between refreshes. A turn of a row is an optional
forward over the whole canvas (which also decodes, and may refill the cache), then an optional forward over a window
around the block, against the cache. In families whose blocks see no later block, the cache may instead grow: then the forward
of a block just entered runs the block before it, too, and appends that one's keys and values. A policy is a frozen
dataclass, a `djax.pytree`, with

    keeps             static: is there a cache at all? If not, `plan` never asks for a window.
    appends           static: does it grow by finished blocks? Only for families whose blocks see what is before them.
    commits           static: does it grow by what a window read, up to the first position that changed? Only for families whose
                      positions see the past. The window then starts where the cache ends.
    reach()           static: how many positions before and after the block the window covers (cut to the canvas)
    plan(tick, cached_block) -> Plan

It is written for one row, and extends `Policy`, which has the defaults. The loop maps it over the rows of a batch.
"""

from typing import ClassVar, NamedTuple

import jax

from djax.decoding.contract import Tick

TO_THE_END = 2**30  # a reach longer than any canvas


class Plan(NamedTuple):
    """One turn of a row, bool scalars.

    full:    run the whole canvas. Without `refresh` its keys and values are lost, and so are those of an earlier refresh: a row
             asks for no window after it until the next refresh.
    refresh: keep that forward's keys and values (implies full; counted as a refresh).
    window:  then run the window against the cache.
    append:  then run the block before and the block, and append the former to the cache.
    """

    full: jax.Array
    refresh: jax.Array
    window: jax.Array
    append: jax.Array | bool = False


class Policy:
    """Base of all cache policies."""

    keeps: ClassVar[bool] = True
    appends: ClassVar[bool] = False
    commits: ClassVar[bool] = False

    def reach(self) -> tuple[int, int]:
        return 0, 0

    def plan(self, tick: Tick, cached_block: jax.Array) -> Plan:
        """`cached_block` int32 scalar: the block in which the row's cache was last filled, -1 while it is empty."""
        raise NotImplementedError


def on_entry(tick: Tick, cached_block: jax.Array, every: jax.Array | int | None) -> jax.Array:
    """Bool: the row has just entered a block or, with `every`, its turn is a multiple of it."""
    refresh = cached_block != tick.block
    return refresh if every is None else refresh | (tick.iteration % every == 0)
