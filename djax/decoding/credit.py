"""Trust tokens that were proposed before."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from djax.checks import number
from djax.decoding.contract import Decoder, Tick, best_and_probability, check_inner, draws
from djax.decoding.threshold import Threshold
from djax.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Credit:
    """Add credit to the logits of tokens that were top before, then let `inner` decide (arXiv 2510.06133; dInfer).

    At each decode call of a block the credit C `[S, V]` decays, C *= beta; each masked position's raw top token gains
    p ** gamma, p its raw probability; inner sees logits + alpha * log(1 + C). The memory lasts one block. With alpha 0
    this is `inner`. alpha and gamma at least 0, beta from 0 (no memory) to 1 (no decay).
    """

    inner: Decoder = dataclasses.field(default_factory=Threshold)
    alpha: float = 0.7
    gamma: float = 0.2
    beta: float = 0.8

    def __post_init__(self) -> None:
        check_inner(self)
        number(self, "alpha", at_least=0.0)
        number(self, "gamma", at_least=0.0)
        number(self, "beta", at_least=0.0, at_most=1.0)

    @property
    def draws(self) -> bool:
        return draws(self.inner)

    def init(self, rows: int, block: int, vocab: int) -> tuple:
        return jnp.zeros((rows, block, vocab), jnp.float32), self.inner.init(rows, block, vocab)

    def step(
        self, state: Any, logits: jax.Array, masked: jax.Array, tick: Tick, key: jax.Array | None
    ) -> tuple[Any, jax.Array, jax.Array]:
        credit, inner_state = state
        top, p = best_and_probability(logits)
        gain = jnp.where(masked, p**self.gamma, 0.0)
        fresh = (tick.call == 0)[:, None, None]
        credit = jnp.where(fresh, 0.0, self.beta * credit)
        is_top = jnp.arange(logits.shape[-1])[None, None, :] == top[..., None]
        credit = credit + jnp.where(is_top, gain[..., None], 0.0)
        fused = logits + self.alpha * jnp.log1p(credit)
        inner_state, tokens, accept = self.inner.step(inner_state, fused, masked, tick, key)
        return (credit, inner_state), tokens, accept
