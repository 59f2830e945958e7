"""Published ways to decode: each file says what its publication says, is accepted, and decodes as it is described."""

import inspect
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from toy import toy_model

import djax
from djax.caching import CACHES
from djax.cli.decoding_options import PRESET
from djax.configs import presets as package
from djax.decoding import DECODERS
from djax.decoding.smoothing import SMOOTHINGS
from djax.errors import OptionError
from djax.plugs import parse
from djax.presets import presets

# As their sources have it, not as the files do: dInfer 2510.08666, credit 2510.06133, Fast-dLLM 2505.22618, LLaDA 2502.09992.
FAST = dict(decoder=djax.Threshold(0.9, slack=0.0), block_length=32, align_blocks=False, early_stop=False)
DINFER = dict(smoothing=djax.Smoothing(first=0.15, growth=0.02, last=0.3, threshold_decay=0.02), block_length=64)
VICINITY = djax.Vicinity(before=16, after=16, warmup=4, every=None)
PUBLISHED = {
    "dinfer_credit": DINFER | dict(decoder=djax.Credit(djax.Threshold(0.8), alpha=0.7, gamma=0.2, beta=0.8), cache=None),
    "dinfer_hierarchy": DINFER | dict(decoder=djax.Hierarchy(high=0.92, low=0.62), cache=VICINITY),
    "dinfer_vicinity": DINFER | dict(decoder=djax.Threshold(0.8), cache=VICINITY),
    "fast_dllm_dual": FAST | dict(cache=djax.Dual(surplus=False)),
    "fast_dllm_prefix": FAST | dict(cache=djax.Prefix(surplus=False)),
    "llada": dict(decoder=djax.Fixed(1), cache=None, block_length=32, align_blocks=False, early_stop=False),
}
PROMPT = [3] * 41


def by_block(out):
    """Of each block, whether each of its forwards ran the whole canvas, and the tokens each accepted."""
    accepted = [int(np.sum(out.trace.accepted_at == f)) for f in range(out.forwards)]
    rows = zip(out.trace.starts.tolist(), out.trace.whole.tolist(), accepted, strict=True)
    return [[row[1:] for row in block] for _, block in groupby(rows, key=lambda row: row[0])]


def test_every_file_is_a_preset():
    assert presets() == sorted(PUBLISHED) == sorted(f.stem for f in Path(package.__file__).parent.glob("[!_]*.py"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_what_was_published(small, name):
    options = djax.preset(name)
    assert options == PUBLISHED[name]
    said = djax.explain(small, "Anna has 3 pens.", **options)
    assert said.facts["decoder"] == repr(options["decoder"])
    for option, registry in (("decoder", DECODERS), ("cache", CACHES), ("smoothing", SMOOTHINGS)):
        plug = options.get(option)
        read = parse(repr(plug), registry, option)
        assert read == (CACHES["none"]() if option == "cache" and plug is None else plug)
    assert f"djax generate --preset {name} " in inspect.getdoc(__import__(f"djax.configs.presets.{name}", fromlist=["_"]))
    assert name in PRESET, "the command line's help names it"


def test_a_preset_can_be_overridden_and_is_a_copy():
    options = djax.preset("llada") | dict(gen_length=8, block_length=4)
    assert [(b.start, b.end) for b in djax.explain(toy_model(), PROMPT, **options).blocks] == [(41, 45), (45, 49)]
    djax.preset("llada")["block_length"] = 1
    assert djax.preset("llada") == PUBLISHED["llada"]


@pytest.mark.parametrize("name", ["fast_dll", "__init__", "", "../small"])
def test_an_unknown_preset(name):
    with pytest.raises(OptionError) as error:
        djax.preset(name)
    assert str(error.value) == f"preset: unknown {name!r}; there are: {', '.join(PUBLISHED)}"


def test_llada_takes_one_token_a_forward():
    out = djax.generate(toy_model(doubt=True), PROMPT, gen_length=70, trace=True, **djax.preset("llada"))
    assert (out.forwards, out.refreshes) == (70, 0)
    assert by_block(out) == [[(True, 1)] * n for n in (32, 32, 6)]


@pytest.mark.parametrize(("name", "windows"), [("fast_dllm_prefix", (70, 38, 6)), ("fast_dllm_dual", (32, 32, 6))])
def test_fast_dllm_refreshes_as_a_blocks_first_step(name, windows):
    """And no window follows in the same turn: a refresh that finishes its block is the block's only forward."""
    options = djax.preset(name) | dict(gen_length=70, trace=True)
    sure = djax.generate(toy_model(), PROMPT, **options)
    assert by_block(sure) == [[(True, 32)], [(True, 32)], [(True, 6)]]
    assert (sure.forwards, sure.refreshes, sure.positions) == (3, 3, 3 * 111)
    # Blocks [41, 73), [73, 105), [105, 111) hold 11, 10 and 2 multiples of 3, which go alone, the surest first.
    out = djax.generate(toy_model(doubt=True), PROMPT, **options)
    assert by_block(out) == [[(True, n)] + [(False, 1)] * m for n, m in ((21, 11), (22, 10), (4, 2))]
    assert (out.forwards, out.refreshes) == (3 + 23, 3)
    assert out.positions == 3 * 111 + 11 * windows[0] + 10 * windows[1] + 2 * windows[2]


def test_dinfer_warms_up_for_four_forwards_and_then_refreshes_once_a_block():
    options = djax.preset("dinfer_vicinity") | dict(gen_length=150, early_stop=False, trace=True)
    out = djax.generate(toy_model(doubt=True), PROMPT, **options)
    # Blocks [0, 64), [64, 128), [128, 191) hold 23, 64 and 63 masks, of them 8, 21 and 21 at multiples of 3. The first
    # forward's bound is 1, which nothing reaches; what is as sure as the best goes with it.
    assert by_block(out) == [
        [(True, 15)] + [(True, 1)] * 4 + [(False, 1)] * 4,
        [(True, 43)] + [(False, 1)] * 21,
        [(True, 42)] + [(False, 1)] * 21,
    ]
    assert out.refreshes == 3
    # Windows of 16 before and after, cut to the canvas.
    assert out.positions == 7 * 191 + 4 * (64 + 16) + 21 * (16 + 64 + 16) + 21 * (16 + 63)
