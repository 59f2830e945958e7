"""Bad input at the public door: a typed error that names the argument, what came and what would work."""

import contextlib
import dataclasses
import datetime
import re
from decimal import Decimal
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model
from toy import family, toy_model

import djax
from djax.decoding.contract import write
from djax.errors import BatchError, CanvasError, DjaxError, OptionError, PromptError
from djax.plugs import parse

IDS = [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(gen_length=0), "gen_length: expected a whole number, at least 1 and at most 2147483647, got 0"),
        (dict(gen_length=-3), "gen_length: .* got -3"),
        (dict(gen_length=1.5), "gen_length: .* got 1.5 of type float"),
        (dict(gen_length=True), "gen_length: .* got True of type bool"),
        (dict(block_length=0), "block_length: expected a whole number, at least 1 .* got 0"),
        (dict(block_length="32"), "block_length: .* got '32' of type str"),
        (dict(temperature=-0.1), "temperature: expected a finite number at least 0.0, got -0.1"),
        (dict(temperature=float("nan")), "temperature: .* got nan"),
        (dict(seed=-1), "seed: expected a whole number, at least 0 and at most 4294967295, got -1"),
        (dict(seed=2**32), "seed: .* got 4294967296"),
        (dict(seed=[1, 2]), "seed: expected one whole number, or one for each of the 1 prompts, got 2"),
        (dict(seed=0.5), "seed: .* got 0.5 of type float"),
        (dict(block_length=2**40), "block_length: .* at most 2147483647, got 1099511627776"),
        (dict(early_stop="yes"), "early_stop: expected True or False, got 'yes'"),
        (dict(align_blocks=1), "align_blocks: expected True or False, got 1"),
        (dict(max_batch=0), "max_batch: expected a whole number, at least 1 .* got 0"),
        (dict(decoder="threshold"), r"decoder: expected one of djax.Threshold\(...\), djax.Fixed\(...\), .* got 'threshold'"),
        (dict(decoder=djax.Threshold), "decoder: expected one of .* got <class"),
        (dict(cache=djax.Threshold()), r"cache: expected one of None, djax.Prefix\(...\), djax.Dual\(...\), .* got"),
        (dict(smoothing=djax.Threshold()), r"smoothing: expected one of None, djax.Smoothing\(...\), got Threshold"),
        (dict(smoothing=djax.Smoothing), "smoothing: expected one of .* got <class"),
        (dict(gen_length=8, min_gen_length=9), "min_gen_length: expected at most gen_length, 8, for prompt 0, got 9"),
        (dict(min_gen_length=-1), "min_gen_length: expected a whole number, at least 0 .* got -1"),
        (dict(min_gen_length=[1, 2]), "min_gen_length: expected one whole number, or one for each of the 1 prompts, got 2"),
        (dict(gen_length=[]), "gen_length: expected one whole number, or one for each of the 1 prompts, got 0"),
        (dict(gen_length=[8.0]), "gen_length: .* got 8.0 of type float"),
        (
            dict(gen_length=27, cache=djax.Vicinity(16, 31)),
            r"cache: Vicinity\(before=16, after=31, .*\) reaches 31 positions beyond its block; prompt 0 has a canvas of 30, "
            "so expected at most 30",
        ),
        (dict(gen_length=8, cache=djax.Vicinity(12, 0)), "reaches 12 positions .* a canvas of 11, so expected at most 11"),
    ],
)
def test_options(moe_a, options, message):
    with pytest.raises(OptionError, match=message):
        djax.generate(moe_a, IDS, **options)


def test_lengths_for_each_prompt_must_be_as_many_and_fit(moe_a):
    for name in ("gen_length", "min_gen_length", "seed"):
        with pytest.raises(OptionError, match=f"{name}: expected one whole number, or one for each of the 2 prompts, got 3"):
            djax.generate(moe_a, [IDS, IDS], **{name: [1, 1, 1]})
    with pytest.raises(OptionError, match="min_gen_length: expected at most gen_length, 6, for prompt 1, got 7"):
        djax.generate(moe_a, [IDS, IDS], gen_length=[8, 6], min_gen_length=7)
    with pytest.raises(CanvasError, match=r"prompt 1: 3 tokens \+ gen_length 8190 = 8193"):
        djax.generate(moe_a, [IDS, IDS], gen_length=[8, 8190])
    with pytest.raises(OptionError, match="prompt 1 has a canvas of 11, so expected at most 11"):
        djax.generate(moe_a, [IDS, IDS], gen_length=[30, 8], cache=djax.Vicinity(4, 12))


