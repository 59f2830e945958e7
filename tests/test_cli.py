"""The command line as a user meets it: a real process, its output, its exit code."""

import json
import os
import subprocess
import sys

import pytest
from conftest import GOLDENS

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
    environment = {"XDG_CACHE_HOME": str(tmp_path / "home"), "DJAX_COMPILE_CACHE": ""}
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
    assert "others may write to it; run chmod 700" in refused.stderr


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
        (["generate", QUESTION, "--cache", "dul"], "--cache: unknown 'dul'; there are: dual, none, prefix, vicinity"),
        (["generate", "what is <|mask|>?"], "contains the mask token (1, '<|mask|>')"),
        (["convert", "/nowhere", "out"], "/nowhere: expected a checkpoint directory"),
        (["convert", str(GOLDENS / "moe_a"), "out", "--to", "gguf"], "--to: expected orbax or hf, got 'gguf'"),
        (["train", "smal", "--out", "x"], "config: unknown 'smal'; there are: small"),
        (["evaluate", "--problems", "0"], "--problems: expected a whole number"),
        (["evaluate", "--batch", "0"], "--batch: expected a whole number"),
        (["convert", str(GOLDENS / "moe_a"), "/"], "already exists"),
        (["generate", "--file", sys.executable], "cannot be read as UTF-8"),
        (["generate", QUESTION, "--steps", "4"], "--steps"),
    ],
)
def test_errors(arguments, message):
    done = djax(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout
