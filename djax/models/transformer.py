"""What every family's network has: embedding, layers, last norm and head."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from djax.kernels.attention import attention
from djax.kernels.linear import linear
from djax.kernels.plain import rms_norm
from djax.kernels.sight import Sight
from djax.kernels.weights import Int8, Weights, product
from djax.models.contract import Config, DType
from djax.models.layers import Cache, replicated, rotary_angles
from djax.models.quantized import SCALE


class Transformer(nn.Module):
    """The parameters and the three functions over them. Every parameter carries logical axis names for sharding.

    A family's network says what its layers are. remat: a layer's activations are computed again for the gradient, not kept.
    full_rotary: queries and keys are rotated in float32 in a narrower model, too.
    """

    config: Config
    dtype: DType = jnp.float32
    remat: bool = False

    full_rotary: ClassVar[bool] = False

    @property
    def rotated(self) -> int:
        """How many features of a head rotary turns."""
        return self.config.head_dim

    def layer(self, n: int) -> "Layer":
        """The module of layer n, named `layer_n`."""
        raise NotImplementedError

    def setup(self) -> None:
        c = self.config
        self.embedding = self._matrix("embedding", (c.vocab, c.width), ("vocab", "embed"))
        self.blocks = [self.layer(n) for n in range(c.layers)]
        self.norm: jax.Array = self.param("norm", box(nn.initializers.ones, ("embed",)), (c.width,), self.dtype)
        self.head = self._matrix("head", (c.width, c.vocab), ("embed", "vocab"))

    def _matrix(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
        return self.param(name, scaled(axes, self.config.width), shape, self.dtype)

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return self.unembed(self.trunk(self.embed(tokens), positions, Sight(jnp.zeros_like(tokens)))[0])

    def embed(self, tokens: jax.Array) -> jax.Array:
        return self.embedding[tokens]

    def trunk(
        self,
        x: jax.Array,
        positions: jax.Array,
        sight: Sight,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, tuple]:
        c = self.config
        angles = rotary_angles(positions, c.head_dim, c.rope_theta, self.rotated)
        if not self.full_rotary:
            angles = angles[0].astype(x.dtype), angles[1].astype(x.dtype)
        fresh = []
        run = nn.remat(_run) if self.remat else _run
        for n, layer in enumerate(self.blocks):
            cached, cached_rank = (cache.layers[n], cache.rank) if cache is not None else (None, None)
            x, kv = run(layer, x, angles, sight, cached, cached_rank)
            fresh.append(kv)
        return rms_norm(x, self.norm, c.eps), tuple(fresh)

    def unembed(self, x: jax.Array) -> jax.Array:
        rows = "bw"[3 - x.ndim :]  # or of positions without a batch
        return linear(f"{rows}d,dv->{rows}v", x, self.head, wide=True)


def _run(layer: "Layer", *arguments: Any) -> tuple:
    return layer(*arguments)


class Layer(nn.Module):
    """x += o(attend(norm x)); x += feed_forward(norm x). Each sum is constrained to replicated: two all-reduces a layer.

    A family's layer has its own `feed_forward`. head_norms: queries and keys are normalised by head, before rotary.
    """

    config: Config
    dtype: DType

    head_norms: ClassVar[bool] = True

    def feed_forward(self, h: jax.Array, valid: jax.Array) -> jax.Array:
        """`[B, W, D]` -> the same; `valid` bool `[B, W]`."""
        raise NotImplementedError

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        sight: Sight,
        cached: tuple[jax.Array, jax.Array] | None,
        cached_rank: jax.Array | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        c = self.config
        h = rms_norm(x, self.scale("attention_norm", c.width, "embed"), c.eps)
        # One product for all three. By group, so that a device that has a group has its queries, its keys and its values.
        per_group = c.heads // c.groups
        shape = (c.width, c.groups, per_group + 2, c.head_dim)
        qkv = linear("bwd,dgsk->bwgsk", h, self.matrix("qkv", shape, ("embed", "heads", None, "head_dim"), c.width))
        norms = None
        if self.head_norms:
            norms = self.scale("q_norm", c.head_dim, "head_dim"), self.scale("k_norm", c.head_dim, "head_dim")
        attended, k, v = attention(qkv, norms, angles, sight, cached, cached_rank, c.eps)
        o = self.matrix("o", (c.heads, c.head_dim, c.width), ("heads", "head_dim", "embed"), c.heads * c.head_dim)
        x = replicated(x + linear("bwhk,hkd->bwd", attended, o))
        h = rms_norm(x, self.scale("ffn_norm", c.width, "embed"), c.eps)
        return replicated(x + self.feed_forward(h, sight.valid)), (k, v)

    def scale(self, name: str, size: int, axis: str) -> jax.Array:
        return self.param(name, box(nn.initializers.ones, (axis,)), (size,), self.dtype)

    def matrix(self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], fan_in: int) -> Weights:
        """A parameter, with its scale if there is one beside it."""
        w = self.param(name, scaled(axes, fan_in), shape, self.dtype)
        return Int8(w, self.get_variable("params", name + SCALE)) if self.has_variable("params", name + SCALE) else w

    def mlp(self, name: str, h: jax.Array, width: int) -> jax.Array:
        """down(silu(gate h) * up h) of this width; parameters `name_in` `[D, 2, F]`, gate first, and `name_out` `[F, D]`."""
        c = self.config
        w_in = self.matrix(f"{name}_in", (c.width, 2, width), ("embed", None, "mlp"), c.width)
        w_out = self.matrix(f"{name}_out", (width, c.width), ("mlp", "embed"), width)
        gate, up = product("bwd,dtf->tbwf", h, w_in)
        return linear("bwf,fd->bwd", jax.nn.silu(gate) * up, w_out)


def scaled(axes: tuple[str | None, ...], fan_in: int) -> Any:
    """An initialiser with variance 1 / fan_in for a parameter with these logical axes."""
    return box(nn.initializers.normal(fan_in**-0.5), axes)


def box(initialiser: jax.nn.initializers.Initializer, axes: tuple[str | None, ...]) -> Any:
    """The initialiser of a parameter with these logical axes. Any: flax's stubs say that `param` then
    gives a box, where it gives the array."""
    return nn.with_logical_partitioning(initialiser, axes)
