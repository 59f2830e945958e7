"""LLaDA2's block diffusion: dInfer's traces, the exact cache, the laws of rows and of the plain loop, and what is refused."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS
from deciding import decide
from test_golden_traces import CLEAN, decoder, recorded
from tiny import LLADA2, tiny_model

import djax
from djax.errors import CanvasError, OptionError

FAMILY = "llada2_block_diffusion"
# An EOS in the prompt that ends dInfer's decode; masks that it leaves. The tokens are then not the same.
DIFFERENT = {"020", "024"}


def rows():
    for name, trace in recorded(FAMILY).items():
        for row in range(trace["settings"]["batch"]):
            yield pytest.param(trace, row, id=f"{name}-{row}")


@pytest.mark.long
@pytest.mark.parametrize(("trace", "row"), list(rows()))
def test_dinfers_tokens_in_no_more_forwards(llada2, trace, row):
    """Each row alone, cached and not."""
    settings, data = trace["settings"], np.load(GOLDENS / f"{FAMILY}.npz")
    prompt = data[f"{trace['id']}/prompt"][row].astype(int)
    prompt = prompt[prompt != trace["mask_id"]]
    final = data[f"{trace['id']}/final"][row]
    options = dict(
        gen_length=settings["gen_length"],
        block_length=settings["block_length"],
        decoder=decoder(settings),
        early_stop=settings["early_stop"],
    )
    cached, plain = (djax.generate(llada2, prompt.tolist(), cache=cache, **options) for cache in (djax.Block(), None))
    np.testing.assert_array_equal(cached.canvas, plain.canvas)
    assert (cached.forwards, cached.refreshes, plain.refreshes) == (plain.forwards, 1, 0)
    assert cached.positions < plain.positions or len(cached.canvas) <= 2 * settings["block_length"]
    if trace["id"] in DIFFERENT:
        assert trace["id"] in CLEAN[FAMILY]["not_expected"]
        return
    # A row with a shorter prompt than its batch is a whole block shorter alone.
    np.testing.assert_array_equal(cached.canvas, final[: len(cached.canvas)])
    assert (
        len(cached.canvas) == -(-(len(prompt) + settings["gen_length"]) // settings["block_length"]) * settings["block_length"]
    )
    assert cached.forwards <= trace["num_forwards"]


def test_the_traces_are_there():
    assert len(CLEAN[FAMILY]["tokens_only"]) == 10 and len(list(rows())) == 36


DECODERS = (
    djax.Threshold(0.4),
    djax.Fixed(2, order="random"),
    djax.Credit(djax.Threshold(0.5)),
    djax.Hierarchy(0.6, 0.2),
    djax.Factor(2.0),
    djax.Entropy(1.0),
    djax.Edit(djax.Threshold(0.4), tau=0.2),
)


@pytest.fixture(scope="module")
def model():
    return tiny_model(config=LLADA2)


def facts(out):
    return out.canvas.tolist(), out.forwards, out.refreshes, out.positions


@pytest.mark.parametrize("smoothing", [None, djax.Smoothing()], ids=["hard", "soft"])
@pytest.mark.parametrize("decoder", DECODERS, ids=lambda d: type(d).__name__)
def test_the_cache_is_exact_and_rows_get_what_they_get_alone(model, decoder, smoothing):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, LLADA2.eos_id, n).tolist() for n in (3, 24, 17)]
    lengths, seeds = [30, 9, 21], [5, 6, 7]
    options = dict(block_length=8, decoder=decoder, smoothing=smoothing)
    cached, plain = (
        djax.generate(model, prompts, gen_length=lengths, seed=seeds, cache=cache, **options) for cache in (djax.Block(), None)
    )
    for with_cache, without in zip(cached, plain, strict=True):
        assert facts(with_cache)[:2] == facts(without)[:2]
    assert len({out.forwards for out in cached}) > 1
    for row, out in enumerate(cached):
        own = dict(gen_length=lengths[row], seed=seeds[row])
        assert facts(djax.generate(model, prompts[row], cache=djax.Block(), **own, **options)) == facts(out)


def test_rows_without_a_cache_in_any_order(model):
    rng = np.random.default_rng(1)
    asked = [(rng.integers(0, LLADA2.eos_id, n).tolist(), length) for n, length in ((3, 30), (24, 9), (17, 21))]
    options = dict(block_length=8, decoder=djax.Credit(djax.Hierarchy(0.6, 0.2)), cache=None)
    alone = [facts(djax.generate(model, prompt, gen_length=length, **options)) for prompt, length in asked]
    assert len({forwards for _, forwards, *_ in alone}) > 1
    for order in ([0, 1, 2], [2, 0, 1]):
        prompts, lengths = zip(*(asked[n] for n in order), strict=True)
        together = djax.generate(model, list(prompts), gen_length=list(lengths), **options)
        assert [facts(out) for out in together] == [alone[n] for n in order]


def test_the_plain_loop(llada2):
    """Full forwards under the mask up to the block's end, on the host, decoded by the same step."""
    prompt, block, rule = [5, 9, 300, 12, 7], 8, djax.Threshold(0.3)
    total = 24
    canvas = np.array(prompt + [llada2.config.mask_id] * (total - len(prompt)))
    forwards = 0
    for start in range(0, total, block):
        while llada2.config.mask_id in canvas[start : start + block]:
            logits = djax.logits(llada2, canvas[None, : start + block], block_length=block)[:, start:]
            masked = jnp.asarray(canvas[None, start : start + block] == llada2.config.mask_id)
            _, tokens, accept = decide(rule, (), logits, masked, mask_id=llada2.config.mask_id)
            canvas[start : start + block] = np.where(accept[0], tokens[0], canvas[start : start + block])
            forwards += 1
    for cache in (None, djax.Block()):
        options = dict(gen_length=19, block_length=block, decoder=rule, early_stop=False, cache=cache)
        out = djax.generate(llada2, prompt, **options)
        assert (out.canvas.tolist(), out.forwards) == (canvas.tolist(), forwards)


