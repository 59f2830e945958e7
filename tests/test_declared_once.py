"""`djax.Options` declares what a decode may be asked, and every door knows each of its fields."""

import contextvars
import dataclasses
import inspect

import pytest
import tyro
from tiny import CONFIG
from toy import toy_model

import djax
from djax import distill
from djax.caching import Uncached
from djax.cli import decoding_options, main
from djax.cli.generate import Generate
from djax.distill.recording import record
from djax.distill.run import judge
from djax.engine.options import FIELDS, describe
from djax.presets import presets
from djax.tasks.evaluate import evaluate

# A value of each that is not its default: an option that is missing here fails the tests.
VALUES = dict(
    gen_length=24,
    min_gen_length=3,
    block_length=8,
    decoder=djax.Fixed(2),
    cache=djax.Dual(every=2),
    smoothing=djax.Smoothing(),
    temperature=0.5,
    top_p=0.5,
    top_k=7,
    seed=3,
    early_stop=False,
    stop=("a", "b"),
    align_blocks=False,
    trace=True,
    max_batch=1,
)
NAMES = [field.name for field in dataclasses.fields(djax.Options)]
DOORS = [djax.generate, djax.explain, djax.compile, djax.export_program, djax.Engine, djax.Engine.join, judge, evaluate]


def test_the_defaults_stand():
    defaults = dict(gen_length=128, min_gen_length=0, block_length=32, decoder=djax.Threshold(0.9), cache=None)
    defaults |= dict(smoothing=None, temperature=0.0, top_p=1.0, top_k=0, seed=0, early_stop=True, stop=None)
    assert vars(djax.Options()) == defaults | dict(align_blocks=True, trace=False, max_batch=None)
    assert list(VALUES) == NAMES
    assert all(VALUES[name] != FIELDS[name].default for name in NAMES)
    with pytest.raises(TypeError):
        djax.Options(8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        djax.Options().seed = 1


@pytest.mark.parametrize("door", [*DOORS, record], ids=lambda door: door.__qualname__)
def test_every_door_shows_all_of_them(door):
    shown = inspect.signature(door).parameters
    assert not [p for p in shown.values() if p.kind is p.VAR_KEYWORD]
    for field in dataclasses.fields(djax.Options):
        if door is record and field.name == "trace":
            assert "trace" not in shown, "a recording sets it itself"
            continue
        assert shown[field.name].kind is inspect.Parameter.KEYWORD_ONLY
        if field.name != "max_batch":  # recordings and evaluations have one of their own
            assert shown[field.name].default == field.default
            assert shown[field.name].annotation == field.type or field.name == "seed"


def test_generate_documents_all_of_them():
    text = " ".join(djax.generate.__doc__.split())
    for name in NAMES:
        assert f"{name}: {' '.join(describe(name).split())}" in text
    assert "{" not in text
    lists = text[text.index("May also be lists") :]
    assert "gen_length, min_gen_length, decoder, cache, smoothing, temperature, top_p, top_k, seed, early_stop, stop." in lists


@pytest.fixture(scope="module")
def model(small):
    ids = dict(vocab=small.config.vocab, mask_id=small.config.mask_id, eos_id=small.config.eos_id)
    return toy_model(says=[65] * 256, config=dataclasses.replace(CONFIG, **ids), tokenizer=small.tokenizer)


@pytest.mark.parametrize("name", NAMES)
def test_explain_and_the_engine_take_each(model, name):
    given = {"top_p": {"temperature": 0.5}, "top_k": {"temperature": 0.5}}.get(name, {}) | {name: VALUES[name]}
    assert str(djax.explain(model, [5, 6], **given))
    engine = {name: VALUES[name]} if name in ("block_length", "decoder", "cache", "smoothing", "trace") else {}
    made = djax.Engine(model, rows=1, canvas=192, truncates=name in ("top_p", "top_k"), **engine)
    made.join([5, 6], **given)
    waiting, stops = made._waiting[0]
    if name in waiting._fields:
        assert waiting._asdict()[name].tolist() == [VALUES[name]]
    assert stops == (VALUES[name] if name == "stop" else ())


def test_an_option_that_does_not_exist(model, small, tmp_path):
    for call in (
        lambda: djax.generate(model, [5], no_such=1),
        lambda: djax.explain(model, [5], no_such=1),
        lambda: djax.Engine(model, no_such=1),
        lambda: record(model, [{"prompt": "x"}], tmp_path / "x", no_such=1),
        lambda: djax.compile(model, no_such=1),
    ):
        with pytest.raises(TypeError, match=r"got unexpected options \['no_such'\]; those of djax.generate are \['align_b"):
            call()
    assert not (tmp_path / "x").exists(), "and nothing was begun"


def decoding(options):
    """The options as the command line hands them on: a cache of its own stands for none."""
    given = {name: value for name, value in vars(options).items() if name not in decoding_options.APART}
    return given | {"cache": Uncached() if options.cache is None else options.cache}


def test_the_command_line_has_each(capsys):
    with pytest.raises(SystemExit):
        contextvars.copy_context().run(main, ["generate", "--help"])
    # Without the frames and the line breaks of the help.
    shown = " ".join(word for word in capsys.readouterr().out.split() if word != "│")
    for name in NAMES:
        if name == "trace":
            assert "--show" in shown and "--html" in shown, "what a trace is for"
            continue
        assert f"--{name.replace('_', '-')} " in shown or f"--{name.replace('_', '-')}, " in shown
        text = " ".join(decoding_options.describe_flag(name).split())
        assert text[:60] in shown, text
    arguments = []
    for name in set(NAMES) - set(decoding_options.APART):
        value, flag = VALUES[name], name.replace("_", "-")
        if value is False:
            arguments.append(f"--no-{flag}")
        else:
            arguments += [part for one in (value if type(value) is tuple else [value]) for part in (f"--{flag}", str(one))]
    read = tyro.cli(decoding_options.Decoding, args=arguments).options()
    assert read == decoding(djax.Options(**VALUES))
    assert decoding_options.Decoding().options() == decoding(djax.Options())
    for name in decoding_options.APART:
        assert name == "trace" or name in {field.name for field in dataclasses.fields(Generate)}


def test_a_preset_may_name_each():
    for name in NAMES:
        if name not in decoding_options.APART:
            shown = decoding_options.spell(name, VALUES[name])
            assert decoding_options.Decoding(**{name: shown}).options()[name] == VALUES[name]
    for name in presets():
        chosen = djax.preset(name)
        assert set(chosen) <= set(NAMES)
        assert decoding_options.Decoding.of(name).options() == decoding(djax.Options(**chosen))


def test_settings_of_a_recording_keep_their_text():
    """Stores and runs are compared by it: what an option does not change looks as it did before there was one."""
    text = (
        "Settings(gen_length=128, block_length=32, decoder=Threshold(tau=0.9, slack=1e-05), cache=None, smoothing=None, "
        "temperature=0.0, early_stop=True, align_blocks=True)"
    )
    assert repr(distill.Settings()) == text
    assert list(distill.Settings().options()) == [part.split("=")[0] for part in text[9:].split(", ") if "slack" not in part]
    assert distill.Settings(256, 16).options() == distill.Settings(gen_length=256, block_length=16).options()
    own = {name: value for name, value in VALUES.items() if name not in ("seed", "trace", "max_batch")}
    settings = distill.Settings(**own)
    assert settings.options() == own, "it knows all that a recording does not set itself"
    assert distill.Settings.read(repr(settings), "x") == settings
