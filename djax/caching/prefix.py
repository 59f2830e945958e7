"""Prefix cache: what stands before the block is cached, the block and all that follows is run."""

import dataclasses

import jax

from djax.caching.contract import TO_THE_END, Plan, Policy, on_entry
from djax.checks import flag, integer
from djax.decoding.contract import Tick
from djax.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Prefix(Policy):
    """Refresh on entering a block, and every `every` turns if given; run from the block to the canvas' end in every turn.

    Turns, `every` and `surplus` are `Dual`'s (dInfer's BaseDiffusionIteration with cache 'prefix', or Fast-dLLM's).
    The window is as wide as the canvas: what lies beyond its end is padding.
    """

    every: int | None = None
    surplus: bool = True

    def __post_init__(self) -> None:
        integer(self, "every", at_least=1, optional=True)
        flag(self, "surplus")

    def reach(self) -> tuple[int, int]:
        return 0, TO_THE_END

    def plan(self, tick: Tick, cached_block: jax.Array) -> Plan:
        refresh = on_entry(tick, cached_block, self.every)
        return Plan(full=refresh, refresh=refresh, window=~refresh | self.surplus)
