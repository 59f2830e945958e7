"""The distillation trainer: what a restart, devices, accumulation, LoRA and remat change (nothing), and what goes wrong."""

import dataclasses
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import killed
import numpy as np
import pytest
from tiny import CONFIG, DENSE, LLADA2, tiny_model

from djax import distill
from djax.distill import lora, supervised
from djax.distill.trainer import Examples
from djax.errors import OptionError, TrainingError
from djax.training import trainer, update
from djax.training.contract import Draw, Network, Own, Weights
from djax.training.plan import make_schedule

MOMENTS = int(os.environ.get("DJAX_TEST_MOMENTS", "3"))
BOTH = (distill.Compression(), distill.Certainty())
RECIPE = distill.Recipe(BOTH, steps=12, rows=8, rate=3e-3, warmup=3, save_every=3, evaluate_every=6, log_every=2)


def trajectories(count=20, config=CONFIG, block=8):
    """Made-up decodes: random tokens, each block in one to four forwards, the last block sometimes not reached."""
    rng = np.random.default_rng(0)
    out = []
    for _ in range(count):
        prompt, length = int(rng.integers(3, 9)), int(rng.integers(24, 33))
        tokens = rng.integers(0, config.eos_id, length).astype(np.int32)
        accepted, forward = np.full(length, -1, np.int32), 0
        for start in range(prompt // block * block, length - block * int(rng.integers(0, 2)), block):
            inside = np.arange(max(start, prompt), min(start + block, length))
            order = np.sort(rng.integers(0, 4, len(inside)))
            accepted[inside] = forward + np.unique(order, return_inverse=True)[1]
            forward = int(accepted.max()) + 1
        numbers = dict(seed=0, prompt=prompt, start=prompt // block * block, block=block, forwards=forward)
        confidence = np.zeros(length, np.float16)
        out.append(distill.Trajectory({"prompt": "", "result": 0}, "", tokens, accepted, confidence, **numbers))
    return out


def leaves(model):
    return [np.asarray(a) for a in jax.tree.leaves(model.params)]


def same(a, b):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def run(directory, recipe=RECIPE, **options):
    return distill.train(tiny_model(), trajectories(), recipe, directory, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return run(directory), directory


def test_training_learns_and_says_how(whole):
    model, directory = whole
    log = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [2, 3, 4, 6, 8, 9, 10, 12]
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    parts = {
        "loss",
        "compression",
        "revealed",
        "cross entropy",
        "entropy",
        "right",
        "balance",
        "gradient norm",
        "tokens_per_second",
    }
    assert parts <= set(log[0])
    assert {p.name for p in (directory / "checkpoints").iterdir()} == {"12"}, "without an evaluation the last is kept"
    assert not any((a == b).all() for a, b in zip(leaves(model), leaves(tiny_model()), strict=True)), "all of it is trained"


def test_the_best_is_kept_and_returned(whole, tmp_path):
    scores = iter([5.0, 3.0])
    model = run(tmp_path, evaluate=lambda model: {"score": next(scores), "accuracy": 0.5})
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"6", "12"}
    lines = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert lines == [{"step": 6, "score": 5.0, "accuracy": 0.5}, {"step": 12, "score": 3.0, "accuracy": 0.5}]
    short = dataclasses.replace(RECIPE)
    assert short == RECIPE
    with pytest.raises(AssertionError):
        same(model, whole[0])
    same(model, run(tmp_path, evaluate=lambda model: {"score": 9.0}))


def train_in(directory, recipe=RECIPE):
    os.environ["JAX_PLATFORMS"] = "cpu"
    run(directory, recipe)


@pytest.mark.long
def test_killed_at_any_moment_it_goes_on_to_the_same_parameters(whole, tmp_path):
    """Bit for bit. DJAX_TEST_MOMENTS=20 takes as many moments, all over a run's time."""
    rng, cut = random.Random(0), 0
    for n in range(MOMENTS):
        log = tmp_path / str(n) / "log.jsonl"
        process = killed.start(train_in, tmp_path / str(n))
        # Once it has logged so much, and then at a moment of the next two updates, or of what is written beside them.
        lines = rng.randrange(0, 7)
        while process.is_alive() and (log.read_text().count("\n") if log.exists() else 0) < lines:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        cut += not killed.end(process)
        same(run(tmp_path / str(n)), whole[0])
        steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
        assert steps == sorted(set(steps)), "no update is logged twice"
    assert cut >= MOMENTS / 2, "most were killed before their end"
    print(f"killed {cut} of {MOMENTS} before their end")


def test_order_and_noise_follow_from_seed_and_number_alone():
    examples = Examples.of(trajectories(), RECIPE)
    seen = [examples.which(step) for step in range(5)]
    assert sorted(np.concatenate(seen)[:20]) == list(range(20)), "each once, then again in another order"
    assert (np.concatenate(seen)[:20] != np.concatenate(seen)[20:40]).any()
    half = Examples.of(trajectories(), dataclasses.replace(RECIPE, rows=4))
    np.testing.assert_array_equal(np.concatenate([half.which(0), half.which(1)]), seen[0])
    other = Examples.of(trajectories(), dataclasses.replace(RECIPE, seed=1))
    assert (other.which(0) != seen[0]).any()


def one_gradient(recipe, model=None, parameters=None):
    model = model or tiny_model()
    rows = Examples.of(trajectories(config=model.config), recipe).batch(0)
    keys = jax.random.split(jax.random.key(3), recipe.rows)
    parameters = model.params if parameters is None else parameters
    found, losses, logged = jax.jit(partial(gradient, recipe, model, rows, keys))(parameters)
    return found, losses, logged


def gradient(recipe, model, rows, keys, parameters):
    """Of the model's parameters, each row's loss, and the parts of the loss."""
    net = Network(model.family, model.config, recipe.remat)
    of = update.Setting(net, recipe.objective(), recipe.plan(), Weights())
    draw = Draw(keys[0], keys, jnp.float32(0))
    (found, own), *rest = update.gradient((parameters, ()), update.Frozen(), rows, draw, of=of)
    assert own == ()
    return found, *rest


def close(found, wanted, rtol=1e-4, atol=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


@pytest.mark.long
@pytest.mark.parametrize("change", [dict(accumulate=4), dict(remat=True)])
@pytest.mark.parametrize("config", [CONFIG, DENSE, LLADA2], ids=["llada_moe", "llada", "llada2"])
def test_accumulation_and_remat_change_no_gradient(config, change):
    recipe = dataclasses.replace(RECIPE, balance=0.0)  # a product of two means, which parts of a batch do not add up to
    model = tiny_model(config=config)
    wanted, losses, _ = one_gradient(recipe, model)
    found, again, _ = one_gradient(dataclasses.replace(recipe, **change), model)
    close(found, wanted)
    close(again, losses)
    assert losses.shape == (8,)


def test_remat_keeps_less():
    def kept(remat):
        recipe = dataclasses.replace(RECIPE, remat=remat)
        model = tiny_model(config=dataclasses.replace(DENSE, layers=6))
        rows = Examples.of(trajectories(), recipe).batch(0)
        keys = jax.random.split(jax.random.key(3), 8)
        program = jax.jit(lambda p: gradient(recipe, model, rows, keys, p)[0])
        return program.lower(model.params).as_text().count("optimization_barrier")

    assert kept(False) == 0
    assert kept(True) == 6, "one a layer: its activations are made again behind it"


def test_many_logits_are_made_a_row_at_a_time(monkeypatch):
    model, keys = tiny_model(), jax.random.split(jax.random.key(3), RECIPE.rows)
    rows = Examples.of(trajectories(), RECIPE).batch(0)

    def loops():
        program = jax.jit(partial(gradient, RECIPE, model, rows, keys)).lower(model.params)
        return program.as_text().count("stablehlo.while")

    wanted, before = one_gradient(RECIPE), loops()
    monkeypatch.setattr(supervised, "AT_ONCE", 1)
    close(one_gradient(RECIPE), wanted)
    assert loops() == before + 2 * 3, "a loop over rows for each of the three views, forth and back"


def test_blocks_see_nothing_after_them_in_a_block_causal_family():
    """What stands after a LLaDA2 row's active block has no part in its loss."""
    model, recipe = tiny_model(config=LLADA2), dataclasses.replace(RECIPE, objectives=(distill.Certainty(),), balance=0.0)
    rows = Examples.of(trajectories(config=LLADA2), recipe).batch(0)
    # Decoded up to 24, the end of a block; what is after it is not there, or is a block of masks.
    rows = rows._replace(accepted_at=np.where(np.arange(32) < 24, rows.accepted_at, -1), total=np.full(8, 24, np.int32))
    keys = jax.random.split(jax.random.key(3), 8)
    draw = Draw(keys[0], keys, jnp.float32(0))

    def losses_of(family):
        net = Network(family, LLADA2)
        return jax.jit(lambda rows: recipe.objective().loss(net, model.params, Own(), rows, draw)[1][0])

    losses = losses_of(model.family)
    longer = rows._replace(total=np.full(8, 32, np.int32))
    np.testing.assert_allclose(losses(longer), losses(rows), rtol=1e-5)
    wide = losses_of(dataclasses.replace(model.family, visibility="all"))
    assert (np.abs(wide(longer) - wide(rows)) > 1e-3).any(), "without the rule it would matter"


def test_lora_begins_as_the_model_and_trains_its_adapters_alone(tmp_path):
    recipe = dataclasses.replace(RECIPE, lora=distill.Lora(rank=4, alpha=8.0))
    model = tiny_model()
    adapters = lora.adapters(recipe.lora, model.family, model.config, jax.random.key(0))
    assert set(adapters["layer_0"]) == {"qkv", "o", "w_in", "w_out"}
    assert adapters["layer_0"]["w_in"]["a"].shape == (4, 16, 4), "experts have an adapter each"
    close(lora.merged(recipe.lora, model.params, adapters), model.params, 0, 0)
    bumped = jax.tree.map(lambda a: a + 0.1, adapters)
    o = bumped["layer_0"]["o"]
    wanted = model.params["layer_0"]["o"] + 2 * (o["a"] @ o["b"]).reshape(2, 8, 16)
    np.testing.assert_allclose(lora.merged(recipe.lora, model.params, bumped)["layer_0"]["o"], wanted, rtol=1e-5)
    trained = run(tmp_path, recipe)
    for name in ("embedding", "head", "norm"):
        np.testing.assert_array_equal(trained.params[name], model.params[name])
    np.testing.assert_array_equal(trained.params["layer_0"]["router"], model.params["layer_0"]["router"])
    assert (np.asarray(trained.params["layer_0"]["w_in"]) != np.asarray(model.params["layer_0"]["w_in"])).mean() > 0.9
    log = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1] < log[0]
    with pytest.raises(OptionError, match=r"Lora\(rank=...\): expected at most 8, the size of layer_0/w_out, got 9"):
        run(tmp_path / "x", dataclasses.replace(RECIPE, lora=distill.Lora(9)))


def test_bfloat16_computes_narrow_and_keeps_wide(tmp_path):
    trained = run(tmp_path, dataclasses.replace(RECIPE, dtype="bfloat16", steps=3))
    assert trained.dtype == jnp.float32
    _, losses, _ = one_gradient(RECIPE)
    found, narrow, _ = one_gradient(dataclasses.replace(RECIPE, dtype="bfloat16"))
    np.testing.assert_allclose(narrow, losses, rtol=0.05)
    assert (np.asarray(narrow) != np.asarray(losses)).any()
    assert jax.tree.leaves(found)[0].dtype == jnp.float32


@pytest.mark.long
def test_one_and_four_devices_see_the_same_and_agree():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    file = Path(__file__).parent / "distil_on_four_devices.py"
    done = subprocess.run([sys.executable, "-W", "error", file], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"(\S+): equal", done.stdout) == ["data=4", "data=2,model=2", "data=2,accumulate=2"]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(whole, tmp_path, monkeypatch):
    original = Examples.batch

    def spoiled(self, step):
        rows = original(self, step)
        if step == 7:
            # Logits of no finite loss, without touching the weights: a block length of 0 divides by zero in one row.
            rows = rows._replace(block=np.where(np.arange(8) == 5, 0, rows.block).astype(np.int32))
        return rows

    monkeypatch.setattr(Examples, "batch", spoiled)
    with pytest.raises(TrainingError, match=r"update 7: the loss is not finite at examples \[61\] \(trajectories \[\d+\] of"):
        run(tmp_path)
    monkeypatch.setattr(Examples, "batch", original)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"6"}
    same(run(tmp_path), whole[0])


def test_what_does_not_fit_is_said(whole, tmp_path):
    with pytest.raises(OptionError, match=r"Recipe\(rows=32\): expected at most the 20 trajectories that are kept"):
        run(tmp_path / "a", dataclasses.replace(RECIPE, rows=32))
    with pytest.raises(OptionError, match=r"holds a run with other settings \(recipe differ\)"):
        run(whole[1], dataclasses.replace(RECIPE, rate=1e-3))
    with pytest.raises(OptionError, match=r"holds a run with other settings \(model differ\)"):
        distill.train(tiny_model(seed=1), trajectories(), RECIPE, whole[1])
    with pytest.raises(OptionError, match=r"holds a run with other settings \(trajectories, data differ\)"):
        distill.train(tiny_model(), trajectories(19), RECIPE, whole[1])
    same(run(whole[1]), whole[0])
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=r"file/run.json: cannot be read"):
        run(tmp_path / "file")
    with pytest.raises(OptionError, match=r"Recipe\(rows=8\): expected a multiple of accumulate=3"):
        distill.Recipe(rows=8, accumulate=3)
    with pytest.raises(OptionError, match=r"Recipe\(objectives=...\): expected at least one"):
        distill.Recipe(())
    with pytest.raises(OptionError, match=r"Recipe\(schedule=...\): expected one of constant, cosine, linear"):
        distill.Recipe(schedule="steps")
    assert not (tmp_path / "a").exists(), "nothing is half-written"