def test_a_reach_as_long_as_the_canvas_is_legal():
    """And one to the end is of every canvas, so that a prefix cache is never refused."""
    for cache in (djax.Vicinity(11, 11), djax.Prefix()):
        assert djax.explain(toy_model(), IDS, gen_length=8, cache=cache).blocks


def test_a_family_without_cache_or_soft_embeddings():
    plain = toy_model(family=family("caches", "smooths"))
    with pytest.raises(OptionError, match=r"cache: expected None, since the family toy keeps no keys .*; got Dual\(every=None"):
        djax.generate(plain, IDS, cache=djax.Dual())
    with pytest.raises(OptionError, match=r"smoothing: expected None, since the family toy takes no soft .*; got Smoothing"):
        djax.generate(plain, IDS, smoothing=djax.Smoothing())
    out = djax.generate(plain, IDS, gen_length=8, block_length=4, decoder=djax.Fixed(2), early_stop=False)
    assert (out.tokens.tolist(), out.forwards) == ([1] * 8, 5), "blocks [0, 4), [4, 8), [8, 11) hold 1, 4 and 3 masks"


def test_a_decoder_of_ones_own_must_be_a_pytree(moe_a):
    class Mine(djax.Decoder):
        init = step = print

    with pytest.raises(OptionError, match=r"decoder: Mine is no pytree; decorate the class with"):
        djax.generate(moe_a, IDS, decoder=Mine())


def test_unknown_options_are_errors(moe_a):
    with pytest.raises(TypeError, match="steps"):
        djax.generate(moe_a, IDS, steps=4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: djax.Threshold(0), r"Threshold\(tau=...\): expected a finite number above 0.0, got 0"),
        (lambda: djax.Threshold(-1.0), "got -1.0"),
        (lambda: djax.Threshold(float("nan")), "got nan"),
        (lambda: djax.Threshold(float("inf")), "got inf"),
        (lambda: djax.Threshold("0.9"), "got '0.9' of type str"),
        (lambda: djax.Threshold(None), "got None of type NoneType"),
        (lambda: djax.Fixed(0), r"Fixed\(per_step=...\): expected a whole number, at least 1 .* got 0"),
        (lambda: djax.Fixed(1.0), "got 1.0 of type float"),
        (lambda: djax.Threshold(1e-60), "expected a finite number above 0.0, got 1e-60"),
        (lambda: djax.Threshold(1e300), "got 1e[+]300"),
        (lambda: djax.Threshold(Decimal("0.9")), "of type Decimal"),
        (lambda: djax.Threshold(np.ones(2)), "of type ndarray"),
        (lambda: djax.Threshold(jnp.float32(jnp.nan)), "got nan"),
        (lambda: djax.Threshold({1}), "of type set"),
        (lambda: djax.Fixed(2**40), "at most 2147483647, got 1099511627776"),
        (lambda: djax.Credit(djax.Threshold), r"Credit\(inner=...\): expected one of the decoders .* got <class"),
        (lambda: djax.Credit(beta=1.5), r"Credit\(beta=...\): .* at least 0.0 at most 1.0, got 1.5"),
        (lambda: djax.Credit(djax.Edit()), r"Credit\(inner=...\): expected a decoder that does not edit, .* got Edit\(inner="),
        (lambda: djax.Edit(djax.Edit()), r"Edit\(inner=...\): expected a decoder that does not edit, .* got Edit\(inner="),
        (lambda: djax.Edit(tau=0), r"Edit\(tau=...\): expected a finite number above 0.0, got 0"),
        (lambda: djax.Edit(post_steps=1025), r"Edit\(post_steps=...\): .* at least 0 and at most 1024, got 1025"),
        (lambda: djax.Hierarchy(0.4, 0.4), "expected low below high, got low=0.4, high=0.4"),
        (lambda: djax.Dual(every=0), r"Dual\(every=...\): .* got 0"),
        (lambda: djax.Vicinity(before=-1), r"Vicinity\(before=...\): .* got -1"),
        (lambda: djax.Vicinity(warmup=0.5), r"Vicinity\(warmup=...\): .* got 0.5"),
        (lambda: djax.Vicinity(every="4"), r"Vicinity\(every=...\): .* got '4'"),
        (lambda: djax.Vicinity(warmup=-1), r"Vicinity\(warmup=...\): expected a whole number, at least 0 .* got -1"),
        (lambda: djax.Dual(surplus=1), r"Dual\(surplus=...\): expected True or False, got 1 of type int"),
        (lambda: djax.Prefix(surplus=None), r"Prefix\(surplus=...\): expected True or False, got None"),
        (lambda: djax.Fixed(1, steps=2), r"Fixed\(per_step=..., steps=...\): expected one of the two, got 1 and 2"),
        (lambda: djax.Fixed(steps=0), r"Fixed\(steps=...\): expected a whole number, at least 1 .* got 0"),
        (lambda: djax.Fixed(order="x"), r"Fixed\(order=...\): expected one of confidence, left, random, got 'x'"),
        (lambda: djax.Smoothing(top=0), r"Smoothing\(top=...\): expected a whole number, at least 1 .* got 0"),
        (lambda: djax.Smoothing(first=-1), r"Smoothing\(first=...\): expected a finite number at least 0.0, got -1"),
        (lambda: djax.Entropy(-1), r"Entropy\(theta=...\): expected a finite number at least 0.0, got -1"),
        (lambda: djax.Factor(0), r"Factor\(f=...\): expected a finite number above 0.0, got 0"),
    ],
)
def test_plugs(make, message):
    with pytest.raises(OptionError, match=message):
        make()


