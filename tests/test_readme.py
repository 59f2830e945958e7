"""The README's code is run, and what it says is printed is printed."""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import djax
from djax.benchmarks import compile as compiling
from djax.benchmarks import conversion, devices, distill, ladder, soft_top, speed
from djax.benchmarks.report import read_lines, with_part
from djax.checkpoints.source import SHIPPED

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)


def test_python_blocks_print_what_the_readme_says(tmp_path, monkeypatch):
    # The directory a reader would have downloaded: the shipped model stands in for it, in the same layout.
    shutil.copytree(SHIPPED, tmp_path / "LLaDA-MoE-7B-A1B-Instruct")
    monkeypatch.chdir(tmp_path)
    names = {}
    ran = 0
    for i, (language, code) in enumerate(BLOCKS):
        if language != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), names)
        following = BLOCKS[i + 1] if i + 1 < len(BLOCKS) else ("", "")
        if printed.getvalue():
            assert following == ("text", printed.getvalue())
        ran += 1
    assert ran == 3
    assert names["out"].text.endswith("#### 14")
    assert (tmp_path / "llada-moe-hf" / "model.safetensors").read_bytes() == (SHIPPED / "model.safetensors").read_bytes()


def test_commands():
    """Every `djax` command of the README, without the installing before it."""
    commands = re.findall(r"^(?:.*&& )?(djax .*)$", "\n".join(code for language, code in BLOCKS if language == "bash"), re.M)
    assert len(commands) == 7
    for command in commands:
        arguments = [sys.executable, "-m", "djax.cli", *shlex.split(command)[1:]]
        done = subprocess.run(arguments, capture_output=True, text=True, cwd="/", env=os.environ)
        assert done.returncode == 0, done.stderr
        if "Lily" in command:
            assert "#### 30" in done.stdout


def test_the_ladder_is_made_from_the_results(tmp_path):
    results = ROOT / "benchmarks" / "results"
    (tmp_path / "ladder.jsonl").write_bytes((results / "ladder.jsonl").read_bytes())
    (tmp_path / "README.md").write_text(README)
    assert ladder.finish(tmp_path, tmp_path / "README.md") == (results / "ladder.md").read_text()
    assert (tmp_path / "README.md").read_text() == README


def test_what_distillation_buys_is_made_from_the_results(tmp_path):
    results = ROOT / "benchmarks" / "results"
    for name in ("distill.jsonl", "distill_facts.jsonl"):
        (tmp_path / name).write_bytes((results / name).read_bytes())
    (tmp_path / "README.md").write_text(README)
    distill.finish(tmp_path, tmp_path / "README.md")
    assert (tmp_path / "distill.md").read_text() == (results / "distill.md").read_text()
    assert (tmp_path / "README.md").read_text() == README


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("compile", compiling.table),
        ("convert", conversion.table),
        ("devices", devices.table),
        ("soft-top", soft_top.table),
        ("speed", speed.table),
    ],
)
def test_tables_are_made_from_the_results(name, table):
    lines = read_lines(ROOT / "benchmarks" / "results" / f"{name.replace('-', '_')}.jsonl")
    assert with_part(README, name, table(lines)) == README


def test_the_readme_names_what_there_is():
    for name in re.findall(r"`djax\.(\w+)\(", README):
        assert name in djax.__all__
    for path in re.findall(r"^(?:\S+ .*)?\b((?:djax|convert|configs|benchmarks)/\S*)", README, re.M):
        assert (ROOT / path.rstrip("`.,)")).exists(), path
