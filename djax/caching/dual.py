"""Dual cache: everything before and after the block is cached, the block alone is run."""

import dataclasses

import jax

from djax.caching.contract import Plan, Policy, on_entry
from djax.checks import flag, integer
from djax.decoding.contract import Tick
from djax.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Dual(Policy):
    """Refresh on entering a block, and every `every` turns if given; run the block's window in every turn.

    A refresh also decodes. surplus: the window of that same turn runs too, even if the refresh finished the block (dInfer's
    BaseDiffusionIteration); without it the refresh is the turn, as in Fast-dLLM (arXiv 2505.22618, section 3.2). Turns
    are counted from the start of the sequence.
    """

    every: int | None = None
    surplus: bool = True

    def __post_init__(self) -> None:
        integer(self, "every", at_least=1, optional=True)
        flag(self, "surplus")

    def plan(self, tick: Tick, cached_block: jax.Array) -> Plan:
        refresh = on_entry(tick, cached_block, self.every)
        return Plan(full=refresh, refresh=refresh, window=~refresh | self.surplus)
