"""Accept as many tokens as their joint confidence allows."""

import dataclasses
from typing import Any

import jax

from djax.checks import number
from djax.decoding.contract import Tick, by_confidence, candidates
from djax.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Factor:
    """Accept the n surest candidates, n the largest with (n + 1) * (1 - c_n) < f, and at least one (Fast-dLLM, 2505.22618).

    c_n is the n-th highest confidence of the row: the more tokens go at once, the surer the last must be. f above 0.
    """

    f: float = 1.0

    def __post_init__(self) -> None:
        number(self, "f", above=0.0)

    def init(self, rows: int, block: int, vocab: int) -> tuple:
        del rows, block, vocab
        return ()

    def step(
        self, state: Any, logits: jax.Array, masked: jax.Array, tick: Tick, key: jax.Array | None
    ) -> tuple[Any, jax.Array, jax.Array]:
        tokens, confidence, candidate = candidates(logits, masked, tick, key)
        rank = by_confidence(confidence, candidate)
        # Both factors grow with the rank, so the positions that pass are just the first n.
        passes = (rank + 2) * (1 - confidence) < self.f
        return state, tokens, candidate & (passes | (rank == 0))
