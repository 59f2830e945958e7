"""What decoders ask of logits over the vocabulary: the likeliest tokens, how likely they are, and tokens that are struck out.

The vocabulary is what a decoder spends its time on, so each pass over it counts.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from djax.kernels import dispatch, native

# A logit that excludes a token; finite, so that a probability of 0 times its logarithm is 0 and not NaN.
NEVER = -1e30


class Peaks(NamedTuple):
    """Of each position's logits: the likeliest token besides the mask id, int32, the lowest id on ties; its logit and the mask
    id's; the sum of all exponentials, shifted by the higher of the two. All `[S]`."""

    other: jax.Array
    highest: jax.Array
    of_mask_id: jax.Array
    total: jax.Array

    def share(self, chosen: jax.Array) -> jax.Array:
        """exp(chosen logit) over the sum of all exponentials."""
        return jnp.exp(chosen - jnp.maximum(self.highest, self.of_mask_id)) / self.total


def find_peaks(logits: jax.Array, mask_id: jax.Array) -> Peaks:
    """See `Peaks`; logits float32 `[..., V]`. On a CPU a fused C++ kernel does this in one pass when available; XLA needs
    five."""
    case = dispatch.Peaks(logits.shape[-1], logits.dtype)
    return dispatch.run(case, {"C++": peaks_on_cpu, "XLA": plain_peaks}, logits, mask_id)


def plain_peaks(logits: jax.Array, mask_id: jax.Array) -> Peaks:
    other, highest, of_mask_id = find_two_best(logits, mask_id)
    top = jnp.maximum(highest, of_mask_id)
    return Peaks(other, highest, of_mask_id, jnp.sum(jnp.exp(logits - top[..., None]), axis=-1))


@jax.custom_batching.custom_vmap
def _fused_peaks(logits: jax.Array, mask_id: jax.Array) -> Peaks:
    flat = logits.reshape(-1, logits.shape[-1])
    whole, real = (jax.ShapeDtypeStruct((len(flat),), dtype) for dtype in (jnp.int32, jnp.float32))
    run = jax.ffi.ffi_call(native.target("djax_peaks", flat.dtype), (whole, real, real, real))
    return Peaks(*(a.reshape(logits.shape[:-1]) for a in run(flat, mask_id)))


@_fused_peaks.def_vmap
def _flatten_peaks(size: int, batched: list, logits: jax.Array, mask_id: jax.Array) -> tuple[Peaks, Peaks]:
    """All rows in one call of the kernel, which takes rows of logits and one mask id."""
    # In the place of each result, whether it is batched.
    each: Any = Peaks._make([True] * 4)
    if batched == [True, False]:
        return _fused_peaks(logits, mask_id), each
    mapped = jax.vmap(plain_peaks, [0 if one else None for one in batched])
    return mapped(logits, mask_id), each


@jax.custom_vjp
def peaks_on_cpu(logits: jax.Array, mask_id: jax.Array) -> Peaks:
    return _fused_peaks(logits, mask_id)


peaks_on_cpu.defvjp(
    lambda *arguments: (peaks_on_cpu(*arguments), arguments), lambda saved, d: jax.vjp(plain_peaks, *saved)[1](d)
)


def find_two_best(logits: jax.Array, mask_id: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The likeliest token besides the mask id, its logit and the mask id's."""
    is_mask_id = jnp.expand_dims(jnp.arange(logits.shape[-1]) == mask_id, range(logits.ndim - 1))
    other, highest = find_best(jnp.where(is_mask_id, -jnp.inf, logits))
    # By a reduction: of a vocabulary that is split over devices a gather would fetch it in a step of its own.
    return other, highest, jnp.max(jnp.where(is_mask_id, logits, -jnp.inf), axis=-1)


def find_best(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The token of the highest logit, int32 `[...]` for logits `[..., V]`, the lowest id on ties, and that logit.

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


def exclude(logits: jax.Array, where: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    """Logits `[S, V]` with `NEVER` at the ids in the positions `where` bool `[S]`."""

    def columns(logits: jax.Array, where: jax.Array) -> jax.Array:
        for one in ids:
            column = jnp.where(where[:, None], NEVER, logits[:, one : one + 1])
            logits = jax.lax.dynamic_update_slice(logits, column, (0, one))
        return logits

    def everywhere(logits: jax.Array, where: jax.Array) -> jax.Array:
        excluded = jnp.any(jnp.arange(logits.shape[-1])[:, None] == jnp.array(ids)[None, :], axis=-1)
        return jnp.where(where[:, None] & excluded[None, :], NEVER, logits)

    @jax.custom_batching.custom_vmap
    def run(logits: jax.Array, where: jax.Array) -> jax.Array:
        forms = {"columns": columns, "everywhere": everywhere}
        return dispatch.run(dispatch.Exclude(logits.dtype), forms, logits, where)

    @run.def_vmap
    def flatten(size: int, batched: list, logits: jax.Array, where: jax.Array) -> tuple[jax.Array, bool]:
        """All rows as one: mapped, an update of columns would become a scatter."""
        logits, where = (
            a if mapped else jnp.broadcast_to(a, (size, *a.shape)) for a, mapped in zip((logits, where), batched, strict=True)
        )
        return run(logits.reshape(-1, logits.shape[-1]), where.reshape(-1)).reshape(logits.shape), True

    return run(logits, where)
