"""The published models as their config.json describes them: as many parameters and bytes as are published, all of them filled
from HF's tensors. Shapes alone; nothing is allocated.
"""

import dataclasses
import math
import re

import jax.numpy as jnp
import pytest

from djax.benchmarks.compile import LLADA_MOE_7B
from djax.checkpoints.source import shapes
from djax.convert import rules
from djax.errors import CheckpointError
from djax.models import llada, llada2, llada_moe
from djax.models.family import Family

LLADA2 = {
    "vocab_size": 157184,
    "head_dim": 128,
    "num_key_value_heads": 4,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "router_dtype": "fp32",
    "rms_norm_eps": 1e-6,
    "rope_theta": 600000,
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_bias": False,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
}


@dataclasses.dataclass(frozen=True)
class Published:
    """hf: config.json, as far as it says anything about the forward. total: billions of parameters, as they are given.
    tensors: how many the checkpoint has. parameters: counted by hand. wide: how many stay float32 in a bfloat16 model."""

    family: Family
    hf: dict
    total: str
    tensors: int
    parameters: int
    wide: int = 0


def by_hand(vocab, width, dense_layers, dense_width, moe_layers, expert_width, heads, groups, head_dim):
    """LLaDA2's parameters: embedding and head, last norm, attention with its norms, dense MLPs; experts, the shared one, router
    and bias."""
    attention = width * head_dim * (2 * heads + 2 * groups) + 2 * head_dim + 2 * width
    experts = 257 * 3 * width * expert_width + 256 * width + 256
    layers = dense_layers + moe_layers
    return 2 * vocab * width + width + layers * attention + dense_layers * 3 * width * dense_width + moe_layers * experts


MODELS = {
    "LLaDA-MoE-7B-A1B": Published(
        llada_moe.FAMILY,
        LLADA_MOE_7B
        | {
            "moe_layer_freq": [1] * 16,
            "dense_intermediate_size": 8192,
            "shared_expert_intermediate_size": None,
            "qk_layernorm": True,
            "norm_topk_prob": False,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
        },
        "7.4",
        3 + 16 * 201,
        # Embedding and head, last norm; per layer attention, experts, router, norms of the layer and of heads.
        2 * 157184 * 2048 + 2048 + 16 * (4 * 2048**2 + 64 * 3 * 2048 * 1024 + 64 * 2048 + 2 * 2048 + 2 * 128),
    ),
    "LLaDA-8B": Published(
        llada.FAMILY,
        {
            "d_model": 4096,
            "n_layers": 32,
            "n_heads": 32,
            "n_kv_heads": 32,
            "mlp_hidden_size": 12288,
            "mlp_ratio": 4,
            "vocab_size": 126464,
            "embedding_size": 126464,
            "max_sequence_length": 4096,
            "rope_theta": 500000.0,
            "rms_norm_eps": 1e-5,
            "block_type": "llama",
            "activation_type": "silu",
            "layer_norm_type": "rms",
            "rope": True,
            "rope_full_precision": True,
            "include_bias": False,
            "weight_tying": False,
        },
        "8.0",
        3 + 32 * 9,
        2 * 126464 * 4096 + 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 12288 + 2 * 4096),
    ),
    "LLaDA2.0-mini, LLaDA2.1-mini": Published(
        llada2.FAMILY,
        LLADA2
        | {
            "hidden_size": 2048,
            "num_hidden_layers": 20,
            "num_attention_heads": 16,
            "intermediate_size": 5120,
            "moe_intermediate_size": 512,
        },
        "16.26",
        3 + 20 * 6 + 3 + 19 * (2 + 3 * 257),
        by_hand(157184, 2048, 1, 5120, 19, 512, 16, 4, 128),
        wide=19 * 256,
    ),
    # Its own config.json we have not seen: these are Ling-flash-2.0's sizes, which give the total that is published.
    "LLaDA2.0-flash, LLaDA2.1-flash": Published(
        llada2.FAMILY,
        LLADA2
        | {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "intermediate_size": 9216,
            "moe_intermediate_size": 1024,
        },
        "102.9",
        3 + 32 * 6 + 3 + 31 * (2 + 3 * 257),
        by_hand(157184, 4096, 1, 9216, 31, 1024, 32, 4, 128),
        wide=31 * 256,
    ),
}


def config_of(model):
    family = model.family
    return family.config_type.from_hf(model.hf, mask_id=family.mask_id, eos_id=family.eos_id)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_bytes(name):
    model = MODELS[name]
    leaves = shapes(model.family, config_of(model), jnp.bfloat16).values()
    assert sum(math.prod(a.shape) for a in leaves) == model.parameters
    places = len(model.total.partition(".")[2])
    assert f"{model.parameters / 1e9:.{places}f}" == model.total
    assert sum(math.prod(a.shape) * a.dtype.itemsize for a in leaves) == 2 * model.parameters + 2 * model.wide


def test_llada_moes_mebibytes():
    """What others measured of the published files: all of it, and the experts."""
    model = MODELS["LLaDA-MoE-7B-A1B"]
    assert model.parameters == 7_356_880_896
    sizes = {path: 2 * math.prod(a.shape) for path, a in shapes(model.family, config_of(model), jnp.bfloat16).items()}
    assert round(sum(sizes.values()) / 2**20, 2) == 14032.14
    assert sum(size for path, size in sizes.items() if path[-1] in ("w_in", "w_out")) == 12288 * 2**20


@pytest.mark.parametrize("name", MODELS)
def test_hfs_tensors_fill_exactly_these(name):
    model = MODELS[name]
    config = config_of(model)
    table = model.family.layouts(config)["hf"]
    found = {rule.source: (rule.shape, "BF16") for rule in table}
    assert len(found) == model.tensors
    assert sum(math.prod(shape) for shape, _ in found.values()) == model.parameters
    leaves = {path: a.shape for path, a in shapes(model.family, config, jnp.bfloat16).items()}
    rules.check(found, table, leaves)
    with pytest.raises(CheckpointError, match=f"missing: {re.escape(table[-1].source)}"):
        rules.check({name: kind for name, kind in found.items() if name != table[-1].source}, table, leaves)
    with pytest.raises(CheckpointError, match=r"rule table: parameter norm has .* elements, rules fill 0"):
        rules.check(found, [rule for rule in table if rule.target != ("norm",)], leaves)
