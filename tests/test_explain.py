"""`djax.explain` against the program: the forwards it foretells are those that run, and it refuses what generate refuses."""

import dataclasses
import re
import sys

import numpy as np
import pytest
from toy import family, toy_model

import djax
from djax.errors import BatchError, CanvasError, DjaxError, OptionError, PromptError
from djax.runtime.programs import Programs

BLOCK = 8
# Prompts inside the first block, on a border and between two; canvases that end on a border and not; each one mask or more.
ASKED = [([3] * 2, 22), ([3] * 8, 24), ([3] * 13, 4)]
CACHES = {
    "none": [None],
    "prefix": [djax.Prefix(), djax.Prefix(surplus=False)],
    "prefix, every": [djax.Prefix(every=3), djax.Prefix(every=2, surplus=False)],
    "dual": [djax.Dual(), djax.Dual(surplus=False)],
    "dual, every": [djax.Dual(every=1), djax.Dual(every=3), djax.Dual(every=5, surplus=False)],
    "vicinity": [djax.Vicinity(3, 5, warmup=n) for n in (0, 4, 9, 100)],
    "vicinity, every": [djax.Vicinity(3, 5, warmup=w, every=e) for w, e in ((0, 1), (4, 3), (9, 4))],
}


def ran(out):
    return list(zip(out.trace.starts.tolist(), out.trace.whole.tolist(), strict=True)), out.refreshes, out.positions


def foretold(blocks, pace):
    forwards = [(block.start, f) for block in blocks for f in getattr(block, pace)]
    return [(s, f.whole) for s, f in forwards], sum(f.refresh for _, f in forwards), sum(f.positions for _, f in forwards)


@pytest.mark.parametrize("smoothing", [None, djax.Smoothing()], ids=["plain", "smoothing"])
@pytest.mark.parametrize("cache", CACHES)
def test_the_forwards_foretold_are_those_that_run(cache, smoothing):
    """The toy never proposes the mask, so Fixed(1) accepts one token a forward and Fixed(block) everything. What runs up to
    the end of each block is told by the same decode ended there by an EOS."""
    for policy in CACHES[cache]:
        for align in (True, False):
            for prompt, gen_length in ASKED:
                shared = dict(gen_length=gen_length, block_length=BLOCK, cache=policy, smoothing=smoothing, align_blocks=align)
                said = djax.explain(toy_model(), prompt, **shared)
                assert [b.masks for b in said.blocks] == [b.end - max(b.start, len(prompt)) for b in said.blocks]
                for pace, decoder in (("slowest", djax.Fixed(1)), ("fastest", djax.Fixed(BLOCK))):
                    shared |= dict(decoder=decoder, trace=True)
                    whole = djax.generate(toy_model(), prompt, early_stop=False, **shared)
                    assert ran(whole) == foretold(said.blocks, pace)
                    assert len(whole.canvas) == said.blocks[-1].end
                    for i, block in enumerate(said.blocks, 1):
                        ended = djax.generate(toy_model(stop=block.end - 1), prompt, **shared)
                        assert ran(ended) == foretold(said.blocks[:i], pace)


def test_a_real_model_runs_what_is_foretold(moe_a):
    """And a threshold that accepts what it likes stays between the two ends. The mask's logit is struck from the head: what
    proposes the mask is no candidate, and then nothing accepts everything."""
    head = moe_a.params["head"].at[:, moe_a.config.mask_id].set(0)
    model = dataclasses.replace(moe_a, params=moe_a.params | {"head": head})
    prompt = np.random.default_rng(0).integers(0, 300, 21).tolist()
    options = dict(gen_length=45, block_length=16, cache=djax.Vicinity(4, 4, warmup=3, every=5), early_stop=False)
    said = djax.explain(model, prompt, **options)
    runs = {tau: djax.generate(model, prompt, decoder=djax.Threshold(tau), trace=True, **options) for tau in (1.5, 0.3, 1e-6)}
    assert ran(runs[1.5]) == foretold(said.blocks, "slowest")
    assert ran(runs[1e-6]) == foretold(said.blocks, "fastest")
    assert runs[1e-6].forwards < runs[0.3].forwards < runs[1.5].forwards


def test_a_block_longer_than_the_canvas():
    options = dict(gen_length=10, block_length=1000, cache=djax.Dual())
    (block,) = djax.explain(toy_model(), [3] * 70, **options).blocks
    assert (block.start, block.end, block.masks) == (0, 80, 10)
    assert [f.positions for f in block.fastest] == [80, 80]


def test_drafts_are_named():
    facts = djax.explain(toy_model(), [1, 2], gen_length=16, block_length=8, decoder=djax.FreeDave(drafts=3)).facts
    assert "reads up to 3 drafts a forward" in facts["decoder"]


def refuse(*_, **__):
    raise AssertionError("explain runs no model")


def test_it_runs_no_model_and_compiles_no_decode(monkeypatch):
    """What jax compiles are the policy's own comparisons, of a single number each."""
    module = sys.modules["djax.engine.generate"]
    monkeypatch.setattr(module, "compiled", refuse)
    monkeypatch.setattr(module, "PROGRAMS", Programs(most=1))
    model = toy_model(family=family(trunk=refuse, unembed=refuse, expected_embedding=refuse))
    for cache in (None, djax.Prefix(), djax.Dual(every=2), djax.Vicinity(every=3)):
        assert djax.explain(model, [1, 2, 3], cache=cache, smoothing=djax.Smoothing(), decoder=djax.Credit()).blocks
    assert not len(module.PROGRAMS)


