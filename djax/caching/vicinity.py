"""Vicinity cache: the block and its neighbours are run, the rest is cached."""

import dataclasses

import jax

from djax.caching.contract import Plan, Policy
from djax.checks import integer
from djax.decoding.contract import Tick
from djax.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Vicinity(Policy):
    """Run `[start - before, end + after)` of each block, cut to the canvas; the first `warmup` forwards run everything.

    After the warm-up the cache is filled once, then refilled on entering each block, and in blocks after the first also
    whenever the row's forward count is a multiple of `every`. A refill also decodes, and the window follows in the
    same turn (dInfer, arXiv 2510.08666, VicinityCacheIteration). Where dInfer refills twice in a row, when the warm-up
    outlasts the first block, djax refills once.
    """

    before: int = dataclasses.field(default=16, metadata={"static": True})
    after: int = dataclasses.field(default=16, metadata={"static": True})
    warmup: int = 4
    every: int | None = None

    def __post_init__(self) -> None:
        for field in ("before", "after", "warmup"):
            integer(self, field, at_least=0)
        integer(self, "every", at_least=1, optional=True)

    def reach(self) -> tuple[int, int]:
        return self.before, self.after

    def plan(self, tick: Tick, cached_block: jax.Array) -> Plan:
        warm = tick.forward < self.warmup
        refresh = cached_block != tick.block
        if self.every is not None:
            refresh |= (tick.block > 0) & (tick.forward % self.every == 0)
        refresh &= ~warm
        return Plan(full=warm | refresh, refresh=refresh, window=~warm)
