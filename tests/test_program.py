"""Laws of the one program: rows never wait or look, nothing recompiles, everything stays on the device."""

import dataclasses
import gc
import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS
from tiny import CONFIG, tiny_model
from toy import family, toy_model

import djax
from djax.decoding.contract import write
from djax.engine.generate import compiled
from djax.engine.loop import decode
from djax.engine.request import prepare
from djax.errors import TripCapError
from djax.runtime.programs import Programs
from djax.tasks.problems import held_out

EVERYTHING = dict(gen_length=32, block_length=16)


def prompts(seed, lengths=(5, 17, 60)):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 300, n).tolist() for n in lengths]


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


def short_prompts(seed):
    """For the tiny model, in one bucket of canvas lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG.eos_id, n).tolist() for n in (5, 17, 30)]


def facts(out):
    return out.canvas.tolist(), out.forwards, out.refreshes


@pytest.mark.parametrize(
    ("decoder", "cache", "smoothing"),
    [
        (djax.Threshold(0.4), djax.Dual(every=3), None),
        (djax.Credit(djax.Threshold(0.4)), djax.Vicinity(4, 4, warmup=2), djax.Smoothing()),
    ],
    ids=repr,
)
def test_a_batch_gives_each_row_what_it_gets_alone(moe_a, decoder, cache, smoothing):
    """Here across length buckets, on a model of several layers; every combination is in test_batch_and_loop.py."""
    for seed in range(3):
        many = prompts(seed)
        options = dict(EVERYTHING, decoder=decoder, cache=cache, smoothing=smoothing)
        alone = [facts(djax.generate(moe_a, p, **options)) for p in many]
        assert [facts(o) for o in djax.generate(moe_a, many, **options)] == alone
        assert [facts(o) for o in djax.generate(moe_a, many[::-1], **options)] == alone[::-1]
    split = djax.generate(moe_a, many, max_batch=2, **options)
    assert [facts(o) for o in split] == alone, "groups, the last one padded with rows that never start"


@pytest.mark.parametrize("cache", [None, djax.Dual(), djax.Vicinity(16, 16, warmup=4)], ids=repr)
def test_a_batch_of_real_questions(small, cache):
    """Trained confidences crowd near 1, where the decoders' 1e-5 decides: the hardest case for equal answers."""
    many = [p.question for p in held_out(3, seed=5)]
    for decoder in (djax.Threshold(0.9), djax.Threshold(2.0)):
        options = dict(decoder=decoder, cache=cache)
        assert [facts(o) for o in djax.generate(small, many, **options)] == [
            facts(djax.generate(small, question, **options)) for question in many
        ]


@pytest.mark.parametrize("cache", [None, djax.Dual(), djax.Vicinity(4, 4, warmup=2)], ids=repr)
def test_bfloat16_decodes(cache):
    model = djax.load(GOLDENS / "moe_a", dtype="bfloat16")
    for out in djax.generate(model, prompts(0), cache=cache, decoder=djax.Credit(djax.Threshold(0.5)), **EVERYTHING):
        assert model.config.mask_id not in out.canvas
        assert out.forwards > 0


def test_rows_really_take_different_ways(moe_a):
    """The batch law would say little if all rows did the same."""
    rows = djax.generate(moe_a, prompts(0), decoder=djax.Threshold(0.4), cache=djax.Dual(), **EVERYTHING)
    assert len({o.forwards for o in rows}) > 1


def test_recording_changes_nothing_and_replays_the_decode(moe_a):
    many = prompts(7)
    options = dict(EVERYTHING, decoder=djax.Threshold(0.4), cache=djax.Dual(), smoothing=djax.Smoothing(), early_stop=False)
    plain = djax.generate(moe_a, many, **options)
    assert all(o.trace is None for o in plain)
    for prompt, out, traced in zip(many, plain, djax.generate(moe_a, many, trace=True, **options), strict=True):
        assert facts(out) == facts(traced)
        trace, n = traced.trace, len(prompt)
        assert len(trace.starts) == len(trace.proposals) == traced.forwards
        assert trace.whole.sum() == traced.refreshes
        assert np.all(trace.accepted_at[:n] == -1)
        assert np.all(trace.accepted_at[n:] >= 0), "every generated position was accepted by some forward"
        for position in range(n, len(traced.canvas)):
            forward = trace.accepted_at[position]
            proposed = trace.proposals[forward, position - trace.starts[forward]]
            assert proposed == traced.canvas[position]
            assert 0 < trace.confidence[position] <= 1 + 1e-6
        np.testing.assert_array_equal(trace.canvas(traced.canvas, n, traced.forwards, 0), traced.canvas)


