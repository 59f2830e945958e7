"""The command line as a user meets it: a real process, its output, its exit code."""

import contextvars
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import GOLDENS

from djax.cli import main

QUESTION = "Anna has 12 pens. She buys 7 more. She gives 4 to Tom. How many pens does Anna have now?"


def djax(*arguments, stdin="", **environment):
    return subprocess.run(
        [sys.executable, "-m", "djax.cli", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, "COLUMNS": "200", **environment},
    )


def test_generate():
    done = djax("generate", QUESTION)
    assert done.returncode == 0, done.stderr
    answer, figures = done.stdout.strip().split("\n\n")
    assert answer.endswith("#### 15")
    assert "tokens/forward" in figures
    assert "compile" in figures


def test_generate_json_from_standard_input_and_file(tmp_path):
    (tmp_path / "questions.txt").write_text(f"{QUESTION}\n\n{QUESTION}\n")
    options = ("--json", "--decoder", "fixed(per_step=2)", "--cache", "Vicinity(16, 16, warmup=2)", "--max-batch", "1")
    lines = djax("generate", "--file", tmp_path / "questions.txt", "--lines", *options)
    assert lines.returncode == 0, lines.stderr
    first, second = map(json.loads, lines.stdout.splitlines())
    assert first["text"] == second["text"]
    assert first["refreshes"] > 0
    assert first["tokens_per_forward"] == len(first["tokens"]) / first["forwards"]
    piped = djax("generate", "-", *options, stdin=QUESTION)
    assert json.loads(piped.stdout)["tokens"] == first["tokens"]


def test_compile_cache_is_private_and_can_be_turned_off(tmp_path):
    cache = tmp_path / "home" / "djax" / "xla"
    # Only what takes a second to compile is kept, which with the suite's own flags nothing does.
    environment = {"XDG_CACHE_HOME": str(tmp_path / "home"), "DJAX_COMPILE_CACHE": "", "XLA_FLAGS": ""}
    short = ("generate", QUESTION, "--gen-length", "8", "--block-length", "8")
    assert djax(*short, "--no-compile-cache", **environment).returncode == 0
    assert not cache.exists()
    assert djax(*short, **environment | {"DJAX_COMPILE_CACHE": "off"}).returncode == 0
    assert not cache.exists()
    assert djax(*short, **environment).returncode == 0
    assert list(cache.iterdir())
    assert cache.stat().st_mode & 0o777 == 0o700
    cache.chmod(0o777)
    without = djax(*short, **environment)
    assert without.returncode == 0, "a default directory that cannot be trusted is no reason not to answer"
    assert "no compile cache" in without.stderr
    refused = djax(*short, DJAX_COMPILE_CACHE=str(cache))
    assert refused.returncode == 2, "one that the user named is"
    assert "others may write to it" in refused.stderr and f"remove {cache} and let djax make it again" in refused.stderr


