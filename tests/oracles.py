"""transformers' own models of the nearest architectures, with a checkpoint's weights and masks of ours: each family's oracle.

`python tests/oracles.py` writes goldens/oracles.npz, what they give for the weights of seed 0, for where there is no torch;
test_torch_parity.py compares the two where there is.
"""

import json
import re
import tempfile
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from djax.checkpoints.source import describe

FILE = Path(__file__).parent / "goldens" / "oracles.npz"
# An eps that is seen in the logits. Everything else as small as it can be with nothing left out.
SHARED = {"vocab_size": 48, "mask_token_id": 47, "eos_token_id": 46, "rms_norm_eps": 0.01, "torch_dtype": "float32"}
ROPE_THETA = 50000.0
HF = SHARED | {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rope_theta": ROPE_THETA,
}
LLADA_MOE = HF | {
    "architectures": ["LLaDAMoEModelLM"],
    "num_hidden_layers": 2,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "expert_intermediate_size": 24,
    "norm_topk_prob": False,
}
LLADA = SHARED | {
    "architectures": ["LLaDAModelLM"],
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "mlp_hidden_size": 48,
    "max_sequence_length": 64,
    "rope_theta": ROPE_THETA,
}
LLADA2 = HF | {
    "architectures": ["LLaDA2MoeModelLM"],
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "partial_rotary_factor": 0.5,
}
CONFIGS = {
    "llada_moe": LLADA_MOE,
    "llada_moe_renormalised": LLADA_MOE | {"norm_topk_prob": True},
    "llada": LLADA,
    "llada2": LLADA2,
}
# Lengths of the blocks whose positions see them and the earlier ones; None lets all see all. 4 leaves a last block of 2.
BLOCKS = {"llada_moe": (None,), "llada_moe_renormalised": (None,), "llada": (None,), "llada2": (None, 4, 1)}
TOKENS = np.random.RandomState(0).randint(0, SHARED["vocab_size"], (2, 14))


def checkpoint(directory, case, seed=0):
    """Write a case in HF layout and return its tensors: 256ths that numpy's frozen generator draws, by their names."""
    (directory / "config.json").write_text(json.dumps(CONFIGS[case]))
    family, config, *_ = describe(directory)
    tensors = {}
    for source, shape in {rule.source: rule.shape for rule in family.layouts(config)["hf"]}.items():
        drawn = np.random.RandomState(zlib.crc32(f"{seed} {source}".encode())).randint(-96, 97, shape) / 256
        around = 1 if len(shape) == 1 and not source.endswith("bias") else 0  # a norm's scales
        tensors[source] = (drawn + around).astype(np.float32)
    save_file(tensors, directory / "model.safetensors")
    return tensors


# Class names of transformers, and our config's keys as theirs; those in neither mean the same or nothing.
MODELS = {
    "LLaDAMoEModelLM": ("Qwen3Moe", {"expert_intermediate_size": "moe_intermediate_size"}),
    "LLaDAModelLM": (
        "Llama",
        {
            "d_model": "hidden_size",
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "n_kv_heads": "num_key_value_heads",
            "mlp_hidden_size": "intermediate_size",
            "max_sequence_length": "max_position_embeddings",
        },
    ),
    "LLaDA2MoeModelLM": ("Glm4Moe", {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}),
}
# Our tensors' names as theirs: of the dense family, then of LLaDA2.
NAMES = {
    r"^model\.transformer\.wte": "model.embed_tokens",
    r"^model\.transformer\.ln_f": "model.norm",
    r"^model\.transformer\.ff_out": "lm_head",
    r"^model\.transformer\.blocks": "model.layers",
    r"\.attn_norm": ".input_layernorm",
    r"\.ff_norm": ".post_attention_layernorm",
    r"(\d)\.([qkv]_proj)": r"\1.self_attn.\2",
    r"\.attn_out": ".self_attn.o_proj",
    r"\.ff_proj": ".mlp.gate_proj",
    r"(\d)\.up_proj": r"\1.mlp.up_proj",
    r"\.ff_out": ".mlp.down_proj",
    r"^model\.word_embeddings": "model.embed_tokens",
    r"\.attention\.dense": ".self_attn.o_proj",
    r"\.attention\.query_layernorm": ".self_attn.q_norm",
    r"\.attention\.key_layernorm": ".self_attn.k_norm",
    r"\.expert_bias": ".e_score_correction_bias",
}


def oracle(case, tensors, **changed):
    """transformers' model with these weights. changed: settings, by our names, that it has otherwise."""
    import torch
    import transformers

    hf = CONFIGS[case] | changed
    name, keys = MODELS[hf["architectures"][0]]
    rope = {"rope_type": "default", **{k: hf[k] for k in ("rope_theta", "partial_rotary_factor") if k in hf}}
    ours = ("architectures", "rope_theta", "partial_rotary_factor", "mask_token_id", "eos_token_id", "torch_dtype")
    settings = {keys.get(key, key): value for key, value in hf.items() if key not in ours}
    if name == "Glm4Moe":
        settings = {"use_qk_norm": True, "num_nextn_predict_layers": 0} | settings
    config = getattr(transformers, f"{name}Config")(**settings, rope_parameters=rope, tie_word_embeddings=False)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    state = {name: torch.from_numpy(np.ascontiguousarray(tensor)) for name, tensor in as_theirs(tensors, hf).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing, missing
    assert all("_norm" in name for name in unexpected) and (not unexpected or "use_qk_norm" in changed), unexpected
    return model


def as_theirs(tensors, hf):
    """Our tensors with their names: queries, keys and values apart, experts stacked, gate rows first."""
    out, experts = {}, defaultdict(dict)
    for name, tensor in tensors.items():
        if name.endswith("query_key_value.weight"):
            queries, keys = (hf[key] * hf["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
            parts = np.split(tensor, (queries, queries + keys))
            layer = name.removesuffix("attention.query_key_value.weight")
            out |= {f"{layer}self_attn.{part}_proj.weight": rows for part, rows in zip("qkv", parts, strict=True)}
        elif found := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name):
            experts[found[1], found[3]][int(found[2])] = tensor
        else:
            for ours, theirs in NAMES.items():
                name = re.sub(ours, theirs, name)
            out[name] = tensor
    stacks = {key: np.stack([part[e] for e in range(len(part))]) for key, part in experts.items()}
    for where in {where for where, _ in stacks}:
        out[f"{where}.gate_up_proj"] = np.concatenate([stacks[where, "gate_proj"], stacks[where, "up_proj"]], axis=1)
        out[f"{where}.down_proj"] = stacks[where, "down_proj"]
    return out


def logits(model, block):
    """Of TOKENS, float32 `[2, 14, V]`, each position seeing its block of this length and those before it, or all."""
    import torch

    at = np.arange(TOKENS.shape[1]) // (block or TOKENS.shape[1])
    # A four-dimensional mask stands in place of the causal one. It is added to the scores.
    mask = np.where(at[:, None] >= at[None, :], 0, np.finfo(np.float32).min).astype(np.float32)
    mask = torch.from_numpy(mask).expand(len(TOKENS), 1, *mask.shape)
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS), attention_mask=mask).logits.numpy()


def record():
    """What is in the file: by case, the logits under each of its masks."""
    figures = {}
    for case in CONFIGS:
        with tempfile.TemporaryDirectory() as directory:
            model = oracle(case, checkpoint(Path(directory), case))
        figures |= {f"{case}/{block}": logits(model, block) for block in BLOCKS[case]}
    return figures


if __name__ == "__main__":
    np.savez_compressed(FILE, **record())