def test_smoothing_without_weight_is_none(tiny):
    """With a ramp only for decoders that compare with no threshold: dInfer's ramp begins at 1, whatever the weight."""
    options = dict(EVERYTHING, cache=djax.Vicinity(4, 4, warmup=2))
    for decoder, decay in ((djax.Fixed(2), 0.02), (djax.Threshold(0.4), None)):
        still = djax.Smoothing(first=0.0, growth=0.0, last=0.0, threshold_decay=decay)
        for prompt in short_prompts(8):
            plain = djax.generate(tiny, prompt, decoder=decoder, **options)
            assert facts(djax.generate(tiny, prompt, decoder=decoder, smoothing=still, **options)) == facts(plain)


def test_sampling_draws_what_the_row_draws_alone(moe_a):
    many = prompts(1)
    options = dict(EVERYTHING, temperature=0.8, seed=3)
    alone = [facts(djax.generate(moe_a, p, **options)) for p in many]
    assert [facts(o) for o in djax.generate(moe_a, many, **options)] == alone
    other = facts(djax.generate(moe_a, many[0], **dict(options, seed=4)))
    assert other != alone[0]
    both = djax.generate(moe_a, [many[0]] * 3, **dict(options, seed=[3, 4, 3]))
    assert [facts(o) for o in both] == [alone[0], other, alone[0]], "one seed a prompt"


def test_vicinity_without_reach_or_warmup_is_dual(tiny):
    for prompt in short_prompts(2):
        options = dict(EVERYTHING, decoder=djax.Threshold(0.4))
        dual = djax.generate(tiny, prompt, cache=djax.Dual(), **options)
        vicinity = djax.generate(tiny, prompt, cache=djax.Vicinity(0, 0, warmup=0), **options)
        assert facts(dual) == facts(vicinity)


def test_a_threshold_above_one_takes_one_token_a_forward(tiny):
    """Up to dInfer's slack of 1e-5, which random weights do not come near."""
    for prompt in short_prompts(4):
        over = djax.generate(tiny, prompt, decoder=djax.Threshold(1.5), early_stop=False, **EVERYTHING)
        one = djax.generate(tiny, prompt, decoder=djax.Fixed(1), early_stop=False, **EVERYTHING)
        assert facts(over) == facts(one)
        assert one.forwards == 32


@pytest.mark.parametrize("early_stop", [True, False])
def test_no_mask_is_ever_returned(moe_a, early_stop):
    for seed in range(4):
        for out in djax.generate(moe_a, prompts(seed), decoder=djax.Threshold(0.2), early_stop=early_stop, **EVERYTHING):
            assert moe_a.config.mask_id not in out.canvas
            assert moe_a.config.eos_id not in out.tokens


def test_early_stop_fills_the_rest_with_eos(moe_b):
    """A prompt on which this checkpoint says EOS in its first block (found by search, fixed by seed)."""
    eos = moe_b.config.eos_id
    for seed in range(60):
        prompt = np.random.default_rng(seed).integers(0, 500, 17).tolist()
        stopped = djax.generate(moe_b, prompt, early_stop=True, **EVERYTHING)
        # Blocks end at 32 and 48 on this canvas of 49.
        if eos in stopped.canvas[17:32]:
            break
    else:
        pytest.fail("no seed says EOS in the first block")
    assert np.all(stopped.canvas[32:] == eos)
    whole = djax.generate(moe_b, prompt, early_stop=False, **EVERYTHING)
    assert whole.forwards > stopped.forwards
    np.testing.assert_array_equal(whole.canvas[:32], stopped.canvas[:32])
    np.testing.assert_array_equal(stopped.tokens, whole.tokens)


def test_eos_in_the_prompt_does_not_stop(moe_a):
    """dInfer stops here when the aligned first block holds it (README, deviations)."""
    prompt = [3, 4, moe_a.config.eos_id, 6, 7]
    out = djax.generate(moe_a, prompt, gen_length=60, block_length=16, decoder=djax.Fixed(4))
    assert moe_a.config.eos_id not in out.canvas[5:16], "this prompt's first block must hold no EOS of its own"
    assert np.any(out.canvas[16:] != moe_a.config.eos_id)


def test_a_block_longer_than_the_canvas_is_the_canvas(moe_a):
    long = djax.generate(moe_a, prompts(6)[0], gen_length=20, block_length=1000, cache=djax.Vicinity(25, 25))
    fitting = djax.generate(moe_a, prompts(6)[0], gen_length=20, block_length=25, cache=djax.Vicinity(20, 20))
    assert facts(long) == facts(fitting)


