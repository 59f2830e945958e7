"""What a model learns from trajectories: trajectory compression, certainty forcing, and plain masked diffusion beside them.

An objective is a frozen dataclass, a pytree, with
- `views(key, row, progress, mask_id) -> tuple[View, ...]`: how a trajectory is shown to the network, always the same number of
  times; its noise comes from the row's key and nothing else;
- `loss(logits, tokens, view) -> (loss, parts)`: of one view, float32 logits `[L, V]`, tokens the view's labels; `parts` are
  scalars to log.
A batch's loss is the mean over its rows of the sum over views, so parts of a batch add up to it whatever their number. What
needs parameters of its own, a second network or batches that the model makes is an `Objective` of `training.contract`.
"""

import dataclasses
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp

from djax.checks import number, plug
from djax.distill.pairs import Uniform
from djax.kernels.sight import Sight
from djax.pytree import pytree
from djax.training.objective import A, hide, sum_surprise, surprise


class Row(NamedTuple, Generic[A]):
    """One trajectory on a canvas of L positions, padding at its end.

    tokens int32 `[L]`, finished; accepted_at int32 `[L]`, -1 where nothing was; prompt, total: where the prompt and the canvas
    end; start, block: where the first block starts, and the length of each; forwards: F. Scalars int32.
    """

    tokens: A
    accepted_at: A
    prompt: A
    total: A
    start: A
    block: A
    forwards: A

    def response(self) -> jax.Array:
        """Bool `[L]`: the positions that were generated."""
        at = jnp.arange(self.tokens.shape[0])
        return (at >= self.prompt) & (at < self.total)

    def blocks(self) -> jax.Array:
        """int32 `[L]`: the block each position is in; negative before the first."""
        return (jnp.arange(self.tokens.shape[0]) - self.start) // self.block


class View(NamedTuple):
    """How a trajectory is shown to the network.

    tokens:    int32 `[L]`, what it reads.
    target:    bool `[L]`, at which positions its predictions count.
    weight:    float32 scalar, of the loss.
    labels:    int32 `[L]`, what it shall predict; None: the trajectory's tokens.
    sight:     what each position sees, fields `[L]` (`models.sight`); None: what the family's see.
    positions: int32 `[L]`, for rotary; None: 0 to L - 1.
    A view may be longer than its trajectory if it has labels and a sight of its own.
    """

    tokens: jax.Array
    target: jax.Array
    weight: jax.Array
    labels: jax.Array | None = None
    sight: Sight | None = None
    positions: jax.Array | None = None


