"""Accept the same number of tokens at every forward."""

import dataclasses
from typing import Any

import jax

from djax.checks import integer
from djax.decoding.contract import Tick, by_confidence, candidates


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fixed:
    """Accept the `per_step` most confident candidates of a row (LLaDA's low-confidence remasking, arXiv 2502.09992).

    Ties go to the lower position. Fewer are accepted where a row has fewer candidates.
    """

    per_step: int = 1

    def __post_init__(self) -> None:
        integer(self, "per_step", at_least=1)

    def init(self, rows: int, block: int, vocab: int) -> tuple:
        del rows, block, vocab
        return ()

    def step(
        self, state: Any, logits: jax.Array, masked: jax.Array, tick: Tick, key: jax.Array | None
    ) -> tuple[Any, jax.Array, jax.Array]:
        tokens, confidence, candidate = candidates(logits, masked, tick, key)
        return state, tokens, candidate & (by_confidence(confidence, candidate) < self.per_step)