def test_borders_with_and_without_alignment(moe_a):
    """17 prompt tokens, block 16: aligned blocks end at 32, 48, 49; others at 33, 49. One refresh a block tells."""
    prompt = prompts(5)[1]
    options = dict(EVERYTHING, cache=djax.Dual(), early_stop=False)
    assert djax.generate(moe_a, prompt, align_blocks=True, **options).refreshes == 3
    assert djax.generate(moe_a, prompt, align_blocks=False, **options).refreshes == 2


# --- facts about the compiled program


class Compilations:
    """Counts backend compilations while it is open."""

    def __enter__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def _listen(self, event, seconds, **kwargs):
        self.count += event == "/jax/core/compile/backend_compile_duration"

    def __exit__(self, *error):
        jax.monitoring.unregister_event_duration_listener(self._listen)


def test_one_executable_a_call_and_none_for_what_is_traced(moe_b):
    """Another prompt length in the bucket, generation length, threshold, seed, early stop: all traced."""
    options = dict(gen_length=20, block_length=10, cache=djax.Dual(every=7))
    with Compilations() as first:
        out = djax.generate(moe_b, list(range(11)), **options)
    assert first.count == 1
    assert out.timing.compile > 0
    with Compilations() as more:
        for n, gen_length, tau in ((12, 20, 0.9), (30, 20, 0.8), (3, 33, 0.7), (40, 24, 2)):
            options = dict(gen_length=gen_length, block_length=10, cache=djax.Dual(every=n))
            again = djax.generate(moe_b, list(range(n)), decoder=djax.Threshold(tau), early_stop=n == 3, **options)
            assert again.timing.compile == 0
        djax.generate(moe_b, list(range(50)), gen_length=20, block_length=10, cache=djax.Dual(every=2))
    assert more.count == 1, "only the last one lies in another bucket of canvas lengths"


def test_programs_that_are_let_go_are_gone(monkeypatch):
    """A CPU program holds hundreds of memory mappings: one that leaves djax's own list must not live on in jax's caches."""
    model, client = tiny_model(), jax.devices()[0].client
    kept = Programs(most=2)
    monkeypatch.setattr(sys.modules["djax.engine.generate"], "PROGRAMS", kept)
    lives = []
    for block_length in (5, 6, 7, 8):
        djax.generate(model, [1, 2, 3], gen_length=20, block_length=block_length)
        gc.collect()
        lives.append(len(client.live_executables()))
    assert len(kept) == 2
    assert lives[1] > lives[0], "two are kept"
    assert lives[1] == lives[2] == lives[3], "and no more"


def test_a_sweep_of_thresholds_over_prompts_compiles_once(moe_b):
    """A hundred calls in one bucket of canvas lengths, however a number is spelled."""
    taus = (0.1, 0.3, 0.5, 0.7, np.float32(0.8), jnp.float32(0.9), 0.95, 1, np.int64(2), 1e6)
    answers = {}
    with Compilations() as sweep:
        for i, tau in enumerate(taus):
            for n in range(1, 11):
                prompt = np.random.default_rng(n).integers(0, 500, 3 * n)
                options = dict(gen_length=10 + n, block_length=6, seed=10 * i + n, early_stop=False)
                answers[i, n] = djax.generate(moe_b, prompt, decoder=djax.Threshold(tau), **options)
    assert sweep.count == 1
    assert [at for at, out in answers.items() if out.timing.compile] == [(0, 1)]
    for n in range(1, 11):
        forwards = [answers[i, n].forwards for i in range(len(taus))]
        assert forwards == sorted(forwards), "the threshold that ran is the one that was asked for"
        assert forwards[0] < forwards[-1] == 10 + n


def asking(model, prompts, **options):
    return prepare(model, prompts, djax.Options(**(EVERYTHING | options)))


def hlo(model, cache):
    asked = asking(model, prompts(0)[:2], cache=cache)
    return compiled(model, asked, asked.asks[0])[0].as_text()


@pytest.mark.parametrize("cache", [None, djax.Dual(), djax.Vicinity(4, 4, warmup=2)], ids=repr)
def test_the_loop_is_inside_and_nothing_leaves_the_device(moe_a, cache):
    text = hlo(moe_a, cache)
    assert len(re.findall(r"^ENTRY ", text, re.M)) == 1
    entry = text[text.index("ENTRY ") :]
    assert len(re.findall(r" while\(", entry)) == 1, "one loop, from the first forward to the last token"
    assert " conditional(" not in text, "the platform's expert back end is chosen when the program is lowered"
    for name in ("infeed", "outfeed", " send(", " recv(", "callback", "SendToHost", "RecvFromHost"):
        assert name not in text


