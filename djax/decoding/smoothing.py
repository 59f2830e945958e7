"""Soft inputs: a position that is still masked is fed what the last forward expected there, not only the mask."""

import dataclasses

import jax
import jax.numpy as jnp

from djax.checks import integer, number
from djax.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Smoothing:
    """After each forward t of a row, a position it covered and left masked gets E[mask] + w_t * (softmax(logits) @ E).

    w_t = min(first + growth * t, last); while the ramp lasts, decoders that compare with a threshold use at least
    1 - threshold_decay * t (dInfer, arXiv 2510.08666, IterSmooth). t counts the row's forwards from the start of its
    sequence. All four at least 0. With all weights 0 and no ramp this is no smoothing.

    threshold_decay: None for no ramp: decoders keep their own thresholds from the first forward on.
    top: None for the whole softmax; a number k reads only the k likeliest tokens' embeddings, with their probabilities as
         they are (what is left out counts as zero, near the mean of the embeddings). Another answer, not a rounding:
         the README has the measured difference.
    """

    first: float = 0.15
    growth: float = 0.02
    last: float = 0.3
    threshold_decay: float | None = 0.02
    top: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        for field in ("first", "growth", "last"):
            number(self, field, at_least=0.0)
        number(self, "threshold_decay", at_least=0.0, optional=True)
        integer(self, "top", at_least=1, optional=True)

    def weight(self, forward: jax.Array) -> jax.Array:
        """w_t, float32, at a row's forward count, an int32 scalar."""
        return jnp.minimum(self.first + self.growth * forward.astype(jnp.float32), self.last)

    def least(self, forward: jax.Array) -> jax.Array:
        """The threshold below which no decoder goes at this forward, a float32 scalar."""
        if self.threshold_decay is None:
            return jnp.full(forward.shape, -jnp.inf)
        return 1 - self.threshold_decay * forward.astype(jnp.float32)


SMOOTHINGS: dict[str, type] = {"none": type(None), "smoothing": Smoothing}
