"""LLaDA (GSAI-ML/LLaDA-8B, LLaDA-1.5) and what shares its code: a dense bidirectional transformer without normalised heads.

Source: the HF model code of LLaDA-8B. dInfer
caches keys before rotary and turns them at every call; here they are cached turned, which is the same number at less work.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from djax.convert import llada
from djax.models.family import Family
from djax.models.hf import EndIds, Reader
from djax.models.transformer import Layer, Transformer

# Values that every LLaDA leaves so. Anything else changes the forward pass, so it is refused, not ignored.
_ONLY = {
    "block_type": ("llama",),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True, None),
    "block_group_size": (1, None),
    "rope": (True,),
    "rope_full_precision": (True,),
    "rope_scaling": (None,),
    "alibi": (False, None),
    "attention_layer_norm": (False, None),
    "bias_for_layer_norm": (False, None),
    "include_bias": (False, None),
    "include_qkv_bias": (False, None),
    "input_emb_norm": (False, None),
    "multi_query_attention": (None, False),
    "scale_logits": (False, None),
    "weight_tying": (False,),
}


@dataclasses.dataclass(frozen=True)
class Config(EndIds):
    """Shape and constants of a LLaDA; hashable, so it is static to `jit`. Letters as in the README."""

    vocab: int  # V
    width: int  # D
    layers: int  # N
    heads: int  # H
    groups: int  # G, key/value heads
    head_dim: int  # K
    mlp_width: int  # F
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
        read = Reader("LLaDA", hf, _ONLY)
        heads, width = read("n_heads", int), read("d_model", int)
        if width % heads:
            read.wrong.append(f"n_heads={heads} (expected: a divisor of d_model={width})")
        vocab = read("vocab_size", int)
        config = cls(
            vocab=read("embedding_size", int, vocab),
            width=width,
            layers=read("n_layers", int),
            heads=heads,
            groups=read("n_kv_heads", int, heads),
            head_dim=width // heads,
            mlp_width=read("mlp_hidden_size", int, width * read("mlp_ratio", int, 4)),
            rope_theta=read.rope_theta(),
            eps=read("rms_norm_eps", float, 1e-5),
            max_positions=read("max_sequence_length", int),
            mask_id=mask_id,
            eos_id=eos_id,
            more_eos_ids=more_eos_ids,
        )
        read.heads(config.heads, config.groups, config.head_dim)
        read.sizes(config.layers)
        read.parameter(config.vocab, width)
        read.parameter(width, 2, config.mlp_width)
        read.parameter(width, heads + 2 * config.groups, config.head_dim)
        read.done()
        return config


class LLaDA(Transformer):
    """Every layer is alike."""

    config: Config

    full_rotary = True

    def layer(self, n: int) -> "DenseLayer":
        return DenseLayer(self.config, self.dtype, name=f"layer_{n}")


class DenseLayer(Layer):
    """The feed-forward part is one gated MLP."""

    config: Config

    head_norms = False

    def feed_forward(self, h: jax.Array, valid: jax.Array) -> jax.Array:
        return self.mlp("mlp", h, self.config.mlp_width)


FAMILY = Family(
    name="llada",
    architectures=("LLaDAModelLM",),
    config_type=Config,
    network=LLaDA,
    layouts=llada.layouts,
    mask_id=126336,
    eos_id=126081,
)