def test_info_and_convert(tmp_path):
    facts = json.loads(djax("info", GOLDENS / "moe_a", "--json").stdout)
    assert (facts["family"], facts["parameters"], facts["mask_id"], facts["eos_id"]) == ("llada_moe", 239648, 318, 317)
    assert djax("convert", GOLDENS / "moe_a", tmp_path / "orbax").returncode == 0
    assert "Orbax" in djax("info", tmp_path / "orbax").stdout
    assert djax("convert", tmp_path / "orbax", tmp_path / "hf", "--to", "hf").returncode == 0
    back = json.loads(djax("info", tmp_path / "hf", "--json").stdout)
    assert {k: v for k, v in back.items() if k != "path"} == {k: v for k, v in facts.items() if k != "path"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "give either a question"),
        (["generate", " "], "the question is empty"),
        (["generate", QUESTION, "--file", "x"], "give either a question"),
        (["generate", "--file", "/nowhere"], "--file: /nowhere does not exist"),
        (["generate", QUESTION, "--lines"], "--lines goes with --file"),
        (["generate", QUESTION, "--model", "/nowhere"], "/nowhere: expected a checkpoint directory"),
        (["generate", QUESTION, "--gen-length", "0"], "gen_length: expected a whole number, at least 1"),
        (["generate", QUESTION, "--gen-length", "2000"], "gen_length may be 9"),
        (["generate", QUESTION, "--decoder", "Fixed(0.9)"], "Fixed(per_step=...): expected a whole number"),
        (["generate", QUESTION, "--decoder", "Fixed(tau=0.9)"], "Fixed(tau=0.9) does not fit Fixed(per_step=1, steps=None"),
        (["generate", QUESTION, "--cache", "dul"], "--cache: unknown 'dul'; there are: block, dual, none, prefix, vicinity"),
        (["generate", "what is <|mask|>?"], "contains the mask token (1, '<|mask|>')"),
        (["convert", "/nowhere", "out"], "/nowhere: expected a checkpoint directory"),
        (["convert", str(GOLDENS / "moe_a"), "out", "--to", "gguf"], "--to: expected orbax or hf, got 'gguf'"),
        (["train", "smal", "--out", "x"], "config: unknown 'smal'; there are: small"),
        (["evaluate", "--problems", "0"], "--problems: expected a whole number"),
        (["evaluate", "--batch", "0"], "--batch: expected a whole number"),
        (["convert", str(GOLDENS / "moe_a"), "/"], "already exists"),
        (["generate", "--file", sys.executable], "cannot be read as UTF-8"),
        (["generate", QUESTION, "--steps", "4"], "--steps"),
        (["generate", QUESTION, "--devices", "64"], "data=1 times model=64 takes 64 devices, there are 1 (cpu)"),
        (["compile", "--export", "/", "--rows", "1"], "/: already exists"),
    ],
)
def test_errors(arguments, message):
    done = djax(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


@pytest.fixture
def inside(capsys):
    """The command without a process of its own, for what happens before anything is decoded: exit code, output, errors."""

    def run(*arguments):
        code = 0
        try:
            contextvars.copy_context().run(main, [*map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["explain", "--preset", "fast"],
            "preset: unknown 'fast'; there are: dinfer_credit, dinfer_hierarchy, dinfer_vicinity, ",
        ),
        (["generate", QUESTION, "--preset=fast"], "preset: unknown 'fast'"),
        (["generate", QUESTION, "--preset"], "argument '--preset"),
        (
            ["explain", "--prompt-length", "10", "--gen-length", "20", "--cache", "Vicinity(16, 31)"],
            "reaches 31 positions beyond its block; prompt 0 has a canvas of 30, so expected at most 30",
        ),
        (["explain", "--decoder", "Hierarchy(0.4, 0.9)"], "expected low below high, got low=0.9, high=0.4"),
        (["explain", "--cache", "Vicinity(warmup=-1)"], "Vicinity(warmup=...): expected a whole number, at least 0 and"),
        (["explain", "--decoder", "Factor(0)"], "Factor(f=...): expected a finite number above 0.0, got 0"),
        (["explain", "--decoder", "Fixed(1, steps=2)"], "expected one of the two, got 1 and 2"),
        (["explain", "--temperature", "-1"], "temperature: expected a finite number at least 0.0, got -1.0"),
        (["explain", "--seed", "-1"], "seed: expected a whole number, at least 0 and at most 4294967295, got -1"),
        (
            ["explain", "--gen-length", "8", "--min-gen-length", "9"],
            "min_gen_length: expected at most gen_length, 8, for prompt 0",
        ),
        (
            ["explain", QUESTION, "--prompt-length", "3"],
            "--prompt-length: expected without a question, whose length is its own",
        ),
        (["explain", "--prompt-length", "0"], "--prompt-length: expected a whole number, at least 1"),
        (["explain", "--gen-length", "1000"], "gen_length may be 960 at most"),
        (["compile", "--platform", "cuda"], "--platform: expected with --export"),
        (["compile", "--export", "x", "--rows", "1", "2"], "--export: expected one --prompt-length and one --rows"),
        (["compile", "--prompt-length", "0"], "prompt_length: expected a whole number, at least 1"),
        (["bench", "speed", "--out", "x", "--repeats", "0"], "--repeats: expected a whole number, at least 1"),
        (["bench", "ladder", "--out", "/nowhere", "--draw"], "--draw: /nowhere/ladder.jsonl does not exist; measure first"),
        (["bench", "ladder", "--out", "/nowhere", "--problems", "0"], "--problems: expected a whole number, at least 1"),
        (
            ["generate", QUESTION, "--html", "/nowhere/page.html"],
            "--html: expected a file to write, but the directory /nowhere",
        ),
    ],
)
def test_illegal_options(inside, arguments, message):
    code, out, error = inside(*arguments)
    assert (code, out) == (2, "")
    assert message in error


