"""A ceiling for every rule of acceptance: what a decoder could reach that knows the answer.

The answer is what one token a forward gives. The oracle accepts each of its tokens as soon as the model proposes it, however
unsure, and nothing else; where a forward proposes none of them, one is written for it. No decoder that ends in this
answer and only takes what the model proposes is faster at each forward; what it leaves over is the model's, not the rule's.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from djax.decoding.contract import Decoder, Tick, candidates, first_best
from djax.generate import Generation, generate
from djax.pytree import pytree
from djax.request import bucket


@pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Oracle:
    """answers: int32 `[B, blocks, S]`, what each row's blocks say in the end."""

    answers: jax.Array

    def init(self, rows: int, block: int, vocab: int) -> jax.Array:
        """The answers themselves: a state goes with its row, also where a forward runs that row alone."""
        del rows, block, vocab
        return self.answers

    def step(
        self, state: Any, logits: jax.Array, masked: jax.Array, tick: Tick, key: jax.Array | None
    ) -> tuple[Any, jax.Array, jax.Array]:
        tokens, confidence, _ = candidates(logits, masked, tick, key)
        answer = jnp.take_along_axis(state, tick.block[:, None, None], axis=1)[:, 0]
        right = masked & (tokens == answer)
        given = masked & first_best(jnp.where(masked, confidence, -jnp.inf)) & ~jnp.any(right, axis=-1, keepdims=True)
        return state, answer, right | given


def answer(model: Any, questions: list[str], *, block_length: int, decoder: Decoder, **options: Any) -> list[Generation]:
    """`djax.generate` with the oracle in the place of `decoder`, whose answers without cache and smoothing it knows."""
    known = _known(model, tuple(questions), options["gen_length"], block_length, decoder)
    count = -(-bucket(max(len(one.canvas) for one in known)) // block_length)
    blocks = np.full((len(known), count * block_length), model.config.eos_id, np.int32)
    for row, one in zip(blocks, known, strict=True):
        start = one.prompt_length // block_length * block_length
        row[: len(one.canvas) - start] = one.canvas[start:]
    oracle = Oracle(blocks.reshape(len(known), count, block_length))
    return generate(model, questions, block_length=block_length, decoder=oracle, **options)


@functools.cache
def _known(model: Any, questions: tuple[str, ...], gen_length: int, block_length: int, decoder: Decoder) -> list[Generation]:
    return generate(model, list(questions), gen_length=gen_length, block_length=block_length, decoder=decoder)
