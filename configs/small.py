"""The small model that ships with djax: 2.8 M parameters, worked answers to word problems.

    LD_PRELOAD=libtcmalloc_minimal.so.4 djax train small --out runs/small

Preloading tcmalloc is optional: fresh memory is slow on many virtual machines. About 80 minutes on two cores of an AMD
EPYC at 7,000 to 9,400 tokens/s, 297,600 examples, last loss 0.0232. The stages were found while this run went on: it was
stopped and resumed at steps 1200, 1600 and 2800 to set the next one, and steps 2700 to 2800 ran at a rate that had begun
to fall (to 0.9 of the peak), so a run from scratch repeats it but for those hundred steps and for rounding.

Result (djax bench ladder, 500 held-out problems, float32, gen_length 128, block_length 32): 94.8% with one token a forward;
with Threshold(0.9) 79.4% at 12.84 tokens a forward without cache, 77.8% at 9.99 with the dual cache, 79.4% at 12.15 with
Vicinity(16, 16, warmup=4). All lines: benchmarks/results/ladder.jsonl.

Why Muon: in trials of 200 s on an earlier form of the problems (canvas 128, 64 rows), its loss after 168 s was 0.65 where
AdamW's (3e-3) was about 0.80.
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
