"""Divide and conquer: accept the surest token of every stretch of masks."""

import dataclasses

import jax.numpy as jnp

from djax.checks import number
from djax.decoding.contract import Decoder, Look, Verdict, candidates, first_best, write
from djax.errors import OptionError
from djax.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Hierarchy(Decoder[tuple[()]]):
    """Accept the best of each run of neighbouring masks if it exceeds low, any candidate that exceeds high, and the row's best.

    Runs are found anew at each call, which is the whole recursion (dInfer, HierarchyDecoder). Both comparisons are
    strict; exact ties for a run's best all go, the row's best is the first. 0 <= low < high; high above 1 is never reached.
    """

    high: float = 0.9
    low: float = 0.4

    def __post_init__(self) -> None:
        number(self, "high", above=0.0)
        number(self, "low", at_least=0.0)
        if isinstance(self.high, float) and isinstance(self.low, float) and self.low >= self.high:
            raise OptionError(f"Hierarchy(high=..., low=...): expected low below high, got low={self.low}, high={self.high}")

    def step(self, state: tuple[()], look: Look) -> tuple[tuple[()], Verdict]:
        tokens, confidence, candidate = candidates(look)
        masked = look.masked
        confidence = jnp.where(masked, confidence, -jnp.inf)
        run = jnp.cumsum(masked & ~jnp.pad(masked, (1, 0))[:-1])
        at = jnp.arange(len(masked))
        others = (run[:, None] == run[None, :]) & masked[None, :] & (at[:, None] != at[None, :])
        # A position that proposes the mask id keeps its rank, as in dInfer: it is not accepted, and nor is a less sure
        # neighbour in its stead. Only if that leaves the row with nothing does the best candidate go.
        surer = jnp.any(others & (confidence[None, :] > confidence[:, None]), axis=-1)
        high = jnp.maximum(self.high, look.floor)
        chosen = (~surer & (confidence > self.low)) | (confidence > high)
        accept = candidate & (chosen | first_best(confidence))
        none = ~jnp.any(accept)
        best = candidate & first_best(jnp.where(candidate, confidence, -jnp.inf))
        return state, write(look, tokens, accept | (none & best))
