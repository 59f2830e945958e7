"""The definitions in XLA's operations: normalisation, rotary positions, gates, attention over cached and fresh keys.

The plain forms of the kernels are made of these, and are what the others are tested against.
"""

from functools import reduce

import jax
import jax.numpy as jnp

from djax.kernels.sight import Sight

# Finite, so that a query which sees nothing (a padded window position) gives a number instead of NaN.
HIDDEN = -1e30
Pair = tuple[jax.Array, jax.Array]
# The attended values, the window's keys and its values, as attention returns them.
Attended = tuple[jax.Array, jax.Array, jax.Array]


def flat(x: jax.Array) -> jax.Array:
    """Keys or values `[B, G, L, K]` as a cache holds them."""
    return x.reshape(*x.shape[:2], -1)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation over the last axis in float32; rounded to x's dtype before the weight (as HF does)."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def gated(h: jax.Array) -> jax.Array:
    """SwiGLU on `[..., 2F]`, gate half first."""
    gate, up = jnp.split(h, 2, axis=-1)
    return jax.nn.silu(gate) * up


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Apply rotary embedding to `x` `[B, W, heads, K]`, in the wider dtype of x and the angles; the result is in x's."""
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sight: Sight,
    cached: tuple[jax.Array, jax.Array] | None = None,
    cached_rank: jax.Array | None = None,
) -> jax.Array:
    """Attention of a window over the cached and its own positions that each of its queries sees.

    q `[B, W, H, K]`; k, v `[B, G, W, K]`, H a multiple of G; cached (k, v) `[B, G, L * K]` with ranks int32 `[B, L]`.
    Returns `[B, W, H, K]`. Scores and softmax are float32, one softmax over cached and fresh keys
    together, so that they compete exactly as they would in a full forward.
    """
    batch, window, heads, head_dim = q.shape
    groups = k.shape[1]
    q = q.reshape(batch, window, groups, heads // groups, head_dim)

    def scores(q: jax.Array, keys: jax.Array, seen: jax.Array) -> jax.Array:
        s = jnp.einsum("bwghk,bglk->bghwl", q, keys, preferred_element_type=jnp.float32) * head_dim**-0.5
        return jnp.where(seen[:, None, None, :, :], s, HIDDEN)

    parts = [(scores(q, k, sight.sees_fresh()), v)]
    if cached is not None:
        assert cached_rank is not None, "cached keys come with their ranks"
        cached_k, cached_v = (a.reshape(batch, groups, -1, head_dim) for a in cached)
        # XLA would join two products with one left side, and copy the cache and the window's keys into one array to do so.
        parts.append((scores(jax.lax.optimization_barrier(q), cached_k, sight.sees_cached(cached_rank)), cached_v))
    top = reduce(jnp.maximum, (jnp.max(s, axis=-1, keepdims=True) for s, _ in parts))
    weights = [jnp.exp(s - top) for s, _ in parts]
    total = sum(jnp.sum(p, axis=-1) for p in weights)
    out = sum(
        jnp.einsum("bghwl,bglk->bghwk", p.astype(v.dtype), values, preferred_element_type=jnp.float32)
        for p, (_, values) in zip(weights, parts, strict=True)
    )
    assert isinstance(total, jax.Array) and isinstance(out, jax.Array), "sums of at least one part"
    out = (out / total[..., None]).astype(v.dtype)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, window, heads, head_dim)
