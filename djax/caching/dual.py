"""Dual cache: everything before and after the block is cached, the block alone is run."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from djax.caching.contract import Plan, on_entry
from djax.checks import integer
from djax.decoding.contract import Tick


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dual:
    """Refresh on entering a block, and every `every` turns if given; run the block's window in every turn.

    dInfer's BaseDiffusionIteration: the refresh also decodes, and the window of the same turn runs even if the refresh
    finished the block. Turns are counted from the start of the sequence. (Fast-dLLM, arXiv 2505.22618, section 3.2.)
    """

    every: int | None = None

    keeps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        integer(self, "every", at_least=1, optional=True)

    def reach(self) -> tuple[int, int]:
        return 0, 0

    def plan(self, tick: Tick, cached_block: jax.Array) -> Plan:
        refresh = on_entry(tick, cached_block, self.every)
        return Plan(full=refresh, refresh=refresh, window=jnp.ones_like(refresh))
