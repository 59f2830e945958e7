"""A second opinion on the forward: transformers' Qwen3-MoE, made bidirectional, on the same random weights.

Same architecture as LLaDA-MoE: normalised heads before rotary, softmax over all experts, no renormalisation.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import djax

torch = pytest.importorskip("torch", reason="torch is an optional test dependency (pip install torch)")
SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=6,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize("renormalise", [False, True])
def test_logits_equal_qwen3_moe(tmp_path, renormalise):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **SIZES,
        head_dim=8,
        moe_intermediate_size=24,
        norm_topk_prob=renormalise,
        rope_parameters={"rope_theta": 5e4, "rope_type": "default"},
    )
    config._attn_implementation = "eager"
    theirs = Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)  # norms away from 1, logits of a few units
    names = {"mlp.experts.gate_up_proj": "mlp.w1", "mlp.experts.down_proj": "mlp.w2"}
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        tensors[name] = tensor.numpy().copy()
    save_file(tensors, tmp_path / "model.safetensors")
    ours = SIZES | {"architectures": ["LLaDAMoEModelLM"], "expert_intermediate_size": 24, "head_dim": 8, "rope_theta": 5e4}
    ours |= {"norm_topk_prob": renormalise, "mask_token_id": 95, "eos_token_id": 94, "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(ours))

    tokens = np.random.default_rng(0).integers(0, 94, (2, 33))
    with torch.no_grad():
        nobody_hidden = torch.zeros(2, 1, 33, 33)
        expected = theirs(torch.from_numpy(tokens), attention_mask=nobody_hidden).logits.numpy()
        causal = theirs(torch.from_numpy(tokens)).logits.numpy()
    logits = np.asarray(djax.logits(djax.load(tmp_path), tokens))
    np.testing.assert_allclose(logits, expected, atol=3e-4)
    assert np.abs(logits - causal).max() > 0.1, "the comparison would notice a causal mask"