@pytest.mark.parametrize("tau", [0.9, np.float64(0.9), np.array(0.9), jnp.float32(0.9), Fraction(9, 10)])
def test_every_spelling_of_a_number_is_the_same_number(tau):
    assert type(djax.Threshold(tau).tau) is float
    assert djax.Threshold(tau).tau == pytest.approx(0.9, abs=1e-7)
    assert type(djax.Threshold(2).tau) is float
    assert type(djax.Fixed(np.int64(3)).per_step) is int


def test_a_threshold_above_one_is_legal():
    assert djax.Threshold(1.5).tau == 1.5


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "expected a string, a list of strings.* got an empty list"),
        ([[]], "prompt 0: expected at least one token, got an empty prompt"),
        ([IDS, []], "prompt 1: expected at least one token"),
        (np.zeros((2, 0), int), "prompt 0: expected at least one token"),
        ([1, 320], "prompt 0: expected token ids from 0 to 319, got 320"),
        ([IDS, [-1]], "prompt 1: expected token ids from 0 to 319, got -1"),
        ([5, 318, 7], r"prompt 0: contains the mask token \(318\)"),
        ([1, "two"], "expected a string, .* got a list of .*int.*str"),
        ([1.5, 2.5], "expected a string, .* got a list of .*float"),
        (np.array([1.5]), "expected token ids as integers of shape .*float64"),
        (np.zeros((1, 1, 1), int), r"got an array of shape \(1, 1, 1\)"),
        (7, "expected a string, .* got int"),
        ([[[1], [2, 3]]], "expected token ids as integers"),
        ("text", "this checkpoint has no tokenizer.json"),
    ],
)
def test_prompts(moe_a, prompts, message):
    with pytest.raises(PromptError, match=message):
        djax.generate(moe_a, prompts)


def test_the_forms_of_a_prompt(moe_a):
    options = dict(gen_length=16, block_length=16)
    one = djax.generate(moe_a, IDS, **options)
    assert isinstance(one, djax.Generation)
    assert one.text is None
    for same in (np.array(IDS), np.array(IDS, np.int64), tuple(IDS)):
        np.testing.assert_array_equal(djax.generate(moe_a, same, **options).canvas, one.canvas)
    for many in ([IDS], np.array([IDS]), [np.array(IDS)], (tuple(IDS),)):
        (row,) = djax.generate(moe_a, many, **options)
        np.testing.assert_array_equal(row.canvas, one.canvas)


