"""What every family shares besides its kernels: the cache, rotary angles, and where arrays lie on a mesh."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from djax.runtime.sharding import split


class Cache(NamedTuple):
    """Keys and values of a whole canvas, read-only between refreshes.

    layers: one (k, v) a layer, each `[B, G, L * K]` in the parameters' dtype; k after rotary. By head, as attention reads
            them, and flat, so that XLA cannot give them another layout where they are written than where they are read,
            and copy them at every turn in between.
    rank:   int32 `[B, L]`, of the cached positions as keys (`Sight`); `HIDDEN_RANK` hides one from this call.
    """

    layers: tuple[tuple[jax.Array, jax.Array], ...]
    rank: jax.Array


def replicated(x: jax.Array) -> jax.Array:
    """x, whole on every device of the mesh's model axis: where a sum over heads or experts is made. x without a mesh."""
    return jax.lax.with_sharding_constraint(x, P(*(None,) * x.ndim)) if split() else x


def by_head(x: jax.Array) -> jax.Array:
    """Keys or values `[B, G, L * K]`, split over the mesh's model axis by head as the projections that make them are."""
    return jax.lax.with_sharding_constraint(x, P(None, "model", None)) if split() else x


def rotary_angles(positions: jax.Array, head_dim: int, theta: float, rotated: int | None = None) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 `[B, W, K / 2]`, of the half-split rotary embedding at `positions` int32 `[B, W]`.

    Both halves of a head turn by the same angles. rotated: how many features are turned; the others, last in each half, stay as
    they are (`convert.llada2.order_rotated`).
    """
    rotated = head_dim if rotated is None else rotated
    frequency = 1.0 / theta ** (jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
    frequency = jnp.pad(frequency, (0, (head_dim - rotated) // 2))
    angle = positions[..., None].astype(jnp.float32) * frequency[None, None, :]
    return jnp.cos(angle), jnp.sin(angle)