@pytest.mark.parametrize(
    ("kind", "prompt", "options"),
    [
        (OptionError, [1], dict(gen_length=0)),
        (OptionError, [[1], [2]], dict(gen_length=[4, 5, 6])),
        (OptionError, [1], dict(gen_length=8, min_gen_length=9)),
        (OptionError, [1], dict(decoder="threshold")),
        (OptionError, [1], dict(gen_length=8, cache=djax.Vicinity(16, 9))),
        (OptionError, [1], dict(trace=1)),
        (CanvasError, [1] * 200, dict(gen_length=57)),
        (PromptError, [[1], []], {}),
        (PromptError, "text", {}),
        (BatchError, [[1]] * 8, {}),
    ],
    ids=str,
)
def test_it_refuses_what_generate_refuses(kind, prompt, options, monkeypatch):
    if kind is BatchError:
        monkeypatch.setattr("djax.engine.request.device_memory", lambda: 2**10)
    with pytest.raises(DjaxError) as generated:
        djax.generate(toy_model(), prompt, **options)
    with pytest.raises(DjaxError) as explained:
        djax.explain(toy_model(), prompt, **options)
    assert type(explained.value) is type(generated.value) is kind
    assert str(explained.value) == str(generated.value)


def test_unknown_options_are_errors():
    with pytest.raises(
        TypeError, match=r"explain\(\) got unexpected options \['steps'\]; those of djax.generate are .*'cache'"
    ):
        djax.explain(toy_model(), [1], steps=4)


def test_one_in_one_out_a_list_in_a_list_out():
    one = djax.explain(toy_model(), [1] * 9, gen_length=20)
    many = djax.explain(toy_model(), [[1] * 9, [1] * 4, [1] * 50], gen_length=[20, 8, 30], max_batch=2)
    assert isinstance(many, list)
    assert many[0].blocks == one.blocks
    assert [[(b.start, b.end, b.masks) for b in said.blocks] for said in many] == [
        [(0, 29, 20)],
        [(0, 12, 8)],
        [(32, 64, 14), (64, 80, 16)],
    ]


def test_the_page():
    page = str(
        djax.explain(
            toy_model(),
            [1] * 10,
            gen_length=30,
            block_length=BLOCK,
            decoder=djax.Credit(djax.Fixed(2, order="random")),
            cache=djax.Vicinity(3, 5, warmup=2, every=4),
            smoothing=djax.Smoothing(),
            max_batch=4,
        )
    )
    facts, table = page.split("\n\n")
    said = dict(line.split("  ", 1) for line in facts.splitlines())
    said = {name.strip(): value.strip() for name, value in said.items()}
    assert said["decoder"] == (
        "Credit(inner=Fixed(per_step=2, steps=None, order='random'), alpha=0.7, gamma=0.2, beta=0.8) (draws from the seed)"
    )
    assert said["cache"] == "Vicinity(before=3, after=5, warmup=2, every=4), windows of 3 + 8 + 5 positions"
    assert said["smoothing"] == repr(djax.Smoothing())
    assert said["canvas"] == "10 of the prompt + 30 = 40 positions, in a program for 1 rows of 64"
    assert "cache: yes; smoothing: yes; gen_length: up to 246 " in said["legal"]
    for number in ("decoder.inner.per_step", "decoder.alpha", "cache.warmup", "cache.every", "smoothing.first", "early_stop"):
        assert number in said["free to change"]
    assert "cache.before" not in said["free to change"]
    assert [part.rsplit(" ", 2)[0] for part in said["memory"].split(", ")] == [
        *("parameters", "decoder", "cache", "soft embeddings"),
    ]
    head, first, second, *_ = table.splitlines()
    assert head.split("  ")[0] == "block"
    assert re.split(" {2,}", first) == [
        *("0", "[8, 16)", "6"),
        "2 whole canvases of 40, 1 refresh of 40, 3 windows of 16",
        "1 whole canvas of 40",
    ]
    assert re.split(" {2,}", second)[-1] == "1 whole canvas of 40"
    without = djax.explain(toy_model(family=family("caches", "smooths")), [1], gen_length=8)
    assert without.facts["legal"].startswith("cache: no; smoothing: no;")
    assert without.facts["cache"] == without.facts["smoothing"] == "None"
    assert "decoder" in without.facts["memory"]
    assert "cache" not in without.facts["memory"]


def test_memory_is_that_of_the_carry(moe_a):
    """Keys and values of every layer, credit for every token of a block's vocabulary, an embedding a position; float32."""
    c, length, block = moe_a.config, 1024, 512
    options = dict(decoder=djax.Credit(), cache=djax.Dual(), smoothing=djax.Smoothing())
    said = djax.explain(moe_a, [1] * 900, gen_length=length - 900, block_length=block, **options)
    sizes = {
        "parameters": moe_a.parameter_count,
        "decoder": block * c.vocab,
        "cache": c.layers * 2 * length * c.groups * c.head_dim,
        "soft embeddings": length * c.width,
    }
    assert said.facts["memory"] == ", ".join(f"{name} {4 * n / 2**20:.1f} MiB" for name, n in sizes.items())
