"""The whole loop: record how a model answers, keep what is right, train on it, and see what that bought."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from djax.checkpoints import checkpoint
from djax.checks import integer, number
from djax.distill.recording import record
from djax.distill.selection import keep
from djax.distill.settings import Settings
from djax.distill.store import Question, Trajectory
from djax.distill.trainer import Recipe, train
from djax.engine.generate import Generation, generate
from djax.engine.options import show_options
from djax.errors import OptionError, TraceError
from djax.models.model import Model
from djax.runtime.process import with_own_settings
from djax.storage.files import expand_home, parse_json, read_text, write
from djax.tasks import problems as word_problems
from djax.tasks import verify
from djax.tasks.evaluate import Report, measure
from djax.training.run_directory import writing

# Problems decoded together while recording. Changes no trajectory.
BATCH = 50


@dataclasses.dataclass(frozen=True)
class Distillation:
    """One run of the loop.

    problems:  how many generated word problems to record, where no others are given; problem_seed: which.
    recordings: how the teacher decodes, each recorded over all problems.
    samples:   trajectories a problem and recording; above 1 they need a temperature in each recording.
    least:     the score from which on an answer is kept.
    recipe:    how to train.
    decoding:  how the held-out problems are answered while training.
    validation: by how many held-out problems, the first ones, the best is chosen.
    """

    problems: int = 4000
    problem_seed: int = 0
    recordings: tuple[Settings, ...] = (Settings(),)
    samples: int = 1
    least: float = 1.0
    recipe: Recipe = Recipe()  # noqa: RUF009  (frozen, so one default is one value)
    decoding: Settings = Settings()  # noqa: RUF009
    validation: int = 200

    def __post_init__(self) -> None:
        for name in ("problems", "samples", "validation"):
            integer(self, name, at_least=1)
        integer(self, "problem_seed", at_least=0)
        number(self, "least", at_least=0, at_most=1)
        if not self.recordings or not all(isinstance(s, Settings) for s in (*self.recordings, self.decoding)):
            raise OptionError(
                f"Distillation(recordings=..., decoding=...): expected Settings(...), at least one, got {self.recordings!r} "
                f"and {self.decoding!r}"
            )


def read_problems(file: Path, name: str) -> list[Question]:
    """Problems from JSON lines. Raises `OptionError`, which names the option and the line."""
    try:
        lines = read_text(file).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{name}: {file} cannot be read: {error}") from error
    problems: list[Question] = []
    for n, line in enumerate(lines, 1):
        try:
            problem = parse_json(line) if line.strip() else None
        except ValueError as error:
            raise OptionError(f"{name}: {file}, line {n} is no JSON: {error}") from error
        if problem is not None:
            if not isinstance(problem, dict) or not isinstance(problem.get("prompt"), str | list):
                raise OptionError(f'{name}: {file}, line {n}: expected an object with a "prompt", text or messages')
            problems.append(problem)
    if not problems:
        raise OptionError(f"{name}: {file} has no problems")
    return problems


def generated(problems: Sequence[word_problems.Problem]) -> list[Question]:
    """Word problems as `record` takes them."""
    return [{"prompt": p.question, "result": p.result} for p in problems]


@with_own_settings
@show_options()
def judge(
    model: Model,
    problems: Sequence[Question],
    verifier: verify.Verifier | str,
    *,
    least: float = 1.0,
    verifier_seconds: float = 60.0,
    max_batch: int = 25,
    progress: Callable[[int], None] | None = None,
    **options: object,
) -> Report:
    """Answer problems (as `record` takes them) by `djax.generate`'s options and count; right is a score of at least `least`."""
    check = verify.known(verifier)
    verify.need(problems, verifier)

    def is_right(n: int, answer: Generation) -> bool:
        score = verify.ask(check, problems[n], answer.text or "", verifier_seconds, f"problem {n}")
        return score >= least

    def ask(prompts: list[Any], **more: object) -> list[Generation]:
        return generate(model, prompts, **options, **more)

    return measure(ask, [p["prompt"] for p in problems], is_right, max_batch, progress)


def quality(now: Report, before: Report, gamma: float = 4.0) -> float:
    """SchED's speed-up punished for lost accuracy: tokens per forward against before times (accuracy against before)^gamma."""
    accuracy = now.accuracy / before.accuracy if before.accuracy else 1.0
    return now.tokens_per_forward / max(before.tokens_per_forward, 1e-9) * accuracy**gamma


