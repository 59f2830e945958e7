"""Accept every token the model is sure of."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from djax.checks import number
from djax.decoding.contract import Tick, candidates

# dInfer lowers the bound to this much under the row's best, so that the best always passes; what ties with it within
# the slack passes too, even at a threshold above 1.
SLACK = 1e-5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Threshold:
    """Accept each candidate whose confidence reaches tau, and always the row's best (Fast-dLLM, arXiv 2505.22618; dInfer).

    tau: above 0. Above 1 it is never reached: then one token a forward is accepted, and any that ties with it to 1e-5.
    """

    tau: float = 0.9

    def __post_init__(self) -> None:
        number(self, "tau", above=0.0)

    def init(self, rows: int, block: int, vocab: int) -> tuple:
        del rows, block, vocab
        return ()

    def step(
        self, state: Any, logits: jax.Array, masked: jax.Array, tick: Tick, key: jax.Array | None
    ) -> tuple[Any, jax.Array, jax.Array]:
        tokens, confidence, candidate = candidates(logits, masked, tick, key)
        best = jnp.max(jnp.where(candidate, confidence, -jnp.inf), axis=-1, keepdims=True)
        bound = jnp.minimum(best - SLACK, jnp.maximum(self.tau, tick.least[:, None]))
        return state, tokens, candidate & (confidence >= bound)
