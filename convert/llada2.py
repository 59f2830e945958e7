"""Where each tensor of a LLaDA2 checkpoint goes (inclusionAI/LLaDA2.0-mini, -flash, 2.1): queries, keys and values are one
matrix, all queries first, and a head's features are put into the order in which djax rotates them."""

from typing import Protocol

import numpy as np

from djax.convert.rules import AttentionShape, Rule


class Shape(AttentionShape, Protocol):
    """What the tables read of the family's Config besides."""

    @property
    def experts(self) -> int: ...
    @property
    def expert_width(self) -> int: ...
    @property
    def dense_layers(self) -> int: ...
    @property
    def dense_width(self) -> int: ...
    @property
    def rotated(self) -> int: ...


def layouts(c: Shape) -> dict[str, list[Rule]]:
    """hf: as published."""
    rules = [
        Rule("model.word_embeddings.weight", (c.vocab, c.width), ("embedding",), transpose=False),
        Rule("model.norm.weight", (c.width,), ("norm",)),
        Rule("lm_head.weight", (c.vocab, c.width), ("head",)),
    ]
    for n in range(c.layers):
        rules += _attention(c, f"layer_{n}", f"model.layers.{n}")
        rules += (_mlp if n < c.dense_layers else _experts)(c, f"layer_{n}", f"model.layers.{n}.mlp")
    return {"hf": rules}


def _attention(c: Shape, layer: str, hf: str) -> list[Rule]:
    queries, keys, per_group = c.heads * c.head_dim, c.groups * c.head_dim, c.heads // c.groups
    name, shape, qkv = f"{hf}.attention.query_key_value.weight", (queries + 2 * keys, c.width), (layer, "qkv")
    turned = tuple(order_rotated(c.head_dim, c.rotated))
    cuts = slice(0, queries), slice(queries, queries + keys), slice(queries + keys, queries + 2 * keys)
    return [
        Rule(f"{hf}.input_layernorm.weight", (c.width,), (layer, "attention_norm")),
        Rule(f"{hf}.post_attention_layernorm.weight", (c.width,), (layer, "ffn_norm")),
        Rule(name, shape, qkv, np.s_[:, :, :per_group], rows=cuts[0], order=turned),
        Rule(name, shape, qkv, np.s_[:, :, per_group], rows=cuts[1], order=turned),
        Rule(name, shape, qkv, np.s_[:, :, per_group + 1], rows=cuts[2]),
        Rule(f"{hf}.attention.dense.weight", (c.width, queries), (layer, "o")),
        Rule(f"{hf}.attention.query_layernorm.weight", (c.head_dim,), (layer, "q_norm"), order=turned),
        Rule(f"{hf}.attention.key_layernorm.weight", (c.head_dim,), (layer, "k_norm"), order=turned),
    ]


def _mlp(c: Shape, layer: str, hf: str) -> list[Rule]:
    return _gated(layer, hf, "mlp", c.width, c.dense_width)


def _gated(layer: str, hf: str, name: str, width: int, inner: int) -> list[Rule]:
    return [
        Rule(f"{hf}.gate_proj.weight", (inner, width), (layer, f"{name}_in"), np.s_[:, 0]),
        Rule(f"{hf}.up_proj.weight", (inner, width), (layer, f"{name}_in"), np.s_[:, 1]),
        Rule(f"{hf}.down_proj.weight", (width, inner), (layer, f"{name}_out")),
    ]


def _experts(c: Shape, layer: str, hf: str) -> list[Rule]:
    gate, up = slice(0, c.expert_width), slice(c.expert_width, 2 * c.expert_width)
    rules = [
        Rule(f"{hf}.gate.weight", (c.experts, c.width), (layer, "router")),
        Rule(f"{hf}.gate.expert_bias", (c.experts,), (layer, "router_bias")),
        *_gated(layer, f"{hf}.shared_experts", "shared", c.width, c.expert_width),
    ]
    for e in range(c.experts):
        expert = f"{hf}.experts.{e}"
        rules += [
            Rule(f"{expert}.gate_proj.weight", (c.expert_width, c.width), (layer, "w_in"), np.s_[e, :, gate]),
            Rule(f"{expert}.up_proj.weight", (c.expert_width, c.width), (layer, "w_in"), np.s_[e, :, up]),
            Rule(f"{expert}.down_proj.weight", (c.width, c.expert_width), (layer, "w_out"), np.s_[e]),
        ]
    return rules


def order_rotated(head_dim: int, rotated: int) -> list[int]:
    """Where a head's features come from if HF turns its first `rotated` ones, half-split, and leaves the rest: our order has
    in each half what is turned first, so that rotary needs no cutting and joining. Scores are sums; the order is free."""
    turned, rest = rotated // 2, (head_dim - rotated) // 2
    halves = ([*range(n * turned, (n + 1) * turned), *range(rotated + n * rest, rotated + (n + 1) * rest)] for n in (0, 1))
    return [feature for half in halves for feature in half]
