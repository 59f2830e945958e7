"""Rows that join and leave: each gets what `djax.generate` gives it alone, and nothing compiles after the first time.

    DJAX_TEST_FUZZ=1 pytest -n 0 -s tests/test_engine.py

draws 100 schedules instead of 12 and prints how many rows joined.
"""

import dataclasses
import os
import threading

import numpy as np
import pytest
from test_batch_and_loop import draw_cache, draw_decoder, draw_smoothing, facts
from tiny import CONFIG, DENSE, LLADA2, tiny_model
from toy import toy_model

import djax
from djax.decoding.contract import write
from djax.errors import BatchError, CanvasError, OptionError, TripCapError
from djax.runtime.programs import Programs

SCHEDULES = 100 if os.environ.get("DJAX_TEST_FUZZ") else 12
KINDS = [
    ("threshold", "dual", False),
    ("credit", "vicinity", True),
    ("hierarchy", "prefix", False),
    ("edit", "none", False),
    ("fixed random", "vicinity", False),
    ("factor", "dual", True),
]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def draw_request(rng, decoder, smoothing):
    prompt = rng.integers(0, CONFIG.eos_id, rng.integers(1, 25)).tolist()
    gen_length = int(rng.integers(9, 38))
    return prompt, dict(
        gen_length=gen_length,
        min_gen_length=int(rng.integers(0, gen_length)),
        decoder=draw_decoder(decoder, rng),
        smoothing=draw_smoothing(smoothing, rng),
        temperature=float(rng.choice([0.0, 0.0, 0.8])),
        seed=int(rng.integers(1000)),
        early_stop=bool(rng.integers(2)),
        align_blocks=bool(rng.integers(2)),
    )


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)).replace(" ", "-"))
def test_rows_that_join_late_get_what_they_get_alone(model, kind, monkeypatch):
    decoder, cache, smoothing = kind
    joined = 0
    # Numbers of the cache that may differ by row do.
    static = draw_cache(cache, np.random.default_rng(5))
    for schedule in range(KINDS.index(kind), SCHEDULES, len(KINDS)):
        rng = np.random.default_rng(schedule)
        first = draw_request(rng, decoder, smoothing)[1]
        options = dict(block_length=8, cache=static, decoder=first["decoder"], smoothing=first["smoothing"])
        engine = djax.Engine(model, rows=3, canvas=64, **options)
        compiled = None
        asked, found = {}, {}
        left = [draw_request(rng, decoder, smoothing) for _ in range(8)]
        while left or asked:
            while left and engine.free and rng.random() < 0.7:
                prompt, request = left.pop()
                if static is not None:
                    numbers = {"every": int(rng.integers(1, 6))} if static.every is not None else {}
                    request["cache"] = dataclasses.replace(static, **numbers)
                asked[engine.join(prompt, **request)] = prompt, request
                joined += 1
            until = str(rng.choice(["end", "row", "block"]))
            ended = engine.run(turns=int(rng.integers(1, 6)), until=until)
            for b, out in ended.items():
                found[len(found)] = asked.pop(b), out
            if compiled is None and ended:
                compiled = True
                # From here on nothing compiles: a store that holds what there is and refuses the rest.
                monkeypatch.setattr(Programs, "get", kept_only(Programs.get))
        monkeypatch.undo()
        assert len(found) == 8
        for (prompt, request), out in found.values():
            alone = djax.generate(model, prompt, block_length=8, **(dict(cache=static) | request))
            assert facts(out) == facts(alone)
            assert out.text == alone.text
    print(f"\n{kind}: {joined} rows joined, each as alone")


def kept_only(get):
    def run(programs, key, compile):
        def refuse():
            raise AssertionError("a program was compiled after the first of its shape")

        return get(programs, key, refuse if isinstance(key[0], str) else compile)

    return run


def test_one_program_serves_numbers_that_differ_by_row():
    model = toy_model(doubt=True)
    engine = djax.Engine(model, rows=3, canvas=64, decoder=djax.Threshold(0.9), block_length=16)
    taus = (0.05, 0.27, 0.9)
    slots = {engine.join([5, 6], gen_length=30, decoder=djax.Threshold(tau)): tau for tau in taus}
    out = engine.run()
    alone = {tau: djax.generate(model, [5, 6], gen_length=30, block_length=16, decoder=djax.Threshold(tau)) for tau in taus}
    assert {slots[b]: facts(generation) for b, generation in out.items()} == {tau: facts(g) for tau, g in alone.items()}
    assert len({generation.forwards for generation in out.values()}) == 3