def test_prompts_as_text(small):
    for prompts, message in (
        ("\ud800", "expected text that UTF-8 can write"),
        ("  ", "expected some text, got an empty prompt"),
        ("so <|mask|>!", r"contains the mask token \(1, '<\|mask\|>'\)"),
        ([{"role": "user"}], "expected chat messages with the strings 'role' and 'content'"),
        ([{"role": "tool", "content": "x"}], "expected role system, user or assistant, got 'tool'"),
        ([{"role": "user", "content": " "}], "got an empty last message"),
    ):
        with pytest.raises(PromptError, match=message):
            djax.generate(small, prompts)


def test_canvas_longer_than_the_model(moe_a):
    with pytest.raises(CanvasError, match=r"3 tokens \+ gen_length 8190 = 8193 positions, .* has 8192; .* 8189 at most"):
        djax.generate(moe_a, IDS, gen_length=8190)


def test_a_batch_that_does_not_fit(moe_a, monkeypatch):
    monkeypatch.setattr("djax.engine.request.device_memory", lambda: 2**20)
    with pytest.raises(BatchError, match=r"8 prompts on a canvas of 192 .*pass max_batch"):
        djax.generate(moe_a, [IDS] * 8, cache=djax.Dual())
    with pytest.raises(BatchError, match=r"1 prompts .*lower gen_length or block_length"):
        djax.generate(moe_a, IDS, cache=djax.Dual())


def test_logits_checks_its_tokens(moe_a):
    for tokens, message in (
        (IDS, r"expected integers of shape \[B, L\]"),
        ([[1.0]], r"expected integers of shape \[B, L\]"),
        ([[400]], "ids from 0 to 319"),
    ):
        with pytest.raises(PromptError, match=message):
            djax.logits(moe_a, tokens)
    for lengths in ([4], [1.0], [1, 2]):
        with pytest.raises(PromptError, match="lengths: expected 1 integers from 1 to 3, got"):
            djax.logits(moe_a, [IDS], lengths=lengths)
    with pytest.raises(CanvasError, match="8193 positions, the model has 8192"):
        djax.logits(moe_a, np.zeros((1, 8193), int))


def refused(call, *arguments, error=DjaxError, **options):
    """The message of the typed error that a call comes to."""
    with pytest.raises(error) as raised:
        call(*arguments, **options)
    return str(raised.value)


def rows(*prompts):
    return [out.canvas.tolist() for out in djax.generate(toy_model(), list(prompts), gen_length=4, block_length=4)]


TWO = [[5, 6, 7], [8]]
LEFT = [[5, 6, 7], [46, 46, 8]], [[1, 1, 1], [0, 0, 1]]
RIGHT = [[5, 6, 7], [8, 46, 46]], [[1, 1, 1], [1, 0, 0]]


def arrays():
    """What makes an array of nested lists: numpy, jax and, where it is installed, torch; and none of them."""
    makers = [list, np.array, jnp.array, lambda given: [np.array(row) for row in given]]
    with contextlib.suppress(ImportError):
        import torch

        makers.append(torch.tensor)
    return makers


@pytest.mark.parametrize("make", arrays())
@pytest.mark.parametrize("padded", [LEFT, RIGHT])
def test_padding_is_no_part_of_a_prompt(padded, make):
    """Each row gets what it gets alone, whatever stands where the mask hides it."""
    from transformers import BatchEncoding

    ids, mask = padded
    for form in (dict, BatchEncoding):
        given = form({"input_ids": make(ids), "attention_mask": make(mask)})
        out = djax.generate(toy_model(), given, gen_length=4, block_length=4)
        assert [g.canvas.tolist() for g in out] == rows(*TWO)


def test_a_real_tokenizer_s_padded_batch(small):
    questions = ["Ben has 3 pens.", "Anna has 12 pens. She buys 7 more."]
    alone = [small.tokenizer(q)["input_ids"] for q in questions]
    for side in ("left", "right"):
        given = small.tokenizer(questions, padding=True, padding_side=side, return_tensors="np")
        said = djax.explain(small, given, gen_length=8, block_length=8)
        assert [str(s) for s in said] == [str(s) for s in djax.explain(small, alone, gen_length=8, block_length=8)]
        assert "row 0" in refused(djax.generate, small, given["input_ids"], error=PromptError)


