"""The whole loop with the small model: record, filter, train, export, compare; from the shell, too; and what it refuses."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_cli import djax as command

import djax
from djax import distill
from djax.benchmarks import distill as benchmark
from djax.benchmarks.report import read_lines
from djax.cli import main
from djax.distill.run import generated, read_problems
from djax.errors import OptionError, TrainingError
from djax.tasks import problems
from djax.tasks.evaluate import evaluate

EASY = djax.Threshold(0.99)
SETTINGS = distill.Settings(gen_length=96, decoder=EASY)
RECIPE = distill.Recipe((distill.Compression(distill.Stride(64)),), steps=3, rows=4, rate=1e-3, evaluate_every=2, save_every=2)
RUN = distill.Distillation(problems=8, recordings=(SETTINGS,), recipe=RECIPE, decoding=SETTINGS, validation=4)


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    return distill.distil(small, RUN, directory), directory


def test_the_loop_ends_in_a_checkpoint(small, finished):
    model, directory = finished
    again = djax.load(directory / "model")
    assert repr(again) == repr(small)
    for name in ("embedding", "head"):
        assert (np.asarray(again.params[name]) != np.asarray(small.params[name])).any()
    facts = json.loads((directory / "facts.json").read_text())
    assert facts["trajectories"] == 8
    assert 4 <= facts["kept"] <= 8
    lines = [json.loads(line) for line in (directory / "training" / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3]
    assert djax.generate(again, generated(problems.held_out(1))[0]["prompt"], gen_length=96).text
    with pytest.raises(OptionError, match="this run is finished; choose another directory"):
        distill.distil(small, RUN, directory)
    assert model.dtype == again.dtype == small.dtype
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b), "what is returned, and measured, is what is on disk"


def test_a_killed_loop_goes_on(small, finished, tmp_path, monkeypatch):
    def killed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("djax.distill.run.train", killed)
    with pytest.raises(KeyboardInterrupt):
        distill.distil(small, RUN, tmp_path)
    monkeypatch.undo()
    with pytest.raises(OptionError, match="holds a run judged by other problems, verifier or decoding"):
        distill.distil(small, dataclasses.replace(RUN, validation=3), tmp_path)
    model = distill.distil(small, RUN, tmp_path)
    np.testing.assert_array_equal(model.params["head"], finished[0].params["head"])


@pytest.mark.long
def test_runs_share_trajectories_and_samples_make_more(small, finished, tmp_path):
    settings = dataclasses.replace(SETTINGS, temperature=0.5)
    run = dataclasses.replace(RUN, samples=2, recordings=(settings,), recipe=dataclasses.replace(RECIPE, steps=1))
    distill.distil(small, run, tmp_path / "a", traces=tmp_path / "traces")
    facts = json.loads((tmp_path / "a" / "facts.json").read_text())
    assert facts["trajectories"] == 16
    before = (tmp_path / "traces" / "0" / "part-00000.npz").stat().st_mtime_ns
    distill.distil(
        small,
        dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, seed=1)),
        tmp_path / "b",
        traces=tmp_path / "traces",
    )
    assert (tmp_path / "traces" / "0" / "part-00000.npz").stat().st_mtime_ns == before


def test_judging_is_evaluating(small):
    held = problems.held_out(6)
    options = dict(gen_length=96, decoder=EASY)
    wanted, found = evaluate(small, held, **options), distill.judge(small, generated(held), "exact", **options)
    for name in ("correct", "correct_bits", "tokens", "tokens_per_forward", "forwards"):
        assert getattr(found, name) == getattr(wanted, name)


def write(file, problems):
    file.write_text("".join(json.dumps(p) + "\n" for p in problems))
    return file


@pytest.mark.long
def test_from_the_shell(tmp_path, capsys):
    train = write(tmp_path / "train.jsonl", generated(problems.not_held_out(8, seed=3)))
    held = write(tmp_path / "held.jsonl", generated(problems.held_out(4, seed=3)))
    files = ("--prompts", train, "--held-out", held)
    small = ("--steps", 2, "--rows", 4, "--muon", 0, "--objectives", "Compression(Uniform())", "Certainty(beta=1)")
    settings = ("--recordings", "Settings(gen_length=96, decoder=Threshold(0.99), cache=Dual())")
    done = command("distill", "tiny_td", "--out", tmp_path / "run", *files, *small, *settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "run" / "model")
    described = json.loads((tmp_path / "run" / "training" / "run.json").read_text())["recipe"]
    assert "Compression(pairs=Uniform(" in described
    assert "muon=None" in described
    store = distill.Store(tmp_path / "run" / "traces" / "0")
    assert store.settings["cache"] == "Dual(every=None, surplus=True)"
    assert djax.load(tmp_path / "run" / "model").parameter_count == 2_762_112
    for options, said in (
        (("--prompts", train), "--prompts and --held-out go together"),
        ((*files, "--verifier", "maths"), "verifier: expected a function or one of exact, python, got 'maths'"),
        ((*files, "--verifier", "python"), "problem 0: the verifier python needs its 'tests'"),
        (("--prompts", train, "--held-out", train), "held_out: expected problems that are not trained on, 8 are"),
        ((*files, "--objectives", "Certain()"), "--objectives: unknown 'Certain'; there are: certainty, compression"),
        ((*files, "--problems", 3), "--problems: expected without --prompts"),
        ((*files, "--eval"), "--held-out: expected more than 200 problems with --eval"),
        (("--eval-problems", 3), "--eval-problems: expected with --eval"),
        ((*files, "--recordings", "Threshold(0.9)"), "--recordings: expected Settings(...), got 'Threshold(0.9)'"),
        ((*files, "--lora", 4, "--muon", 0.1), r"Recipe(muon=...): expected None with lora"),
        (("--prompts", tmp_path / "no", "--held-out", held), "--prompts: "),
    ):
        refused(capsys, "distill", "tiny_td", "--out", tmp_path / "x", *options, said=said)
        assert not (tmp_path / "x").exists(), "nothing is half-written"
    refused(capsys, "distill", "small", "--out", tmp_path / "x", said="config: unknown 'small'; there are: tiny_td")
    refused(capsys, "train", "tiny_td", "--out", tmp_path / "x", said="config: unknown 'tiny_td'; there are: small")


def refused(capsys, *arguments, said):
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no problems"),
        ("{", "line 1 is no JSON"),
        ('{"question": 1}', 'line 1: expected an object with a "prompt"'),
        ('{"prompt": "a"}\n[1]', 'line 2: expected an object with a "prompt"'),
    ],
)
def test_files_of_problems_that_are_none(tmp_path, text, said):
    (tmp_path / "f").write_text(text)
    with pytest.raises(OptionError, match=said):
        read_problems(tmp_path / "f", "--prompts")


def test_settings_read_back():
    settings = distill.Settings(block_length=64, decoder=djax.Credit(djax.Hierarchy(0.9, 0.4)), cache=djax.Vicinity(1, 2))
    assert distill.Settings.read(repr(settings), "--recordings") == settings
    assert distill.Settings.read("Settings()", "x") == distill.Settings()
    with pytest.raises(OptionError, match="--recordings"):
        distill.Settings.read("Settings(decoder=Nothing())", "--recordings")


def test_the_arms_of_the_benchmark_and_its_tables(small, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "RUNGS", benchmark.RUNGS[:2])
    text = benchmark.compare(
        {"before": small, "after": finished[0]},
        tmp_path,
        problems=generated(problems.held_out(4)),
        count=4,
        verifier="exact",
        gen_length=96,
        note=lambda text: None,
    )
    lines = read_lines(tmp_path / "ladder.jsonl")
    monkeypatch.setattr(benchmark, "judge", None)
    options = dict(file=tmp_path / "ladder.jsonl", note=print, gen_length=96, resume=True)
    benchmark.measure({"before": small}, generated(problems.held_out(4)), **options)  # measures nothing again
    with pytest.raises(OptionError, match="holds points of another model 'after' or of other problems"):
        benchmark.measure({"after": small}, generated(problems.held_out(4)), **options)
    with pytest.raises(OptionError, match="holds points of another model 'before' or of other problems"):
        benchmark.measure({"before": small}, generated(problems.held_out(5)), **options)
    assert len(lines) == 2 * sum(len(rung.decoders) for rung in benchmark.RUNGS)
    assert text.count("AUP") == 2
    assert "- after: " in text
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
    starts = {name: start for name, (start, _) in benchmark.ARMS.items()}
    assert starts == {
        **dict.fromkeys(("both", "compression", "control", "certainty"), "before"),
        **{f"{name}, again": name for name in ("both", "control")},
    }
    steps = {name: arm.recipe.steps for name, (_, arm) in benchmark.ARMS.items()}
    assert len({steps[name] for name in ("both", "compression", "control", "certainty")}) == 1, "as many updates each"
    assert steps["both, again"] == steps["control, again"]


def test_aup_by_hand():
    # One segment at the best accuracy: a rectangle and another.
    assert benchmark.aup([(1.0, 90.0), (3.0, 90.0)], 90.0) == pytest.approx(90 + 2 * 90)
    # A point that loses more than five points does not count.
    assert benchmark.aup([(1.0, 90.0), (3.0, 84.9)], 90.0) == pytest.approx(90)
    weight = np.exp(-3 * (1 - 87 / 90))
    assert benchmark.aup([(3.0, 87.0), (1.0, 90.0)], 90.0) == pytest.approx(90 + 2 * (90 + 87 * weight) / 2)


def test_a_spoiled_model_stops_the_training(small, tmp_path):
    spoiled = dataclasses.replace(small, params=small.params | {"norm": small.params["norm"].at[0].set(np.nan)})
    kept = list(distill.record(small, generated(problems.not_held_out(4)), tmp_path / "t", gen_length=96, decoder=EASY))
    with pytest.raises(TrainingError, match=r"update 0: the loss is not finite at examples \[0, 1, 2, 3\]"):
        distill.train(spoiled, kept, RECIPE, tmp_path / "run")
