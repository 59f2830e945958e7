"""Block-diffusion cache: exact. A finished block's keys and values never change, for no later block is seen by it."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from djax.caching.contract import Plan, Policy
from djax.decoding.contract import Tick
from djax.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Block(Policy):
    """Run the block alone against the blocks before it; for families whose blocks see no later one (LLaDA2).

    The first forward runs the prompt and the first block, keeps their keys and values, and decodes. The first forward of each
    later block also runs the block before it, now without masks, and appends its keys and values. So a decode takes exactly the
    forwards of one without a cache, and gives its tokens. dInfer stores a block by a forward of its own (arXiv 2510.08666;
    BlockDiffusionRunner), one more a block.
    """

    appends: ClassVar[bool] = True

    def plan(self, tick: Tick, cached_block: jax.Array) -> Plan:
        first = cached_block < 0
        entered = cached_block != tick.block
        return Plan(full=first, refresh=first, window=~entered, append=entered & jnp.logical_not(first))
