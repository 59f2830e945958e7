"""Train a model by any objective on any batches; a run that was killed goes on, bit for bit.

    fit(model, objective, plan, directory, batches=batches)

from-scratch training (`train.py`) and distillation (`djax.distill`) are calls of `fit` that differ
in their objective, their batches, which weights are trained, and what a log line says.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from djax.checks import show, type_name
from djax.errors import OptionError, TrainingError
from djax.models.contract import Params
from djax.models.model import Model, computing
from djax.runtime.compilation import enable_cache
from djax.runtime.process import make_key, with_own_settings
from djax.runtime.sharding import DATA
from djax.storage.files import expand_home
from djax.training.checksum import checksum
from djax.training.contract import Batches, Network, Objective, Own, Weights
from djax.training.plan import Plan, check_rows, make_optimizer
from djax.training.run_directory import (
    append,
    begin,
    forget_after,
    load_state,
    open_checkpoints,
    writing,
)
from djax.training.update import Frozen, Setting, State, make_own_optimizer, update


class Window(NamedTuple):
    """The updates that one log line is about.

    step: updates done. steps: their numbers. losses: of each its rows' losses. parts: of each the
    scalars. tokens_per_second: over this process's updates so far, which took `seconds`.
    """

    step: int
    steps: list[int]
    losses: list[np.ndarray]
    parts: list[dict[str, np.ndarray]]
    tokens_per_second: int
    seconds: float


def describe_means(window: Window) -> dict[str, Any]:
    """A log line: the mean loss, and the means of its parts."""
    entry = {"loss": float(np.mean(window.losses))}
    names = window.parts[0]
    entry |= {name: float(np.mean([parts[name] for parts in window.parts])) for name in names}
    entry = {name: round(value, 5) for name, value in entry.items()}
    return entry | {"tokens_per_second": window.tokens_per_second, "step": window.step}


class Fitted(NamedTuple):
    """What a training gives: the model, and the objective's own parameters."""

    model: Model
    own: Own


Evaluate = Callable[[Model], Mapping[str, float]]