@pytest.mark.parametrize(("config", "cache"), [(DENSE, djax.Dual()), (LLADA2, djax.Block())])
def test_other_families(config, cache):
    model = tiny_model(config=config)
    engine = djax.Engine(model, rows=2, canvas=64, cache=cache, block_length=8)
    prompts = [[1, 2, 3], [4] * 9, [7, 8]]
    slots = {engine.join(prompts[0], gen_length=20): 0, engine.join(prompts[1], gen_length=30): 1}
    done = {}
    while slots:
        ended = engine.run(until="row")
        done |= {slots.pop(b): out for b, out in ended.items()}
        if len(done) == 1 and 2 not in slots.values():
            slots[engine.join(prompts[2], gen_length=17)] = 2
    for n, length in enumerate((20, 30, 17)):
        assert facts(done[n]) == facts(djax.generate(model, prompts[n], gen_length=length, block_length=8, cache=cache))


def test_a_canvas_can_be_looked_at_while_it_fills():
    model = toy_model()
    engine = djax.Engine(model, rows=1, canvas=64, block_length=8, decoder=djax.Fixed(2))
    b = engine.join([5], gen_length=15)
    assert (engine.look(b)[1:] == CONFIG.mask_id).all()
    assert engine.run(turns=1) == {}
    assert (engine.look(b) != CONFIG.mask_id).sum() == 1 + 2
    assert engine.run(until="block") == {}
    assert (engine.look(b)[:8] != CONFIG.mask_id).all() and (engine.look(b)[8:] == CONFIG.mask_id).all()
    assert engine.run(until="row").keys() == {b}
    assert engine.run() == {}


@djax.pytree
@dataclasses.dataclass(frozen=True)
class Stubborn(djax.Decoder):
    def step(self, state, look):
        return state, write(look, look.tokens, look.open & False)


def test_bad_input_is_refused_before_anything_runs():
    model = toy_model()
    engine = djax.Engine(model, rows=1, canvas=64, block_length=8, decoder=djax.Threshold(0.9))
    with pytest.raises(CanvasError, match="65 positions, the engine's canvas has 64"):
        engine.join([1], gen_length=64)
    with pytest.raises(OptionError, match="decoder, cache or smoothing: expected what the engine was made with"):
        engine.join([1], gen_length=8, decoder=djax.Fixed(1))
    with pytest.raises(OptionError, match="decoder, cache or smoothing"):
        engine.join([1], gen_length=8, cache=djax.Dual())
    with pytest.raises(OptionError, match="block_length: expected what the engine was made with"):
        engine.join([1], gen_length=8, block_length=4)
    with pytest.raises(OptionError, match="trace: expected what the engine was made with"):
        engine.join([1], gen_length=8, trace=True)
    with pytest.raises(OptionError, match="prompt: expected one prompt"):
        engine.join([[1], [2]], gen_length=8)
    with pytest.raises(OptionError, match="temperature"):
        engine.join([1], gen_length=8, temperature=-1)
    with pytest.raises(OptionError, match="until: expected one of end, row, block"):
        engine.run(until="word")
    with pytest.raises(OptionError, match="turns"):
        engine.run(turns=0)
    with pytest.raises(OptionError, match="model: expected a djax"):
        djax.Engine(5)
    with pytest.raises(OptionError, match="max_batch: expected None"):
        djax.Engine(model, max_batch=3)
    with pytest.raises(OptionError, match="b: expected a slot that a prompt has joined"):
        engine.look(0)
    with pytest.raises(CanvasError, match="canvas: expected at most the model's 256 positions, got 300"):
        djax.Engine(model, canvas=300)
    with pytest.raises(OptionError, match="temperature: expected a finite number"):
        djax.Engine(model, temperature=-1)
    with pytest.raises(BatchError, match=r"2147483647 (prompts on a canvas of 256|rows) need"):
        djax.Engine(model, rows=2**31 - 1)
    with pytest.raises(OptionError, match="temperature: expected 0 in an engine that was made with draws=False"):
        djax.Engine(model, draws=False, canvas=64).join([1], gen_length=8, temperature=0.5)
    engine.join([1], gen_length=8)
    with pytest.raises(BatchError, match="all 1 slots are taken"):
        engine.join([1], gen_length=8)
    assert len(engine.run()) == 1
    assert engine.free == [0]


