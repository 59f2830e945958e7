"""LLaDA-MoE (inclusionAI/LLaDA-MoE-7B-A1B): every layer is bidirectional attention with normalised heads, then experts.

Sources: the HF model code and dInfer's `modeling_llada_moe` for the order of operations.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from djax.convert import llada_moe
from djax.kernels.experts import experts
from djax.kernels.weights import values
from djax.models import moe
from djax.models.family import Family
from djax.models.hf import EndIds, Reader
from djax.models.transformer import Layer, Transformer

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
class Config(EndIds):
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
        read = Reader("LLaDA-MoE", hf, _OFF)
        frequencies = hf.get("moe_layer_freq")
        if frequencies is not None and (not isinstance(frequencies, list) or any(f != 1 for f in frequencies)):
            read.wrong.append(f"moe_layer_freq={frequencies!r} (implemented: every layer is MoE)")
        heads, width = read("num_attention_heads", int), read("hidden_size", int)
        config = cls(
            vocab=read("vocab_size", int),
            width=width,
            layers=read("num_hidden_layers", int),
            heads=heads,
            groups=read("num_key_value_heads", int, heads),
            head_dim=read("head_dim", int, width // heads),
            expert_width=read("expert_intermediate_size", int),
            experts=read("num_experts", int),
            top=read("num_experts_per_tok", int),
            renormalise=read.flag("norm_topk_prob"),
            rope_theta=read.rope_theta(),
            eps=read("rms_norm_eps", float),
            max_positions=read("max_position_embeddings", int),
            # config.json has no mask id. The tokenizer has; these are the model card's, for checkpoints without one.
            mask_id=mask_id,
            eos_id=eos_id,
            more_eos_ids=more_eos_ids,
        )
        read.heads(config.heads, config.groups, config.head_dim)
        read.experts(config.experts, config.top)
        read.sizes(config.layers, config.experts)
        if read.rotated(config.head_dim) != config.head_dim:
            read.wrong.append("rope_parameters.partial_rotary_factor (implemented: 1)")
        read.parameter(config.vocab, width)
        read.parameter(width, heads + 2 * config.groups, config.head_dim)
        read.parameter(config.experts, width, 2, config.expert_width)
        read.done()
        return config


class LLaDAMoE(Transformer):
    """Every layer is alike."""

    config: Config

    def layer(self, n: int) -> "MoELayer":
        return MoELayer(self.config, self.dtype, name=f"layer_{n}")


class MoELayer(Layer):
    """The feed-forward part is experts, chosen by a softmax over all of them."""

    config: Config

    def feed_forward(self, h: jax.Array, valid: jax.Array) -> jax.Array:
        c = self.config
        flat = h.reshape(-1, c.width)
        router = self.matrix("router", (c.width, c.experts), ("embed", None), c.width)
        w_in = self.matrix("w_in", (c.experts, c.width, 2 * c.expert_width), ("expert", "embed", None), c.width)
        w_out = self.matrix("w_out", (c.experts, c.expert_width, c.width), ("expert", None, "embed"), c.expert_width)
        routing = moe.route(flat, values(router), c.top, c.renormalise)
        # Collected only where a caller asks for it (the trainer's load-balancing loss).
        self.sow("routing", "choice", (routing.probs, routing.ids))
        return experts(flat, routing, w_in, w_out, valid.reshape(-1)).reshape(h.shape)


FAMILY = Family(
    name="llada_moe",
    architectures=("LLaDAMoEModelLM", "LLaDAMoEModel"),
    config_type=Config,
    network=LLaDAMoE,
    layouts=llada_moe.layouts,
    # config.json has no mask id. The tokenizer has; these are the model card's, for checkpoints without one.
    mask_id=156895,
    eos_id=156892,
    has_experts=True,
)
