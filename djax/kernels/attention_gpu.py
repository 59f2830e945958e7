"""Attention as one Pallas kernel, for GPUs.

Nothing of size window x canvas is in memory.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from djax.kernels.plain import HIDDEN, Attended, Pair, flat
from djax.kernels.sight import HIDDEN_RANK, Sight

# Rows of a tile. Tensor cores take no fewer than 16; more would leave a GPU that has two heads of a window with nothing to do.
QUERIES, CACHED, FRESH = 16, 64, 32


def call(
    qkv: jax.Array,
    norms: Pair | None,
    angles: Pair,
    sight: Sight,
    cached: Pair | None,
    cached_rank: jax.Array | None,
    *,
    eps: float,
    interpret: bool = False,
) -> Attended:
    """The kernel on one device; arguments and results as `attention.plain` has them.

    interpret: run its operations one by one, on any platform, for tests.
    """
    # Half a second to import, for the programs of a GPU alone.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    batch, window, groups, slots, head_dim = qkv.shape
    heads = groups * (slots - 2)
    inputs = {"qkv": qkv} | {name: a for name, a in sight._asdict().items() if a is not None}
    inputs |= dict(zip(("cos", "sin"), angles, strict=True))
    if norms is not None:
        inputs |= dict(zip(("q_norm", "k_norm"), norms, strict=True))
    if cached is not None:
        layers = (a.reshape(batch, groups, -1, head_dim) for a in cached)
        inputs |= dict(zip(("cached_k", "cached_v"), layers, strict=True)) | {"cached_rank": cached_rank}
    fresh = jax.ShapeDtypeStruct((batch, groups, window, head_dim), qkv.dtype)

    def kernel(*refs: jax.Ref) -> None:
        _kernel(*refs[-3:], **dict(zip(inputs, refs, strict=False)), eps=eps)

    out, k, v = pl.pallas_call(
        kernel,
        grid=(batch, heads, pl.cdiv(window, QUERIES)),
        out_shape=(jax.ShapeDtypeStruct((batch, window, heads, head_dim), qkv.dtype), fresh, fresh),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attention",
    )(*inputs.values())
    return out, flat(k), flat(v)


def _kernel(
    out: jax.Ref,
    k_out: jax.Ref,
    v_out: jax.Ref,
    *,
    qkv: jax.Ref,
    rank: jax.Ref,
    cos: jax.Ref,
    sin: jax.Ref,
    q_norm: jax.Ref | None = None,
    k_norm: jax.Ref | None = None,
    cached_k: jax.Ref | None = None,
    cached_v: jax.Ref | None = None,
    cached_rank: jax.Ref | None = None,
    context: jax.Ref | None = None,
    copy: jax.Ref | None = None,
    own: jax.Ref | None = None,
    eps: float,
) -> None:
    """One head's queries of one tile against all keys, with a running maximum and sum (online softmax, arXiv 1805.02867).

    Heads are held in halves: what rotary mixes is the one half with the other, and a score is the sum over both.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    _, window, _, slots, head_dim = qkv.shape
    half, dtype = head_dim // 2, qkv.dtype
    b, h, t = (pl.program_id(n) for n in range(3))
    group, slot = h // (slots - 2), h % (slots - 2)
    low, high = pl.ds(0, half), pl.ds(half, half)
    product = partial(jnp.dot, preferred_element_type=jnp.float32, precision="highest" if dtype == jnp.float32 else None)

    def tile(n: Any, size: int, length: int) -> tuple[Any, jax.Array, Any]:
        """The n-th `size` rows of `length`: as an index, which of them there are, and how to read them."""
        there = n * size + jnp.arange(size) < length
        return pl.ds(n * size, size), there, partial(plgpu.load, mask=there[:, None], other=0)

    def rotated(at: Any, rows: Any, slot: Any, norm: jax.Ref | None) -> tuple[jax.Array, jax.Array]:
        """Rows of a slot as `rotate(rms_norm(...))` gives them, in halves; rounded where those round."""
        one, two = (rows(qkv.at[b, at, group, slot, part]) for part in (low, high))
        if norm is not None:
            one, two = one.astype(jnp.float32), two.astype(jnp.float32)
            scale = jax.lax.rsqrt((jnp.sum(one * one, axis=1) + jnp.sum(two * two, axis=1)) / head_dim + eps)[:, None]
            one, two = ((x * scale).astype(dtype) * norm[part][None, :] for x, part in ((one, low), (two, high)))
        c, s = rows(cos.at[b, at, :]), rows(sin.at[b, at, :])
        return (one * c - two * s).astype(dtype), (two * c + one * s).astype(dtype)

    mine, there, rows = tile(t, QUERIES, window)
    q_low, q_high = rotated(mine, rows, slot, q_norm)

    def of_queries(numbers: jax.Ref | None, default: int) -> Any:
        """A vector of `Sight` at this tile's queries."""
        return default if numbers is None else plgpu.load(numbers.at[b, mine], mask=there, other=0)[:, None]

    limit, own_limit, own_copy = of_queries(context, HIDDEN_RANK), of_queries(own, HIDDEN_RANK), of_queries(copy, 0)

    def take(carry: tuple, k_low: jax.Array, k_high: jax.Array, v: jax.Array, seen: jax.Array) -> tuple:
        top, total, sums = carry
        scores = (product(q_low, k_low.T) + product(q_high, k_high.T)) * head_dim**-0.5
        scores = jnp.where(seen, scores, HIDDEN)
        higher = jnp.maximum(top, jnp.max(scores, axis=1))
        weights, shrink = jnp.exp(scores - higher[:, None]), jnp.exp(top - higher)
        sums = sums * shrink[:, None] + product(weights.astype(dtype), v)
        return higher, total * shrink + jnp.sum(weights, axis=1), sums

    def from_cache(n: jax.Array, carry: tuple) -> tuple:
        assert cached_k is not None and cached_v is not None and cached_rank is not None, "all or none"
        at, there, rows = tile(n, CACHED, cached_rank.shape[1])
        k_low, k_high = (rows(cached_k.at[b, group, at, part]) for part in (low, high))
        ranks = plgpu.load(cached_rank.at[b, at], mask=there, other=HIDDEN_RANK)[None, :]
        return take(carry, k_low, k_high, rows(cached_v.at[b, group, at, :]), ranks < limit)

    def from_window(n: jax.Array, carry: tuple) -> tuple:
        at, there, rows = tile(n, FRESH, window)
        k_low, k_high = rotated(at, rows, jnp.int32(slots - 2), k_norm)
        v = rows(qkv.at[b, at, group, jnp.int32(slots - 1), :])

        @pl.when((t == 0) & (slot == 0))
        def _() -> None:
            store = partial(plgpu.store, mask=there[:, None])
            store(k_out.at[b, group, at, low], k_low)
            store(k_out.at[b, group, at, high], k_high)
            store(v_out.at[b, group, at, :], v)

        ranks = plgpu.load(rank.at[b, at], mask=there, other=HIDDEN_RANK)[None, :]
        seen = ranks < limit
        if copy is not None:
            copies = plgpu.load(copy.at[b, at], mask=there, other=0)[None, :]
            seen = (seen & (copies == 0)) | ((ranks < own_limit) & (copies == own_copy))
        return take(carry, k_low, k_high, v, seen)

    start = jnp.full(QUERIES, HIDDEN), jnp.zeros(QUERIES), jnp.zeros((QUERIES, head_dim))
    carry = start if cached_rank is None else jax.lax.fori_loop(0, pl.cdiv(cached_rank.shape[1], CACHED), from_cache, start)
    _, total, sums = jax.lax.fori_loop(0, pl.cdiv(window, FRESH), from_window, carry)
    plgpu.store(out.at[b, mine, h, :], (sums / total[:, None]).astype(dtype), mask=there[:, None])
