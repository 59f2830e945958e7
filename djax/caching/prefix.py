"""Prefix cache: what stands before the block is cached, the block and all that follows is run."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from djax.caching.contract import TO_THE_END, Plan, on_entry
from djax.checks import integer
from djax.decoding.contract import Tick


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Refresh on entering a block, and every `every` turns if given; run from the block to the canvas' end in every turn.

    The turns are `Dual`'s (dInfer's BaseDiffusionIteration with cache 'prefix'; Fast-dLLM, arXiv 2505.22618, section 3.2).
    The window is as wide as the canvas: what lies beyond its end is padding.
    """

    every: int | None = None

    keeps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        integer(self, "every", at_least=1, optional=True)

    def reach(self) -> tuple[int, int]:
        return 0, TO_THE_END

    def plan(self, tick: Tick, cached_block: jax.Array) -> Plan:
        refresh = on_entry(tick, cached_block, self.every)
        return Plan(full=refresh, refresh=refresh, window=jnp.ones_like(refresh))
