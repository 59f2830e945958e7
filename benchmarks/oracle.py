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

from djax.decoding.contract import Decoder, Look, Verdict, candidates, first_best, write
from djax.engine.generate import Generation, generate
from djax.engine.request import bucket
from djax.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True, eq=False)
class Oracle(Decoder):
    """answers: int32 `[blocks, S]`, what the row's blocks say in the end."""

    answers: jax.Array | np.ndarray

    def step(self, state: Any, look: Look) -> tuple[Any, Verdict]:
        tokens, confidence, _ = candidates(look)
        answer = self.answers[look.tick.block]
        right = look.masked & (tokens == answer)
        given = look.masked & first_best(jnp.where(look.masked, confidence, -jnp.inf)) & ~jnp.any(right)
        return state, write(look, answer, right | given)


def answer(model: Any, questions: list[str], *, block_length: int, decoder: Decoder, **options: Any) -> list[Generation]:
    """`djax.generate` with oracles in the place of `decoder`, whose answers without cache and smoothing they know."""
    known = _known(model, tuple(questions), options["gen_length"], block_length, decoder)
    count = -(-bucket(max(len(one.canvas) for one in known)) // block_length)
    oracles = []
    for one in known:
        blocks = np.full(count * block_length, model.config.eos_id, np.int32)
        start = one.prompt_length // block_length * block_length
        blocks[: len(one.canvas) - start] = one.canvas[start:]
        oracles.append(Oracle(blocks.reshape(count, block_length)))
    return generate(model, questions, block_length=block_length, decoder=oracles, **options)


@functools.cache
def _known(model: Any, questions: tuple[str, ...], gen_length: int, block_length: int, decoder: Decoder) -> list[Generation]:
    return generate(model, list(questions), gen_length=gen_length, block_length=block_length, decoder=decoder)
