"""The trainer: its problems, tokenizer, objective, and that an interrupted run equals an uninterrupted one."""

import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import sys
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import killed
import numpy as np
import optax
import pytest
from runs_of_before import as_before

import djax
from djax.checkpoints.source import NAMED, SHIPPED
from djax.configs.small import RUN
from djax.errors import OptionError, TrainingError
from djax.models import FAMILIES
from djax.tasks import problems
from djax.tasks.evaluate import evaluate, wilson
from djax.training import data, objective, tokenizer
from djax.training import train as training
from djax.training.train import Stage, train


def test_problems_are_right_and_told_apart():
    rng = random.Random(0)
    drawn = [problems.draw(rng, held_out=False) for _ in range(2000)]
    assert {p.steps for p in drawn} == {2, 3, 4, 5, 6}
    for p in drawn:
        assert not p.held_out
        assert problems.stated_result(p.answer) == p.result
        calculations = [c.split("=") for c in p.answer.replace(",", " ").replace(".", " ").split() if "=" in c]
        assert len(calculations) == p.steps
        assert all(eval(left) == int(right) for left, right in calculations)
        assert 0 < p.result <= problems.LIMIT
    for p in [problems.drill(rng, 5, easy=0.3) for _ in range(200)]:
        sums = [c.split("=") for c in p.answer.split("\n")[0].rstrip(".").split(". ")]
        assert all(eval(left) == int(right) <= problems.LIMIT for left, right in sums)
        assert p.question == f"Work out {', '.join(left for left, _ in sums)}."
        assert p.result == int(sums[-1][1])
    held = problems.held_out(300)
    assert all(p.held_out for p in held)
    assert len({p.question for p in held}) == 300
    assert held == problems.held_out(300)
    assert held[:100] != problems.held_out(100, seed=1)


@pytest.mark.parametrize(
    ("text", "result"), [("so 1+1=2.\n#### 2", 2), ("#### 1 #### 37", 37), ("#### ", None), ("no", None), ("####-4", -4)]
)
def test_stated_result(text, result):
    assert problems.stated_result(text) == result


def test_answers_take_40_to_120_tokens(small):
    rng = random.Random(1)
    lengths = [len(data.example(small.tokenizer, problems.draw(rng, held_out=False))[1]) for _ in range(2000)]
    assert min(lengths) >= 35
    assert max(lengths) <= 125
    assert np.mean([40 <= n <= 120 for n in lengths]) > 0.98


def test_tokenizer(small):
    words = small.tokenizer
    assert words.convert_ids_to_tokens(words("12+345")["input_ids"]) == ["1", "2", "+", "3", "4", "5"]
    text = "Größe: naïve 東京 🙂 #### 17\n"
    assert words.decode(words(text)["input_ids"]) == text
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    shown = words.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert shown == "<role>SYSTEM</role>a<|role_end|><role>HUMAN</role>b<|role_end|><role>ASSISTANT</role>"
    assert (words.mask_token_id, words.eos_token_id) == (small.config.mask_id, small.config.eos_id)


def test_batches(small):
    tokens, response = data.batch(small.tokenizer, random.Random(0), 16, 192, 0.5, 0.5, small.config.eos_id)
    assert tokens.shape == response.shape == (16, 192)
    for row, answer in zip(tokens, response, strict=True):
        start = int(answer.argmax())
        assert answer[start:].all(), "the response runs to the end, so that EOS is learned"
        assert row[-1] == small.config.eos_id
        text = small.tokenizer.decode(row[start:], skip_special_tokens=True)
        assert problems.stated_result(text) is not None
        assert small.tokenizer.decode(row[:start]).endswith("<role>ASSISTANT</role>")


def test_corrupt_masks_only_the_response_at_the_drawn_ratio():
    tokens = jnp.ones((64, 2000), jnp.int32)
    response = jnp.broadcast_to(jnp.arange(2000) >= 500, tokens.shape)
    noisy, masked, t = objective.corrupt(jax.random.key(0), tokens, response, mask_id=7)
    assert not np.any(masked[:, :500])
    np.testing.assert_array_equal(noisy == 7, masked)
    np.testing.assert_allclose(masked[:, 500:].mean(axis=1), t[:, 0], atol=0.06)
    ratios = np.sort(np.asarray(t)[:, 0])
    assert ratios[0] > 0
    assert ratios[-1] <= 1
    np.testing.assert_allclose(ratios, (np.arange(64) + 0.5) / 64, atol=0.02), "one row in each slice"


