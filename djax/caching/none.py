"""No cache: the whole canvas at every forward."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from djax.caching.contract import Plan, Policy
from djax.decoding.contract import Tick
from djax.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Uncached(Policy):
    """Exact, and the reference the caches approximate. `cache=None` means this."""

    keeps: ClassVar[bool] = False

    def plan(self, tick: Tick, cached_block: jax.Array) -> Plan:
        del tick, cached_block
        return Plan(full=jnp.bool_(True), refresh=jnp.bool_(False), window=jnp.bool_(False))
