"""The small model learns its own decodes, so as to need fewer forwards: the first of the two rounds that made `tiny-td`.

    LD_PRELOAD=libtcmalloc_minimal.so.4 djax distill tiny_td --out runs/td --eval

On two cores of an AMD EPYC: 408 s to record 16,000 trajectories in 2.7 MB (14,710 kept), 531 s to train. 500 held-out
problems, Threshold(0.997): 95.6% at 11.97 tokens a forward where it began with 93.4% at 8.50; block 128, 94.4% at 16.51 after
93.8% at 11.47 (benchmarks/results/distill.md has all).

What was tried, 400 updates each, 200 problems, Threshold(0.99), block 32 (before: 92.5% at 10.10): jumps to the block's end
with AdamW 1e-3, 93.0% at 10.64; with Muon 5e-3 on the matrices, 93.5% at 10.90; and beta=2, 91.5% at 11.85; beta=6, 89.5% at
12.26. Compression and Certainty(masked=0.9) as two losses, 300 updates at 2.5 times the cost: 92.0% at 11.45. Certainty() with
half of the block masked lost seven points in 200 updates: this model has next to no doubt of half a block, and unlearns empty
ones meanwhile.
"""

from djax.decoding import Threshold
from djax.distill import Compression, Distillation, Recipe, Settings, Stride

RUN = Distillation(
    problems=8000,
    recordings=(
        Settings(decoder=Threshold(0.99), block_length=32),
        Settings(decoder=Threshold(0.99), block_length=128),
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
    decoding=Settings(decoder=Threshold(0.99)),
)