def recorded(
    model: Model,
    run: Distillation,
    traces: Path,
    problems: Sequence[Question],
    verifier: verify.Verifier | str,
    note: Callable[[str], None],
) -> tuple[list[Trajectory], dict[str, Any]]:
    """Record, or go on recording, and filter. Returns what is kept, and how many that is of how many, bytes and seconds."""
    kept: list[Trajectory] = []
    facts: dict[str, Any] = {"trajectories": 0, "kept": 0, "bytes": 0}
    began = time.perf_counter()
    for n, settings in enumerate(run.recordings):
        total = len(problems) * run.samples

        def told(done: int, name: str = f"recording {n + 1}", total: int = total) -> None:
            if done % 500 == 0:
                note(f"{name}: {done} of {total}, {time.perf_counter() - began:.0f} s")

        where, options = traces / str(n), settings.options()
        store = record(model, problems, where, samples=run.samples, max_batch=BATCH, progress=told, **options)
        recording = time.perf_counter()
        kept += keep(store, verifier, least=run.least, first=total)
        facts["trajectories"] += total
        facts["bytes"] += store.bytes
        facts["filter_seconds"] = round(facts.get("filter_seconds", 0.0) + time.perf_counter() - recording, 2)
    facts["kept"] = len(kept)
    note(f"{len(kept)} of {facts['trajectories']} trajectories kept")
    facts["record_seconds"] = round(time.perf_counter() - began - facts["filter_seconds"], 2)
    return kept, facts


@with_own_settings
def distil(
    model: Model,
    run: Distillation,
    directory: str | Path,
    *,
    problems: Sequence[Question] | None = None,
    held_out: Sequence[Question] | None = None,
    verifier: verify.Verifier | str = "exact",
    traces: str | Path | None = None,
    console: Console | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Model:
    """Record, filter, train; the best model stands in `directory`/model in HF layout. A run that was killed goes on.

    problems, held_out: mappings with a "prompt" and what the verifier needs; by default generated word problems, and ones never
    trained on. `directory` also gets traces/ (a store a recording; `traces` is another place for them, which runs may share),
    training/ (`train`) and facts.json. Raises `OptionError` if it holds a finished run, and what `record`, `verify.keep` and
    `train` raise.
    """
    directory = expand_home(directory)
    if (directory / "model").exists():
        raise OptionError(f"{directory / 'model'}: this run is finished; choose another directory or remove it")
    if problems is None:
        problems = generated(word_problems.not_held_out(run.problems, run.problem_seed))
    if held_out is None:
        held_out = generated(word_problems.held_out(run.validation, seed=1))
    held_out = held_out[: run.validation]
    verify.known(verifier)
    verify.need([*problems, *held_out], verifier)
    seen = {json.dumps(p["prompt"]) for p in problems} & {json.dumps(p["prompt"]) for p in held_out}
    if seen:
        raise OptionError(f"held_out: expected problems that are not trained on, {len(seen)} are: {sorted(seen)[0]:.80}")
    kept, facts = recorded(model, run, Path(traces or directory / "traces"), problems, verifier, note)

    def evaluated(model: Model) -> Report:
        return judge(model, held_out, verifier, least=run.least, **run.decoding.options())

    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"{directory}: cannot be a directory: {error}") from error
    asked = json.dumps([repr(run.decoding), verify.name_of(verifier), run.least, [dict(p) for p in held_out]])
    before = _before(directory / "before.json", hashlib.sha256(asked.encode()).hexdigest(), lambda: evaluated(model))

    def evaluate(model: Model) -> Mapping[str, float]:
        now = evaluated(model)
        figures = {"accuracy": round(now.accuracy, 4), "tokens_per_forward": now.tokens_per_forward}
        return {"score": round(quality(now, before), 4), **figures}

    began = time.perf_counter()
    trained = train(model, kept, run.recipe, directory / "training", evaluate=evaluate, console=console)
    facts["train_seconds"] = round(time.perf_counter() - began, 2)
    with writing(directory):
        write(directory / "facts.json", json.dumps(facts, indent=1) + "\n")
    checkpoint.export_hf(trained, directory / "model")
    # As it is on disk, where it may be narrower than it was trained.
    return checkpoint.load(directory / "model", dtype=str(np.dtype(model.dtype)), mesh=model.mesh)


def _before(file: Path, asked: str, ask: Callable[[], Report]) -> Report:
    """What the untrained model does on the held-out problems, asked once a run. asked: a digest of what is asked, and how."""
    if not file.exists():
        answers = json.dumps({"asked": asked, "report": dataclasses.asdict(ask())}) + "\n"
        with writing(file.parent):
            write(file, answers)
    try:
        there = parse_json(read_text(file))
        same, found = there["asked"] == asked, Report(**there["report"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TraceError(f"{file}: cannot be read: {error}; remove it") from error
    if not same:
        raise OptionError(
            f"{file.parent}: holds a run judged by other problems, verifier or decoding; choose another directory"
        )
    return found
