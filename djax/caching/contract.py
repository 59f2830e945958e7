"""The contract every cache policy keeps: which forwards a row runs in each turn of the loop.

The cache holds keys and values of the whole canvas and is read-only between refreshes. A turn of a row is an optional
forward over the whole canvas (which also decodes, and may refill the cache), then an optional forward over a window
around the block, against the cache. In families whose blocks see no later block, the cache may instead grow: then the forward
of a block just entered runs the block before it, too, and appends that one's keys and values. A policy is a frozen
dataclass, a `djax.pytree`, with

    keeps             static: is there a cache at all? If not, `plan` never asks for a window.
    appends           static, optional: does it grow by finished blocks? Only for families that are block-causal.
    reach()           static: how many positions before and after the block the window covers (cut to the canvas)
    plan(tick, cached_block) -> Plan
"""

from typing import NamedTuple, Protocol

import jax

from djax.checks import reading
from djax.decoding.contract import Tick

TO_THE_END = 2**30  # a reach longer than any canvas


class Plan(NamedTuple):
    """One turn, bool `[B]` each.

    full:    run the whole canvas.
    refresh: keep that forward's keys and values (implies full; counted as a refresh).
    window:  then run the window against the cache.
    append:  then run the block before and the block, and append the former to the cache; None where a policy never does.
    """

    full: jax.Array
    refresh: jax.Array
    window: jax.Array
    append: jax.Array | None = None


class Policy(Protocol):
    keeps: bool

    def reach(self) -> tuple[int, int]: ...

    def plan(self, tick: Tick, cached_block: jax.Array) -> Plan:
        """`cached_block` int32 `[B]`: the block in which the row's cache was last filled, -1 while it is empty."""
        ...


def appends(policy: Policy) -> bool:
    """Whether the policy's cache grows by finished blocks."""
    with reading("cache: its attribute appends"):
        return bool(getattr(policy, "appends", False))


def on_entry(tick: Tick, cached_block: jax.Array, every: jax.Array | None) -> jax.Array:
    """Bool `[B]`: rows that have just entered a block, and, with `every`, those whose turn is a multiple of it."""
    refresh = cached_block != tick.block
    return refresh if every is None else refresh | (tick.iteration % every == 0)
