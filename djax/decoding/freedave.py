"""Draft several steps from one prediction, verify them in one forward."""

import dataclasses

import jax
import jax.numpy as jnp

from djax.checks import integer, plug, reading, show
from djax.decoding.contract import MOST_DRAFTS, Decoder, Look, Verdict, by_confidence, candidates, probability
from djax.decoding.fixed import Fixed
from djax.decoding.threshold import Threshold
from djax.errors import OptionError
from djax.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class FreeDave(Decoder[tuple[()]]):
    """Decode as `inner` does, verifying up to `drafts` of its next states in each forward (arXiv 2510.00294).

    A state and the prediction on it give what `inner` writes next, D_1, which is certain, and
    guesses D_2, D_3, ...: D_1 and the next most confident tokens (or leftmost, as inner's order
    says). One forward reads them all. Each gets a prediction of its own, so what `inner` makes of
    D_k is known: where that agrees with a later draft, the draft is accepted, and verification goes
    on from there; what follows the last accepted one is certain again. A block's last mask needs
    no forward.

    inner:  `Fixed(1)` or `Fixed(1, order="left")`: the tokens are its own under every cache, in no
            more forwards (with equal rounding; where a refresh depends on a count, the forwards
            that `inner` would have taken are counted, and no draft passes it). `Threshold(...)`:
            FreeDave++, whose tokens may differ from inner's: not lossless.
    drafts: static, D, at least 1; with 1 this is `inner`, forward for forward. A forward costs as
            many positions as its drafts.
    """

    inner: Fixed | Threshold = dataclasses.field(default_factory=lambda: Fixed(1))
    drafts: int = dataclasses.field(default=4, metadata={"static": True})

    def __post_init__(self) -> None:
        integer(self, "drafts", at_least=1, at_most=MOST_DRAFTS)
        legal = "djax.Fixed(1), djax.Fixed(1, order='left') or djax.Threshold(...)"
        plug(self.inner, "FreeDave(inner=...)", Decoder, legal)
        with reading("FreeDave(inner=...)"):
            fixed = type(self.inner) is Fixed and self.inner.steps is None and self.inner.order != "random"
            # Read where it is a number: jax may have put anything else there, and checked it before.
            per_step = getattr(self.inner, "per_step", None)
            if isinstance(per_step, int):
                fixed = fixed and per_step == 1
        if not fixed and type(self.inner) is not Threshold:
            raise OptionError(f"FreeDave(inner=...): expected {legal}; got {show(self.inner)}")

    def step(self, state: tuple[()], look: Look) -> tuple[tuple[()], Verdict]:
        read = look.drafts
        assert read is not None, "of a decoder with drafts"

        def predict(tokens: jax.Array, logits: jax.Array) -> tuple[jax.Array, ...]:
            """What `inner` makes of a draft, and the prediction on it."""
            seen = look._replace(tokens=tokens, logits=logits, drafts=None, read=None)
            return self.inner.step((), seen)[1].tokens, *candidates(seen)

        targets, tokens, confidence, candidate = jax.vmap(predict)(read, look.logits)
        accepted, jumps = self._accept(look, targets)
        now, tokens, confidence, candidate = (a[accepted] for a in (targets, tokens, confidence, candidate))
        masks = jnp.sum(look.open & (read[accepted] == look.mask_id), dtype=jnp.int32)
        still = candidate & (now == look.mask_id)
        if self.inner.order == "left":
            confidence = -look.at.astype(jnp.float32)
        rank = by_confidence(confidence, still)
        guessed = jnp.arange(self.drafts)[:, None] > rank[None, :]
        # `Fixed(1)` writes a token a forward. After a draft without masks nothing follows.
        written = jnp.sum(now != look.tokens, dtype=jnp.int32)
        steps = written if type(self.inner) is Fixed else jnp.minimum(jumps + (masks > 0), written)
        verdict = Verdict(
            tokens=now,
            proposals=tokens,
            confidence=probability(look.logits[accepted], now, look.mask_id),
            done=~jnp.any(look.open & (now == look.mask_id)),
            stop=jnp.bool_(False),
            drafts=jnp.where(guessed & still[None, :], tokens[None, :], now[None, :]),
            drafted=jnp.minimum(self.drafts, masks),
            kept=accepted,
            steps=jnp.maximum(steps, 1),
        )
        return state, verdict

    def _accept(self, look: Look, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The draft that is accepted, int32: from the first one on, the last that agrees with what follows the one before; and
        over how many of them that went."""
        drafts, read = look.drafts, look.read
        assert drafts is not None and read is not None, "of a decoder with drafts"
        undecided = drafts == look.mask_id
        agrees = undecided[None, :, :] | (drafts[None, :, :] == targets[:, None, :])
        agrees = jnp.all(agrees | ~look.open[None, None, :], axis=-1) & (jnp.arange(self.drafts) < read)[None, :]
        furthest = jnp.max(jnp.where(agrees, jnp.arange(self.drafts, dtype=jnp.int32)[None, :], 0), axis=1)

        def go_on(_: jax.Array, reached: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            at, jumps = reached
            return jnp.maximum(at, furthest[at]), jumps + (furthest[at] > at)

        return jax.lax.fori_loop(0, self.drafts, go_on, (jnp.int32(0), jnp.int32(0)))
