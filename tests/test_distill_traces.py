"""Trajectories: recorded by the decode program, kept on disk, told apart, and filtered by verifiers that may misbehave."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import time

import jax
import killed
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model

import djax
from djax import distill
from djax.distill import store as stores
from djax.errors import OptionError, TraceError, VerifierError
from djax.tasks import problems, verify

PROBLEMS = distill.run.generated(problems.not_held_out(7))
OPTIONS = dict(gen_length=64, block_length=16, decoder=djax.Threshold(0.9))


@pytest.fixture(scope="module")
def recorded(small, tmp_path_factory):
    return distill.record(small, PROBLEMS, tmp_path_factory.mktemp("traces") / "store", **OPTIONS)


def test_every_state_is_the_canvas_the_decode_had(small, recorded):
    """Forward by forward, against a decode of the same with its trace."""
    answers = djax.generate(small, [p["prompt"] for p in PROBLEMS], trace=True, **OPTIONS)
    for t, a, problem in zip(recorded, answers, PROBLEMS, strict=True):
        assert (t.problem, t.text, t.forwards) == (problem, a.text, a.forwards)
        np.testing.assert_array_equal(t.tokens, a.canvas)
        np.testing.assert_array_equal(t.accepted_at, a.trace.accepted_at)
        np.testing.assert_allclose(t.confidence, a.trace.confidence, atol=1e-3)
        for forward in range(a.forwards):
            shown = a.trace.canvas(a.canvas, a.prompt_length, forward, small.config.mask_id)
            np.testing.assert_array_equal(t.state(forward + 1, small.config.mask_id), shown)
        first = t.state(0, small.config.mask_id)
        assert (first[t.prompt :] == small.config.mask_id).all()
        assert t.start == t.prompt // 16 * 16
        assert t.block == 16


def test_recording_appends_and_goes_on(small, recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(distill.recording, "PART", 3)
    parts = distill.record(small, PROBLEMS[:4], tmp_path / "s", **OPTIONS)
    assert parts.parts == 2
    more = distill.record(small, PROBLEMS, tmp_path / "s", **OPTIONS)
    assert more.parts == 3
    again = distill.record(small, PROBLEMS, tmp_path / "s", **OPTIONS)
    assert again.parts == 3, "nothing is recorded twice"
    for a, b in zip(more, recorded, strict=True):
        assert a.text == b.text
        np.testing.assert_array_equal(a.accepted_at, b.accepted_at)
    for other in (PROBLEMS[::-1], PROBLEMS[1:3], [*PROBLEMS[:3], PROBLEMS[0]]):
        with pytest.raises(TraceError, match=r"trajectory \d is of another problem; choose another directory"):
            distill.record(small, other, tmp_path / "s", **OPTIONS)
    assert len(distill.keep(more, lambda problem, answer: True, first=2)) == 2


def test_samples_differ_and_do_not_depend_on_their_neighbours(small, tmp_path):
    options = OPTIONS | {"temperature": 1.5}
    two = list(distill.record(small, PROBLEMS[:2], tmp_path / "a", samples=2, **options))
    four = list(distill.record(small, PROBLEMS[:2], tmp_path / "b", samples=2, max_batch=1, **options))
    assert [t.problem for t in two] == [PROBLEMS[0]] * 2 + [PROBLEMS[1]] * 2
    assert len({t.seed for t in two}) == 4
    assert any((a.tokens != b.tokens).any() for a, b in (two[:2], two[2:]))
    for a, b in zip(two, four, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
    with pytest.raises(OptionError, match="samples: expected 1, since all 3 would be alike at temperature 0"):
        distill.record(small, PROBLEMS, tmp_path / "c", samples=3, **OPTIONS)


def test_other_models_tokenizers_settings_and_directories_are_refused(small, recorded, moe_a, tmp_path):
    with pytest.raises(
        TraceError, match=r"holds trajectories of other settings \(decoder='Threshold\(tau=0.9, slack=1e-05\)'\)"
    ):
        distill.record(small, PROBLEMS, recorded.directory, **(OPTIONS | {"decoder": djax.Threshold(0.8)}))
    changed = jax.tree.map(lambda a: a, small.params)
    changed["layer_2"]["o"] = changed["layer_2"]["o"].at[0, 0, 0].add(0.01)
    with pytest.raises(TraceError, match="trajectories of another model, Model"):
        recorded.check(dataclasses.replace(small, params=changed))
    with pytest.raises(TraceError, match="trajectories of another tokenizer"):
        recorded.check(moe_a)
    narrow = djax.load(dtype="bfloat16")
    recorded.check(narrow)
    with pytest.raises(TraceError, match=r"no trajectories there \(store.json is missing\)"):
        distill.Store(tmp_path)
    (tmp_path / "store.json").write_text("{}")
    with pytest.raises(TraceError, match="cannot be read"):
        distill.Store(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("")
    with pytest.raises(TraceError, match="is not empty and holds no trajectories"):
        distill.record(small, PROBLEMS, tmp_path / "x", **OPTIONS)
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceError, match="cannot be a directory"):
        distill.record(small, PROBLEMS, tmp_path / "file", **OPTIONS)
    for wrong in ({"question": "1+1?"}, {"prompt": "a", "result": {1, 2}}, {"prompt": "a", "result": (1, 2)}):
        with pytest.raises(OptionError, match='problem 0: expected a mapping with a "prompt" and JSON values'):
            distill.record(small, [wrong], tmp_path / "y", **OPTIONS)
    with pytest.raises(OptionError, match="problems: expected at least one"):
        distill.record(small, [], tmp_path / "y", **OPTIONS)


def test_a_damaged_part_is_said(recorded, tmp_path):
    data = (recorded.directory / "part-00000.npz").read_bytes()
    (tmp_path / "store.json").write_bytes((recorded.directory / "store.json").read_bytes())
    rng = np.random.default_rng(0)
    for n in range(60):
        if n % 2:
            spoiled = data[: rng.integers(len(data))]
        else:
            spoiled = bytearray(data)
            spoiled[rng.integers(len(data))] ^= 1 << rng.integers(8)
        (tmp_path / "part-00000.npz").write_bytes(spoiled)
        try:
            got = distill.Store(tmp_path).part(0)
        except TraceError:
            continue
        assert len(got) == len(PROBLEMS), "what is read all the same is whole (a bit that means nothing)"


def test_hostile_parts_take_no_memory_and_raise_what_they_should(recorded, tmp_path):
    (tmp_path / "store.json").write_bytes((recorded.directory / "store.json").read_bytes())
    with np.load(recorded.directory / "part-00000.npz") as file:
        whole = {name: file[name] for name in file.files}
    for change in (
        {"length": np.full(7, 2**46)},
        {"length": np.full(7, np.inf)},
        {"prompt": np.full((7, 1), 3)},
        {"words": np.frombuffer(b"3", np.uint8)},
        {"words": np.frombuffer(b"[[[[", np.uint8)},
        {"tokens": np.zeros(3, np.uint8)},
        {"tokens": np.zeros(1 << 31, bool)},
    ):
        np.savez_compressed(tmp_path / "part-00000.npz", **(whole | change))
        with pytest.raises(TraceError, match="cannot be read"):
            distill.Store(tmp_path).part(0)
    np.save(tmp_path / "part-00000.npy", whole["tokens"])
    (tmp_path / "part-00000.npy").rename(tmp_path / "part-00000.npz")
    with pytest.raises(TraceError, match="cannot be read"):
        distill.Store(tmp_path).part(0)


def test_a_full_disk_leaves_what_was_there(recorded):
    trajectories, ignore = list(recorded), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    try:
        with pytest.raises(TraceError, match=r"cannot be written: .*; what was there before is untouched"):
            recorded.write(1, trajectories)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, ignore)
    assert recorded.parts == 1
    assert not [f for f in recorded.directory.iterdir() if f.name.startswith(".")]


@given(st.data())
def test_what_is_packed_comes_back(data):
    def one():
        length = data.draw(st.integers(2, 40))
        prompt = data.draw(st.integers(0, length - 1))
        accepted = np.array(data.draw(st.lists(st.integers(-1, 300), min_size=length, max_size=length)), np.int32)
        accepted[:prompt] = -1
        tokens = np.array(data.draw(st.lists(st.sampled_from([0, 7, 200_000]), min_size=length, max_size=length)), np.int32)
        confidence = np.where(accepted >= 0, 0.5, 0).astype(np.float16)
        words = {"prompt": data.draw(st.text()), "result": 3}
        numbers = dict(seed=data.draw(st.integers(0, 2**31)), prompt=prompt, start=0, block=32, forwards=301)
        return distill.Trajectory(words, data.draw(st.text()), tokens, accepted, confidence, **numbers)

    wanted = [one() for _ in range(data.draw(st.integers(1, 4)))]
    for a, b in zip(wanted, stores.unpacked(stores.packed(wanted)), strict=True):
        for field in dataclasses.fields(a):
            np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


def test_a_trajectory_takes_few_bytes(recorded, small):
    """Hundreds of thousands fit a laptop's disk: 164 bytes each in parts of 500 (the README has it measured)."""
    many = list(recorded) * 20
    assert len(stores.packed(many)) / len(many) < 400


