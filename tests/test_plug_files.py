"""A plug of one's own from a file: the example from Python and from the shell, wrong plugs and wrong files."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import tiny_model

import djax
from djax.caching import Uncached
from djax.cli import main
from djax.decoding.smoothing import SMOOTHINGS
from djax.distill import Settings
from djax.errors import OptionError
from djax.plug_files import read_plugs
from djax.presets import check_preset

EXAMPLE = Path(__file__).parent.parent / "examples" / "margin.py"
OPTIONS = dict(gen_length=24, block_length=8, early_stop=False)
HEAD = """
import dataclasses, jax.numpy as jnp, djax
from djax.caching.contract import Plan
from djax.decoding.contract import Verdict, write

@djax.pytree
@dataclasses.dataclass(frozen=True)
"""
# Each wrong in one way, and what both doors then say.
WRONG = {
    "Alone(djax.Decoder)": (
        "return write(look, look.tokens, look.masked)",
        "decoder: Alone.step: expected two results, the state and a djax.Verdict; got one, a Verdict",
    ),
    "Three(djax.Decoder)": (
        "return state, look.tokens, look.masked",
        "decoder: Three.step: expected two results, the state and a djax.Verdict; got 3 results",
    ),
    "Shape(djax.Decoder)": (
        "return state, write(look, look.tokens, look.masked)._replace(tokens=look.tokens[:4])",
        "decoder: Shape: the tokens of its verdict: expected integer of shape (8,), got "
        "ShapeDtypeStruct(shape=(4,), dtype=int32)",
    ),
    "Dtype(djax.Decoder)": (
        "return state, write(look, look.tokens, look.masked)._replace(done=jnp.int32(1))",
        "decoder: Dtype: done of its verdict: expected bool of shape (), got ShapeDtypeStruct(shape=(), dtype=int32",
    ),
}


def write_class(folder, name, body, method="step(self, state, look)"):
    """A file with one class, whose method has this body."""
    file = folder / "own.py"
    file.write_text(f"{HEAD}class {name}:\n    least: float = 0.5\n    def {method}:\n        {body}\n", "utf-8")
    return file


def load(file):
    """The file as a module, as Python imports it."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(text, option="decoder"):
    return read_plugs({option: str(text)})[option]


def refuse(text, option="decoder"):
    with pytest.raises(OptionError) as caught:
        read(text, option)
    return str(caught.value)


def test_the_example_is_short():
    tree = ast.parse(EXAMPLE.read_text("utf-8"))
    code = ast.unparse([node for node in tree.body if not isinstance(node, ast.Expr)])
    assert len([line for line in code.split("\n") if line.strip()]) <= 12


def test_the_example_accepts_by_margin():
    """From Python, by another way: the probabilities of what the network said to each canvas on the way."""
    model, margin = tiny_model(), load(EXAMPLE).Margin
    prompt, mask = list(range(1, 9)), model.config.mask_id
    out = djax.generate(model, prompt, decoder=margin(0.5), trace=True, **OPTIONS)
    at, canvas = np.asarray(out.trace.accepted_at), np.array([*prompt, *[mask] * 24])
    several = best = 0
    for forward in range(out.forwards):
        here = slice(int(out.trace.starts[forward]), int(out.trace.starts[forward]) + 8)
        said = np.asarray(jax.nn.softmax(djax.logits(model, [canvas.tolist()])[0], axis=-1))
        two = np.sort(said, axis=-1)[:, -2:]
        candidate = (canvas == mask) & (said.argmax(-1) != mask)
        lead = np.where(candidate, two[:, 1] - two[:, 0], -1)[here]
        accepted = at[here] == forward
        if lead.max() < 0:  # every position proposes the mask
            assert accepted.sum() == 1
        else:
            assert accepted.tolist() == ((lead >= 0.5) | (lead == lead.max())).tolist()
            best += 1
        canvas[here] = np.where(accepted, out.canvas[here], canvas[here])
        several += accepted.sum() > 1
    assert 0 < several < best and mask not in canvas


def test_the_example_from_the_shell(small, capsys):
    question = "Anna has 12 pens. She buys 7 more. How many pens does Anna have now?"
    sizes = ("--gen-length", "24", "--block-length", "8")
    main(["generate", question, "--json", "--decoder", f"{EXAMPLE}:Margin(least=0.9)", *sizes])
    shell = json.loads(capsys.readouterr().out)
    python = djax.generate(small, question, decoder=load(EXAMPLE).Margin(0.9), gen_length=24, block_length=8)
    assert (shell["tokens"], shell["forwards"]) == (python.tokens.tolist(), python.forwards)
    assert python.forwards != djax.generate(small, question, gen_length=24, block_length=8).forwards


