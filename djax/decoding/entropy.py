"""Accept every token whose distribution is sharp."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from djax.checks import number
from djax.decoding.contract import Tick, candidates, first_best
from djax.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Entropy:
    """Accept each candidate whose entropy, in nats, is at most theta, and always the row's lowest (dParallel, 2509.26488).

    theta at least 0. Ties for the lowest go to the lower position.
    """

    theta: float = 0.45

    def __post_init__(self) -> None:
        number(self, "theta", at_least=0.0)

    def init(self, rows: int, block: int, vocab: int) -> tuple:
        del rows, block, vocab
        return ()

    def step(
        self, state: Any, logits: jax.Array, masked: jax.Array, tick: Tick, key: jax.Array | None
    ) -> tuple[Any, jax.Array, jax.Array]:
        tokens, _, candidate = candidates(logits, masked, tick, key)
        p = jax.nn.softmax(logits, axis=-1)
        entropy = jnp.where(candidate, -jnp.sum(p * jax.nn.log_softmax(logits, axis=-1), axis=-1), jnp.inf)
        return state, tokens, candidate & ((entropy <= self.theta) | first_best(-entropy))
