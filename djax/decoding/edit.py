"""Replace tokens that were accepted and that the model no longer stands by."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from djax.checks import integer, number
from djax.decoding.contract import MOST_POST_STEPS, Decoder, Look, Verdict, best_and_probability, check_inner, probability
from djax.decoding.threshold import Threshold
from djax.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Edit(Decoder[tuple[jax.Array, Any]]):
    """Let `inner` accept, and replace each accepted token of the block where another is likeliest, with p > tau (LLaDA2.1,
    arXiv 2602.08676).

    p is the probability under the forward's own logits, without noise and without inner's credit. A block without masks
    takes further forwards until one changes nothing, `post_steps` at most (static, up to 1024: it sets the trace's
    length). tau above 0.

    Law: with a tau of 1 or more and no post-steps this is `inner`, forward for forward. With post-steps a last look costs
    one forward a block, and the tokens are inner's where nothing counts forwards: no smoothing, no warm-up, no `every`.
    """

    inner: Decoder[Any] = dataclasses.field(default_factory=lambda: Threshold(0.95))
    tau: float = 0.9
    post_steps: int = dataclasses.field(default=16, metadata={"static": True})
    edits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_inner(self)
        number(self, "tau", above=0.0)
        integer(self, "post_steps", at_least=0, at_most=MOST_POST_STEPS)

    @property
    def draws(self) -> bool:
        return self.inner.draws

    def init(self, block: int, vocab: int) -> tuple[jax.Array, Any]:
        """How many forwards of the block began without a mask, and inner's state."""
        return jnp.int32(0), self.inner.init(block, vocab)

    def step(self, state: tuple[jax.Array, Any], look: Look) -> tuple[tuple[jax.Array, Any], Verdict]:
        """The likeliest token of each position replaces what stands there. Where that is the mask id, or where the logits are
        not finite, nothing changes. Like every comparing decoder it does not go below smoothing's ramp."""
        post, inner_state = state
        post = jnp.where(look.tick.call == 0, 0, post)
        inner_state, verdict = self.inner.step(inner_state, look)
        likeliest, p = best_and_probability(look.logits)
        editable = look.open & (look.tokens != look.mask_id) & (post < self.post_steps)
        surer = p > jnp.maximum(self.tau, look.floor)
        replace = editable & surer & (likeliest != look.tokens) & (likeliest != look.mask_id)
        now = jnp.where(replace, likeliest, verdict.tokens)
        post = post + ~jnp.any(look.masked)
        settled = jnp.all(now == look.tokens) | (post >= self.post_steps)
        return (post, inner_state), verdict._replace(
            tokens=now,
            proposals=jnp.where(editable, likeliest, verdict.proposals),
            confidence=probability(look.logits, now, look.mask_id),
            done=verdict.done & settled,
        )
