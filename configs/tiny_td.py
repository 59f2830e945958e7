"""The small model, distilled."""

import djax
from djax.distill import Compression, Distillation, Recipe, Settings, Stride

RUN = Distillation(
    problems=8000,
    recordings=(
        Settings(decoder=djax.Threshold(0.99), block_length=32),
        Settings(decoder=djax.Threshold(0.99), block_length=128),
    ),
    recipe=Recipe(
        (Compression(Stride(64), beta=2.0),),
        steps=1500,
        rows=32,
        rate=1e-3,
        muon=5e-3,
        save_every=100,
        evaluate_every=500,
        log_every=20,
    ),
    decoding=Settings(decoder=djax.Threshold(0.99)),
)
