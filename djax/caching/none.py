"""No cache: the whole canvas at every forward."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from djax.caching.contract import Plan
from djax.decoding.contract import Tick
from djax.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Uncached:
    """Exact, and the reference the caches approximate. `cache=None` means this."""

    keeps: ClassVar[bool] = False

    def reach(self) -> tuple[int, int]:
        return 0, 0

    def plan(self, tick: Tick, cached_block: jax.Array) -> Plan:
        del cached_block
        yes = jnp.ones(tick.forward.shape, bool)
        return Plan(full=yes, refresh=~yes, window=~yes)