def test_the_verifiers_that_ship():
    assert distill.exact({"prompt": "", "result": 37}, "so 30+7=37.\n#### 37") == 1
    assert distill.exact({"prompt": "", "result": 37}, "#### 36") == 0
    assert distill.exact({"prompt": "", "result": 37}, "37") == 0


TESTS = "assert add(2, 3) == 5"
GOOD = "def add(a, b):\n    return a + b"


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (GOOD, 1),
        (f"Here it is:\n```python\n{GOOD}\n```\nDone.", 1),
        (f"import math, re, json, collections\n{GOOD}", 1),
        ("def add(a, b):\n    return a - b", 0),
        ("def add(a, b) return", 0),
        ("import os\nos._exit(0)", 0),
        ("raise SystemExit(0)", 0),
        (f"print('x' * 100)\n{GOOD}", 1),
        ("while True: pass", 0),
        (f"x = bytearray(1 << 33)\n{GOOD}", 0),
        (f"open('here', 'w')\n{GOOD}", 0),
        (f"import socket\nsocket.socket()\n{GOOD}", 0),
        (f"import subprocess\nsubprocess.run(['true'])\n{GOOD}", 0),
        (f"import os\nos.fork()\n{GOOD}", 0),
        (f"import os\nos.system('true')\n{GOOD}", 0),
        (f"import os\nfor _ in range(1000): os.write(3, b'x' * 100000)\n{GOOD}", 0),
        (f"import _posixsubprocess\n{GOOD}", 0),
        (f"import sqlite3\nsqlite3.connect('here')\n{GOOD}", 0),
        ("import __main__, os\nos.write(__main__.say, __main__.word.encode())\nos._exit(0)", 0),
        (f"import os\nassert not [k for k in os.environ if k not in ('LC_CTYPE',)]\nassert os.listdir() == []\n{GOOD}", 1),
    ],
)
def test_a_python_answer_runs_in_its_own_limits(answer, right):
    began = time.monotonic()
    assert distill.python({"prompt": "", "tests": TESTS}, answer, seconds=4) == right
    assert time.monotonic() - began < 15


