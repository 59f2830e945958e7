"""A decoder of your own: accept where the likeliest token leads the second by enough probability.

djax generate --decoder "examples/margin.py:Margin(0.8)" --file question.txt
"""

import dataclasses

import jax

from djax import Decoder, decoding, pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Margin(Decoder):
    least: float = 0.8

    def step(self, state, look):
        tokens, confidence, candidate = decoding.contract.candidates(look)
        margin = confidence - jax.lax.top_k(jax.nn.softmax(look.logits), 2)[0][:, 1]
        accept = (margin >= self.least) | (decoding.contract.by_confidence(margin, candidate) == 0)
        return state, decoding.contract.write(look, tokens, candidate & accept)
