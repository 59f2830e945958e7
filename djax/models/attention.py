"""Attention of a window over cached and fresh keys: heads normalised, rotated and attended, in three forms behind one function.

The plain form is XLA's own operations. On a CUDA GPU one Pallas kernel does the same from the projection's output on, and
nothing of size window x canvas is in memory; on a CPU one C++ function.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from djax.models import attention_cpu
from djax.models.layers import HIDDEN, attend, flat, rms_norm, rotate
from djax.models.sight import HIDDEN_RANK, Sight
from djax.native import kernels_wanted
from djax.sharding import split

Pair = tuple[jax.Array, jax.Array]
# Rows of a tile. Tensor cores take no fewer than 16; more would leave a GPU that has two heads of a window with nothing to do.
QUERIES, CACHED, FRESH = 16, 64, 32


def attention(
    qkv: jax.Array,
    norms: Pair | None,
    angles: Pair,
    sight: Sight,
    cached: Pair | None,
    cached_rank: jax.Array | None,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalise and rotate queries and keys, then attend.

    qkv `[B, W, G, H / G + 2, K]`: a group's queries, its key, its value. norms: weights `[K]` of the queries' and the
    keys' normalisation, None where a family has none. angles: cos and sin `[B, W, K / 2]` (`layers.rotary_angles`); their
    dtype, if wider, is what heads are rotated in. sight, cached, cached_rank: as in `attend`.
    Returns the attended values `[B, W, H, K]` and the window's k (after rotary) and v, `[B, G, W * K]` each.
    The form is chosen when the program is lowered: the kernel on CUDA if it `suits`, the C++ function on a CPU if it can be
    had, else the plain one.
    """
    arguments, head_dim = (qkv, norms, angles, sight, cached, cached_rank), qkv.shape[-1]
    forms = {"cuda": fused} if suits(head_dim) else {}
    forms |= {"cpu": on_cpu} if attention_cpu.why_not(head_dim, qkv.dtype) is None else {}
    return jax.lax.platform_dependent(*arguments, **{p: partial(f, eps=eps) for p, f in (forms | {"default": plain}).items()})


def suits(head_dim: int) -> bool:
    """Whether the kernel takes heads of this width: it works on halves, whose size must be a power of two, at least 16. None
    where DJAX_KERNELS=xla."""
    return kernels_wanted() and head_dim in (32, 64, 128, 256)


def described(platform: str, head_dim: int, dtype: Any) -> str:
    """The form that a platform's programs have, for people to read."""
    if platform in ("cuda", "gpu") and suits(head_dim):
        return "one Pallas kernel"
    if platform != "cpu":
        return "XLA's products"
    why_not = attention_cpu.why_not(head_dim, dtype)
    return f"XLA's products; not djax's own C++, since {why_not}" if why_not else "djax's own C++"


def plain(
    qkv: jax.Array,
    norms: Pair | None,
    angles: Pair,
    sight: Sight,
    cached: Pair | None,
    cached_rank: jax.Array | None,
    *,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`attention` in XLA's own operations: the oracle."""
    batch, window, groups, slots, head_dim = qkv.shape
    q = qkv[:, :, :, :-2].reshape(batch, window, groups * (slots - 2), head_dim)
    k = qkv[:, :, :, -2]
    if norms is not None:
        q, k = (rms_norm(x, norm, eps) for x, norm in zip((q, k), norms, strict=True))
    k = rotate(k, *angles).swapaxes(1, 2)
    v = qkv[:, :, :, -1].swapaxes(1, 2)
    return attend(rotate(q, *angles), k, v, sight, cached, cached_rank), flat(k), flat(v)


def fused(*arguments: Any, eps: float, interpret: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`attention` as one Pallas kernel; arguments and gradient as `plain` has them.

    interpret: run the kernel's operations one by one, on any platform, for tests.
    """
    return _whole(partial(_call, eps=eps, interpret=interpret), arguments, eps)


def on_cpu(*arguments: Any, eps: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`attention` as one C++ function; arguments and gradient as `plain` has them."""
    return _whole(partial(attention_cpu.call, eps=eps), arguments, eps)


def _whole(call: Callable[..., tuple], arguments: tuple, eps: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """call(*arguments) with the gradient of `plain`; under a mesh each device runs it for its own heads."""
    _, norms, _, sight, cached, cached_rank = arguments

    @jax.custom_vjp
    def run(*arguments: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        if not split():
            return call(*arguments)
        heads, kv = P(None, None, "model"), P(None, "model")
        # An argument that is None has no part in the tree, and no place.
        specs = (
            heads,
            None if norms is None else (P(), P()),
            (P(), P()),
            jax.tree.map(lambda _: P(), sight),
            None if cached is None else (kv, kv),
            None if cached_rank is None else P(),
        )
        shards = jax.shard_map(call, in_specs=specs, out_specs=(heads, kv, kv), axis_names={"model"}, check_vma=False)
        return shards(*arguments)

    run.defvjp(lambda *a: (run(*a), a), lambda a, d: jax.vjp(partial(plain, eps=eps), *a)[1](d))
    return run(*arguments)


def _call(
    qkv: jax.Array,
    norms: Pair | None,
    angles: Pair,
    sight: Sight,
    cached: Pair | None,
    cached_rank: jax.Array | None,
    *,
    eps: float,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The kernel on one device."""
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

    def kernel(*refs: Any) -> None:
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
    out: Any,
    k_out: Any,
    v_out: Any,
    *,
    qkv: Any,
    rank: Any,
    cos: Any,
    sin: Any,
    q_norm: Any = None,
    k_norm: Any = None,
    cached_k: Any = None,
    cached_v: Any = None,
    cached_rank: Any = None,
    context: Any = None,
    copy: Any = None,
    own: Any = None,
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

    def rotated(at: Any, rows: Any, slot: Any, norm: Any) -> tuple[jax.Array, jax.Array]:
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

    def of_queries(numbers: Any, default: int) -> Any:
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