def fill_the_disk(directory, what):
    """Train with a disk that is full from the ninth update on: this process can write no file of over a kilobyte, or none at
    all, any more. Fails unless that is said."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # What pytest captures is a file, too, and the bar that cannot be drawn there would be what is raised.
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    original = trainer.append

    def append(file, entry):
        if entry["step"] == 9:
            resource.setrlimit(resource.RLIMIT_FSIZE, (what, resource.RLIM_INFINITY))
        original(file, entry)

    trainer.append = append
    with pytest.raises(TrainingError, match=r"cannot be written: .*File too large.*; what was saved before is there"):
        run(directory)


@pytest.mark.parametrize("what", [0, 1000])
def test_a_full_disk_is_said_and_training_goes_on_later(whole, tmp_path, what):
    """The log's own line, or a checkpoint that is written beside the next updates."""
    assert killed.end(killed.start(fill_the_disk, tmp_path, what))
    assert {"3", "6"} & {p.name for p in (tmp_path / "checkpoints").iterdir()}, "6 may still have been under way"
    same(run(tmp_path), whole[0])


def test_a_schedule_rises_and_falls():
    recipe = distill.Recipe(steps=100, warmup=10, rate=1.0, schedule="cosine")

    def make(recipe):
        return make_schedule(recipe.plan(), recipe.rate)

    rate = make(recipe)
    assert [round(float(rate(s)), 3) for s in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert float(rate(55)) == pytest.approx(0.5)
    assert float(rate(100)) == 0
    assert float(make(dataclasses.replace(recipe, schedule="constant"))(100)) == 1
    assert float(make(dataclasses.replace(recipe, schedule="linear"))(55)) == pytest.approx(0.5)