def test_a_mapping_of_one_dimension_is_one_prompt():
    for given in ({"input_ids": [5, 6], "attention_mask": [1, 1]}, {"input_ids": [46, 5, 6], "attention_mask": [0, 1, 1]}):
        out = djax.generate(toy_model(), given, gen_length=4, block_length=4)
        assert [out.canvas.tolist()] == rows([5, 6])
    assert len(djax.generate(toy_model(), [{"input_ids": [5]}, {"input_ids": [6, 7]}], gen_length=4, block_length=4)) == 2


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 1], [1, 0, 1]], "attention_mask'], row 1: expected zeros only before or after the ones, got holes"),
        ([[1, 1, 1], [0, 0, 2]], "row 1: expected ones and zeros, got [0, 0, 2]"),
        ([[1, 1, 1], [0, 0, -1]], "row 1: expected ones and zeros"),
        ([[1, 1, 1], [0, 0, 0]], "row 1: expected at least one 1"),
        ([[1, 1, 1]], "expected the shape of input_ids"),
        ([[1, 1], [1, 1]], "expected the shape of input_ids"),
        ([1, 1, 1], "expected the shape of input_ids"),
        ([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]], "expected ones and zeros in the shape of input_ids"),
        ("110", "expected ones and zeros in the shape of input_ids"),
    ],
)
def test_a_mask_that_cannot_be_right(mask, message):
    for call in (djax.generate, djax.logits):
        said = refused(call, toy_model(), {"input_ids": LEFT[0], "attention_mask": mask}, error=PromptError)
        assert message in said or call is djax.logits


@pytest.mark.parametrize("make", [np.array, jnp.array, np.ma.array])
def test_a_padded_array_without_its_mask_is_refused(make):
    for ids in (LEFT[0], RIGHT[0], [[46, 5, 6], [46, 46, 8]]):
        said = refused(djax.generate, toy_model(), make(ids), error=PromptError)
        assert "padding would be read as text" in said
        assert "pass the tokenizer's whole output" in said
    for literal in ([[46, 5], [46, 8]], [[46, 5, 46]]):
        out = djax.generate(toy_model(), make(literal), gen_length=4, block_length=4)
        assert [g.canvas.tolist() for g in out] == rows(*literal)
    assert rows(*LEFT[0])[1][:3] == [46, 46, 8], "lists are taken literally"


def test_arrays_of_one_number_are_ids():
    kinds = [jnp.int32, np.int64, np.uint8, np.array]
    with contextlib.suppress(ImportError):
        import torch

        kinds.append(torch.tensor)
    for kind in kinds:
        out = djax.generate(toy_model(), [kind(5), kind(6), 7], gen_length=4, block_length=4)
        assert [out.canvas.tolist()] == rows([5, 6, 7])


@pytest.mark.parametrize(
    "ids",
    [
        *(b"ab", bytearray(b"ab"), memoryview(b"ab"), [bytearray(b"ab")], iter([5]), (i for i in [5]), {5}),
        *(np.bool_(True), [np.bool_(True)], [True, 5], np.array(5), jnp.int32(5), np.array([5, 6], object)),
        *(np.array([5, 6], "m8[ns]"), np.array([5, 6], "M8[s]"), [np.timedelta64(5, "s")], [datetime.timedelta(5)]),
        *(np.ma.array([5, 6], mask=[0, 1]), [np.ma.masked, 5], [np.ma.array([5, 6], mask=[1, 0]), [7]]),
        *(jax.random.key(0), [jax.random.key(0)], np.zeros((0, 3), int), range(10**12), np.broadcast_to(np.int32(5), 10**12)),
        {"ids": [5]},
    ],
    ids=lambda ids: f"{type(ids).__name__}",
)
def test_what_is_no_prompt(ids):
    refused(djax.generate, toy_model(), ids, error=PromptError)
    refused(djax.logits, tiny_model(), ids, error=PromptError)


