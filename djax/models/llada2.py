"""LLaDA2.0 and 2.1 (inclusionAI/LLaDA2.0-mini, -flash): block diffusion over a mixture of experts.

A block of positions sees itself and the blocks before it, never a later one. The first layers are dense; the others have
experts chosen by sigmoid scores within the best groups of experts, and one expert that every token shares. Sources: the HF
model code and dInfer's `modeling_llada2_moe` for the order of operations.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from djax.convert import llada2
from djax.kernels.experts import experts
from djax.kernels.weights import values
from djax.models import moe
from djax.models.family import Family
from djax.models.hf import EndIds, Reader
from djax.models.transformer import Layer, Transformer, box

# Values that LLaDA2 leaves so. Anything else changes the forward pass, so it is refused, not ignored.
_ONLY = {
    "hidden_act": ("silu",),
    "use_qk_norm": (True,),
    "use_qkv_bias": (False, None),
    "use_bias": (False, None),
    "attention_bias": (False, None),
    "rope_scaling": (None,),
    "tie_word_embeddings": (False, None),
    "score_function": ("sigmoid", None),
    "moe_router_enable_expert_bias": (True,),
    "norm_topk_prob": (True,),
    "norm_head": (False, None),
    "norm_softmax": (False, None),
    "use_sliding_window": (False, None),
    "num_shared_experts": (1,),
}


@dataclasses.dataclass(frozen=True)
class Config(EndIds):
    """Shape and constants of a LLaDA2; hashable, so it is static to `jit`. Letters as in the README."""

    vocab: int  # V
    width: int  # D
    layers: int  # N
    heads: int  # H
    groups: int  # G, key/value heads
    head_dim: int  # K
    rotated: int  # how many of a head's features rotary turns
    dense_layers: int  # the first ones, without experts
    dense_width: int  # of their MLP
    expert_width: int  # F, of the shared one, too
    experts: int  # E
    top: int  # experts a token
    expert_groups: int
    top_groups: int  # groups a token chooses its experts from
    router_scale: float
    rope_theta: float
    eps: float
    max_positions: int
    mask_id: int
    eos_id: int
    more_eos_ids: tuple[int, ...] = ()

    @classmethod
    def from_hf(
        cls,
        hf: Mapping[str, Any],
        mask_id: int,
        eos_id: int,
        more_eos_ids: tuple[int, ...] = (),
    ) -> "Config":
        """Read HF's config.json. Raises `UnsupportedModelError` naming every absent, malformed or unimplemented setting."""
        read = Reader("LLaDA2", hf, _ONLY)
        heads, width = read("num_attention_heads", int), read("hidden_size", int)
        head_dim = read("head_dim", int, width // heads)
        experts, groups = read("num_experts", int), read("n_group", int, 1)
        config = cls(
            vocab=read("vocab_size", int),
            width=width,
            layers=read("num_hidden_layers", int),
            heads=heads,
            groups=read("num_key_value_heads", int, heads),
            head_dim=head_dim,
            rotated=read.rotated(head_dim),
            dense_layers=0 if hf.get("first_k_dense_replace") == 0 else read("first_k_dense_replace", int),
            dense_width=read("intermediate_size", int),
            expert_width=read("moe_intermediate_size", int),
            experts=experts,
            top=read("num_experts_per_tok", int),
            expert_groups=groups,
            top_groups=read("topk_group", int, groups),
            router_scale=read("routed_scaling_factor", float, 1.0),
            rope_theta=read.rope_theta(),
            eps=read("rms_norm_eps", float),
            max_positions=read("max_position_embeddings", int),
            mask_id=mask_id,
            eos_id=eos_id,
            more_eos_ids=more_eos_ids,
        )
        read.heads(config.heads, config.groups, config.head_dim)
        if config.rotated % 2 or config.rotated > head_dim:
            read.wrong.append(f"partial_rotary_factor: {config.rotated} of {head_dim} features (expected: an even part)")
        if experts % groups or config.top_groups > groups or experts // groups < min(2, experts):
            read.wrong.append(
                f"n_group={groups}, topk_group={config.top_groups} (expected: topk_group of the n_group equal parts, of two or "
                f"more, of num_experts={experts})"
            )
        else:
            read.experts(config.top_groups * experts // groups, config.top)
        read.sizes(config.layers, config.experts)
        read.parameter(config.vocab, width)
        read.parameter(width, heads + 2 * config.groups, head_dim)
        read.parameter(width, 2, config.dense_width)
        read.parameter(experts, width, 2, config.expert_width)
        read.done()
        return config


class LLaDA2(Transformer):
    """Dense layers first, then layers with experts."""

    config: Config

    @property
    def rotated(self) -> int:
        return self.config.rotated

    def layer(self, n: int) -> Layer:
        kind = DenseLayer if n < self.config.dense_layers else MoELayer
        return kind(self.config, self.dtype, name=f"layer_{n}")


class DenseLayer(Layer):
    """The feed-forward part is one gated MLP."""

    config: Config

    def feed_forward(self, h: jax.Array, valid: jax.Array) -> jax.Array:
        return self.mlp("mlp", h, self.config.dense_width)


class MoELayer(Layer):
    """The feed-forward part is the chosen experts and the shared one."""

    config: Config

    def feed_forward(self, h: jax.Array, valid: jax.Array) -> jax.Array:
        c = self.config
        flat = h.reshape(-1, c.width)
        router = self.matrix("router", (c.width, c.experts), ("embed", None), c.width)
        # Float32 in a narrower model, too: it decides between scores that differ by little.
        bias = self.param("router_bias", box(nn.initializers.zeros, (None,)), (c.experts,), jnp.float32)
        w_in = self.matrix("w_in", (c.experts, c.width, 2 * c.expert_width), ("expert", "embed", None), c.width)
        w_out = self.matrix("w_out", (c.experts, c.expert_width, c.width), ("expert", None, "embed"), c.expert_width)
        routing = moe.route_in_groups(flat, values(router), bias, c.top, c.expert_groups, c.top_groups, c.router_scale)
        self.sow("routing", "choice", (routing.probs, routing.ids))
        y = experts(flat, routing, w_in, w_out, valid.reshape(-1)).reshape(h.shape)
        return y + self.mlp("shared", h, c.expert_width)


FAMILY = Family(
    name="llada2",
    architectures=("LLaDA2MoeModelLM", "LLaDA2MoeModel"),
    config_type=Config,
    network=LLaDA2,
    layouts=llada2.layouts,
    mask_id=156895,
    eos_id=156892,
    visibility="blocks",
    has_experts=True,
)
