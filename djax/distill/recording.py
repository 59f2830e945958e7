"""Record how a model decodes: the trajectories come from the decode program itself, for any decoder, cache and family."""

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from djax.checks import whole_number
from djax.distill.store import Question, Store, Trajectory
from djax.engine.generate import Generation, generate
from djax.engine.options import make_options, show_options
from djax.errors import OptionError, TraceError
from djax.models.model import Model
from djax.runtime.process import with_own_settings

# Trajectories a file, as many as are lost when a recording is killed.
PART = 500


@with_own_settings
@show_options(without=("trace",))
def record(
    model: Model,
    problems: Sequence[Question],
    directory: str | Path,
    *,
    samples: int = 1,
    seed: int = 0,
    max_batch: int = 25,
    progress: Callable[[int], None] | None = None,
    **options: object,
) -> Store:
    """Answer every problem `samples` times and keep how, appended to the store in `directory`.

    problems: mappings with a "prompt" (text or chat messages, as `djax.generate` takes them) and whatever a verifier needs,
              all JSON values. options: `djax.generate`'s; temperature 0 gives one trajectory a prompt, so samples must be 1.
    A store that has some of these problems already gets the rest: a recording that was killed goes on, and a longer list of
    problems appends. Which noise a sample draws depends on `seed`, its problem's number and its own alone.
    `progress` is called with the number of trajectories that are there. Raises `OptionError`, `TraceError` (another model's or
    other settings' store; disk full), and `generate`'s errors.
    """
    given = make_options(options, "record")
    whole_number(samples, "samples", at_least=1)
    whole_number(max_batch, "max_batch", at_least=1)
    _plain(problems)
    if not problems:
        raise OptionError("problems: expected at least one, got none")
    heat = given.temperature
    if samples > 1 and (isinstance(heat, Sequence) or not heat > 0):
        raise OptionError(f"samples: expected 1, since all {samples} would be alike at temperature 0; pass a temperature")
    if wrong := {"trace", "seed"} & set(options):
        raise OptionError(f"{', '.join(sorted(wrong))}: not for a recording, which sets it itself")
    plain = (int, float, str, bool, type(None))
    settings = {k: v if isinstance(v, plain) else repr(v) for k, v in options.items()} | {"samples": samples, "seed": seed}
    store = Store.create(directory, model, settings)
    wanted = [(i, n) for i in range(len(problems)) for n in range(samples)]
    done = _same_problems(store, problems, samples)
    for number, at in enumerate(range(done, len(wanted), PART), store.parts):
        part: list[Trajectory] = []
        group = wanted[at : at + PART]
        for first in range(0, len(group), max_batch):
            batch = group[first : first + max_batch]
            seeds = [zlib.crc32(f"{seed} {i} {n}".encode()) >> 1 for i, n in batch]
            asked = [problems[i]["prompt"] for i, _ in batch]
            answers = generate(model, asked, seed=seeds, trace=True, max_batch=max_batch, **options)
            part += [trajectory(problems[i], s, a) for (i, _), s, a in zip(batch, seeds, answers, strict=True)]
            if progress is not None:
                progress(at + len(part))
        store.write(number, part)
    return store


def _plain(problems: Sequence[Question]) -> None:
    """Every problem is something JSON can say, before anything is decoded."""
    for n, problem in enumerate(problems):
        try:
            fits = json.loads(json.dumps(dict(problem))) == dict(problem) and "prompt" in problem
        except (TypeError, ValueError, RecursionError):
            fits = False
        if not fits:
            raise OptionError(f'problem {n}: expected a mapping with a "prompt" and JSON values, got {problem!r:.100}')


def _same_problems(store: Store, problems: Sequence[Mapping[str, Any]], samples: int) -> int:
    """How many trajectories there are, all of them of the problem that stands at their place in the list."""
    done = 0
    for done, t in enumerate(store, 1):
        place = (done - 1) // samples
        if place < len(problems) and dict(t.problem) != dict(problems[place]):
            raise TraceError(f"{store.directory}: trajectory {done - 1} is of another problem; choose another directory")
    return done


def trajectory(problem: Question, seed: int, answer: Generation) -> Trajectory:
    """A generation with its trace as a trajectory."""
    assert answer.trace is not None, "asked for by `record`"
    trace, canvas = answer.trace, np.asarray(answer.canvas, np.int32)
    return Trajectory(
        *(problem, answer.text, canvas, trace.accepted_at, trace.confidence.astype(np.float16)),
        seed=seed,
        prompt=answer.prompt_length,
        start=int(trace.starts[0]),
        block=trace.proposals.shape[1],
        forwards=answer.forwards,
    )