def test_logits_of_a_padded_batch_are_those_of_its_rows():
    model = tiny_model()
    for ids, mask in (LEFT, RIGHT):
        out = djax.logits(model, {"input_ids": np.array(ids), "attention_mask": mask})
        for row, got, real in zip(TWO, out, mask, strict=True):
            np.testing.assert_allclose(got[np.flatnonzero(real)], djax.logits(model, [row])[0], atol=1e-5)
    assert "pass lengths" in refused(djax.logits, model, np.array(LEFT[0]), error=PromptError)
    djax.logits(model, np.array(RIGHT[0]))  # rows of EOS at the end are what a finished canvas has
    padded = dataclasses.replace(model, hf_config={"pad_token_id": 45})
    refused(djax.logits, padded, np.array([[5, 6, 7], [8, 45, 45]]), error=PromptError)
    djax.logits(padded, np.array([[5, 6, 7], [8, 45, 45]]), [3, 1])
    for lengths in (
        np.array([1, 2], "m8[ns]"),
        [True, True],
        np.ma.array([1, 2], mask=[0, 1]),
        iter([1, 2]),
        jax.random.key(0),
    ):
        refused(djax.logits, model, [[5, 6], [7, 8]], lengths, error=PromptError)


class Raises:
    """Of which nothing can be read."""

    def __init__(self, error):
        self.error = error

    def raises(self, *_, **__):
        raise self.error

    __repr__ = __str__ = __array__ = __len__ = __iter__ = __getitem__ = __float__ = __index__ = __fspath__ = __bool__ = raises
    __class__ = property(raises)


class Panic(BaseException):
    """As libraries of other languages have."""


NO_NUMBERS = [
    *(10**400, -(10**400), 10**5000, Fraction(10**400), Fraction(10**5000, 3), np.longdouble("1e4000"), np.ma.masked),
    *(
        object(),
        jnp.float32,
        jax.random.key(0),
        jax.ShapeDtypeStruct((), jnp.float32),
        np.timedelta64(3, "s"),
        np.timedelta64(3, "ns"),
    ),
    *(Raises(ValueError()), Raises(Panic()), Raises(RecursionError())),
]


@pytest.mark.parametrize("which", range(len(NO_NUMBERS)))  # pytest itself cannot handle some of them
def test_what_is_no_number_is_a_typed_error_everywhere(which):
    value = NO_NUMBERS[which]
    for make in (
        lambda: djax.Threshold(value),
        lambda: djax.Smoothing(growth=value),
        lambda: djax.Fixed(value),
        lambda: djax.Vicinity(every=value),
        lambda: djax.Dual(surplus=value),
        lambda: djax.Credit(inner=value),
        lambda: djax.Fixed(order=value),
        lambda: djax.mesh(model=value),
        lambda: djax.preset(value),
        lambda: djax.load(dtype=value),
        lambda: djax.load(mesh=value),
        lambda: djax.load(value),
        lambda: djax.save(toy_model(), value),
        lambda: djax.compile(toy_model(), rows=value),
        lambda: djax.compile_cache(value),
        lambda: djax.logits(value, [[1]]),
    ):
        with pytest.raises(DjaxError) as raised:
            make()
        assert len(str(raised.value)) < 2000
    for name in (
        "temperature",
        "seed",
        "gen_length",
        "min_gen_length",
        "block_length",
        "max_batch",
        "early_stop",
        "decoder",
        "cache",
    ):
        refused(djax.generate, toy_model(), [5], error=OptionError, **{name: value})


def test_plugs_that_no_constructor_made_are_checked():
    """jax rebuilds them from leaves, and tracers are let in where jax traces the constructor."""
    for plug in (djax.Threshold(), djax.Credit()):
        for bad in (-1.0, None, object(), "0.9"):
            refused(djax.generate, toy_model(), [5], error=OptionError, decoder=jax.tree.map(lambda _, bad=bad: bad, plug))
    kept = []
    jax.eval_shape(lambda x: kept.append(djax.Threshold(x)) or x, jnp.float32(1))
    assert "while jax traces" in refused(djax.generate, toy_model(), [5], error=OptionError, decoder=kept[0])
    assert "at most 48, got 49" in refused(djax.generate, toy_model(), [5], error=OptionError, smoothing=djax.Smoothing(top=49))


def test_plugs_inside_plugs_have_an_end():
    plug = djax.Threshold()
    with pytest.raises(OptionError, match="at most 16 decoders inside one another"):
        for _ in range(1000):
            plug = djax.Credit(plug)