@pytest.mark.parametrize(("kernels", "tiles"), [pytest.param("djax", 0, marks=pytest.mark.cpp), ("xla", 2)])
def test_lowered_for_a_gpu_the_experts_are_dense_products(moe_a, monkeypatch, kernels, tiles):
    """The back end follows the platform the program is lowered for, not the machine it is lowered on: only on a CPU without
    djax's own function a layer runs loops over expert tiles. What is left are the decode, its refreshes and its window."""
    monkeypatch.setenv("DJAX_KERNELS", kernels)
    asked = asking(moe_a, prompts(0)[:2], block_length=16, cache=djax.Vicinity(4, 4))
    ask = asked.asks[0]
    made = jax.jit(partial(decode, spec=asked.spec(moe_a, ask))).trace(moe_a.params, ask)
    loops = {p: made.lower(lowering_platforms=(p,)).as_text().count("stablehlo.while") for p in ("cuda", "cpu")}
    assert loops == {"cuda": 3, "cpu": 3 + tiles * moe_a.config.layers}


def test_a_window_step_copies_no_cache(moe_a):
    """Keys and values live in the carry and are read where they are: no copy of their shape outside the entry."""
    text = hlo(moe_a, djax.Vicinity(4, 4, warmup=2))
    c = moe_a.config
    shape = f"f32[2,{c.groups},{64 * c.head_dim}]"
    body = text[: text.index("ENTRY ")]
    assert shape in body
    assert not re.findall(rf"= {re.escape(shape)}\S* copy\(", body)


@djax.pytree
@dataclasses.dataclass(frozen=True)
class Stubborn(djax.Decoder):
    """Breaks the law of progress."""

    def step(self, state, look):
        return state, write(look, look.tokens, look.open & False)


def test_the_cap_ends_a_decoder_that_makes_no_progress(moe_a):
    with pytest.raises(TripCapError, match=r"rows \[0\] still hold masks after 32 turns: .*finite.*Stubborn"):
        djax.generate(moe_a, [1, 2, 3], decoder=Stubborn(), **EVERYTHING)


@djax.pytree
@dataclasses.dataclass(frozen=True)
class StopsAfterABlock(djax.Decoder):
    """Keeps the law of progress in the first block only."""

    def step(self, state, look):
        _, verdict = djax.Fixed(1).step(state, look)
        return state, write(look, verdict.tokens, (verdict.tokens != look.tokens) & (look.tick.block == 0))


def test_the_error_at_the_cap_has_what_was_decoded(small):
    """Three rows, of which the last finishes: each as far as it came, with its trace; text only where no mask is left."""
    ids = dict(vocab=small.config.vocab, mask_id=small.config.mask_id, eos_id=small.config.eos_id)
    model = toy_model(says=[65] * 256, config=dataclasses.replace(CONFIG, **ids), tokenizer=small.tokenizer)
    lengths, prompts = [20, 11, 5], [[7] * 4, [7] * 8, [7] * 3]
    options = dict(gen_length=lengths, block_length=8, decoder=StopsAfterABlock(), cache=djax.Dual(surplus=False))
    with pytest.raises(TripCapError, match=r"rows \[0, 1\] still hold masks after 20 turns: ") as error:
        djax.generate(model, prompts, **options)
    # Blocks from 0 and from 8 on: the first one of each row holds 4, 8 and 5 masks.
    stuck, other, done = error.value.generations
    for out, prompt, accepted, forwards in ((stuck, prompts[0], 4, 20), (other, prompts[1], 8, 11), (done, prompts[2], 5, 5)):
        end = len(prompt) + accepted
        assert out.canvas.tolist() == prompt + [65] * accepted + [ids["mask_id"]] * (len(out.canvas) - end)
        assert out.tokens.tolist() == [65] * accepted
        assert out.trace.accepted_at.tolist() == [-1] * len(prompt) + [*range(accepted)] + [-1] * (len(out.canvas) - end)
        assert out.forwards == len(out.trace.starts) == forwards
    assert [out.refreshes for out in error.value.generations] == [2, 2, 1]
    assert (stuck.text, other.text) == (None, None)
    assert done.text == small.tokenizer.decode([65] * 5)


def test_a_model_that_is_not_finite_ends_at_the_cap():
    """With an error that has no token the model never gave, rather than with an answer."""
    model = toy_model(family=family(unembed=lambda params, c, x: jnp.full((*x.shape[:2], c.vocab), jnp.nan)))
    with pytest.raises(TripCapError, match=r"rows \[0\] still hold masks after 9 turns: either the model's logits") as error:
        djax.generate(model, [1, 2], gen_length=9, block_length=4)
    (out,) = error.value.generations
    assert (len(out.tokens), out.forwards, out.text) == (0, 9, None)
    assert np.all(out.trace.accepted_at == -1)
    assert np.all(out.canvas[2:] == CONFIG.mask_id)
