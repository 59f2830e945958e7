"""Two laws over every decoder x cache x smoothing: a row of a batch gets what it gets alone, and the one program gives
what a plain Python loop over the same step functions gives."""

import numpy as np
import pytest
from plain_loop import decode
from tiny import CONFIG, DENSE, tiny_model

import djax
from djax.caching import CACHES, Uncached
from djax.decoding import DECODERS

CASES = 4  # a combination; over all of them more than 200


def draw_decoder(kind, rng):
    """A plug of the kind with numbers of its own."""
    tau, low = rng.uniform(0.1, 1.1), rng.uniform(0.05, 0.4)
    return {
        "threshold": lambda: djax.Threshold(tau),
        "fixed": lambda: djax.Fixed(int(rng.integers(1, 4))),
        "fixed steps": lambda: djax.Fixed(steps=int(rng.integers(1, 10))),
        "fixed random": lambda: djax.Fixed(2, order="random"),
        "credit": lambda: djax.Credit(djax.Threshold(tau), alpha=rng.uniform(0, 2)),
        "credit over hierarchy": lambda: djax.Credit(djax.Hierarchy(low + 0.5, low)),
        "hierarchy": lambda: djax.Hierarchy(low + rng.uniform(0.1, 0.6), low),
        "factor": lambda: djax.Factor(rng.uniform(0.1, 3)),
        "entropy": lambda: djax.Entropy(rng.uniform(0.1, 3)),
        "freedave": lambda: djax.FreeDave(djax.Fixed(1, order=str(rng.choice(["confidence", "left"]))), drafts=3),
        "edit": lambda: djax.Edit(djax.Threshold(tau), tau=rng.uniform(0.05, 0.5), post_steps=5),
    }[kind]()


def draw_cache(kind, rng):
    every = int(rng.integers(1, 6))
    return {
        "none": lambda: None,
        "prefix": lambda: djax.Prefix(every, surplus=bool(rng.integers(2))),
        "dual": lambda: djax.Dual(every, surplus=bool(rng.integers(2))),
        "vicinity": lambda: djax.Vicinity(3, 5, warmup=int(rng.integers(0, 6)), every=every),
    }[kind]()


def draw_smoothing(on, rng):
    return djax.Smoothing(first=rng.uniform(0, 0.5), threshold_decay=rng.uniform(0, 0.2)) if on else None


# Block() is for another family: test_block_diffusion.py.
COMBINATIONS = [
    *((d, c, s) for d in DECODERS for c in CACHES if c != "block" for s in ((False,) if d == "freedave" else (False, True))),
    ("fixed steps", "dual", False),
    ("fixed random", "vicinity", False),
    ("credit over hierarchy", "vicinity", True),
]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def facts(out):
    return out.canvas.tolist(), out.forwards, out.refreshes, out.positions


@pytest.mark.parametrize(("decoder", "cache", "smoothing"), COMBINATIONS, ids=lambda x: str(x).replace(" ", "-"))
def test_rows_alone_and_the_plain_loop(model, decoder, cache, smoothing):
    check(model, decoder, cache, smoothing)


@pytest.mark.long
@pytest.mark.parametrize(
    ("decoder", "cache", "smoothing"), [("credit", "dual", False), ("hierarchy", "vicinity", True), ("factor", "prefix", False)]
)
def test_a_dense_model_s_rows(decoder, cache, smoothing):
    check(tiny_model(config=DENSE), decoder, cache, smoothing)


def check(model, decoder, cache, smoothing):
    rng = np.random.default_rng(COMBINATIONS.index((decoder, cache, smoothing)))
    ways = set()
    for case in range(CASES):
        prompts = [rng.integers(0, CONFIG.eos_id, rng.integers(1, 33)).tolist() for _ in range(3)]
        lengths = [int(n) for n in rng.integers(9, 32, 3)]
        least = [int(rng.integers(0, n)) for n in lengths]
        seeds = [int(s) for s in rng.integers(0, 1000, 3)]
        shared = dict(
            block_length=8,
            decoder=draw_decoder(decoder, rng),
            smoothing=draw_smoothing(smoothing, rng),
            early_stop=bool(rng.integers(2)),
            align_blocks=bool(rng.integers(2)),
        )
        policy = draw_cache(cache, rng)
        together = djax.generate(model, prompts, gen_length=lengths, min_gen_length=least, seed=seeds, cache=policy, **shared)
        for row, out in enumerate(together):
            own = dict(gen_length=lengths[row], min_gen_length=least[row], seed=seeds[row])
            alone = djax.generate(model, prompts[row], cache=policy, **own, **shared)
            assert facts(out) == facts(alone)
            if case == 0:
                plain = decode(model, prompts[row], policy=Uncached() if policy is None else policy, **own, **shared)
                assert facts(alone) == facts(plain)
            assert CONFIG.mask_id not in out.canvas
            assert CONFIG.eos_id not in out.canvas[len(prompts[row]) : len(prompts[row]) + least[row]]
            assert len(out.tokens) >= least[row]
        ways |= {out.forwards for out in together}
    assert len(ways) > 1, "rows that all did the same would say little"


def test_enough_cases():
    assert len(COMBINATIONS) * CASES >= 200