def test_filtering_counts_keeps_scores_and_says_when_nothing_is_left(recorded):
    right = [p["result"] == problems.stated_result(t.text) for p, t in zip(PROBLEMS, recorded, strict=True)]
    kept = distill.keep(recorded, "exact")
    assert [t.text for t in kept] == [t.text for t, r in zip(recorded, right, strict=True) if r]
    file = recorded.directory / "part-00000.npz.exact-2.json"
    assert json.loads(file.read_text()) == [float(r) for r in right]
    for spoiled in ("[", '{"a": 1}', "[1.0]", '["1"]'):
        file.write_text(spoiled)
        assert len(distill.keep(recorded, "exact")) == sum(right), "made again"

    def half(problem, answer):
        return np.float32(0.5)

    assert len(distill.keep(recorded, half, least=0.5)) == len(PROBLEMS)
    assert distill.keep(recorded, lambda problem, answer: np.bool_(True), first=3)[2].text == list(recorded)[2].text
    with pytest.raises(TraceError, match=r"none of 7 trajectories has a score of 1 by the verifier half \(the best has 0.5\)"):
        distill.keep(recorded, half)
    with pytest.raises(OptionError, match="verifier: expected a function or one of exact, python, got 'maths'"):
        distill.keep(recorded, "maths")


def test_verifiers_that_raise_hang_or_babble(recorded):
    def raises(problem, answer):
        raise KeyError("nothing there")

    def hangs(problem, answer):
        time.sleep(60)

    def babbles(problem, answer):
        return "fine"

    with pytest.raises(VerifierError, match=r"part 0, trajectory 0: the verifier raises raised KeyError: 'nothing there'"):
        distill.keep(recorded, raises)
    with pytest.raises(VerifierError, match=r"the verifier hangs has said nothing for 0.2 s"):
        distill.keep(recorded, hangs, verifier_seconds=0.2)
    for value in (2, -0.1, float("nan"), None):
        with pytest.raises(VerifierError, match=r"expected a number from 0 to 1, or a bool"):
            verify.ask(lambda p, a, value=value: value, {}, "", 1, "here")
    with pytest.raises(VerifierError, match=r"the verifier babbles said 'fine'"):
        distill.keep(recorded, babbles)
    assert list(recorded), "nothing is lost"


IDS = [{"prompt": [1 + n, 2, 3], "result": n} for n in range(30)]
SAMPLED = dict(samples=2, seed=5, temperature=0.7, gen_length=16, block_length=8, max_batch=2)


def record_in(directory, die=None):
    """A tiny model's recording in many parts, killed just before its n-th operation on files."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    distill.recording.PART = 2
    model = tiny_model()
    if die is not None:
        killed.die_at(die)
    distill.record(model, IDS, directory, **SAMPLED)


def contents(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir() if not p.name.startswith(".")}


@pytest.mark.long
def test_a_recording_that_is_killed_goes_on(tmp_path, monkeypatch):
    """To the same store, byte for byte."""
    monkeypatch.setattr(distill.recording, "PART", 2)
    record_in(tmp_path / "whole")
    whole, left = contents(tmp_path / "whole"), []
    assert len(whole) == 1 + 30

    def check():
        there = contents(tmp_path / "s") if (tmp_path / "s").exists() else {}
        assert there.items() <= whole.items(), "each file is there and right, or is not there"
        left.append(len(there))
        record_in(tmp_path / "s")
        assert contents(tmp_path / "s") == whole
        shutil.rmtree(tmp_path / "s")

    def begin(die):
        return killed.start(record_in, tmp_path / "s", die)

    killed.kill_at_moments(int(killed.MOMENTS or 3), begin, (tmp_path / "s" / "part-00000.npz").exists, check, "recording")
    print("files left by each:", left[2:])
