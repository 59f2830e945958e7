"""Accept every token whose distribution is sharp."""

import dataclasses

import jax
import jax.numpy as jnp

from djax.checks import number
from djax.decoding.contract import Decoder, Look, Verdict, candidates, first_best, write
from djax.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Entropy(Decoder[tuple[()]]):
    """Accept each candidate whose entropy, in nats, is at most theta, and always the row's lowest (dParallel, 2509.26488).

    theta at least 0. Ties for the lowest go to the lower position.
    """

    theta: float = 0.45

    def __post_init__(self) -> None:
        number(self, "theta", at_least=0.0)

    def step(self, state: tuple[()], look: Look) -> tuple[tuple[()], Verdict]:
        tokens, _, candidate = candidates(look)
        p = jax.nn.softmax(look.logits, axis=-1)
        entropy = jnp.where(candidate, -jnp.sum(p * jax.nn.log_softmax(look.logits, axis=-1), axis=-1), jnp.inf)
        return state, write(look, tokens, candidate & ((entropy <= self.theta) | first_best(-entropy)))
