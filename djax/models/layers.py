"""The maths every family shares: normalisation, rotary positions, attention over cached and fresh keys."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that a query which sees nothing (a padded window position) gives a number instead of NaN.
HIDDEN = -1e30


class Cache(NamedTuple):
    """Keys and values of a whole canvas, read-only between refreshes.

    layers: one (k, v) a layer, each `[B, L, G, K]` in the parameters' dtype; k after rotary.
    visible: bool `[B, L]`, the cached positions this call may attend to.
    """

    layers: tuple[tuple[jax.Array, jax.Array], ...]
    visible: jax.Array


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalisation over the last axis in float32; rounded to x's dtype before the weight (as HF does)."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def rotary_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 `[B, W, K]`, of the half-split rotary embedding at `positions` int32 `[B, W]`."""
    frequency = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None].astype(jnp.float32) * frequency[None, None, :]
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Apply rotary embedding to `x` `[B, W, heads, K]`; cos and sin are rounded to x's dtype first, as in HF."""
    cos, sin = (a.astype(x.dtype)[:, :, None, :] for a in (cos, sin))
    low, high = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-high, low], axis=-1) * sin


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array,
    cached: tuple[jax.Array, jax.Array] | None = None,
    visible: jax.Array | None = None,
) -> jax.Array:
    """Bidirectional attention of a window over [visible cached positions] and [its own valid positions].

    q `[B, W, H, K]`; k, v `[B, W, G, K]`, H a multiple of G; valid bool `[B, W]`; cached (k, v) `[B, L, G, K]` with
    visible bool `[B, L]`. Returns `[B, W, H, K]`. Scores and softmax are float32. The two score blocks are joined
    before one softmax, so that cached and fresh keys compete exactly as they would in a full forward.
    """
    batch, window, heads, head_dim = q.shape
    groups = k.shape[2]
    q = q.reshape(batch, window, groups, heads // groups, head_dim)

    def scores(keys: jax.Array, seen: jax.Array) -> jax.Array:
        s = jnp.einsum("bwghk,blgk->bghwl", q, keys, preferred_element_type=jnp.float32) * head_dim**-0.5
        return jnp.where(seen[:, None, None, None, :], s, HIDDEN)

    def weigh(p: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.einsum("bghwl,blgk->bwghk", p.astype(v.dtype), values, preferred_element_type=jnp.float32)

    if cached is None:
        out = weigh(jax.nn.softmax(scores(k, valid), axis=-1), v)
    else:
        cached_k, cached_v = cached
        p = jax.nn.softmax(jnp.concatenate([scores(cached_k, visible), scores(k, valid)], axis=-1), axis=-1)
        length = cached_k.shape[1]
        # Both parts stay float32 until they are summed: in bfloat16 they are rounded once, as one product would be.
        out = weigh(p[..., :length], cached_v) + weigh(p[..., length:], v)
    return out.astype(v.dtype).reshape(batch, window, heads, head_dim)