@djax.pytree
@dataclasses.dataclass(frozen=True)
class Wrong(djax.Decoder):
    """A decoder of a user's own, wrong in one way."""

    how: str = dataclasses.field(default="", metadata={"static": True})

    def step(self, state, look):
        if self.how == "raises":
            raise ZeroDivisionError("of the user's")
        verdict = write(look, jnp.ones_like(look.tokens), look.masked)
        if self.how == "tuple":
            return state, (verdict.tokens, look.masked)
        if self.how == "tokens":
            verdict = verdict._replace(tokens=verdict.tokens.astype(float))
        if self.how == "done":
            verdict = verdict._replace(done=look.masked)
        return jnp.zeros(2) if self.how == "state" else state, verdict


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "decoder: trying Wrong: reading it raised ZeroDivisionError: of the user's"),
        ("state", "decoder: Wrong.step: expected the state's shapes (), got ShapeDtypeStruct"),
        ("tuple", "decoder: Wrong.step: expected a djax.Verdict (djax.decoding.contract.write makes one), got (Shape"),
        (
            "tokens",
            "decoder: Wrong: the tokens of its verdict: expected integer of shape (4,), got ShapeDtypeStruct(shape=(4,), dty",
        ),
        ("done", "decoder: Wrong: done of its verdict: expected bool of shape ()"),
    ],
)
def test_a_decoder_of_ones_own_keeps_its_contract(how, message):
    assert message in refused(djax.generate, toy_model(), [5], gen_length=4, block_length=4, decoder=Wrong(how))
    djax.generate(toy_model(), [5], gen_length=4, block_length=4, decoder=Wrong())


def test_paths_that_cannot_be(tmp_path):
    for path in ("a\0b", "\ud800", "x" * 300, b"bytes", "~nobody-of-this-name/x", 5):
        for call in (djax.load, lambda p: djax.save(tiny_model(), p), djax.compile_cache):
            refused(call, path)
    for path in ("/proc/none/x", "/dev/null/x"):
        refused(djax.compile_cache, path, error=OptionError)
        refused(djax.save, tiny_model(), path, error=OptionError)


REGISTRY = {"threshold": djax.Threshold, "vicinity": djax.Vicinity}


def test_none_as_text():
    nothing = {"none": type(None), "smoothing": djax.Smoothing}
    assert parse("none", nothing, "--smoothing") is None
    assert parse("None", nothing, "--smoothing") is None
    with pytest.raises(OptionError, match=r"--smoothing: none\(1\) does not fit None"):
        parse("none(1)", nothing, "--smoothing")


@pytest.mark.parametrize(
    ("text", "plug"),
    [
        ("Threshold(0.8)", djax.Threshold(0.8)),
        ("threshold", djax.Threshold()),
        ("Vicinity(8, after=4, every=None)", djax.Vicinity(8, 4)),
        (repr(djax.Vicinity(1, 2, 3, 4)), djax.Vicinity(1, 2, 3, 4)),
    ],
)
def test_plugs_as_text(text, plug):
    assert parse(text, REGISTRY, "--decoder") == plug


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("treshold", "--decoder: unknown 'treshold'; there are: threshold, vicinity"),
        ("Threshold(0.9, per_step=2)", "--decoder: Threshold(0.9, per_step=2) does not fit Threshold(tau=0.9, slack=1e-05)"),
        ("Threshold(0.9, 1, 1, 1)", "does not fit Threshold(tau=0.9, slack=1e-05)"),
        ("Threshold(0.9, tau=1)", "does not fit"),
        ("Threshold(", "--decoder: cannot read 'Threshold('; write it like Threshold(tau=0.9, slack=1e-05) or"),
        ("__import__('os').getcwd()", "--decoder: cannot read"),
        ("Threshold(open)", "--decoder: unknown 'open'"),
        ("Threshold('a')", "got 'a' of type str"),
        ("Threshold({[]: 1})", "--decoder: cannot read"),
        ("Threshold(\0)", "--decoder: cannot read"),
        ("\ud800", "--decoder: cannot read"),
        ("(" * 10**6, "--decoder: expected text of at most 4000 characters"),
        ("-" * 3000 + "1", "--decoder: cannot read"),
        ("x(" * 1900, "--decoder: cannot read"),
        ("Threshold(" + "9" * 3900 + ")", "expected a finite number"),
        (5, "--decoder: expected text"),
    ],
)
def test_bad_plugs_as_text(text, message):
    with pytest.raises(OptionError, match=re.escape(message)):
        parse(text, REGISTRY, "--decoder")
