"""LLaDA-MoE (inclusionAI/LLaDA-MoE-7B-A1B): every layer is bidirectional attention with normalised heads, then experts.

Sources: the HF model code and dInfer's `modeling_llada_moe` for the order of operations.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from djax.errors import UnsupportedModelError
from djax.models import moe
from djax.models.attention import attention, suits
from djax.models.layers import Cache, by_head, replicated, rms_norm, rotary_angles

ARCHITECTURES = ("LLaDAMoEModelLM", "LLaDAMoEModel")
# LLaDA-MoE's config.json has no mask id. Its tokenizer has; these are what the model card uses, for checkpoints without one.
DEFAULT_MASK_ID = 156895
DEFAULT_EOS_ID = 156892

# Values that LLaDA-MoE leaves at "off". Anything else changes the forward pass, so it is refused, not ignored.
_OFF = {
    "attention_bias": (False, None),
    "clip_qkv": (None,),
    "rope_scaling": (None,),
    "shared_expert_intermediate_size": (None, 0),
    "tie_word_embeddings": (False, None),
    "moe_router_enable_expert_bias": (False, None),
    "moe_router_score_function": ("softmax", None),
    "partial_rotary_factor": (1, 1.0, None),
    "hidden_act": ("silu", None),
    "qk_layernorm": (True,),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape and constants of a LLaDA-MoE; hashable, so it is static to `jit`. Letters as in the README."""

    vocab: int  # V
    width: int  # D
    layers: int  # N
    heads: int  # H
    groups: int  # G, key/value heads
    head_dim: int  # K
    expert_width: int  # F
    experts: int  # E
    top: int  # experts a token
    renormalise: bool  # divide the chosen router weights by their sum (norm_topk_prob)
    rope_theta: float
    eps: float
    max_positions: int
    mask_id: int
    eos_id: int

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], mask_id: int, eos_id: int) -> "Config":
        """Read HF's config.json. Raises `UnsupportedModelError` naming every absent, malformed or unimplemented setting."""
        wrong = [f"{k}={hf[k]!r} (implemented: {ok[0]!r})" for k, ok in _OFF.items() if k in hf and hf[k] not in ok]

        def get(key: str, kind: type, default: Any = None) -> Any:
            """A positive number of this kind; `default` where the key is absent or null and there is a default."""
            value = hf.get(key) if hf.get(key) is not None else default
            good = isinstance(value, int | kind) and not isinstance(value, bool) and value > 0
            if not good:
                wrong.append(f"{key}={value!r} (expected: a positive {'whole number' if kind is int else 'number'})")
            return kind(value) if good else kind(1)

        frequencies = hf.get("moe_layer_freq")
        if frequencies is not None and (not isinstance(frequencies, list) or any(f != 1 for f in frequencies)):
            wrong.append(f"moe_layer_freq={frequencies!r} (implemented: every layer is MoE)")
        if hf.get("norm_topk_prob") not in (True, False, None):
            wrong.append(f"norm_topk_prob={hf['norm_topk_prob']!r} (expected: true, false or null)")
        # transformers 5 writes rotary settings into a table of their own.
        rope = hf.get("rope_parameters") or {}
        if rope:
            if rope.get("rope_type", "default") != "default":
                wrong.append(f"rope_parameters.rope_type={rope['rope_type']!r} (implemented: 'default')")
            if "rope_theta" in hf and hf["rope_theta"] != rope.get("rope_theta"):
                wrong.append(f"rope_theta={hf['rope_theta']!r} (rope_parameters says {rope.get('rope_theta')!r})")
            hf = {**hf, "rope_theta": rope.get("rope_theta")}
        heads, width = get("num_attention_heads", int), get("hidden_size", int)
        groups, head_dim = get("num_key_value_heads", int, heads), get("head_dim", int, width // heads)
        experts, top = get("num_experts", int), get("num_experts_per_tok", int)
        config = cls(
            vocab=get("vocab_size", int),
            width=width,
            layers=get("num_hidden_layers", int),
            heads=heads,
            groups=groups,
            head_dim=head_dim,
            expert_width=get("expert_intermediate_size", int),
            experts=experts,
            top=top,
            renormalise=bool(hf.get("norm_topk_prob")),
            rope_theta=get("rope_theta", float),
            eps=get("rms_norm_eps", float),
            max_positions=get("max_position_embeddings", int),
            mask_id=mask_id,
            eos_id=eos_id,
        )
        if heads % groups:
            wrong.append(f"num_key_value_heads={groups} (expected: a divisor of num_attention_heads={heads})")
        if head_dim % 2 and not wrong:
            wrong.append(f"head_dim={head_dim} (expected: even, for rotary positions)")
        if top > experts:
            wrong.append(f"num_experts_per_tok={top} (expected: at most num_experts={experts})")
        if wrong:
            raise UnsupportedModelError("config.json asks for what LLaDA-MoE in djax does not have: " + "; ".join(wrong))
        return config


class LLaDAMoE(nn.Module):
    """The parameters and the three functions over them. Every parameter carries logical axis names for sharding."""

    config: Config
    dtype: Any = jnp.float32

    def setup(self) -> None:
        c = self.config
        self.embedding = self._matrix("embedding", (c.vocab, c.width), ("vocab", "embed"), fan_in=c.width)
        self.blocks = [Layer(c, self.dtype, name=f"layer_{n}") for n in range(c.layers)]
        self.norm = self.param("norm", nn.with_logical_partitioning(nn.initializers.ones, ("embed",)), (c.width,), self.dtype)
        self.head = self._matrix("head", (c.width, c.vocab), ("embed", "vocab"), fan_in=c.width)

    def _matrix(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int) -> jax.Array:
        return self.param(name, _scaled(axes, fan_in), shape, self.dtype)

    def __call__(self, tokens: jax.Array, positions: jax.Array, valid: jax.Array) -> jax.Array:
        return self.unembed(self.trunk(self.embed(tokens), positions, valid)[0])

    def embed(self, tokens: jax.Array) -> jax.Array:
        return self.embedding[tokens]

    def trunk(
        self, x: jax.Array, positions: jax.Array, valid: jax.Array, cache: Cache | None = None
    ) -> tuple[jax.Array, tuple]:
        c = self.config
        angles = rotary_angles(positions, c.head_dim, c.rope_theta)
        fresh = []
        for n, layer in enumerate(self.blocks):
            cached, visible = (cache.layers[n], cache.visible) if cache is not None else (None, None)
            x, kv = layer(x, angles, valid, cached, visible)
            fresh.append(kv)
        return rms_norm(x, self.norm, c.eps), tuple(fresh)

    def unembed(self, x: jax.Array) -> jax.Array:
        return jnp.einsum("...d,dv->...v", x, self.head, preferred_element_type=jnp.float32)


class Layer(nn.Module):
    """x += o(attend(norm x)); x += experts(norm x). Each sum is constrained to replicated: two all-reduces a layer."""

    config: Config
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        angles: tuple[jax.Array, jax.Array],
        valid: jax.Array,
        cached: tuple[jax.Array, jax.Array] | None,
        visible: jax.Array | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        c = self.config
        batch, window, _ = x.shape

        def scale(name: str, size: int, axis: str) -> jax.Array:
            return self.param(name, nn.with_logical_partitioning(nn.initializers.ones, (axis,)), (size,), self.dtype)

        def matrix(name: str, shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int) -> jax.Array:
            return self.param(name, _scaled(axes, fan_in), shape, self.dtype)

        h = rms_norm(x, scale("attention_norm", c.width, "embed"), c.eps)
        # One product for all three. By group, so that a device that has a group has its queries, its keys and its values.
        per_group = c.heads // c.groups
        shape = (c.width, c.groups, per_group + 2, c.head_dim)
        qkv = jnp.einsum("bwd,dgsk->bwgsk", h, matrix("qkv", shape, ("embed", "heads", None, "head_dim"), c.width))
        norms = scale("q_norm", c.head_dim, "head_dim"), scale("k_norm", c.head_dim, "head_dim")
        attended, k, v = attention(qkv, norms, angles, valid, cached, visible, c.eps)
        o = matrix("o", (c.heads, c.head_dim, c.width), ("heads", "head_dim", "embed"), c.heads * c.head_dim)
        x = x + jnp.einsum("bwhk,hkd->bwd", attended, o)
        x = replicated(x)

        h = rms_norm(x, scale("expert_norm", c.width, "embed"), c.eps).reshape(batch * window, c.width)
        router = matrix("router", (c.width, c.experts), ("embed", None), c.width)
        w_in = matrix("w_in", (c.experts, c.width, 2 * c.expert_width), ("expert", "embed", None), c.width)
        w_out = matrix("w_out", (c.experts, c.expert_width, c.width), ("expert", None, "embed"), c.expert_width)
        flat_valid = valid.reshape(batch * window)
        routing = moe.route(h, router, c.top, c.renormalise)
        # Collected only where a caller asks for it (the trainer's load-balancing loss).
        self.sow("routing", "choice", (routing.probs, routing.ids))
        y = moe.experts(h, routing, w_in, w_out, flat_valid)
        return replicated(x + y.reshape(x.shape)), (k, v)


def _scaled(axes: tuple[str, ...], fan_in: int) -> Any:
    return nn.with_logical_partitioning(nn.initializers.normal(fan_in**-0.5), axes)


def abstract(config: Config, dtype: Any) -> Any:
    """The parameters' tree without values: boxed `ShapeDtypeStruct`s that know their logical axes."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    valid = jax.ShapeDtypeStruct((1, 2), jnp.bool_)
    return jax.eval_shape(LLaDAMoE(config, dtype).init, jax.random.key(0), tokens, tokens, valid)["params"]


def init(config: Config, key: jax.Array, dtype: Any = jnp.float32) -> Any:
    """Random parameters, normal with variance 1 / fan-in."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    variables = jax.jit(LLaDAMoE(config, dtype).init)(key, tokens, tokens, tokens == 0)
    return nn.meta.unbox(variables["params"])


def embed(params: Any, config: Config, tokens: jax.Array) -> jax.Array:
    """int32 `[B, W]` -> `[B, W, D]` in the parameters' dtype."""
    return LLaDAMoE(config).apply({"params": params}, tokens, method="embed")


def trunk(
    params: Any, config: Config, x: jax.Array, positions: jax.Array, valid: jax.Array, cache: Cache | None = None
) -> tuple[jax.Array, tuple]:
    """Run all layers over a window.

    x `[B, W, D]`; positions int32 `[B, W]`, absolute; valid bool `[B, W]`, false where the window holds padding: such
    a position is seen by nobody and its output means nothing. With `cache` the window also attends to the cached
    positions that are visible (hide the window's own there).
    Returns the normalised output `[B, W, D]` and each layer's fresh (k, v), `[B, G, W * K]`, k after rotary.
    Law: a window over tokens unchanged since the cache was filled gives the full forward's output at its positions.
    """
    return LLaDAMoE(config).apply({"params": params}, x, positions, valid, cache, method="trunk")


def unembed(params: Any, config: Config, x: jax.Array) -> jax.Array:
    """`[B, W, D]` -> float32 logits `[B, W, V]`."""
    return LLaDAMoE(config).apply({"params": params}, x, method="unembed")


def expected_embedding(
    params: Any, config: Config, x: jax.Array, top: int | None = None, logits: jax.Array | None = None, chunk: int = 256
) -> jax.Array:
    """softmax(unembed(x)) @ embedding: the trunk's output `[B, W, D]` as the embedding it expects at each position.

    Softmax in float32. In chunks of positions, so that no array of canvas x vocabulary is ever made, unless the caller has
    x's `logits` already. With `top` only that many tokens' rows of the embedding are read, weighted by their
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
        return expect(unembed(params, config, flat)).reshape(x.shape)
    padded = jnp.pad(flat, ((0, -len(flat) % chunk), (0, 0))).reshape(-1, chunk, x.shape[-1])
    expected = jax.lax.map(lambda x: expect(unembed(params, config, x)), padded)
    return expected.reshape(-1, x.shape[-1])[: len(flat)].reshape(x.shape)


def trunk_with_routing(
    params: Any, config: Config, x: jax.Array, positions: jax.Array, valid: jax.Array
) -> tuple[jax.Array, list]:
    """`trunk` without cache, and each layer's router choice (probabilities `[T, E]`, ids `[T, J]`), for training."""
    (x, _), collected = LLaDAMoE(config).apply({"params": params}, x, positions, valid, method="trunk", mutable=["routing"])
    return x, [collected["routing"][f"layer_{n}"]["choice"][0] for n in range(config.layers)]


def back_ends(config: Config, platform: str) -> dict[str, str]:
    """Which form of each layer a program for this platform has, for people to read."""
    forms = {
        "tiles": "the chosen ones, in tiles",
        "dense": "all of them on every token",
        "kernel": f"Pallas kernels of the chosen ones for over {moe.DENSE} tokens at once, else all of them on every token",
    }
    platform = "cuda" if platform == "gpu" else platform
    experts = moe.form(platform, moe.DENSE + 1, (config.experts, config.width, 2 * config.expert_width))
    fused = platform == "cuda" and suits(config.head_dim)
    return {"experts": forms[experts], "attention": "one Pallas kernel" if fused else "XLA's products"}


def empty_cache(params: Any, config: Config, batch: int, length: int) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Zeroed keys and values of a canvas: one (k, v) a layer, `[B, G, L * K]` in the parameters' dtype."""
    shape = (batch, config.groups, length * config.head_dim)
    dtype = params["embedding"].dtype
    return tuple((by_head(jnp.zeros(shape, dtype)), by_head(jnp.zeros(shape, dtype))) for _ in range(config.layers))