def entropy(logits: jax.Array) -> jax.Array:
    """Of the softmax of each position, in nats, `[L]`."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


@pytree
@dataclasses.dataclass(frozen=True)
class Compression:
    """Trajectory compression (dInfer, arXiv 2510.08666, appendix C.1): several steps of the teacher in one jump.

    Of two states of a trajectory the earlier one is shown, and the tokens revealed between them are to be predicted: the sum of
    their -log p, over the trajectory's block length, so that of its pairs one counts as much as it reveals, as in the paper.
    Positions outside get exactly zero gradient. pairs: which states (`pairs.py`).

    beta above 0 also forces certainty there, as dParallel does on masks drawn at random: beta times the entropy of
    softmax(logits / temperature) on those positions whose likeliest token is right.
    """

    pairs: Any = Uniform()  # noqa: RUF009  (frozen, so one default is one value)
    beta: float = 0.0
    temperature: float = 0.5

    def __post_init__(self) -> None:
        number(self, "beta", at_least=0)
        number(self, "temperature", above=0)
        plug(self.pairs, "Compression(pairs=...)", ("draw",), "Uniform(...), Stride(...), Curriculum(...)")

    def views(self, key: jax.Array, row: Row[jax.Array], progress: jax.Array, mask_id: int) -> tuple[View, ...]:
        accepted = row.accepted_at
        # For each forward the last state of its block: one past the last forward that wrote there.
        block = row.blocks()
        length = accepted.shape[0]
        written = jnp.where(accepted >= 0, accepted, 4 * length)
        last = jax.ops.segment_max(jnp.where(accepted >= 0, accepted + 1, 0), jnp.maximum(block, 0), num_segments=length)
        most = 4 * length  # forwards: a decoder that edits may take more than there are positions
        ends = jnp.zeros(most, jnp.int32).at[written].max(last[jnp.maximum(block, 0)], mode="drop")
        # A forward that accepted nothing (a decoder that edits) belongs to the block of the next that did.
        ends = jnp.where(ends > 0, ends, most)
        ends = jax.lax.cummin(ends, reverse=True)
        i, j = self.pairs.draw(key, row.forwards, ends, progress)
        shown = ~row.response() | ((accepted >= 0) & (accepted < i))
        between = (accepted >= i) & (accepted < j)
        return (View(jnp.where(shown, row.tokens, mask_id), between, 1 / row.block),)

    def loss(self, logits: jax.Array, tokens: jax.Array, view: View) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss = sum_surprise(logits, tokens, view.target) * view.weight
        parts = {"compression": loss, "revealed": jnp.sum(view.target).astype(jnp.float32)}
        right = view.target & (jnp.argmax(logits, axis=-1) == tokens)
        unsure = jnp.sum(jnp.where(right, entropy(logits / self.temperature), 0.0)) * view.weight
        return loss + self.beta * unsure, parts | {
            "revealed entropy": unsure,
            "revealed right": _mean(right.astype(jnp.float32), view.target),
        }


@pytree
@dataclasses.dataclass(frozen=True)
class Certainty:
    """Certainty forcing (dParallel, arXiv 2509.26488): cross entropy, and beta times the entropy where the model is right.

    One block of the answer is drawn. Before it all is shown, after it all is masked, in it each token is masked with chance
    `masked`; a second view masks the rest of the block instead. Each gives the mean -log p of its masked tokens A, plus
    beta * the mean entropy of softmax(logits / temperature) over the positions of A whose likeliest token is right, 0 if none
    is: what is right is sharpened, what is wrong is not made surer. Positions outside A get exactly zero gradient.
    """

    beta: float = 2.0
    temperature: float = 0.5
    masked: float = 0.5

    def __post_init__(self) -> None:
        number(self, "beta", at_least=0)
        number(self, "temperature", above=0)
        number(self, "masked", above=0, at_most=1)

    def views(self, key: jax.Array, row: Row[jax.Array], progress: jax.Array, mask_id: int) -> tuple[View, ...]:
        which, where = jax.random.split(key)
        block, accepted = row.blocks(), row.accepted_at >= 0
        # Only blocks that were decoded: what an early stop filled in teaches no decode anything.
        first = jnp.min(jnp.where(accepted, block, block.shape[0]))
        last = jnp.max(jnp.where(accepted, block, -1))
        active = row.response() & (block == jax.random.randint(which, (), first, jnp.maximum(last, first) + 1))
        shown = ~row.response() | (row.response() & (block < jnp.min(jnp.where(active, block, block.shape[0]))))
        hidden = jax.random.uniform(where, block.shape) < self.masked
        targets = active & hidden, active & ~hidden
        return tuple(
            View(jnp.where(shown | (active & ~target), row.tokens, mask_id), target, jnp.float32(1)) for target in targets
        )

    def loss(self, logits: jax.Array, tokens: jax.Array, view: View) -> tuple[jax.Array, dict[str, jax.Array]]:
        right = view.target & (jnp.argmax(logits, axis=-1) == tokens)
        cross_entropy = _mean(surprise(logits, tokens), view.target)
        unsure = _mean(entropy(logits / self.temperature), right)
        parts = {"cross entropy": cross_entropy, "entropy": unsure, "right": _mean(right.astype(jnp.float32), view.target)}
        return cross_entropy + self.beta * unsure, parts


@pytree
@dataclasses.dataclass(frozen=True)
class Plain:
    """Masked diffusion on the kept answers (LLaDA, arXiv 2502.09992, section 2.2): the control, which knows no trajectory.

    Each token of the answer is masked with probability t, uniform on (0, 1]: -log p of the masked tokens over t and the
    number of the answer's tokens.
    """

    least: float = 1e-3

    def __post_init__(self) -> None:
        number(self, "least", above=0, at_most=1)

    def views(self, key: jax.Array, row: Row[jax.Array], progress: jax.Array, mask_id: int) -> tuple[View, ...]:
        level, where = jax.random.split(key)
        t = 1 - (1 - self.least) * jax.random.uniform(level)
        noisy, target = hide(where, row.tokens, row.response(), t, mask_id)
        weight = 1 / (t * jnp.maximum(jnp.sum(row.response()), 1))
        return (View(noisy, target, weight),)

    def loss(self, logits: jax.Array, tokens: jax.Array, view: View) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss = sum_surprise(logits, tokens, view.target) * view.weight
        return loss, {"diffusion": loss}


def _mean(x: jax.Array, where: jax.Array) -> jax.Array:
    """Over the positions, 0 where there is none."""
    return jnp.sum(jnp.where(where, x, 0.0)) / jnp.maximum(jnp.sum(where), 1)


OBJECTIVES: dict[str, type] = {"compression": Compression, "certainty": Certainty, "plain": Plain}
