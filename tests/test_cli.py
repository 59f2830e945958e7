"""The command line as a user meets it: a real process, its output, its exit code."""

import contextvars
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import GOLDENS

from djax import generate
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


@pytest.mark.long
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


@pytest.mark.long
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


SHORT = ("--gen-length", "8", "--block-length", "8", "--decoder", "Fixed(8)")


def test_lines_end_at_newlines_and_keep_their_numbers(inside, tmp_path):
    """A line separator, a next line and a form feed stand inside of questions; a byte order mark is no part of the first."""
    questions = ["one\u2028two", "three\u0085four", "five\x0csix\x1c", "seven \rx"]
    text = "\r\n".join([questions[0], "", questions[1], "  ", *questions[2:]]) + "\n"
    (tmp_path / "q").write_bytes(b"\xef\xbb\xbf" + text.encode())
    code, out, error = inside(
        "generate", "--file", tmp_path / "q", "--lines", "--json", "--seed", "7", "--max-batch", "2", *SHORT
    )
    assert code == 0, error
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["index"], line["prompt"]) for line in lines] == list(zip((0, 2, 4, 5), questions, strict=True))
    assert {line["seed"] for line in lines} == {7}
    for line in lines:
        assert line["finish_reason"] == ("length" if len(line["tokens"]) == 8 else "stop")
    (tmp_path / "plain").write_text(questions[1])
    code, out, error = inside("generate", "--file", tmp_path / "plain", "--json", "--seed", "7", *SHORT)
    (alone,) = map(json.loads, out.splitlines())
    for name in ("prompt", "tokens", "prompt_tokens", "forwards"):
        assert alone[name] == lines[1][name]
    timed = [{"compile_seconds", "decode_seconds"} & set(line) for line in lines]
    assert [len(names) for names in timed] == [2, 0, 2, 0], "once a batch, so that sums are right"
    assert all(round(line[name], 3) == line[name] for line, names in zip(lines, timed, strict=True) for name in names)


def test_why_an_answer_ends(small):
    whole = tuple(generate(small, QUESTION, gen_length=length).finish_reason for length in (128, 8))
    assert whole == ("stop", "length")


@pytest.mark.parametrize("arguments", [(), ("--lines",)])
def test_a_byte_order_mark_changes_no_answer(inside, tmp_path, arguments):
    told = []
    for n, mark in enumerate((b"", b"\xef\xbb\xbf")):
        (tmp_path / str(n)).write_bytes(mark + QUESTION.encode())
        code, out, error = inside("generate", "--file", tmp_path / str(n), *arguments, "--json", *SHORT)
        assert code == 0, error
        told.append({k: v for k, v in json.loads(out).items() if not k.endswith("seconds")})
    assert told[0] == told[1]
    (tmp_path / "wide").write_bytes(QUESTION.encode("utf-16"))
    code, out, error = inside("generate", "--file", tmp_path / "wide")
    assert (code, out) == (2, "") and "cannot be read as UTF-8" in error


@pytest.mark.long
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"},
    ],
    ids=lambda e: next(iter(e.values())),
)
def test_output_that_is_not_utf8(environment):
    question = "Größe 東京 🙂: " + QUESTION
    commands = [
        (("generate", question, *SHORT, "--show", "--gen-length", "16"), 0, b"+8 tokens"),
        (("generate", question, "--decoder", "東"), 2, b"--decoder: "),
        (("generate", question, *SHORT, "--json"), 0, b'"prompt": "Gr\\u00f6\\u00dfe \\u6771'),
        (("explain", question), 0, b"canvas"),
        (("generate", "--help"), 0, b"--gen-length"),
        (("generate", question, "--東"), 2, b"--"),
    ]
    for arguments, code, said in commands if "PYTHONUTF8" in environment else commands[:2]:
        command = [sys.executable, "-m", "djax.cli", *arguments]
        env = {**os.environ, "COLUMNS": "200", **environment}
        done = subprocess.run(command, capture_output=True, cwd="/", env=env)
        assert done.returncode == code, done.stderr
        assert b"Traceback" not in done.stderr
        assert said in (done.stderr if code else done.stdout)


