"""Accept a fixed number of tokens at every forward, or a block's masks in a fixed number of forwards."""

import dataclasses

import jax
import jax.numpy as jnp

from djax.checks import integer, one_of
from djax.decoding.contract import Decoder, Look, Verdict, by_confidence, candidates, write
from djax.errors import OptionError
from djax.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Fixed(Decoder[jax.Array | tuple[()]]):
    """Accept the `per_step` surest candidates, or spread each block's masks over `steps` forwards (LLaDA, arXiv 2502.09992).

    per_step: candidates a forward; 1 if neither is given. Fewer are accepted where a row has fewer candidates.
    steps:    instead: m masks at the block's first forward go m // steps at a time, one more at each of the first
              m % steps, and never less than one. Refreshes and windows count alike (dInfer's FixedParallelDecoder).
    order:    "confidence" (LLaDA's low-confidence remasking; ties go to the lower position), "left" (leftmost first) or
              "random" (uniform, from the row's seed, at temperature 0 too; the tokens are the same argmax).
    """

    per_step: int | None = None
    steps: int | None = None
    order: str = dataclasses.field(default="confidence", metadata={"static": True})

    def __post_init__(self) -> None:
        integer(self, "per_step", at_least=1, optional=True)
        integer(self, "steps", at_least=1, optional=True)
        one_of(self, "order", ("confidence", "left", "random"))
        if self.per_step is None and self.steps is None:
            object.__setattr__(self, "per_step", 1)
        elif self.per_step is not None and self.steps is not None:
            raise OptionError(f"Fixed(per_step=..., steps=...): expected one of the two, got {self.per_step} and {self.steps}")

    @property
    def draws(self) -> bool:
        return self.order == "random"

    def init(self, block: int, vocab: int) -> jax.Array | tuple[()]:
        """The masks the block began with, where they set the pace."""
        del block, vocab
        return () if self.steps is None else jnp.int32(0)

    def step(self, state: jax.Array | tuple[()], look: Look) -> tuple[jax.Array | tuple[()], Verdict]:
        tokens, confidence, candidate = candidates(look)
        if self.order == "random":
            # Folded in, so that the order says nothing about the noise that chose the tokens.
            assert look.key is not None, "what draws gets a key"
            confidence = jax.random.uniform(jax.random.fold_in(look.key, 1), look.tokens.shape)
        elif self.order == "left":
            confidence = -look.at.astype(jnp.float32)
        if self.steps is None:
            assert self.per_step is not None, "one of the two is given"
            count: jax.Array | int = self.per_step
        else:
            assert not isinstance(state, tuple), "made by init"
            call = look.tick.call
            state = jnp.where(call == 0, jnp.sum(look.masked, dtype=jnp.int32), state)
            count = jnp.maximum(1, state // self.steps + (call < state % self.steps))
        return state, write(look, tokens, candidate & (by_confidence(confidence, candidate) < count))