@djax.pytree
@dataclasses.dataclass(frozen=True)
class StopsAtOnce(djax.Decoder):
    """Ends its row at the first forward, and calls every block done."""

    def step(self, state, look):
        _, verdict = djax.Fixed(1).step(state, look)
        return state, verdict._replace(stop=look.tick.forward == 0, done=verdict.done | True)


@pytest.mark.parametrize("cache", [None, djax.Dual(), djax.Prefix(), djax.Vicinity(2, 2, warmup=0)], ids=repr)
def test_a_decoder_ends_a_row_whatever_the_cache(cache):
    out = djax.generate(toy_model(), [1, 2], gen_length=20, block_length=8, decoder=StopsAtOnce(), cache=cache)
    assert out.forwards == 1 and len(out.tokens) == 1
    assert (out.canvas[3:] == CONFIG.eos_id).all()


@djax.pytree
@dataclasses.dataclass(frozen=True)
class Hasty(djax.Decoder):
    """Calls every block done."""

    def step(self, state, look):
        _, verdict = djax.Fixed(1).step(state, look)
        return state, verdict._replace(done=verdict.done | True)


def test_a_block_with_masks_is_not_done():
    options = dict(gen_length=20, block_length=8)
    hasty, plain = (djax.generate(toy_model(), [1], decoder=d, **options) for d in (Hasty(), djax.Fixed(1)))
    assert facts(hasty) == facts(plain)


def test_threads_may_join_at_once():
    engine = djax.Engine(toy_model(), rows=8, canvas=64, block_length=8, gen_length=9)
    slots, start = [], threading.Barrier(8)

    def work(n):
        start.wait()
        slots.append((engine.join([n] * (n + 1)), n))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    out = engine.run()
    assert {b: g.canvas[0] for b, g in out.items()} == dict(slots)
    assert all(len(g.canvas) == n + 1 + 9 for (b, n) in slots for g in [out[b]]), "the engine's own defaults hold"


def test_one_kind_of_plug_a_call():
    model = toy_model(doubt=True)
    prompts, taus = [[5, 6], [7]], (0.05, 0.9)
    options = dict(gen_length=20, block_length=8)
    together = djax.generate(model, prompts, decoder=[djax.Threshold(tau) for tau in taus], temperature=[0, 0.0], **options)
    for prompt, tau, out in zip(prompts, taus, together, strict=True):
        assert facts(out) == facts(djax.generate(model, prompt, decoder=djax.Threshold(tau), **options))
    with pytest.raises(OptionError, match="decoder: expected one kind with equal static fields"):
        djax.generate(model, prompts, decoder=[djax.Threshold(), djax.Fixed()])
    with pytest.raises(OptionError, match="cache: expected one kind with equal static fields"):
        djax.generate(model, prompts, cache=[djax.Vicinity(1, 2), djax.Vicinity(2, 2)])
    with pytest.raises(OptionError, match="decoder: expected one, or a list with one for each of the 2 prompts, got 1"):
        djax.generate(model, prompts, decoder=[djax.Threshold()])


def test_a_decoder_without_progress_ends_its_row_with_an_error():
    model = toy_model()
    engine = djax.Engine(model, rows=2, canvas=64, block_length=8, decoder=Stubborn())
    engine.join([1, 2], gen_length=8)
    with pytest.raises(TripCapError, match=r"rows \[0\] still hold masks after 8 turns"):
        engine.run()
    assert engine.free == [0, 1] and engine.run() == {}
    # A row that spends its cap ends the run that waits for a row, though others go on.
    engine.join([1, 2], gen_length=8)
    engine.join([1, 2], gen_length=40)
    with pytest.raises(TripCapError, match=r"rows \[0\] still hold masks after 8 turns"):
        engine.run(until="row")
    assert engine.free == [0]
