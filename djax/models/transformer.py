"""What every family's network has: embedding, layers, last norm and head, and the functions over plain parameter trees."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from djax.models.attention import attention
from djax.models.layers import Cache, by_head, replicated, rms_norm, rotary_angles
from djax.models.linear import linear
from djax.models.quantized import SCALE, Int8, Weights, product
from djax.process import make_key


class Transformer(nn.Module):
    """The parameters and the three functions over them. Every parameter carries logical axis names for sharding.

    A family's network says what its layers are. remat: a layer's activations are computed again for the gradient, not kept.
    full_rotary: queries and keys are rotated in float32 in a narrower model, too.
    """

    config: Any
    dtype: Any = jnp.float32
    remat: bool = False

    full_rotary: ClassVar[bool] = False

    def layer(self, n: int) -> "Layer":
        """The module of layer n, named `layer_n`."""
        raise NotImplementedError

    def setup(self) -> None:
        c = self.config
        self.embedding = self._matrix("embedding", (c.vocab, c.width), ("vocab", "embed"))
        self.blocks = [self.layer(n) for n in range(c.layers)]
        self.norm = self.param("norm", nn.with_logical_partitioning(nn.initializers.ones, ("embed",)), (c.width,), self.dtype)
        self.head = self._matrix("head", (c.width, c.vocab), ("embed", "vocab"))

    def _matrix(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
        return self.param(name, scaled(axes, self.config.width), shape, self.dtype)

    def __call__(self, tokens: jax.Array, positions: jax.Array, valid: jax.Array) -> jax.Array:
        return self.unembed(self.trunk(self.embed(tokens), positions, valid)[0])

    def embed(self, tokens: jax.Array) -> jax.Array:
        return self.embedding[tokens]

    def trunk(
        self,
        x: jax.Array,
        positions: jax.Array,
        valid: jax.Array,
        cache: Cache | None = None,
        until: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple]:
        c = self.config
        angles = rotary_angles(positions, c.head_dim, c.rope_theta, getattr(c, "rotated", None))
        if not self.full_rotary:
            angles = tuple(a.astype(x.dtype) for a in angles)
        fresh = []
        run = nn.remat(_run) if self.remat else _run
        for n, layer in enumerate(self.blocks):
            cached, visible = (cache.layers[n], cache.visible) if cache is not None else (None, None)
            x, kv = run(layer, x, angles, valid, cached, visible, until)
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

    config: Any
    dtype: Any

    head_norms: ClassVar[bool] = True

    def feed_forward(self, h: jax.Array, valid: jax.Array) -> jax.Array:
        """`[B, W, D]` -> the same; `valid` bool `[B, W]`."""
        raise NotImplementedError

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        valid: jax.Array,
        cached: tuple[jax.Array, jax.Array] | None,
        visible: jax.Array | None,
        until: jax.Array | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        c = self.config
        h = rms_norm(x, self.scale("attention_norm", c.width, "embed"), c.eps)
        # One product for all three. By group, so that a device that has a group has its queries, its keys and its values.
        per_group = c.heads // c.groups
        shape = (c.width, c.groups, per_group + 2, c.head_dim)
        qkv = linear("bwd,dgsk->bwgsk", h, self.matrix("qkv", shape, ("embed", "heads", None, "head_dim"), c.width))
        norms = tuple(self.scale(name, c.head_dim, "head_dim") for name in ("q_norm", "k_norm")) if self.head_norms else None
        attended, k, v = attention(qkv, norms, angles, valid, cached, visible, until, c.eps)
        o = self.matrix("o", (c.heads, c.head_dim, c.width), ("heads", "head_dim", "embed"), c.heads * c.head_dim)
        x = replicated(x + linear("bwhk,hkd->bwd", attended, o))
        h = rms_norm(x, self.scale("ffn_norm", c.width, "embed"), c.eps)
        return replicated(x + self.feed_forward(h, valid)), (k, v)

    def scale(self, name: str, size: int, axis: str) -> jax.Array:
        return self.param(name, nn.with_logical_partitioning(nn.initializers.ones, (axis,)), (size,), self.dtype)

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
    return nn.with_logical_partitioning(nn.initializers.normal(fan_in**-0.5), axes)


class Functions:
    """A family's functions over plain parameter trees, made from its network."""

    def __init__(self, network: type[Transformer]) -> None:
        self._network = network

    def abstract(self, config: Any, dtype: Any) -> Any:
        """The parameters' tree without values: boxed `ShapeDtypeStruct`s that know their logical axes."""
        tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        valid = jax.ShapeDtypeStruct((1, 2), jnp.bool_)
        return jax.eval_shape(self._network(config, dtype).init, make_key(0), tokens, tokens, valid)["params"]

    def init(self, config: Any, key: jax.Array, dtype: Any = jnp.float32) -> Any:
        """Random parameters, normal with variance 1 / fan-in."""
        tokens = jnp.zeros((1, 2), jnp.int32)
        variables = jax.jit(self._network(config, dtype).init)(key, tokens, tokens, tokens == 0)
        return nn.meta.unbox(variables["params"])

    def embed(self, params: Any, config: Any, tokens: jax.Array) -> jax.Array:
        """int32 `[B, W]` -> `[B, W, D]` in the parameters' dtype."""
        return self._network(config).apply({"params": params}, tokens, method="embed")

    def trunk(
        self,
        params: Any,
        config: Any,
        x: jax.Array,
        positions: jax.Array,
        valid: jax.Array,
        cache: Cache | None = None,
        until: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple]:
        """Run all layers over a window.

        x `[B, W, D]`; positions int32 `[B, W]`, absolute; valid bool `[B, W]`, false where the window holds padding: such
        a position is seen by nobody and its output means nothing. With `cache` the window also attends to the cached
        positions that are visible (hide the window's own there). until int32 `[B, W]`: each position attends to no more
        than that many of the window's first ones; None for all of them.
        Returns the normalised output `[B, W, D]` and each layer's fresh (k, v), `[B, G, W * K]`, k after rotary.
        Law: a window over tokens unchanged since the cache was filled gives the full forward's output at its positions.
        """
        return self._network(config).apply({"params": params}, x, positions, valid, cache, until, method="trunk")

    def trunk_with_routing(
        self,
        params: Any,
        config: Any,
        x: jax.Array,
        positions: jax.Array,
        valid: jax.Array,
        until: jax.Array | None = None,
        *,
        remat: bool = False,
    ) -> tuple[jax.Array, list]:
        """`trunk` without cache, for training, and the router's choice of each layer that has one (probabilities `[T, E]`, ids
        `[T, J]`). remat: a layer's activations are computed again for its gradient, not kept."""
        network = self._network(config, remat=remat)
        arguments = x, positions, valid, None, until
        (x, _), collected = network.apply({"params": params}, *arguments, method="trunk", mutable=["routing"])
        layers = (collected.get("routing", {}).get(f"layer_{n}") for n in range(config.layers))
        return x, [layer["choice"][0] for layer in layers if layer]

    def unembed(self, params: Any, config: Any, x: jax.Array) -> jax.Array:
        """`[B, W, D]` -> float32 logits `[B, W, V]`."""
        return self._network(config).apply({"params": params}, x, method="unembed")

    def expected_embedding(
        self,
        params: Any,
        config: Any,
        x: jax.Array,
        top: int | None = None,
        logits: jax.Array | None = None,
        chunk: int = 256,
    ) -> jax.Array:
        """softmax(unembed(x)) @ embedding: the trunk's output `[B, W, D]` as the embedding it expects at each position.

        Softmax in float32. In chunks of positions, so that no array of canvas x vocabulary is ever made, unless the caller
        has x's `logits` already. With `top` only that many tokens' rows of the embedding are read, weighted by their
        probabilities in the whole softmax.
        """
        embedding = params["embedding"]

        def expect(logits: jax.Array) -> jax.Array:
            p = jax.nn.softmax(logits, axis=-1)
            if top is None or top >= config.vocab:
                return p.astype(x.dtype) @ embedding
            p, ids = jax.lax.top_k(p, top)
            return jnp.einsum("...k,...kd->...d", p.astype(x.dtype), embedding[ids])

        if logits is not None:
            return expect(logits)
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) <= chunk:
            return expect(self.unembed(params, config, flat)).reshape(x.shape)
        padded = jnp.pad(flat, ((0, -len(flat) % chunk), (0, 0))).reshape(-1, chunk, x.shape[-1])
        expected = jax.lax.map(lambda x: expect(self.unembed(params, config, x)), padded)
        return expected.reshape(-1, x.shape[-1])[: len(flat)].reshape(x.shape)

    def empty_cache(self, params: Any, config: Any, batch: int, length: int) -> tuple[tuple[jax.Array, jax.Array], ...]:
        """Zeroed keys and values of a canvas: one (k, v) a layer, `[B, G, L * K]` in the parameters' dtype."""
        shape = (batch, config.groups, length * config.head_dim)
        dtype = params["embedding"].dtype
        return tuple((by_head(jnp.zeros(shape, dtype)), by_head(jnp.zeros(shape, dtype))) for _ in range(config.layers))