def test_a_ladder_there_is_not_written_over(inside, tmp_path):
    (tmp_path / "ladder.jsonl").write_text("measured")
    code, out, error = inside("bench", "ladder", "--out", tmp_path)
    assert (code, out) == (2, "")
    assert f"--out: {tmp_path / 'ladder.jsonl'} exists; give --resume to go on with it, or remove it" in error
    assert (tmp_path / "ladder.jsonl").read_text() == "measured"


def test_explain():
    done = djax("explain", "--prompt-length", "40", "--gen-length", "60", "--cache", "Dual(every=8)")
    assert done.returncode == 0, done.stderr
    facts, table = done.stdout.strip().split("\n\n")
    assert "canvas          40 of the prompt + 60 = 100 positions, in a program for 1 rows of 128" in facts
    assert [re.split(" {2,}", line) for line in table.splitlines()] == [
        ["block", "positions", "masks", "one token a forward", "everything at once"],
        ["0", "[32, 64)", "24", "3 refreshes of 100, 21 windows of 32", "1 refresh of 100, 1 window of 32"],
        ["1", "[64, 96)", "32", "5 refreshes of 100, 28 windows of 32", "1 refresh of 100, 1 window of 32"],
        ["2", "[96, 100)", "4", "1 refresh of 100, 3 windows of 4", "1 refresh of 100, 1 window of 4"],
    ]


def test_a_preset_sets_defaults_and_options_override_them(inside):
    def said(*arguments):
        code, out, error = inside("explain", QUESTION, "--gen-length", "40", *arguments)
        assert code == 0, error
        facts, table = out.split("\n\n")
        facts = dict(re.split(" {2,}", line) for line in facts.splitlines())
        return facts["decoder"], facts["cache"], facts["smoothing"], re.findall(r"\[(\d+), \d+\)", table)

    # A prompt of 35 tokens.
    decoder, cache, smoothing, starts = said("--preset", "dinfer_vicinity")
    assert decoder == "Threshold(tau=0.8, slack=1e-05)"
    assert cache.startswith("Vicinity(before=16, after=16, warmup=4, every=None)")
    assert smoothing.startswith("Smoothing(first=0.15")
    assert starts == ["0", "64"]
    changed = said("--decoder", "Entropy(0.1)", "--block-length", "16", "--smoothing", "none", "--preset=dinfer_vicinity")
    assert changed[0] == "Entropy(theta=0.1)"
    assert changed[1].startswith("Vicinity(before=16, after=16, warmup=4")
    assert changed[2] == "None"
    assert changed[3][:2] == ["32", "48"]
    assert said("--preset", "llada")[3] == ["35", "67"]
    assert said("--preset", "llada", "--align-blocks")[3] == ["32", "64"]
    assert said() == ("Threshold(tau=0.9, slack=1e-05)", "None", "None", ["32", "64"]), "nothing is left of a preset"


def test_generate_shows_and_writes_the_decode(tmp_path):
    """Piped, a forward is a line; the page has the same forwards."""
    page = tmp_path / "decode.html"
    done = djax("generate", QUESTION, "--preset", "fast_dllm_dual", "--gen-length", "64", "--show", "--html", page)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0].startswith("prompt: ")
    shown = [line for line in lines if line.startswith("forward ")]
    forwards, refreshes = map(int, re.search(r"(\d+) forwards \((\d+) refreshes\)", lines[-1]).groups())
    assert lines[1 : 1 + forwards] == shown
    assert [line.split(" · ")[0] for line in shown] == [f"forward {n}/{forwards}" for n in range(1, forwards + 1)]
    assert sum(" · whole canvas · " in line for line in shown) == refreshes == 2
    html = page.read_text("utf-8")
    (data,) = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])
    assert data["facts"]["question"] == QUESTION
    assert data["facts"]["decoder"] == "Threshold(tau=0.9, slack=0.0)"
    assert data["facts"]["answer"] in done.stdout
    assert (len(data["forwards"]), data["facts"]["forwards"]) == (forwards, str(forwards))
    assert [whole for _, _, whole, _, _ in data["forwards"]] == [" · whole canvas · " in line for line in shown]
