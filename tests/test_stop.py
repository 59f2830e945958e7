"""Stop strings: where they end a row's text and tokens, and that nothing else of the row changes."""

import contextvars
import dataclasses
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batch_and_loop import facts
from tiny import CONFIG
from toy import toy_model

import djax
from djax import text
from djax.cli import main
from djax.engine import stop
from djax.errors import OptionError

# Of characters of one to four bytes, of which most are several tokens.
SAID = "Straße 😀 one, two, three 日本 and four. #### 14 one more"


@pytest.fixture(scope="module")
def model(small):
    """It says SAID after a prompt of four tokens, and an EOS then."""
    ids = dict(vocab=small.config.vocab, mask_id=small.config.mask_id, eos_id=small.config.eos_id)
    config = dataclasses.replace(CONFIG, **ids)
    says = [7] * 4 + list(small.tokenizer(SAID)["input_ids"])
    says += [config.eos_id] * (config.max_positions - len(says))
    return toy_model(says=says, config=config, tokenizer=small.tokenizer)


PROMPT, SHAPE = [7] * 4, dict(gen_length=100, block_length=16)


def expected(tokenizer, tokens, stops):
    """The rule by looking at every beginning of the text and of the tokens."""
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    for at in range(len(whole)):
        there = [s for s in stops if whole[at:].startswith(s)]
        if there:
            before = whole[:at]
            texts = [tokenizer.decode(tokens[:n], skip_special_tokens=True) for n in range(len(tokens) + 1)]
            return before, max(n for n, t in enumerate(texts) if before.startswith(t)), max(there, key=len)
    return whole, len(tokens), None


STOPS = [
    *(None, "two", ["two"], ["four", "one"], ["one", "one, t", "on"], "😀", "本", "ß", "ra", "S", "e"),
    *(["nothing of it"], [SAID], []),
]


@pytest.mark.parametrize("asked", STOPS, ids=repr)
def test_the_first_of_them_ends_text_and_tokens(model, asked):
    whole = djax.generate(model, PROMPT, **SHAPE)
    assert (whole.text, whole.finish_reason, whole.stopped_at) == (SAID, "stop", None)
    out = djax.generate(model, PROMPT, stop=asked, trace=True, **SHAPE)
    stops = [asked] if isinstance(asked, str) else asked or []
    said, count, which = expected(model.tokenizer, whole.tokens.tolist(), stops)
    assert (out.text, out.tokens.tolist(), out.stopped_at) == (said, whole.tokens[:count].tolist(), which)
    assert out.finish_reason == "stop"
    assert (which is None) == (out.text == SAID)
    # The row is decoded all the same.
    assert out.canvas.tolist() == whole.canvas.tolist()
    assert (out.forwards, out.refreshes, out.positions) == (whole.forwards, whole.refreshes, whole.positions)
    assert len(out.trace.starts) == out.forwards


