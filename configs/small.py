"""The small model that ships with djax: 2.8 M parameters, worked answers to word problems.

djax train small --out runs/small
"""

from djax.training.train import Run, Stage

RUN = Run(
    family="llada_moe",
    architecture={
        "architectures": ["LLaDAMoEModelLM"],
        "model_type": "llada",
        "vocab_size": 512,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "expert_intermediate_size": 96,
        "norm_topk_prob": False,
        "qk_layernorm": True,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "router_aux_loss_coef": 0.01,
        "torch_dtype": "float32",
    },
    stages=(
        Stage(until=1200, lengths=(96, 128), drills=0.5),
        Stage(until=1600, lengths=(64, 64, 96, 128), drills=0.6, easy=0.5),
        Stage(until=2300, lengths=(96, 128), drills=0.4, easy=0.25),
        Stage(until=2800, lengths=(96, 128, 160, 192, 192, 256), drills=0.15),
        Stage(until=4650, lengths=(96, 128, 160, 192, 192, 256), drills=0.25, easy=0.15),
    ),
    cooldown=1250,
)
