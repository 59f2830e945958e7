"""Where each tensor of a LLaDA-MoE checkpoint goes: HF's layout, and dInfer's with stacked experts."""

from typing import Protocol

import numpy as np

from djax.convert.rules import AttentionShape, Rule


class Shape(AttentionShape, Protocol):
    """What the tables read of the family's Config besides."""

    @property
    def experts(self) -> int: ...
    @property
    def expert_width(self) -> int: ...


def layouts(c: Shape) -> dict[str, list[Rule]]:
    """hf: as published, three matrices an expert. fused: dInfer's `tools/transfer`, w1 `[E, 2F, D]` (gate rows, then up
    rows) and w2 `[E, D, F]` a layer. The first is what an export writes."""
    return {"hf": _rest(c) + _experts(c), "fused": _rest(c) + _stacked_experts(c)}


def _rest(c: Shape) -> list[Rule]:
    queries, keys = c.heads * c.head_dim, c.groups * c.head_dim
    per_group = c.heads // c.groups
    rules = [
        Rule("model.embed_tokens.weight", (c.vocab, c.width), ("embedding",), transpose=False),
        Rule("model.norm.weight", (c.width,), ("norm",)),
        Rule("lm_head.weight", (c.vocab, c.width), ("head",)),
    ]
    for n in range(c.layers):
        layer, hf = f"layer_{n}", f"model.layers.{n}"
        rules += [
            Rule(f"{hf}.input_layernorm.weight", (c.width,), (layer, "attention_norm")),
            Rule(f"{hf}.post_attention_layernorm.weight", (c.width,), (layer, "ffn_norm")),
            Rule(f"{hf}.self_attn.q_proj.weight", (queries, c.width), (layer, "qkv"), np.s_[:, :, :per_group]),
            Rule(f"{hf}.self_attn.k_proj.weight", (keys, c.width), (layer, "qkv"), np.s_[:, :, per_group]),
            Rule(f"{hf}.self_attn.v_proj.weight", (keys, c.width), (layer, "qkv"), np.s_[:, :, per_group + 1]),
            Rule(f"{hf}.self_attn.o_proj.weight", (c.width, queries), (layer, "o")),
            Rule(f"{hf}.self_attn.q_norm.weight", (c.head_dim,), (layer, "q_norm")),
            Rule(f"{hf}.self_attn.k_norm.weight", (c.head_dim,), (layer, "k_norm")),
            Rule(f"{hf}.mlp.gate.weight", (c.experts, c.width), (layer, "router")),
        ]
    return rules


def _experts(c: Shape) -> list[Rule]:
    gate, up = slice(0, c.expert_width), slice(c.expert_width, 2 * c.expert_width)
    rules = []
    for n in range(c.layers):
        for e in range(c.experts):
            hf = f"model.layers.{n}.mlp.experts.{e}"
            w_in, w_out = (f"layer_{n}", "w_in"), (f"layer_{n}", "w_out")
            rules += [
                Rule(f"{hf}.gate_proj.weight", (c.expert_width, c.width), w_in, np.s_[e, :, gate]),
                Rule(f"{hf}.up_proj.weight", (c.expert_width, c.width), w_in, np.s_[e, :, up]),
                Rule(f"{hf}.down_proj.weight", (c.width, c.expert_width), w_out, np.s_[e]),
            ]
    return rules


def _stacked_experts(c: Shape) -> list[Rule]:
    rules = []
    for n in range(c.layers):
        hf = f"model.layers.{n}.mlp"
        rules += [
            Rule(f"{hf}.w1", (c.experts, 2 * c.expert_width, c.width), (f"layer_{n}", "w_in")),
            Rule(f"{hf}.w2", (c.experts, c.width, c.expert_width), (f"layer_{n}", "w_out")),
        ]
    return rules
