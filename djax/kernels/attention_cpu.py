"""Attention as one C++ function of djax's own: the form for a CPU where it can be compiled.

XLA makes some twenty operations of it there, each over a few kilobytes.
"""

import jax
import jax.numpy as jnp
import numpy as np

from djax.kernels import native
from djax.kernels.plain import Attended, Pair
from djax.kernels.sight import Sight


def call(
    qkv: jax.Array,
    norms: Pair | None,
    angles: Pair,
    sight: Sight,
    cached: Pair | None,
    cached_rank: jax.Array | None,
    *,
    eps: float,
) -> Attended:
    """`attention.plain`'s arguments and results. In narrower models, too, everything is float32 between qkv and the results,
    but fresh keys, which count as they are kept.

    Law: a query's result is the same, bit for bit, whatever finite is hidden from it, however many threads there are.
    """
    batch, window, groups, slots, head_dim = qkv.shape
    none, nobody = jnp.zeros((batch, groups, 0), qkv.dtype), jnp.zeros((batch, 0), jnp.int32)
    arguments = [
        qkv,
        *((jnp.zeros(0, qkv.dtype),) * 2 if norms is None else norms),
        *(a.astype(jnp.float32) for a in angles),
        *(nobody if a is None else a for a in sight),
        *((none, none) if cached is None else cached),
        nobody if cached_rank is None else cached_rank,
    ]
    fresh = jax.ShapeDtypeStruct((batch, groups, window * head_dim), qkv.dtype)
    out = jax.ShapeDtypeStruct((batch, window, groups * (slots - 2), head_dim), qkv.dtype)
    run = jax.ffi.ffi_call(native.target("djax_attention", qkv.dtype), (out, fresh, fresh), vmap_method="sequential")
    attended, k, v = run(*arguments, eps=np.float32(eps))
    return attended, k, v