def test_diffusion_loss_by_loop():
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(size=(2, 5, 7)).astype(np.float32), rng.integers(0, 7, (2, 5))
    masked, t = rng.random((2, 5)) < 0.5, np.array([[0.3], [0.8]], np.float32)
    response = masked | (rng.random((2, 5)) < 0.5)
    total = 0.0
    for b in range(2):
        for s in range(5):
            if masked[b, s]:
                p = np.exp(logits[b, s]) / np.exp(logits[b, s]).sum()
                total += -np.log(p[tokens[b, s]]) / t[b, 0]
    got = objective.diffusion_loss(*map(jnp.asarray, (logits, tokens, masked, response, t)))
    np.testing.assert_allclose(got, total / response.sum(), rtol=1e-5)


def test_balance_loss_is_one_when_even_and_the_number_of_experts_when_not():
    even = jnp.full((6, 3), 1 / 3), jnp.arange(6, dtype=jnp.int32).reshape(6, 1) % 3
    one = jax.nn.one_hot(jnp.zeros(6, jnp.int32), 3), jnp.zeros((6, 1), jnp.int32)
    np.testing.assert_allclose(objective.balance_loss([even]), 1, rtol=1e-6)
    np.testing.assert_allclose(objective.balance_loss([one, one]), 3, rtol=1e-6)


TINY = dataclasses.replace(
    RUN,
    architecture=RUN.architecture
    | {"hidden_size": 32, "num_hidden_layers": 1, "num_experts": 4, "expert_intermediate_size": 16},
    stages=(Stage(until=6, lengths=(96,), drills=0.5), Stage(until=12, lengths=(96, 128), drills=0.0)),
    rows=4,
    warmup=2,
    cooldown=4,
)


def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    whole = train(TINY, tmp_path / "whole", log_every=4)

    class Killed(Exception):
        pass

    original, calls = data.batch, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 8:
            raise Killed
        return original(*args)

    monkeypatch.setattr("djax.training.train.data.batch", killed)
    with pytest.raises(Killed):
        train(TINY, tmp_path / "parts", save_every=4)
    monkeypatch.setattr("djax.training.train.data.batch", original)
    parts = train(TINY, tmp_path / "parts", save_every=4)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [4, 8, 12]
    assert log[-1]["loss"] < log[0]["loss"]
    with pytest.raises(OptionError, match="this run is finished"):
        train(TINY, tmp_path / "whole")


FEW = dataclasses.replace(TINY, stages=(Stage(until=6, lengths=(96,), drills=0.5),))


