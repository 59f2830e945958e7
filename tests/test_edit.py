"""The decoder that replaces what it accepted: its law, LLaDA2.1's rule as a NumPy loop, and that its blocks end."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deciding import begin, decide
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoders import BLOCK, MADE, MASK, ROWS, VOCAB, cases, softmax
from tiny import CONFIG, LLADA2, tiny_model
from toy import family, toy_model

import djax
from djax.decoding import DECODERS
from djax.errors import OptionError
from djax.plugs import parse
from djax.tasks.problems import held_out

EDITORS = [plug for name in DECODERS for plug in MADE[name] if plug.edits]


@pytest.mark.parametrize("plug", EDITORS, ids=repr)
@settings(max_examples=40, deadline=None)
@given(case=cases(), ramp=st.sampled_from([-np.inf, 0.7]))
def test_the_law(plug, case, ramp):
    """And the rule, position by position."""
    logits, masked, seed = case
    rng = np.random.default_rng(seed)
    tokens = np.where(masked, MASK, rng.integers(0, MASK, (ROWS, BLOCK))).astype(np.int32)
    editable = ~masked & (rng.random((ROWS, BLOCK)) < 0.7)
    state = begin(plug, ROWS, BLOCK, VOCAB)
    key = jax.random.split(jax.random.key(seed), ROWS) if plug.draws else None
    looked = dict(tokens=tokens, may_write=masked | editable, floor=ramp, key=key)
    _, edited, new = (
        np.asarray(x) if n else x for n, x in enumerate(decide(plug, state, logits, masked, mask_id=MASK, **looked))
    )
    if not plug.post_steps:
        assert not np.any(new & ~masked), "without post-steps nothing is editable"
        return
    replace = new & ~masked
    assert not np.any(replace & ~editable), "replace lies inside editable"
    assert np.all(edited[replace] != MASK), "the mask id is never written"
    assert np.all(edited[replace] != tokens[replace]), "what is written is another token"
    for b, s in zip(*np.nonzero(editable), strict=True):
        p, bound = softmax(logits[b, s]), max(plug.tau, ramp)
        if abs(p.max() - bound) > 1e-6:  # float32 decides the rest
            assert replace[b, s] == (logits[b, s].argmax() not in (tokens[b, s], MASK) and p.max() > bound)


def edited(plug, logits):
    """Where a block of tokens 0 is edited, by logits `[1, S, V]`."""
    state, masked = begin(plug, 1, BLOCK, VOCAB), np.zeros((1, BLOCK), bool)
    return np.asarray(decide(plug, state, logits, masked, mask_id=MASK, tokens=np.zeros((1, BLOCK), np.int32))[2])


def test_the_bound_is_strict_and_what_is_not_finite_stays():
    logits = np.zeros((1, BLOCK, VOCAB), np.float32)
    logits[0, :, 4] = np.log(10.0)  # p is one half
    logits[0, 0] = np.nan
    for tau, expected in ((0.4999, [False] + [True] * (BLOCK - 1)), (0.5001, [False] * BLOCK)):
        assert edited(djax.Edit(tau=tau), logits)[0].tolist() == expected
    logits[0, :, 4] = 1000.0  # p is exactly one
    assert not np.any(edited(djax.Edit(tau=1.0), logits))


def published(logits_of, prompt, total, block, mask_id, eos_id, *, tau_mask, tau_edit, post_steps, early_stop):
    """LLaDA2.1's rule on the host: canvas, forwards, the last forward that wrote each position, how many were replaced.

    logits_of: int `[1, L]` -> `[1, L, V]`.
    """
    canvas = np.full(total, mask_id)
    canvas[: len(prompt)] = prompt
    wrote, forwards, replaced = np.full(total, -1), 0, 0
    for start in range(len(prompt) // block * block, total, block):
        at = np.arange(start, min(start + block, total))
        post = 0
        while True:
            masked = canvas[at] == mask_id
            post += not masked.any()
            if post > post_steps:
                break
            p = np.stack([softmax(z) for z in np.asarray(logits_of(canvas[None])[0])[at]])
            best, sure = p.argmax(axis=1), p.max(axis=1)
            unmask = masked & (best != mask_id) & (sure > tau_mask)
            if masked.any() and not unmask.any():
                unmask[np.argmax(np.where(masked & (best != mask_id), sure, -1))] = True
                assert best[unmask] != mask_id, "this prompt says nothing about the rule"
            replace = ~masked & (at >= len(prompt)) & (best != mask_id) & (best != canvas[at]) & (sure > tau_edit)
            write = unmask | replace
            canvas[at[write]], wrote[at[write]] = best[write], forwards
            forwards, replaced = forwards + 1, replaced + replace.sum()
            if not masked.any() and not write.any():
                break
        if early_stop and np.any(canvas[at[at >= len(prompt)]] == eos_id):
            canvas[at[-1] + 1 :] = eos_id
            break
    return canvas, forwards, wrote, replaced


def agree(out, expected):
    canvas, forwards, wrote, replaced = expected
    np.testing.assert_array_equal(out.canvas, canvas)
    assert out.forwards == len(out.trace.starts) == forwards
    np.testing.assert_array_equal(out.trace.accepted_at, wrote)
    for position in np.flatnonzero(wrote >= 0):
        assert out.trace.proposals[wrote[position], position - out.trace.starts[wrote[position]]] == canvas[position]
    return replaced


@pytest.mark.parametrize("cache", [None, djax.Block()], ids=repr)
def test_the_published_rule_on_llada2(llada2, cache):
    config, block, total, replaced = llada2.config, 8, 24, 0
    for seed in range(3):
        prompt = np.random.default_rng(seed).integers(0, 300, 3 + 4 * seed).tolist()
        rule = dict(tau_mask=0.3, tau_edit=0.15, post_steps=4)
        expected = published(
            partial(djax.logits, llada2, block_length=block),
            *(prompt, total, block, config.mask_id, config.eos_id),
            early_stop=False,
            **rule,
        )
        decoder = djax.Edit(djax.Threshold(0.3, slack=0.0), tau=0.15, post_steps=4)
        options = dict(gen_length=total - len(prompt), block_length=block, early_stop=False, trace=True)
        replaced += agree(djax.generate(llada2, prompt, decoder=decoder, cache=cache, **options), expected)
    assert replaced > 0


def test_the_published_rule_on_the_small_model(small):
    replaced = 0
    for problem in held_out(2, seed=3):
        options = dict(gen_length=96, block_length=32, trace=True)
        decoder = djax.Edit(djax.Threshold(0.3, slack=0.0), tau=0.5)
        out = djax.generate(small, problem.question, decoder=decoder, **options)
        total = len(out.canvas)
        expected = published(
            partial(djax.logits, small),
            *(out.canvas[: out.prompt_length], total, 32, small.config.mask_id, small.config.eos_id),
            **dict(tau_mask=0.3, tau_edit=0.5, post_steps=16, early_stop=True),
        )
        replaced += agree(out, expected)
    assert replaced > 0


@pytest.mark.parametrize(
    ("config", "cache", "smoothing", "post_steps", "more"),
    [(LLADA2, djax.Block(), None, 16, [3, 2, 5]), (CONFIG, djax.Vicinity(3, 5, warmup=2), djax.Smoothing(), 0, [0, 0, 0])],
    ids=["a-last-look", "no-post-steps"],
)
def test_a_bound_of_one_is_the_inner_decoder(config, cache, smoothing, post_steps, more):
    """With a forward more a block, where nothing counts forwards; without post-steps with no more, whatever counts them."""
    model, inner = tiny_model(config=config), djax.Threshold(0.4)
    prompts = [np.random.default_rng(n).integers(0, config.eos_id, n).tolist() for n in (3, 17, 24)]
    options = dict(gen_length=[21, 15, 40], block_length=8, cache=cache, smoothing=smoothing, early_stop=False)
    plain = djax.generate(model, prompts, decoder=inner, **options)
    never = djax.generate(model, prompts, decoder=djax.Edit(inner, tau=1.0, post_steps=post_steps), **options)
    assert [(o.canvas.tolist(), o.refreshes) for o in never] == [(o.canvas.tolist(), o.refreshes) for o in plain]
    assert [o.forwards - p.forwards for o, p in zip(never, plain, strict=True)] == more


def undecided(first, second):
    """A model that is sure of `first` at a mask and where `second` stands, and of `second` where `first` stands."""

    def unembed(params, config, x):
        token = x[..., 0].astype(jnp.int32)
        return 12 * params["head"][token]

    model = toy_model(family=family(trunk=lambda params, config, x, *_: (x, ((x[..., None], x[..., None]),)), unembed=unembed))
    says = np.full(CONFIG.vocab, first)
    says[first] = second
    model.params.update(
        embedding=jnp.arange(CONFIG.vocab, dtype=jnp.float32)[:, None],
        head=jnp.asarray(np.eye(CONFIG.vocab, dtype=np.float32)[says]),
    )
    return model


@pytest.mark.parametrize(("post_steps", "left"), [(0, 1), (1, 2), (2, 1), (16, 1), (17, 2)])
def test_tokens_that_never_settle_end_after_the_post_steps(post_steps, left):
    model, decoder = undecided(1, 2), djax.Edit(djax.Threshold(0.5), tau=0.5, post_steps=post_steps)
    out = djax.generate(model, [5, 1, 2], gen_length=21, block_length=8, decoder=decoder, trace=True)
    assert out.canvas.tolist() == [5, 1, 2] + [left] * 21, "the prompt stays"
    assert out.forwards == 3 * (1 + post_steps)
    blocks = (np.arange(3, 24)) // 8
    assert out.trace.accepted_at[3:].tolist() == (blocks * (1 + post_steps) + post_steps).tolist()


def test_no_forward_edits_after_the_post_steps_and_the_trace_holds_all():
    """A turn of two forwards can pass the bound by one: it runs and changes nothing. More forwards than two a position."""
    decoder = djax.Edit(djax.Threshold(0.5), tau=0.5, post_steps=16)
    options = dict(gen_length=60, block_length=4, decoder=decoder, cache=djax.Dual(every=1), align_blocks=False, trace=True)
    out = djax.generate(undecided(1, 2), [7, 7, 7], **options)
    assert out.canvas.tolist() == [7, 7, 7] + [1] * 60
    assert out.forwards == len(out.trace.starts) == 15 * 18 > 2 * 64
    assert out.trace.accepted_at[-4:].tolist() == [14 * 18 + 16] * 4
    assert out.trace.starts[-1] == 59


@pytest.mark.parametrize(("first", "second"), [(CONFIG.eos_id, 1), (1, CONFIG.eos_id)], ids=["goes", "comes"])
def test_an_eos_counts_once_its_block_is_finished(first, second):
    model = undecided(first, second)
    for post_steps in (1, 2):
        decoder = djax.Edit(djax.Threshold(0.5), tau=0.5, post_steps=post_steps)
        out = djax.generate(model, [5, 5, 5], gen_length=21, block_length=8, decoder=decoder)
        ends = (first, second)[post_steps % 2] == CONFIG.eos_id
        assert out.forwards == (1 if ends else 3) * (1 + post_steps)
        assert len(out.tokens) == (0 if ends else 21)


@pytest.mark.parametrize("cache", [None, djax.Dual(every=3), djax.Vicinity(2, 2, warmup=3)], ids=repr)
def test_explain_foretells_the_forwards(cache):
    model = undecided(1, 2)
    options = dict(gen_length=19, block_length=8, cache=cache, early_stop=False)
    paces = (("slowest", djax.Edit(djax.Fixed(1), tau=0.5, post_steps=3)), ("fastest", djax.Edit(djax.Fixed(8), tau=2.0)))
    for pace, decoder in paces:
        told = djax.explain(model, [5] * 5, decoder=decoder, **options)
        foretold = [f for block in told.blocks for f in getattr(block, pace)]
        out = djax.generate(model, [5] * 5, decoder=decoder, **options)
        assert (out.forwards, out.refreshes) == (len(foretold), sum(f.refresh for f in foretold))
        assert out.positions == sum(f.positions for f in foretold)
        assert told.facts["decoder"].endswith(f" (edits: up to {decoder.post_steps} more forwards a block)")


def test_a_sweep_of_bounds_compiles_once():
    model = undecided(1, 2)
    options = dict(gen_length=8, block_length=8)
    forwards = []
    for i, tau in enumerate((0.5, 0.9, 0.9999, 1)):
        out = djax.generate(model, [5] * 3, decoder=djax.Edit(djax.Threshold(0.1 * i + 0.1), tau=tau), **options)
        assert (out.timing.compile > 0) == (i == 0)
        forwards.append(out.forwards)
    assert forwards == [34, 34, 4, 4], "the bound that ran is the one that was asked for"


@djax.pytree
@dataclasses.dataclass(frozen=True)
class Unbounded(djax.Decoder):
    """Says that it edits, and not for how long."""

    edits = True
    post_steps = None

    def step(self, state, look):
        return djax.Fixed(1).step(state, look)


def test_a_decoder_of_one_s_own_that_edits_has_all_it_takes():
    with pytest.raises(OptionError, match=r"decoder: Unbounded.post_steps: expected a whole number, at least 0 .* got None"):
        djax.generate(undecided(1, 2), [5], decoder=Unbounded())
    with pytest.raises(OptionError, match=r"Credit\(inner=...\): expected a decoder that does not edit, .* got Unbounded\(\)"):
        djax.Credit(Unbounded())


def test_it_is_read_from_a_command_line():
    made = djax.Edit(djax.Credit(djax.Factor(0.3)), tau=0.8, post_steps=4)
    assert parse("Edit(Credit(Factor(0.3)), 0.8, post_steps=4)", DECODERS, "decoder") == made
    assert parse(repr(made), DECODERS, "decoder") == made
    assert djax.Edit() == djax.Edit(djax.Threshold(0.95), tau=0.9, post_steps=16)