@with_own_settings
def fit(
    model: Model,
    objective: Objective,
    plan: Plan,
    directory: str | Path,
    *,
    batches: Batches | None = None,
    weights: Weights = Weights(),  # noqa: B008  (it has no fields)
    described: Mapping[str, Any] | None = None,
    evaluate: Evaluate | None = None,
    describe: Callable[[Window], dict[str, Any]] = describe_means,
    keep: int = 1,
    console: Console | None = None,
) -> Fitted:
    """Train the model, or go on training it, in `directory`; returns the best model by `evaluate`,
    or the last without it, and what the objective's own parameters were then.

    batches:   where examples come from, by default the objective, if it is `Batches`, too.
    weights:   which weights are trained.
    described: what tells this run from others, JSON values; by default what plan, objective and
               batches print, and the model's checksum. A run goes on only where they are the same.
    evaluate:  (model) -> figures with a "score", the higher the better; asked every
               `evaluate_every` updates and at the end.
    describe:  (window) -> a log line, which has "loss" and "step".
    keep:      how many of the last checkpoints stay, besides the best one.
    console:   where progress is shown, by default on standard output.

    `directory` gets run.json, log.jsonl, evaluations.jsonl, and checkpoints/ (Orbax), which are
    written while training goes on.

    Invariant: a run killed at any moment and started again gives the same parameters, bit for bit
    on the same number of devices; on another number it sees the same examples and noise.
    Raises `OptionError` (rows that the mesh does not divide, a directory of another run or one
    whose checkpoints cannot be read), `TrainingError` (a loss that is not finite, disk full); then
    the last good checkpoint stays.
    """
    from orbax.checkpoint.experimental.v1 import training as orbax

    enable_cache()
    batches = _check(model, objective, plan, batches, described is None)
    directory = expand_home(directory)
    if described is None:
        described = {"plan": repr(plan), "objective": repr(objective), "model": checksum(model)}
        examples: object = batches
        if examples is not objective:
            described |= {"batches": repr(batches)}
    begin(directory, described)
    state, frozen = _begin(model, objective, plan, weights)
    places = None if model.mesh is None else jax.tree.map(lambda a: a.sharding, state)
    net = Network(model.family, model.config, plan.remat, model.parts)
    of = Setting(net, objective, plan, weights, model.mesh, places)

    def make_model(params: Params) -> Model:
        """The model with trained weights, in its own dtypes."""
        params = weights.whole(params, frozen.model)
        trained = jax.tree.map(_like, params, model.params)
        return dataclasses.replace(model, params=trained)

    policies = orbax.preservation_policies
    kept = [policies.LatestN(keep)]
    if evaluate is not None:
        score = dict(get_metric_fn=lambda m: m["score"], keep_checkpoints_without_metrics=False)
        kept.append(policies.BestN(n=1, **score))
    log, scores = directory / "log.jsonl", directory / "evaluations.jsonl"
    with open_checkpoints(directory, policies.AnyPreservationPolicy(kept)) as saved:
        if saved.latest is not None:
            state = _load(saved, saved.latest.step, state, directory)
        first = int(state.step)
        forget_after(log, first)
        forget_after(scores, first)
        with _show_progress(console) as bar:
            task = bar.add_task("training", total=plan.steps, completed=first, loss=float("nan"), speed=0.0)
            began, seen, pending = time.perf_counter(), 0, []
            for step in range(first, plan.steps):
                batch = batches.draw(step, partial(make_model, state.params))
                with computing(model), jax.default_matmul_precision(plan.precision):
                    state, *told = update(state, frozen, place(batch, model.mesh), of=of)
                pending.append((step, *told))
                seen += batches.count(batch)
                done = step + 1
                saving = done % plan.save_every == 0 or done == plan.steps
                evaluating = evaluate is not None
                evaluating &= done % plan.evaluate_every == 0 or done == plan.steps
                if done % plan.log_every == 0 or saving or evaluating:
                    told = _check_finite(pending, batches, plan.rows)
                    seconds = time.perf_counter() - began
                    entry = describe(Window(done, *told, round(seen / seconds), seconds))
                    append(log, entry)
                    shown = dict(loss=entry["loss"], speed=seen / seconds)
                    bar.update(task, completed=done, **shown)
                    pending = []
                figures = None
                if evaluate is not None and evaluating:
                    paused = time.perf_counter()
                    figures = dict(evaluate(make_model(state.params)))
                    append(scores, {"step": done} | figures)
                    began += time.perf_counter() - paused
                if saving or evaluating:
                    # A copy, since the next update takes over the state's memory while this one
                    # is written.
                    copy = _stored(jax.tree.map(jnp.copy, state))
                    metrics = None if figures is None else {"score": figures["score"]}
                    with writing(directory):
                        saved.save_async(done, copy, force=True, metrics=metrics)
    with orbax.Checkpointer((directory / "checkpoints").resolve()) as saved:
        scored = [c for c in saved.checkpoints if c.metrics and "score" in c.metrics]
        best = max(scored, key=lambda c: (c.metrics["score"], c.step), default=saved.latest)
        state = _load(saved, best.step, state, directory)
    own = Own(state.own[0] if state.own else (), frozen.own)
    return Fitted(make_model(state.params), own)


def _check(model: Model, objective: Objective, plan: Plan, batches: Batches | None, printed: bool) -> Batches:
    """The batches; `OptionError` for what does not go together, before anything is written.

    printed: whether what the batches print tells runs apart.
    """
    source: Any = objective if batches is None else batches
    for name, value, kind in (("objective", objective, Objective), ("batches", source, Batches)):
        if not isinstance(value, kind):
            raise OptionError(f"{name}: expected {kind.__name__}, got {show(value)}")
        if (printed or name == "objective") and not dataclasses.is_dataclass(value):
            raise OptionError(
                f"{name}: expected a frozen dataclass, whose fields tell runs apart, got "
                f"{show(value)}; write @dataclasses.dataclass(frozen=True) above {type_name(value)}"
            )
    if model.quantized:
        raise OptionError(f"model: expected one that was not quantised, got one that holds {model.quantized}")
    check_rows(plan, model)
    if objective.whole and plan.accumulate * model.parts > 1:
        raise OptionError(
            f"{type(objective).__name__}: needs all rows of an update at once; expected "
            f"accumulate=1 and a mesh of data=1, got {plan.accumulate} and {model.parts}"
        )
    return source