@pytest.mark.parametrize(("name", "body", "message"), [(n, *what) for n, what in WRONG.items()], ids=list(WRONG))
def test_wrong_decoders_are_refused_by_both_doors(small, tmp_path, capsys, name, body, message):
    file = write_class(tmp_path, name, body)
    kind = name.split("(")[0]
    with pytest.raises(OptionError) as caught:
        djax.generate(small, "x", decoder=getattr(load(file), kind)(), block_length=8)
    assert str(caught.value).startswith(message)
    with pytest.raises(SystemExit) as ended:
        main(["explain", "--decoder", f"{file}:{kind}", "--block-length", "8"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"djax: {message}")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return True, False", "cache: Own.plan: expected a djax.caching.contract.Plan; got 2 results"),
        ("return Plan(jnp.ones(2, bool), False, False)", "cache: Own.plan: its full: expected bool of shape (), got Sh"),
        ("return Plan(1, False, False)", "cache: Own.plan: its full: expected bool of shape (), got ShapeDtypeStruct("),
    ],
)
def test_wrong_caches_are_refused(tmp_path, body, message):
    file = write_class(tmp_path, "Own(djax.Policy)", body, "plan(self, tick, cached_block)")
    with pytest.raises(OptionError, match=re.escape(message)):
        djax.generate(tiny_model(), [1, 2], cache=read(f"{file}:own", "cache"), gen_length=8, block_length=8)


def test_what_stands_behind_the_colon(tmp_path):
    text = EXAMPLE.read_text("utf-8")
    (tmp_path / "two: three.py").write_text(
        f"from __future__ import annotations\n{text}\n\n@pytree\n@dataclasses.dataclass(frozen=True)\n"
        "class Around(Decoder):\n    inner: Decoder\n    far: int = 3\n",
        "utf-8",
    )
    here = f"{tmp_path / 'two: three.py'}:"
    assert repr(read(f"{EXAMPLE}:margin")) == "Margin(least=0.8)"
    assert repr(read(f"{here} Margin(0.25)")) == "Margin(least=0.25)"
    around = read(f"{here}Around(Credit(Threshold(0.5), alpha=0.1), far=2)")
    assert around.inner == djax.Credit(djax.Threshold(0.5), alpha=0.1) and around.far == 2
    credit = read(f"{here}Credit(Margin(0.5))")
    assert type(credit) is djax.Credit and repr(credit.inner) == "Margin(least=0.5)"
    assert "Around() does not fit Around(inner, far=3)" in refuse(f"{here}Around()")
    assert "Margin(0.5, 3) does not fit Margin(least=0.8)" in refuse(f"{here}Margin(0.5, 3)")
    assert "does not fit Margin(least=0.8)" in refuse(f"{here}Margin(tau=0.5)")
    assert "cannot read" in refuse(f"{here}Margin(") and "defines no class 'os'" in refuse(f"{here}os.getcwd()")


def test_one_file_is_executed_once_for_all_options(tmp_path):
    file = write_class(tmp_path, "Own(djax.Decoder)", "pass")
    with file.open("a", encoding="utf-8") as out:
        out.write(
            "@djax.pytree\n@dataclasses.dataclass(frozen=True)\nclass Kept(djax.Policy):\n    keeps = False\n"
            "@djax.pytree\n@dataclasses.dataclass(frozen=True)\nclass Soft:\n"
            "    def weight(self, n):\n        return 0.5\n    least = weight\n"
        )
    made = read_plugs({"decoder": f"{file}:Own()", "cache": f"{file}:Kept()", "smoothing": f"{file}:Soft()"})
    assert list(made) == ["decoder", "cache", "smoothing"]
    assert len({id(type(plug).__init__.__globals__) for plug in made.values()}) == 1
    assert isinstance(made["cache"], djax.Policy)
    assert read_plugs(dict.fromkeys(made, "none") | {"decoder": "Fixed(2)"}) == {
        **{"decoder": djax.Fixed(2), "cache": Uncached(), "smoothing": None}
    }
    assert "its class Kept does not extend djax.Decoder" in refuse(f"{file}:Kept()")
    assert "its class Own does not have the methods weight and least" in refuse(f"{file}:Own()", "smoothing")
    assert "defines no class 'Dual'; it has: Kept" in refuse(f"{file}:Dual()", "cache")


