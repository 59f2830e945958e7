"""Where each tensor of a LLaDA checkpoint goes (GSAI-ML/LLaDA-8B, LLaDA-1.5): OLMo's names, whose `ff_out` is the head
at the top and an MLP's second matrix in a block."""

from typing import Protocol

import numpy as np

from djax.convert.rules import AttentionShape, Rule


class Shape(AttentionShape, Protocol):
    """What the tables read of the family's Config besides."""

    @property
    def mlp_width(self) -> int: ...


def layouts(c: Shape) -> dict[str, list[Rule]]:
    """hf: as published."""
    queries, keys, per_group = c.heads * c.head_dim, c.groups * c.head_dim, c.heads // c.groups
    top = "model.transformer"
    rules = [
        Rule(f"{top}.wte.weight", (c.vocab, c.width), ("embedding",), transpose=False),
        Rule(f"{top}.ln_f.weight", (c.width,), ("norm",)),
        Rule(f"{top}.ff_out.weight", (c.vocab, c.width), ("head",)),
    ]
    for n in range(c.layers):
        layer, hf = f"layer_{n}", f"{top}.blocks.{n}"
        rules += [
            Rule(f"{hf}.attn_norm.weight", (c.width,), (layer, "attention_norm")),
            Rule(f"{hf}.ff_norm.weight", (c.width,), (layer, "ffn_norm")),
            Rule(f"{hf}.q_proj.weight", (queries, c.width), (layer, "qkv"), np.s_[:, :, :per_group]),
            Rule(f"{hf}.k_proj.weight", (keys, c.width), (layer, "qkv"), np.s_[:, :, per_group]),
            Rule(f"{hf}.v_proj.weight", (keys, c.width), (layer, "qkv"), np.s_[:, :, per_group + 1]),
            Rule(f"{hf}.attn_out.weight", (c.width, queries), (layer, "o")),
            Rule(f"{hf}.ff_proj.weight", (c.mlp_width, c.width), (layer, "mlp_in"), np.s_[:, 0]),
            Rule(f"{hf}.up_proj.weight", (c.mlp_width, c.width), (layer, "mlp_in"), np.s_[:, 1]),
            Rule(f"{hf}.ff_out.weight", (c.width, c.mlp_width), (layer, "mlp_out")),
        ]
    return {"hf": rules}
