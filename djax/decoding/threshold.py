"""Accept every token the model is sure of."""

import dataclasses

import jax.numpy as jnp

from djax.checks import number, one_of
from djax.decoding.contract import Decoder, Look, Verdict, candidates, first_best, write
from djax.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Threshold(Decoder[tuple[()]]):
    """Accept each candidate whose confidence reaches tau, and always the row's best (Fast-dLLM, arXiv 2505.22618; dInfer).

    tau:   above 0. Above 1 it is never reached: then one token a forward is accepted, up to the slack.
    slack: what is within it of the row's best goes with the best. dInfer lowers its bound to 1e-5 under the best, so
           that the best always passes; with 0 the best goes alone, the lower position of a tie, as in Fast-dLLM, and
           a tau above 1 is exactly `Fixed(1)`.
    order: "confidence", or "left": the leading run of masks that all reach tau, at least the leftmost candidate; without slack.
    """

    tau: float = 0.9
    slack: float = 1e-5
    order: str = dataclasses.field(default="confidence", metadata={"static": True, "later": True})

    def __post_init__(self) -> None:
        number(self, "tau", above=0.0)
        number(self, "slack", at_least=0.0)
        one_of(self, "order", ("confidence", "left"))

    def step(self, state: tuple[()], look: Look) -> tuple[tuple[()], Verdict]:
        tokens, confidence, candidate = candidates(look)
        if self.order == "left":
            reaches = candidate & (confidence >= jnp.maximum(self.tau, look.floor))
            leading = jnp.cumprod(reaches | ~look.masked).astype(bool)
            return state, write(look, tokens, candidate & (leading | first_best(candidate)))
        confidence = jnp.where(candidate, confidence, -jnp.inf)
        best = jnp.max(confidence)
        reaches = confidence >= jnp.maximum(self.tau, look.floor)
        ties = (confidence >= best - self.slack) & (self.slack > 0)
        return state, write(look, tokens, candidate & (reaches | ties | first_best(confidence)))