def train_few(directory, die=None):
    """A short training with a tokenizer that is quickly made, killed just before its n-th operation on files."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    training.tokenizer.train = partial(tokenizer.train, examples=300)
    if die is not None:
        killed.die_at(die)
    train(FEW, directory, save_every=2, log_every=1)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    directory = tmp_path_factory.mktemp("few") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.tokenizer, "train", partial(tokenizer.train, examples=300))
        train(FEW, directory, save_every=2, log_every=1)
    return directory


@pytest.fixture
def again(few, tmp_path, monkeypatch):
    """Goes on with what is left in a directory, and sees that it ends as if nothing had happened."""
    monkeypatch.setattr(training.tokenizer, "train", partial(tokenizer.train, examples=300))

    def go_on(directory):
        if not (directory / "model").exists():
            train(FEW, directory, save_every=2, log_every=1)
        for file in sorted(p for p in few.rglob("*") if p.is_file() and "checkpoints" not in p.parts and p.name != "log.jsonl"):
            assert (directory / file.relative_to(few)).read_bytes() == file.read_bytes(), file
        steps = [json.loads(line)["step"] for line in (directory / "log.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 7)), "no update is logged twice, and none is missing"
        assert {p.name for p in directory.iterdir()} == {p.name for p in few.iterdir()}, "nothing else is left"

    return go_on


@pytest.mark.long
def test_a_training_that_is_killed_goes_on(again, tmp_path):
    """To the same files, byte for byte."""
    directory, left = tmp_path / "run", Counter()

    def begin(die):
        return killed.start(train_few, directory, die)

    def check():
        left[", ".join(sorted(p.name for p in directory.glob("[!.]*")))] += 1
        again(directory)
        shutil.rmtree(directory)

    killed.kill_at_moments(int(killed.MOMENTS or 2), begin, directory.exists, check, "train")
    print("what was there:", dict(left))


def copy(few, directory, *, trained):
    """What a killed training has left."""
    shutil.copytree(few, directory)
    shutil.rmtree(directory / "model")
    for step in (directory / "checkpoints").iterdir():
        if not trained or step.name == "6":
            shutil.rmtree(step)
    return directory


@pytest.mark.long
@pytest.mark.parametrize("spoiled", ["", "{", "[]", "null", "[" * 100_000, '{"rows": 4,\n "family"'], ids=range(6))
def test_a_damaged_run_json_is_written_again_or_said(few, again, tmp_path, spoiled):
    new = copy(few, tmp_path / "new", trained=False)
    (new / "run.json").write_text(spoiled)
    again(new)
    old = copy(few, tmp_path / "old", trained=True)
    (old / "run.json").write_text(spoiled)
    with pytest.raises(OptionError, match=r"run.json: is damaged \(.*\), so nothing says .* remove the file and start again"):
        train(FEW, old)
    (old / "run.json").unlink()
    again(old)


def test_a_run_of_before_goes_on(few, again, tmp_path):
    """Its run.json and its checkpoints are what they were when distillation had another trainer."""
    old = copy(few, tmp_path / "old", trained=True)
    dims = optax.contrib.MuonDimensionNumbers
    axes = {"qkv": dims(0, (1, 3)), "o": dims((0, 1), 2), "w_in": dims(1, 2), "w_out": dims(1, 2)}

    def matrices(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: axes.get(path[-1].key), params)

    rates = dict(learning_rate=lambda step: 0.0, adam_learning_rate=lambda step: 0.0)
    muon = optax.contrib.muon(**rates, muon_weight_dimension_numbers=matrices)
    config = djax.load(few / "model").config
    as_before(old, 4, FAMILIES[FEW.family].init(config, jax.random.key(0)), optax.chain(optax.clip_by_global_norm(1.0), muon))
    described = json.loads((old / "run.json").read_text())
    assert list(described) == ("family architecture stages rows rate adam_rate warmup cooldown balance clip seed".split())
    again(old)


def cut(directory, name):
    file = directory / "tokenizer" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.long
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("spoil", [cut, lambda directory, name: (directory / "tokenizer" / name).unlink()], ids=["cut", "gone"])
def test_a_tokenizer_that_is_not_whole_is_made_again_or_said(few, again, tmp_path, name, spoil):
    new = copy(few, tmp_path / "new", trained=False)
    spoil(new, name)
    again(new)
    old = copy(few, tmp_path / "old", trained=True)
    spoil(old, name)
    with pytest.raises(
        OptionError, match=r"tokenizer: is damaged \(.*\) beside checkpoints; restore it, or choose another dir"
    ):
        train(FEW, old)
    shutil.copytree(few / "tokenizer", old / "tokenizer", dirs_exist_ok=True)
    again(old)


def fill_the_disk(directory, what, room):
    """Train with a disk that is full from the first time on that this is written."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    training.tokenizer.train = partial(tokenizer.train, examples=300)
    full = False

    def hook(event, arguments):
        nonlocal full
        if event in ("open", "os.mkdir") and not full and what in str(arguments[0]):
            full = True
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    sys.addaudithook(hook)
    with pytest.raises(
        TrainingError, match=r"run: cannot be written: .*; what was saved before is there, start again to go on"
    ):
        train(FEW, directory, save_every=2, log_every=1)


@pytest.mark.parametrize(("what", "room"), [("run.json", 10), ("tokenizer", 1000), ("log.jsonl", 0), ("checkpoints/4", 1000)])
def test_a_full_disk_is_said_and_training_goes_on_later(few, again, tmp_path, what, room):
    assert killed.end(killed.start(fill_the_disk, tmp_path / "run", what, room))
    again(tmp_path / "run")


def test_the_shipped_model(small):
    """Small enough to ship, of the published configuration, and it answers."""
    assert sum(f.stat().st_size for f in SHIPPED.iterdir()) <= 8_000_000
    assert small.parameter_count > 1_000_000
    shape = json.loads((SHIPPED / "config.json").read_text())
    assert RUN.architecture.items() <= shape.items()
    # The full figures are in configs/small.py; 30 problems tell a trained model from a broken one.
    report = evaluate(small, problems.held_out(30), max_batch=30, decoder=djax.Fixed(1), cache=djax.Dual())
    assert report.accuracy >= 0.75, report
    report = evaluate(small, problems.held_out(30), max_batch=30, decoder=djax.Threshold(0.9), cache=djax.Dual())
    assert report.accuracy >= 0.5, report
    assert report.tokens_per_forward > 2, report


def test_the_distilled_model_ships_and_needs_fewer_forwards(small):
    """The full figures are in the README; 60 problems tell it from the one it was made from."""
    directory = NAMED["tiny-td"]
    assert sum(f.stat().st_size for f in directory.iterdir()) <= 8_000_000
    distilled = djax.load("tiny-td")
    assert repr(distilled) == repr(small)
    options = dict(max_batch=30, decoder=djax.Threshold(0.997))
    before, after = (evaluate(model, problems.held_out(60), **options) for model in (small, distilled))
    assert after.tokens_per_forward > 1.25 * before.tokens_per_forward, (before, after)
    assert after.correct >= before.correct - 4, (before, after)


def test_wilson():
    low, high = wilson(450, 500)
    assert (round(low, 3), round(high, 3)) == (0.871, 0.923)
    assert wilson(5, 5)[1] == pytest.approx(1.0)
