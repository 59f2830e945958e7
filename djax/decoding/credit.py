"""Trust tokens that were proposed before."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from djax.checks import number
from djax.decoding.contract import Decoder, Look, Verdict, best_and_probability, check_inner, probability
from djax.decoding.threshold import Threshold
from djax.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Credit(Decoder[tuple[jax.Array, Any]]):
    """Add credit to the logits of tokens that were top before, then let `inner` decide (arXiv 2510.06133; dInfer).

    At each decode call of a block the credit C `[S, V]` decays, C *= beta; each masked position's raw top token gains
    p ** gamma, p its raw probability; inner sees logits + alpha * log(1 + C). The memory lasts one block. With alpha 0
    this is `inner`. alpha and gamma at least 0, beta from 0 (no memory) to 1 (no decay).
    """

    inner: Decoder[Any] = dataclasses.field(default_factory=Threshold)
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
        return self.inner.draws

    def init(self, block: int, vocab: int) -> tuple[jax.Array, Any]:
        return jnp.zeros((block, vocab), jnp.float32), self.inner.init(block, vocab)

    def step(self, state: tuple[jax.Array, Any], look: Look) -> tuple[tuple[jax.Array, Any], Verdict]:
        credit, inner_state = state
        top, p = best_and_probability(look.logits)
        gain = jnp.where(look.masked, p**self.gamma, 0.0)
        credit = jnp.where(look.tick.call == 0, 0.0, self.beta * credit)
        is_top = jnp.arange(look.logits.shape[-1])[None, :] == top[:, None]
        credit = credit + jnp.where(is_top, gain[:, None], 0.0)
        fused = look.logits + self.alpha * jnp.log1p(credit)
        inner_state, verdict = self.inner.step(inner_state, look._replace(logits=fused))
        # Credit moves what is chosen; how sure the model is of it, it says itself.
        sure = probability(look.logits, verdict.tokens, look.mask_id)
        return (credit, inner_state), verdict._replace(confidence=sure)
