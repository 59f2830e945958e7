"""Attention of a window over cached and fresh keys: heads normalised, rotated and attended, in three forms behind one function.

The plain form is XLA's own operations. On a CUDA GPU one Pallas kernel does the same from the projection's output on; on a CPU
one C++ function.
"""

from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import PartitionSpec as P

from djax.kernels import attention_cpu, attention_gpu, dispatch
from djax.kernels.plain import Attended, Pair, attend, flat, rms_norm, rotate
from djax.kernels.sight import Sight
from djax.runtime.sharding import split


def attention(
    qkv: jax.Array,
    norms: Pair | None,
    angles: Pair,
    sight: Sight,
    cached: Pair | None,
    cached_rank: jax.Array | None,
    eps: float,
) -> Attended:
    """Normalise and rotate queries and keys, then attend.

    qkv `[B, W, G, H / G + 2, K]`: a group's queries, its key, its value. norms: weights `[K]` of the queries' and the
    keys' normalisation, None where a family has none. angles: cos and sin `[B, W, K / 2]`; their dtype, if wider, is what heads
    are rotated in. sight, cached, cached_rank: as in `plain.attend`.
    Returns the attended values `[B, W, H, K]` and the window's k (after rotary) and v, `[B, G, W * K]` each.
    The back end is chosen when the program is lowered (`dispatch.TABLE`).
    """
    case = dispatch.Attention(qkv.shape[-1], qkv.dtype)
    back_ends: dict[str, Callable[..., Attended]] = {"Pallas": fused, "C++": on_cpu, "XLA": plain}
    forms = {name: partial(form, eps=eps) for name, form in back_ends.items()}
    return dispatch.run(case, forms, qkv, norms, angles, sight, cached, cached_rank)


def plain(
    qkv: jax.Array,
    norms: Pair | None,
    angles: Pair,
    sight: Sight,
    cached: Pair | None,
    cached_rank: jax.Array | None,
    *,
    eps: float,
) -> Attended:
    """`attention` in XLA's own operations: the oracle."""
    batch, window, groups, slots, head_dim = qkv.shape
    q = qkv[:, :, :, :-2].reshape(batch, window, groups * (slots - 2), head_dim)
    k = qkv[:, :, :, -2]
    if norms is not None:
        q, k = (rms_norm(x, norm, eps) for x, norm in zip((q, k), norms, strict=True))
    k = rotate(k, *angles).swapaxes(1, 2)
    v = qkv[:, :, :, -1].swapaxes(1, 2)
    return attend(rotate(q, *angles), k, v, sight, cached, cached_rank), flat(k), flat(v)


def fused(*arguments: object, eps: float, interpret: bool = False) -> Attended:
    """`attention` as one Pallas kernel; arguments and gradient as `plain` has them.

    interpret: run the kernel's operations one by one, on any platform, for tests.
    """
    return _whole(partial(attention_gpu.call, eps=eps, interpret=interpret), arguments, eps)


def on_cpu(*arguments: object, eps: float) -> Attended:
    """`attention` as one C++ function; arguments and gradient as `plain` has them."""
    return _whole(partial(attention_cpu.call, eps=eps), arguments, eps)


def _whole(call: Callable[..., tuple], arguments: tuple, eps: float) -> Attended:
    """call(*arguments) with the gradient of `plain`; under a mesh each device runs it for its own heads."""
    _, norms, _, sight, cached, cached_rank = arguments

    @jax.custom_vjp
    def run(*arguments: object) -> Attended:
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