def _begin(model: Model, objective: Objective, plan: Plan, weights: Weights) -> tuple[State, Frozen]:
    """The first state, and what is not trained."""
    key = make_key(plan.seed)
    params, frozen = weights.begin(model, key)
    own = objective.init(model, key)
    moves = make_optimizer(plan)
    with computing(model):
        begun = jax.jit(moves.init)(params)
    state = State(params, begun, jnp.int32(0))
    if jax.tree.leaves(own.trained):
        # Copies: what a model lends its objective stays as it is.
        copy = jax.tree.map(lambda a: jnp.array(a, jnp.float32, copy=True), own.trained)
        state = state._replace(own=(copy, make_own_optimizer(objective, plan).init(copy)))
    if model.mesh is None:
        return state, Frozen(frozen, own.frozen)
    # What the optimizer knows of a parameter lies where that does, the rest on every device: from
    # the first update on, and again after a restart.
    everywhere = NamedSharding(model.mesh, P())
    places = jax.tree.map(lambda a: a.sharding, params)
    move = partial(optax.tree.map_params, moves, jax.device_put, begun, places)
    begun = move(transform_non_params=lambda a: jax.device_put(a, everywhere))
    step, owned = jax.device_put((state.step, state.own), everywhere)
    return State(params, begun, step, owned), Frozen(frozen, own.frozen)


def place(batch: Any, mesh: Mesh | None) -> Any:
    """A batch's rows on the devices that they belong to."""
    if mesh is None:
        return batch
    return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P(DATA))), batch)


def _like(trained: jax.Array, like: jax.Array) -> jax.Array:
    return jax.device_put(trained.astype(like.dtype), like.sharding)


def _stored(state: State) -> dict[str, Any]:
    """A state as checkpoints hold it: without an entry for what there is nothing of."""
    stored = state._asdict()
    return stored if state.own else {name: stored[name] for name in State._fields[:3]}


def _load(saved: object, step: int, state: State, directory: Path) -> State:
    return state._replace(**load_state(saved, step, _stored(state), directory))


def _show_progress(console: Console | None) -> Progress:
    told = "{task.description}", "loss {task.fields[loss]:.4f}"
    columns = map(TextColumn, (*told, "{task.fields[speed]:,.0f} tokens/s"))
    rest = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    quiet = console is not None and not console.is_terminal  # nobody watches; log.jsonl has it all
    return Progress(*columns, *rest, console=console, disable=quiet)


def _check_finite(pending: list[tuple], batches: Batches, rows: int) -> tuple[list, list, list]:
    """Steps, losses and parts of some updates, on the host. Raises `TrainingError` if a loss or a
    gradient is not finite."""
    pending = jax.device_get(pending)
    for step, losses, logged in pending:
        if np.isfinite(losses).all() and np.isfinite(logged["gradient norm"]):
            continue
        bad = np.flatnonzero(~np.isfinite(losses)) if np.ndim(losses) else np.arange(0)
        which = bad if bad.size else np.arange(rows)
        where = batches.name(step, which)
        numbers = (step * rows + which).tolist()
        raise TrainingError(
            f"update {step}: the loss is not finite at examples {numbers} "
            f"({where if bad.size else f'its gradient, {where}'}); the last checkpoint is good. "
            "Take a lower rate, or look at these examples and at the model's weights"
        )
    steps, losses, logged = (list(column) for column in zip(*pending, strict=True))
    return steps, losses, logged