@pytest.mark.parametrize(
    ("text", "call", "message"),
    [
        ("\n1 / 0", "Own", ", line 2: ZeroDivisionError: division by zero"),
        ("x = 1\ny = = 2", "Own", ", line 2: SyntaxError: invalid syntax"),
        ("import json\njson.loads(3)", "Own", ", line 2: TypeError: the JSON object must be"),
        ("import sys\n\nsys.exit(0)", "Own", ", line 3: SystemExit: 0"),
        ("import djax\ndjax.Threshold(-1)", "Own", ", line 2: OptionError: Threshold(tau=...)"),
        ("x = 1", "Own(1)", " defines no class 'Own'; it has: no class that would extend djax.Decoder"),
        (HEAD + "class Margin(djax.Decoder): pass", "Own(1)", " defines no class 'Own'; it has: Margin"),
        (HEAD + "class Margin(djax.Decoder): pass", "Threshold(1)", " defines no class 'Threshold'; it has: Margin"),
        (HEAD + "class Margin(djax.Decoder): pass", "None", ": expected the name of a class; it has: Margin"),
        (HEAD + "class Threshold(djax.Decoder): pass", "Threshold", ": Threshold is djax's own; give the file's class"),
        (HEAD + "class dual(djax.Policy): pass", "Dual", ": Dual is djax's own; give the file's class dual another"),
        (HEAD + "class Own: pass", "Own", ": its class Own does not extend djax.Decoder"),
        ("def Own(x): pass", "Own(1)", " defines no class 'Own'; it has: no class"),
        ("import djax\nclass Own(djax.Decoder): pass", "Own()", ": Own is no dataclass; write @djax.pytree and"),
        (HEAD + "class A(djax.Decoder): pass\nclass a(A): pass", "A", "the names of two classes differ only in case: a"),
    ],
)
def test_wrong_files(tmp_path, text, call, message):
    file = tmp_path / "own.py"
    file.write_text(text, "utf-8")
    said = refuse(f"{file}:{call}")
    assert said.startswith(f"--decoder: {file}") and message in said
    assert [f.name for f in tmp_path.iterdir()] == ["own.py"], "nothing is left next to it"


def test_classes_that_fail(tmp_path):
    file = write_class(tmp_path, "Own(djax.Decoder)", "raise ValueError(self.least)", "__post_init__(self)")
    assert refuse(f"{file}:Own(3)") == "--decoder: Own(3) raised ValueError: 3"
    file.write_text(HEAD.replace("@djax.pytree", "") + "class Own(djax.Decoder): pass", "utf-8")
    assert refuse(f"{file}:Own()") == "--decoder: Own is no pytree; decorate the class with djax.pytree"


def test_paths(tmp_path, monkeypatch):
    assert refuse("no/such.py:Margin(0.8)") == "--decoder: no/such.py does not exist or is not a file"
    (tmp_path / "folder.py").mkdir()
    assert refuse(f"{tmp_path}/folder.py:Margin").endswith("folder.py does not exist or is not a file")
    inner = "--decoder: a file goes in front of the whole; expected m.py:Credit(Margin(0.8)), got 'Credit(m.py:Margin(0.8))'"
    assert refuse("Credit(m.py:Margin(0.8))") == inner
    assert "expected one file, got" in refuse("m.py:Around(n.py:Margin(0.8))")
    (tmp_path / "djax.py").write_text(EXAMPLE.read_text("utf-8"), "utf-8")  # is no module of djax's
    monkeypatch.setenv("HOME", str(tmp_path))
    own = read("~/djax.py:Margin()")
    with pytest.raises(OptionError, match="expected numbers and arrays in its fields, got 'a'"):
        djax.generate(tiny_model(), [1], decoder=type(own)("a"))
    monkeypatch.chdir(tmp_path)
    assert type(read("djax.py:Margin()")).__module__ == type(own).__module__ != "djax"


def test_only_the_command_line_names_files(tmp_path):
    """What is stored or shipped as data executes nothing."""
    file = tmp_path / "own.py"
    file.write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()", "utf-8")
    for text in (f"Settings(decoder={file}:Own())", f"{file}:Settings()"):
        with pytest.raises(OptionError, match="only --decoder, --cache and --smoothing on the command line take a class"):
            Settings.read(text, "--recordings")
    for plug in (f"{file}:Own()", load(EXAMPLE).Margin(), djax.Credit(load(EXAMPLE).Margin())):
        with pytest.raises(OptionError, match="preset mine: decoder: expected one of djax's own, got"):
            check_preset({"decoder": plug}, "mine")
    check_preset(dict(decoder=djax.Credit(), cache=None, smoothing=SMOOTHINGS["smoothing"](), seed=1), "mine")
    assert not (tmp_path / "ran").exists()