def test_an_answer_as_long_as_its_canvas(model):
    """Which ends for want of room, or at a stop string all the same, be it the last of its text."""
    reasons = {}
    for asked in (None, "nothing of it", "ß"):
        out = djax.generate(model, PROMPT, **(SHAPE | dict(gen_length=20)), stop=asked)
        reasons[asked] = out.finish_reason, out.stopped_at
    assert reasons == {None: ("length", None), "nothing of it": ("length", None), "ß": ("stop", "ß")}
    cut = djax.generate(model, PROMPT, **(SHAPE | dict(gen_length=20)))
    last = djax.generate(model, PROMPT, **(SHAPE | dict(gen_length=20)), stop=cut.text[-1])
    assert (last.finish_reason, last.stopped_at) == ("stop", cut.text[-1])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_tokens_before_a_string_are_counted_as_by_trying_all(small, data):
    """Drawn tokens, mostly bytes that make no character, and strings of what they say."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    tokens = rng.integers(0, small.config.vocab if rng.random() < 0.5 else 260, rng.integers(1, 60)).astype(np.int32)
    whole = text.decode(small.tokenizer, tokens)
    stops = []
    for _ in range(3):
        at = int(rng.integers(0, max(1, len(whole))))
        stops += [piece for piece in [whole[at : at + int(rng.integers(1, 4))]] if piece]
    said, count, which = expected(small.tokenizer, tokens.tolist(), stops)
    found = stop.find(whole, stops)
    assert (found is None) == (which is None)
    if found is not None:
        assert (whole[: found[0]], found[1]) == (said, which)
        assert stop.count_before(lambda some: text.decode(small.tokenizer, some), tokens, said) == count


def test_each_prompt_may_have_its_own(model):
    each = [None, ["two"], ("four", "three"), []]
    alone = [djax.generate(model, PROMPT, stop=[one], **SHAPE) for one in each]
    for max_batch in (None, 3):
        together = djax.generate(model, [PROMPT] * 4, stop=each, max_batch=max_batch, **SHAPE)
        assert [(g.text, facts(g), g.stopped_at) for g in together] == [(g.text, facts(g), g.stopped_at) for g in alone]
    assert [g.stopped_at for g in alone] == [None, "two", "three", None]
    both = djax.generate(model, [PROMPT] * 2, stop=["two", "four"], **SHAPE)
    assert [g.stopped_at for g in both] == ["two", "two"], "one list of strings holds for all prompts"


def test_rows_of_an_engine(model):
    engine = djax.Engine(model, rows=2, canvas=128, stop="four", **SHAPE)
    slots = {engine.join(PROMPT): "four", engine.join(PROMPT, stop=["two"]): "two"}
    assert {b: (g.stopped_at, g.text + g.stopped_at) for b, g in engine.run().items()} == {
        b: (s, SAID[: SAID.index(s) + len(s)]) for b, s in slots.items()
    }


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("", "stop: expected strings of at least one character, got ''"),
        (["a", ""], "stop: expected strings of at least one character"),
        (5, "stop: expected None, a string or a list of strings, got 5 of type int"),
        (b"a", "stop: .* got b'a' of type bytes"),
        ({"a"}, "stop: .* of type set"),
        (["a", 5], "stop: .* got 5 of type int"),
        (["a"] * 17, "stop: expected at most 16 strings, got 17"),
        ("\ud800", r"stop: expected text that UTF-8 can write, got '\\ud800'"),
        ([["a"], ["a", "\udfff"]], "stop, prompt 1: expected text that UTF-8 can write"),
        ([["a"]], "stop: expected strings, or a list with one entry for each of the 2 prompts, got 1"),
        ([None, "a"], r"stop: expected in entry 1 .* None or a list of strings, got 'a' of type str"),
        ([None, [["a"]]], r"stop, prompt 1: .* got \['a'\] of type list"),
        ([None, ["a"] * 17], "stop, prompt 1: expected at most 16 strings, got 17"),
    ],
)
def test_bad_values(model, asked, message):
    for call in (djax.generate, djax.explain):
        with pytest.raises(OptionError, match=message):
            call(model, [PROMPT, PROMPT], stop=asked, **SHAPE)


def test_without_a_tokenizer_there_is_no_text():
    with pytest.raises(OptionError, match=r"stop: expected None, since this checkpoint has no tokenizer .* got 'a'"):
        djax.generate(toy_model(), [1], stop="a")
    assert djax.generate(toy_model(), [1], gen_length=8, block_length=8, stop=[]).text is None


def test_an_export_has_no_text(model, tmp_path):
    with pytest.raises(OptionError, match="stop: expected None, since an exported program gives tokens"):
        djax.export_program(model, tmp_path / "out", stop="a")
    assert not (tmp_path / "out").exists()


def test_the_command_line(capsys):
    question = "Anna has 12 pens. She buys 7 more. She gives 4 to Tom. How many pens does Anna have now?"

    def run(*arguments):
        try:
            contextvars.copy_context().run(main, ["generate", question, "--json", *arguments])
        except SystemExit:
            return capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    whole = run()
    assert whole["stopped_at"] is None and "####" in whole["text"]
    cut = run("--stop", "nothing of it", "--stop", "\n####")
    assert cut["stopped_at"] == "\n####" and cut["finish_reason"] == "stop"
    assert cut["text"] == whole["text"].split("\n####")[0]
    assert cut["tokens"] == whole["tokens"][: len(cut["tokens"])] and cut["forwards"] == whole["forwards"]
    assert run("--temperature", "0.9", "--top-k", "1", "--top-p", "0.5")["text"] == whole["text"], "of one there is no choice"
    assert re.search("top_p: expected a finite number above 0.0 at most 1.0, got 2.0", run("--top-p", "2"))
    assert "stop: expected strings of at least one character" in run("--stop", "")
