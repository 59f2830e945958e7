"""Accept as many tokens as their joint confidence allows."""

import dataclasses

from djax.checks import number
from djax.decoding.contract import Decoder, Look, Verdict, by_confidence, candidates, write
from djax.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Factor(Decoder[tuple[()]]):
    """Accept the n surest candidates, n the largest with (n + 1) * (1 - c_n) < f, and at least one (Fast-dLLM, 2505.22618).

    c_n is the n-th highest confidence of the row: the more tokens go at once, the surer the last must be. f above 0.
    """

    f: float = 1.0

    def __post_init__(self) -> None:
        number(self, "f", above=0.0)

    def step(self, state: tuple[()], look: Look) -> tuple[tuple[()], Verdict]:
        tokens, confidence, candidate = candidates(look)
        rank = by_confidence(confidence, candidate)
        # Both factors grow with the rank, so the positions that pass are just the first n.
        passes = (rank + 2) * (1 - confidence) < self.f
        return state, write(look, tokens, candidate & (passes | (rank == 0)))
