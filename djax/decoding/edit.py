"""Replace tokens that were accepted and that the model no longer stands by."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from djax.checks import integer, number
from djax.decoding.contract import Decoder, Tick, best_and_probability, check_inner, draws
from djax.decoding.threshold import Threshold
from djax.pytree import pytree


@pytree
@dataclasses.dataclass(frozen=True)
class Edit:
    """Let `inner` accept, and replace each accepted token of the block where another is likeliest, with p > tau (LLaDA2.1,
    arXiv 2602.08676).

    p is the probability under the forward's own logits, without noise and without inner's credit. A block without masks
    takes further forwards until one changes nothing, `post_steps` at most (static, up to 1024: it sets the trace's
    length). tau above 0.

    Law: with a tau of 1 or more and no post-steps this is `inner`, forward for forward. With post-steps a last look costs
    one forward a block, and the tokens are inner's where nothing counts forwards: no smoothing, no warm-up, no `every`.
    """

    inner: Decoder = dataclasses.field(default_factory=lambda: Threshold(0.95))
    tau: float = 0.9
    post_steps: int = dataclasses.field(default=16, metadata={"static": True})
    edits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_inner(self)
        number(self, "tau", above=0.0)
        integer(self, "post_steps", at_least=0, at_most=1024)

    @property
    def draws(self) -> bool:
        return draws(self.inner)

    def init(self, rows: int, block: int, vocab: int) -> Any:
        return self.inner.init(rows, block, vocab)

    def step(
        self, state: Any, logits: jax.Array, masked: jax.Array, tick: Tick, key: jax.Array | None
    ) -> tuple[Any, jax.Array, jax.Array]:
        return self.inner.step(state, logits, masked, tick, key)

    def edit(self, logits: jax.Array, tokens: jax.Array, editable: jax.Array, tick: Tick) -> tuple[jax.Array, jax.Array]:
        """The likeliest token of each position. Where that is the mask id, or where the logits are not finite, what stands
        there stays. Like every comparing decoder it does not go below smoothing's ramp."""
        likeliest, p = best_and_probability(logits)
        surer = p > jnp.maximum(self.tau, tick.least[:, None])
        return likeliest, editable & surer & (likeliest != tokens) & (likeliest != tick.mask_id)
