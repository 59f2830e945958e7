"""The model whose speed is measured: LLaDA-MoE's architecture at a size that two CPU cores can run, with random weights.

Its prompts are real ones, cut into tokens by a byte-level BPE trained on them: what a decode costs depends on how many tokens
there are and on which experts they choose, not on what they say.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

HF: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "expert_intermediate_size": 256,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "rope_theta": 50000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
}
MASK, EOS = 31999, 31998


def model(dtype: str = "float32") -> Any:
    """The same weights in every process, rounded to the dtype."""
    import djax
    from djax.models import llada_moe

    config = llada_moe.Config.from_hf(HF, mask_id=MASK, eos_id=EOS)
    params = llada_moe.FAMILY.init(config, jax.random.key(0))
    return djax.Model(llada_moe.FAMILY, config, jax.tree.map(lambda a: a.astype(dtype), params), None, HF, {})


def tensors(model: Any) -> dict[str, np.ndarray]:
    """Its weights by the names of transformers' Qwen3-MoE."""
    from flax import traverse_util

    from djax.convert import rules
    from djax.models import llada_moe

    flat = traverse_util.flatten_dict(jax.device_get(model.params))
    table = sorted(llada_moe.FAMILY.layouts(model.config)["fused"], key=lambda rule: rule.target)
    new = {"mlp.w1": "mlp.experts.gate_up_proj", "mlp.w2": "mlp.experts.down_proj"}
    out = {}
    for name, tensor in rules.unload(table, lambda path: flat[path]):
        for ours, theirs in new.items():
            name = name.replace(ours, theirs)
        out[name] = tensor
    return out


def prompts() -> dict[str, list[list[int]]]:
    """Token ids of the prompts in prompts/, by where they come from."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    lines = (Path(__file__).parent / "prompts" / "prompts.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(line) for line in lines]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=EOS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([t["prompt"] for t in texts], trainer)
    out: dict[str, list[list[int]]] = {}
    for t in texts:
        out.setdefault(t["from"], []).append(tokenizer.encode(t["prompt"]).ids)
    return out