def test_lengths_are_rounded_up_to_whole_blocks(model):
    out = djax.generate(model, [1, 2, 3], gen_length=6, block_length=8, cache=djax.Block(), early_stop=False)
    assert len(out.canvas) == 16 and len(out.tokens) <= 13
    with pytest.raises(CanvasError, match=r"prompt 0: 3 tokens \+ gen_length 253 = 256 positions, the model has 255"):
        odd = tiny_model(config=LLADA2.__class__(**vars(LLADA2) | {"max_positions": 255}))
        djax.generate(odd, [1, 2, 3], gen_length=250, block_length=8)


def test_what_a_block_causal_family_does_not_take(model, moe_a):
    with pytest.raises(OptionError, match=r"cache: expected None or Block\(\), which is exact, .* llada2; got Dual"):
        djax.generate(model, [1], cache=djax.Dual())
    with pytest.raises(OptionError, match=r"cache: expected None, Prefix, Dual or Vicinity.*llada_moe.*got Block\(\)"):
        djax.generate(moe_a, [1], cache=djax.Block())
    with pytest.raises(OptionError, match=r"align_blocks: expected True, .* got False"):
        djax.generate(model, [1], align_blocks=False)
    with pytest.raises(OptionError, match="block_length: expected None, since every position of this family sees all; got 8"):
        djax.logits(moe_a, [[1, 2]], block_length=8)


def test_explain_foretells_the_forwards(model):
    options = dict(gen_length=20, block_length=8, cache=djax.Block(), early_stop=False)
    prompt = [1] * 11
    for pace, rule in (("slowest", djax.Fixed(1)), ("fastest", djax.Fixed(8))):
        told = djax.explain(model, prompt, decoder=rule, **options)
        foretold = [f for block in told.blocks for f in getattr(block, pace)]
        out = djax.generate(model, prompt, decoder=rule, **options)
        assert out.forwards == len(foretold)
        assert out.positions == sum(f.positions for f in foretold)
        assert out.refreshes == sum(f.refresh for f in foretold)
    assert "1 append of 16, 7 windows of 8" in str(told)


def test_the_cache_grows_in_place(model):
    """No keys or values of a whole layer are copied in the loop."""
    from djax.engine.generate import ask, compiled

    asked = ask(model, [[1] * 11], dict(gen_length=50, block_length=8, cache=djax.Block()), "generate")
    text = compiled(model, asked, asked.asks[0])[0].as_text()
    shape = f"f32[1,{LLADA2.groups},{64 * LLADA2.head_dim}]"
    body = text[: text.index("ENTRY ")]
    assert shape in body
    assert not re.findall(rf"= {re.escape(shape)}\S* copy\(", body)


def test_the_model_on_eight_groups_of_experts_is_what_the_file_says():
    config = json.loads((GOLDENS / "llada2" / "config.json").read_text())
    model = djax.load(GOLDENS / "llada2", dtype="bfloat16")
    assert model.params["layer_1"]["router_bias"].dtype == jnp.float32, "a choice between near ties"
    assert model.params["layer_1"]["router"].dtype == jnp.bfloat16
    assert model.config.rotated == config["head_dim"] * config["partial_rotary_factor"]
    assert jax.tree.leaves(model.params["layer_0"])[0].dtype == jnp.bfloat16
