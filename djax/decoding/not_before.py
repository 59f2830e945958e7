"""Keep an answer from ending early."""

import dataclasses

import jax

from djax.decoding.contract import Decoder, Look, State, Verdict
from djax.kernels.vocabulary import exclude
from djax.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class NotBefore(Decoder[State]):
    """Exclude the tokens `ids` at canvas positions below `least`, then let `inner` decide: `min_gen_length` of a row.

    Every decode holds its decoder in one. ids: static; least: int32, 0 excludes nothing.
    """

    inner: Decoder[State]
    least: int | jax.Array
    ids: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def draws(self) -> bool:
        return self.inner.draws

    @property
    def post_steps(self) -> int:
        return self.inner.post_steps

    @property
    def drafts(self) -> int:
        return self.inner.drafts

    def init(self, block: int, vocab: int) -> State:
        return self.inner.init(block, vocab)

    def step(self, state: State, look: Look) -> tuple[State, Verdict]:
        early = look.at < self.least

        def shape(logits: jax.Array) -> jax.Array:
            return exclude(logits, early, self.ids)

        logits = jax.vmap(shape)(look.logits) if self.drafts else shape(look.logits)
        return self.inner.step(state, look._replace(logits=logits))