@pytest.mark.long
@pytest.mark.parametrize("arguments", [("generate", "--help"), ("info",)])
def test_whoever_reads_the_output_may_stop(arguments):
    command = f"{sys.executable} -m djax.cli {' '.join(arguments)}"
    for shell, codes in (
        (f"{command} | head -1", {0}),
        (f"set -o pipefail; {command} | true", {0, 141}),
        (f"{command} >&-", {0}),
        (f"{command} 2>&-", {0}),
        (f"{command} > /dev/full", {2}),
    ):
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd="/", env=os.environ)
        assert done.returncode in codes, (shell, done.stderr)
        full = "djax: standard output cannot be written: No space left on device"
        assert done.stderr.strip().replace("\n", " ") == (full if "full" in shell else ""), shell


def test_a_closed_standard_input_is_said():
    shell = f"{sys.executable} -m djax.cli generate - <&-"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd="/", env=os.environ)
    assert done.returncode == 2
    assert done.stderr == "djax: the question cannot be read: standard input is closed\n"


def start(*arguments, **environment):
    """The command, on its way: past what an interpreter does before any code of djax runs."""
    command = [sys.executable, "-m", "djax.cli", *map(str, arguments)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/")
    process = subprocess.Popen(command, **pipes, env={**os.environ, **environment})
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "jaxlib" not in maps.read_text():
        time.sleep(0.001)
    return process


def ended(process):
    """Whether it was interrupted, rather than coming to its end. Fails for anything else, and for more than a line."""
    _, error = process.communicate(timeout=60)
    if process.returncode == 0:
        return False
    # By the signal itself where the interpreter was about to be gone.
    assert (process.returncode, error) in ((130, "djax: interrupted\n"), (-signal.SIGINT, "")), (process.returncode, error)
    return True


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="moments are told by /proc")
@pytest.mark.parametrize("command", ["generate", "convert"])
def test_an_interrupt_is_one_line_at_any_moment(tmp_path, command):
    """While importing, reading, compiling, decoding and writing; every other one comes twice. DJAX_TEST_MOMENTS=40 takes as
    many. Nothing half-written is left."""
    given = {"generate": (QUESTION, "--cache", "Dual()"), "convert": (GOLDENS / "moe_b", tmp_path / "out")}[command]
    environment = {"DJAX_COMPILE_CACHE": "off", "XLA_FLAGS": ""}
    process = start(command, *given, **environment)
    began = time.monotonic()
    assert not ended(process)
    seconds = time.monotonic() - began
    moments, cut = int(os.environ.get("DJAX_TEST_MOMENTS", 3)), 0
    for n in range(moments):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        process = start(command, *given, **environment)
        time.sleep((n + 0.5) / moments * seconds)
        process.send_signal(signal.SIGINT)
        if n % 2:
            time.sleep((0.01, 1.2)[n // 2 % 2])
            process.send_signal(signal.SIGINT)
        cut += ended(process)
        assert {p.name for p in tmp_path.iterdir()} <= {"out"}
    assert cut, "a slower first start than the ones after it may let some come to their end"
    print(f"{command}: interrupted {cut} of {moments} before their end")


def test_an_interrupt_that_a_finalizer_swallows_or_a_library_renames_ends_the_command(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW, "utf-8")
    for way in ("finalizer", "renamed", "C", "asked to ignore"):
        process = subprocess.Popen(
            [sys.executable, tmp_path / "slow.py", way], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert ended(process) == (way != "asked to ignore"), way


# The command with something slow in it, whose start it says.
SLOW = """
import sys, time
way, sys.argv = sys.argv[1], ["djax", "info"]
if way == "asked to ignore":
    import signal
    signal.signal(signal.SIGINT, signal.SIG_IGN)
from djax import cli
from djax.checkpoints import checkpoint

def wait(seconds=5):
    print("here", flush=True)
    until = time.monotonic() + (1 if way == "asked to ignore" else seconds)
    while time.monotonic() < until:
        time.sleep(0.01)

class Slow:
    def __del__(self):
        wait()

def inspect(path, **options):
    if way == "finalizer":
        Slow()
        wait()
    elif way == "renamed":
        try:
            wait()
        except BaseException as error:
            raise RuntimeError("the library failed") from error
    elif way == "C":
        import hashlib
        print("here", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)  # a minute, in which no handler of Python's runs
    else:
        wait()
    return {"a": 1}

checkpoint.inspect = inspect
cli.main()
"""


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
        (
            ["bench", "ladder", "--out", "/nowhere", "--draw", "--resume"],
            "--draw: expected without --problems, --model and --resume",
        ),
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
