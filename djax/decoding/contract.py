"""The contract every decoder keeps, and the candidate rule they share.

A decoder is a frozen dataclass, a `djax.pytree`. Its numbers are leaves (a sweep over them compiles once); what
sets a shape is a static field. It has two pure methods:

    init(rows, block, vocab) -> state                        any pytree, every leaf with leading axis `rows`
    step(state, logits, masked, tick, key) -> state, tokens, accept

with logits float32 `[B, S, V]`, masked bool `[B, S]` (what may be decided), `tick` where decoding stands, key a random
key a row `[B]` or None at temperature 0; tokens int32 `[B, S]` and accept bool `[B, S]`. A decoder that draws even at
temperature 0 says so with a static attribute `draws = True`, and then always gets a key.

A decoder that also replaces tokens it accepted says so with a static attribute `edits = True`. It has a static int
`post_steps` and a third pure method, called after `step` at every forward:

    edit(logits, tokens, editable, tick) -> tokens, replace

with tokens int32 `[B, S]`, those of the block before this forward, and editable bool `[B, S]`: generated and not masked
then; the returned tokens int32 `[B, S]` and replace bool `[B, S]` are what to write, and where. Its block without masks is
finished once a forward changes nothing, or once `post_steps` forwards began without a mask; after them nothing is editable.

The law of every decoder, tested from the registry: accept lies inside masked; every row with a mask accepts at least
one token; the mask id is never accepted; rows do not look at each other; state keeps structure, shape and dtype.
Of one that edits: replace lies inside editable, what it writes differs from what stands there and is not the mask id.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from djax import native
from djax.checks import MOST_NESTED, plug, reading, show
from djax.errors import OptionError
from djax.sharding import split


class Tick(NamedTuple):
    """What a decoder and a cache policy are told about where decoding stands: one value a row, the last two scalars.

    iteration: turns of the loop this row took since its start. A turn that refreshes the cache runs two forwards.
    forward:   network forwards of this row since its start.
    block:     index of the row's current block, from 0.
    call:      decode calls in the current block, from 0: a decoder's memory of a block starts anew at 0.
    least:     float32, a threshold that comparing decoders do not go below (smoothing's ramp); -inf without smoothing.
    mask_id, temperature: as given.
    """

    iteration: jax.Array
    forward: jax.Array
    block: jax.Array
    call: jax.Array
    least: jax.Array
    mask_id: jax.Array
    temperature: jax.Array


class Decoder(Protocol):
    def init(self, rows: int, block: int, vocab: int) -> Any: ...

    def step(
        self, state: Any, logits: jax.Array, masked: jax.Array, tick: Tick, key: jax.Array | None
    ) -> tuple[Any, jax.Array, jax.Array]: ...


def draws(decoder: Decoder) -> bool:
    """Whether the decoder needs a key at every temperature."""
    with reading("decoder: its attribute draws"):
        return bool(getattr(decoder, "draws", False))


def edits(decoder: Decoder) -> bool:
    """Whether the decoder replaces tokens that it accepted."""
    with reading("decoder: its attribute edits"):
        return bool(getattr(decoder, "edits", False))


def post_steps(decoder: Decoder) -> int:
    """How many forwards, at most, a block takes after its last mask went: 0 for a decoder that does not edit."""
    return decoder.post_steps if edits(decoder) else 0


def check_inner(decoder: Any) -> None:
    """Check, in its `__post_init__`, the decoder that a decoder holds: it must not edit, since only the outermost is asked."""
    name = f"{type(decoder).__name__}(inner=...)"
    plug(decoder.inner, name, ("init", "step"), "the decoders of djax, such as djax.Threshold(0.9)")
    if edits(decoder.inner):
        raise OptionError(
            f"{name}: expected a decoder that does not edit, such as djax.Threshold(0.9); got {show(decoder.inner)}"
        )
    with reading(name):
        depth, inner = 0, decoder.inner
        while dataclasses.is_dataclass(inner) and hasattr(inner, "inner"):
            depth, inner = depth + 1, inner.inner
            if depth == MOST_NESTED:
                raise OptionError(f"{name}: expected at most {MOST_NESTED} decoders inside one another, got more")


def candidates(
    logits: jax.Array, masked: jax.Array, tick: Tick, key: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The token each position proposes, int32 `[B, S]`; its confidence, float32; and whether it is a candidate, bool.

    The token is the argmax of the logits, with Gumbel noise scaled by the temperature if there is a key; the confidence
    is its probability under the logits without noise (LLaDA, arXiv 2502.09992; dInfer). A masked position that proposes
    the mask id is no candidate. If a row has masks but no candidate, the mask id is struck from its logits, so that the
    row still goes on; dInfer loops forever there. Ties go to the lower token id. Where the logits are not finite nothing
    is a candidate: such a model ends at the cap on turns with an error, not with an answer.
    """
    if key is None:
        found = peaks(logits, tick.mask_id)
        other, highest, of_mask_id, _ = found
    else:
        noise = jax.vmap(lambda k: jax.random.gumbel(k, logits.shape[1:], logits.dtype, mode="low"))(key)
        other, highest, of_mask_id = _two_best(logits + tick.temperature * noise, tick.mask_id)
    is_mask = (of_mask_id > highest) | ((of_mask_id == highest) & (tick.mask_id < other))
    candidate = masked & ~is_mask
    stuck = ~jnp.any(candidate, axis=-1, keepdims=True)
    takes_mask = is_mask & ~stuck
    tokens = jnp.where(takes_mask, tick.mask_id, other)
    if key is None:
        # The chosen token's logit is at hand.
        confidence = found.share(jnp.where(takes_mask, of_mask_id, highest))
    else:
        confidence = probability(logits, tokens, tick.mask_id)
    return tokens, confidence, (candidate | (masked & stuck)) & ~jnp.isnan(confidence)


class Peaks(NamedTuple):
    """Of each position's logits: the likeliest token beside the mask id, int32, the lowest id on ties; its logit and the mask
    id's; the sum of all exponentials, shifted by the higher of the two. All `[B, S]`."""

    other: jax.Array
    highest: jax.Array
    of_mask_id: jax.Array
    total: jax.Array

    def share(self, chosen: jax.Array) -> jax.Array:
        """exp(chosen logit) of the sum of all exponentials."""
        return jnp.exp(chosen - jnp.maximum(self.highest, self.of_mask_id)) / self.total


def peaks(logits: jax.Array, mask_id: jax.Array) -> Peaks:
    """See `Peaks`. On a CPU one C++ function visits the vocabulary, where it can be had; XLA makes five passes over it."""
    vocab = logits.shape[-1]
    if vocab % 16 or logits.dtype != jnp.float32 or split() or native.why_not(logits.dtype) is not None:
        return _plain_peaks(logits, mask_id)
    return jax.lax.platform_dependent(logits, mask_id, cpu=_peaks_on_cpu, default=_plain_peaks)


def _plain_peaks(logits: jax.Array, mask_id: jax.Array) -> Peaks:
    other, highest, of_mask_id = _two_best(logits, mask_id)
    top = jnp.maximum(highest, of_mask_id)
    return Peaks(other, highest, of_mask_id, jnp.sum(jnp.exp(logits - top[..., None]), axis=-1))


@jax.custom_vjp
def _peaks_on_cpu(logits: jax.Array, mask_id: jax.Array) -> Peaks:
    flat = logits.reshape(-1, logits.shape[-1])
    whole, real = (jax.ShapeDtypeStruct((len(flat),), dtype) for dtype in (jnp.int32, jnp.float32))
    run = jax.ffi.ffi_call(native.target("djax_peaks", flat.dtype), (whole, real, real, real), vmap_method="sequential")
    return Peaks(*(a.reshape(logits.shape[:-1]) for a in run(flat, mask_id)))


_peaks_on_cpu.defvjp(
    lambda *arguments: (_peaks_on_cpu(*arguments), arguments), lambda saved, d: jax.vjp(_plain_peaks, *saved)[1](d)
)


def _two_best(logits: jax.Array, mask_id: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The likeliest token beside the mask id, its logit and the mask id's."""
    is_mask_id = (jnp.arange(logits.shape[-1]) == mask_id)[None, None, :]
    other, highest = best(jnp.where(is_mask_id, -jnp.inf, logits))
    # By a reduction: of a vocabulary that is split over devices a gather would fetch it in a step of its own.
    return other, highest, jnp.max(jnp.where(is_mask_id, logits, -jnp.inf), axis=-1)


def best(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The token of the highest logit, int32 `[B, S]`, the lowest id on ties, and that logit.

    Two plain reductions: XLA's own argmax carries value and index together, which no CPU vectorises (five times as slow
    at a vocabulary of 32,000). Ids are exact in float32 below 2**23. Where a logit is NaN the token is the last id.
    """
    vocab = logits.shape[-1]
    ids = jnp.arange(vocab, dtype=jnp.float32)
    highest = jnp.max(logits, axis=-1)
    # XLA may compute the logits anew for the second reduction, and round a product and a sum once where it rounded twice
    # before. So if none equals the highest, the first that nearly does is meant.
    nearly = (highest - 1e-5 * (1 + jnp.abs(highest)))[..., None]
    at = jnp.where(logits == highest[..., None], ids, jnp.where(logits >= nearly, vocab + ids, float(2 * vocab - 1)))
    return jnp.min(at, axis=-1).astype(jnp.int32) % vocab, highest


def best_and_probability(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The token of the highest logit, as `best` has it, and its probability."""
    tokens, highest = best(logits)
    return tokens, _share(highest, logits, highest)


def probability(logits: jax.Array, tokens: jax.Array, mask_id: jax.Array) -> jax.Array:
    """softmax(logits)[tokens], float32 `[B, S]`.

    By the `peaks` that `candidates` asks for: beside a decoder that does, XLA then sums the exponentials once.
    """
    return peaks(logits, mask_id).share(jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0])


def _share(chosen: jax.Array, logits: jax.Array, top: jax.Array) -> jax.Array:
    """exp(chosen) of the sum of exp(logits), all shifted by the maximum first: at logits of a hundred, subtracting a
    log-sum-exp would cost more than the 1e-5 by which decoders tell confidences apart."""
    return jnp.exp(chosen - top) / jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)


def by_confidence(confidence: jax.Array, candidate: jax.Array) -> jax.Array:
    """Each position's rank among its row's candidates, 0 the surest, ties to the lower position; the others come last."""
    order = jnp.argsort(jnp.where(candidate, -confidence, jnp.inf), axis=-1, stable=True)
    return jnp.argsort(order, axis=-1)


def first_best(confidence: jax.Array) -> jax.Array:
    """Bool `[B, S]`: each row's highest value, the first if there are several."""
    return jnp.arange(confidence.shape[1])[None, :] == jnp.argmax(confidence, axis=-1, keepdims=True)
