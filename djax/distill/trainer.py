"""Train a model on kept trajectories; a run that was killed goes on where it stopped, bit for bit.

Which trajectory an example is, and how it is masked, follows from the run's seed and the example's number alone: neither the
number of devices nor a restart changes it.
"""

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from djax.checks import flag, integer, number, one_of, plug
from djax.compilation import enable_cache
from djax.distill import lora as low_rank
from djax.distill.lora import Lora
from djax.distill.objectives import Compression, Row
from djax.distill.store import Trajectory, checksum
from djax.errors import OptionError, TrainingError
from djax.files import expand_home
from djax.model import Model, computing
from djax.models.family import Family
from djax.models.sight import see
from djax.process import make_key, with_own_settings
from djax.sharding import DATA
from djax.training.objective import balance_loss
from djax.training.run_directory import append, begin, forget_after, open_checkpoints, writing
from djax.training.train import muon

# Logits of one view of all its rows at once, in bytes; beyond, a row's are made at a time and made again for its gradient.
AT_ONCE = 1 << 30


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train.

    objectives: what is learned (`objectives.py`), their losses added.
    steps:      updates. rows: trajectories an update, all devices together, in `accumulate` equal parts one after another.
    rate:       peak learning rate of AdamW, reached after `warmup` updates; schedule "constant", "cosine" or "linear" to 0.
    muon:       None, or the peak rate of Muon, which then moves the matrices of attention and experts instead.
    weight_decay, betas, clip: of AdamW, on matrices only (of Muon, on its matrices), and the gradient's largest norm.
    balance:    weight of the router's load-balancing loss, so that experts stay in use; nothing for models without experts.
    lora:       train low-rank adapters only, None trains all parameters.
    dtype:      what the network computes in, "float32" or "bfloat16"; parameters and optimizer are float32.
    remat:      compute each layer's activations again for the gradient instead of keeping them.
    save_every, evaluate_every, log_every: updates. seed: of order and noise.
    """

    objectives: tuple[Any, ...] = (Compression(),)
    steps: int = 1000
    rows: int = 32
    accumulate: int = 1
    rate: float = 3e-4
    muon: float | None = None
    warmup: int = 50
    schedule: str = "cosine"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    balance: float = 0.01
    lora: Lora | None = None
    dtype: str = "float32"
    remat: bool = False
    save_every: int = 100
    evaluate_every: int = 250
    log_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "accumulate", "save_every", "evaluate_every", "log_every"):
            integer(self, name, at_least=1)
        for name in ("warmup", "seed"):
            integer(self, name, at_least=0)
        for name in ("rate", "clip"):
            number(self, name, above=0)
        number(self, "muon", above=0, optional=True)
        if self.muon is not None and self.lora is not None:
            raise OptionError("Recipe(muon=...): expected None with lora, whose adapters AdamW moves")
        for name in ("weight_decay", "balance"):
            number(self, name, at_least=0)
        one_of(self, "schedule", ("constant", "cosine", "linear"))
        one_of(self, "dtype", ("float32", "bfloat16"))
        flag(self, "remat")
        if not self.objectives:
            raise OptionError("Recipe(objectives=...): expected at least one, got none")
        for objective in self.objectives:
            plug(objective, "Recipe(objectives=...)", ("views", "loss"), "Compression(...), Certainty(...), Plain(...)")
        if self.rows % self.accumulate:
            raise OptionError(f"Recipe(rows={self.rows}): expected a multiple of accumulate={self.accumulate}")


class State(NamedTuple):
    """What a checkpoint holds. params: all that is trained, float32: the model's, or the adapters. step: updates done."""

    params: Any
    optimizer: Any
    step: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Kept trajectories as arrays, one row each: the fields of `Row` with a leading axis, padded to the longest."""

    rows: Row
    recipe: Recipe

    @classmethod
    def of(cls, kept: Sequence[Trajectory], recipe: Recipe) -> "Examples":
        if recipe.rows > len(kept):
            raise OptionError(f"Recipe(rows={recipe.rows}): expected at most the {len(kept)} trajectories that are kept")
        length = -(-max(len(t.tokens) for t in kept) // 32) * 32
        tokens, accepted = np.zeros((len(kept), length), np.int32), np.full((len(kept), length), -1, np.int32)
        for n, t in enumerate(kept):
            tokens[n, : len(t.tokens)], accepted[n, : len(t.tokens)] = t.tokens, t.accepted_at
        numbers = [[t.prompt, len(t.tokens), t.start, t.block, t.forwards] for t in kept]
        return cls(Row(tokens, accepted, *np.array(numbers, np.int32).T), recipe)

    def __len__(self) -> int:
        return len(self.rows.tokens)

    def which(self, step: int) -> np.ndarray:
        """The trajectories of an update's examples, int64 `[R]`: each pass over all of them is in an order of its own."""
        numbers = step * self.recipe.rows + np.arange(self.recipe.rows)
        orders = {
            e: np.random.default_rng([self.recipe.seed, int(e)]).permutation(len(self)) for e in set(numbers // len(self))
        }
        return np.array([orders[n // len(self)][n % len(self)] for n in numbers])

    def batch(self, step: int) -> Row:
        which = self.which(step)
        return jax.tree.map(lambda a: a[which], self.rows)


def schedule(recipe: Recipe) -> Callable[[jax.Array], jax.Array]:
    def rate(step: jax.Array) -> jax.Array:
        rise = jnp.minimum(1.0, (step + 1) / max(recipe.warmup, 1))
        left = jnp.clip((recipe.steps - step) / max(recipe.steps - recipe.warmup, 1), 0.0, 1.0)
        fall = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * jnp.cos(math.pi * left)}[recipe.schedule]
        return recipe.rate * rise * fall

    return rate


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    if recipe.muon is not None:
        whole = schedule(dataclasses.replace(recipe, rate=1.0))
        options = dict(weight_decay=recipe.weight_decay, adam_b1=recipe.betas[0], adam_b2=recipe.betas[1])
        moves = muon(lambda step: recipe.muon * whole(step), schedule(recipe), **options)
        return optax.chain(optax.clip_by_global_norm(recipe.clip), moves)
    adamw = optax.adamw(
        schedule(recipe),
        *recipe.betas,
        weight_decay=recipe.weight_decay,
        mask=_matrices,
    )
    return optax.chain(optax.clip_by_global_norm(recipe.clip), adamw)


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda a: a.ndim > 1, params)


def batch_loss(
    params: Any, rows: Row, keys: jax.Array, progress: jax.Array, *, family: Family, config: Any, recipe: Recipe, parts: int
) -> tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]:
    """The loss of some rows: the mean over rows of the objectives' losses, and the balance loss over all they show the network.

    keys: one a row. parts: into how many the rows of an update are split over devices; only the router's shares, which have no
    gradient, are taken over all of them, so that the mean of the parts' gradients is the whole's.
    Returns the loss, and each row's loss `[R]` and the mean of each part of it.
    """
    shown = [
        (objective, view)
        for n, objective in enumerate(recipe.objectives)
        for view in jax.vmap(lambda k, r, o=objective, n=n: o.views(jax.random.fold_in(k, n), r, progress, config.mask_id))(
            keys, rows
        )
    ]
    tokens = jnp.concatenate([view.tokens for _, view in shown])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    totals = jnp.tile(rows.total, len(shown))
    blocks = jnp.tile(rows.block, len(shown))[:, None]
    sight = see(family.visibility, positions, positions < totals[:, None], blocks)
    x = family.embed(params, config, tokens)
    x, routing = family.trunk_with_routing(params, config, x, positions, sight, remat=recipe.remat)

    count = len(rows.total)
    whole = 4 * count * tokens.shape[1] * config.vocab <= AT_ONCE
    losses, logged = jnp.zeros(count), {}
    for n, (objective, view) in enumerate(shown):

        def row_loss(of: tuple, objective: Any = objective) -> tuple:
            x, tokens, view = of
            return objective.loss(family.unembed(params, config, x), tokens, view)

        of = x[n * count : (n + 1) * count], rows.tokens, view
        found, parts_of = jax.vmap(row_loss)(of) if whole else jax.lax.map(jax.checkpoint(row_loss), of)
        losses += found
        for name, value in parts_of.items():
            logged.setdefault(name, []).append(jnp.mean(value))
    logged = {name: sum(values) / len(values) for name, values in logged.items()}
    loss = jnp.mean(losses)
    if routing:
        over = (lambda a: jax.lax.pmean(a, DATA)) if parts > 1 else None
        logged["balance"] = balance_loss(routing, sight.valid.reshape(-1), over)
        loss += recipe.balance * logged["balance"]
    return loss, (losses, logged)


def gradient(
    params: Any, frozen: Any, rows: Row, keys: jax.Array, progress: jax.Array, *, parts: int, of: "_Static"
) -> tuple[Any, jax.Array, dict[str, jax.Array]]:
    """The gradient over all rows, each row's loss, and the parts of the loss."""
    recipe = of.recipe

    def loss(params: Any, rows: Row, keys: jax.Array) -> tuple:
        whole = params
        if recipe.lora is not None:
            # Merged in float32: a narrower model's steps would swallow small changes.
            wide = jax.tree.map(lambda a: a.astype(jnp.float32), frozen)
            whole = low_rank.merged(recipe.lora, wide, params)
        whole = jax.tree.map(lambda a: a.astype(recipe.dtype), whole)
        statics = dict(family=of.family, config=of.config, recipe=recipe, parts=parts)
        return batch_loss(whole, rows, keys, progress, **statics)

    def one(rows: Row, keys: jax.Array) -> tuple:
        (_, (losses, logged)), found = jax.value_and_grad(loss, has_aux=True)(params, rows, keys)
        return found, losses, logged

    if recipe.accumulate == 1:
        found, losses, logged = one(rows, keys)
    else:
        cut = jax.tree.map(lambda a: a.reshape(recipe.accumulate, -1, *a.shape[1:]), (rows, keys))
        shapes = jax.eval_shape(one, *jax.tree.map(lambda a: a[0], cut))
        zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (shapes[0], shapes[2]))

        def add(sums: tuple, part: tuple) -> tuple:
            found, losses, logged = one(*part)
            return jax.tree.map(jnp.add, sums, (found, logged)), losses

        sums, losses = jax.lax.scan(add, zero, cut)
        found, logged = jax.tree.map(lambda a: a / recipe.accumulate, sums)
        losses = losses.reshape(-1)
    if parts > 1:
        found, logged = jax.lax.pmean((found, logged), DATA)
    return found, losses, logged


@dataclasses.dataclass(frozen=True, eq=False)
class _Static:
    """What an update's program is made for; compared by identity, so each training compiles its own. places: of the state."""

    family: Family
    config: Any
    recipe: Recipe
    mesh: Any
    places: Any = None


@partial(jax.jit, static_argnames="of", donate_argnums=0)
def update(state: State, frozen: Any, rows: Row, *, of: _Static) -> tuple[State, jax.Array, dict[str, jax.Array]]:
    """One update on rows `[R]`. Returns the state, each row's loss `[R]`, and the loss's parts with the gradient's norm."""
    recipe = of.recipe
    count = len(rows.total)
    numbers = state.step * count + jnp.arange(count)
    keys = jax.vmap(lambda n: jax.random.fold_in(make_key(recipe.seed), n))(numbers)
    progress = state.step.astype(jnp.float32) / recipe.steps
    parts = 1 if of.mesh is None else of.mesh.shape[DATA]
    if recipe.accumulate > 1 and parts > 1:
        # A device's rows lie together, its parts one after another in each of the accumulated ones.
        order = np.arange(count).reshape(recipe.accumulate, parts, -1).transpose(1, 0, 2).reshape(-1)
        rows, keys = jax.tree.map(lambda a: a[order], (rows, keys))
    run = partial(gradient, parts=parts, of=of)
    if parts > 1:
        specs = P(), P(), P(DATA), P(DATA), P()
        run = jax.shard_map(
            run, mesh=of.mesh, in_specs=specs, out_specs=(P(), P(DATA), P()), axis_names={DATA}, check_vma=False
        )
    found, losses, logged = run(state.params, frozen, rows, keys, progress)
    if recipe.accumulate > 1 and parts > 1:
        losses = losses[np.argsort(order)]
    logged["gradient norm"] = optax.tree.norm(found)
    change, moved = optimizer(recipe).update(found, state.optimizer, state.params)
    new = State(optax.apply_updates(state.params, change), moved, state.step + 1)
    if of.places is not None:
        new = jax.lax.with_sharding_constraint(new, of.places)
    return new, losses, logged


Evaluate = Callable[[Model], Mapping[str, float]]


@with_own_settings
def train(
    model: Model,
    kept: Sequence[Trajectory],
    recipe: Recipe,
    directory: str | Path,
    *,
    evaluate: Evaluate | None = None,
    console: Any = None,
) -> Model:
    """Train the model, or go on training it, in `directory`; returns the best model by `evaluate`, or the last without it.

    kept: the trajectories (`verify.keep`). evaluate: (model) -> figures with a "score", the higher the
    better; asked every `evaluate_every` updates and at the end. `directory` gets run.json, log.jsonl (loss, parts, tokens/s),
    evaluations.jsonl, and checkpoints/ with the best and the last, written while training goes on.

    Law: a run killed at any moment and started again gives the same parameters, bit for bit on the same number of devices; on
    another number it sees the same examples and masks. Raises `OptionError` (more rows than trajectories, rows that the mesh
    does not divide, a directory of another run), `TrainingError` (a loss that is not finite, disk full); then the last good
    checkpoint stays.
    """
    from orbax.checkpoint.experimental.v1 import training as orbax

    enable_cache()
    examples = Examples.of(kept, recipe)
    if model.quantized:
        raise OptionError(f"model: expected one that was not quantised, got one that holds {model.quantized}")
    if recipe.rows % (model.parts * recipe.accumulate):
        raise OptionError(
            f"Recipe(rows={recipe.rows}): expected a multiple of accumulate={recipe.accumulate} "
            f"times the mesh's data={model.parts}"
        )
    directory = expand_home(directory)
    begin(directory, _describe(model, examples, recipe))
    state, frozen = _begin(model, recipe)
    places = None if model.mesh is None else jax.tree.map(lambda a: a.sharding, state)
    of = _Static(model.family, model.config, recipe, model.mesh, places)

    policies = orbax.preservation_policies
    keep = [policies.LatestN(1)]
    if evaluate is not None:
        keep.append(policies.BestN(n=1, get_metric_fn=lambda m: m["score"], keep_checkpoints_without_metrics=False))
    log = directory / "log.jsonl"
    columns = ("{task.description}", "loss {task.fields[loss]:.4f}", "{task.fields[rate]:,.0f} tokens/s")
    quiet = console is not None and not console.is_terminal  # nobody watches; log.jsonl has it all
    bar = Progress(
        *map(TextColumn, columns), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, disable=quiet
    )
    with open_checkpoints(directory, policies.AnyPreservationPolicy(keep)) as saved:
        if saved.latest is not None:
            state = saved.load(saved.latest.step, state)
        first = int(state.step)
        forget_after(log, first)
        forget_after(directory / "evaluations.jsonl", first)
        with bar:
            task = bar.add_task("training", total=recipe.steps, completed=first, loss=float("nan"), rate=0.0)
            began, seen, pending = time.perf_counter(), 0, []
            for step in range(first, recipe.steps):
                rows = _placed(examples.batch(step), model.mesh)
                # Full float32 products where the network computes in float32, whatever the model's own dtype is.
                with computing(model), jax.default_matmul_precision("highest" if recipe.dtype == "float32" else None):
                    state, losses, logged = update(state, frozen, rows, of=of)
                pending.append((step, losses, logged))
                seen += int(rows.total.sum())
                done = step + 1
                saving = done % recipe.save_every == 0 or done == recipe.steps
                evaluating = evaluate is not None and (done % recipe.evaluate_every == 0 or done == recipe.steps)
                if done % recipe.log_every == 0 or saving or evaluating:
                    entry = _checked(pending, examples)
                    entry |= {"tokens_per_second": round(seen / (time.perf_counter() - began)), "step": done}
                    append(log, entry)
                    bar.update(task, completed=done, loss=entry["loss"], rate=entry["tokens_per_second"])
                    pending = []
                figures = None
                if evaluating:
                    paused = time.perf_counter()
                    figures = dict(evaluate(_model(model, recipe, frozen, state.params)))
                    append(directory / "evaluations.jsonl", {"step": done} | figures)
                    began += time.perf_counter() - paused
                if saving or evaluating:
                    # A copy, since the next update takes over the state's memory while this one is written.
                    copy = jax.tree.map(jnp.copy, state)
                    metrics = None if figures is None else {"score": figures["score"]}
                    with writing(directory):
                        saved.save_async(done, copy, force=True, metrics=metrics)
    with orbax.Checkpointer((directory / "checkpoints").resolve()) as saved:
        scored = [c for c in saved.checkpoints if c.metrics and "score" in c.metrics]
        best = max(scored, key=lambda c: (c.metrics["score"], c.step), default=saved.latest)
        return _model(model, recipe, frozen, saved.load(best.step, state).params)


def _describe(model: Model, examples: Examples, recipe: Recipe) -> dict[str, Any]:
    """What tells a run from others."""
    data = hashlib.sha256(b"".join(a.tobytes() for a in examples.rows)).hexdigest()
    return {"recipe": repr(recipe), "model": checksum(model), "trajectories": len(examples), "data": data}


def _begin(model: Model, recipe: Recipe) -> tuple[State, Any]:
    """The first state, and the parameters that are not trained (None if all are)."""
    if recipe.lora is None:
        # Copies: the model stays as it is while its parameters are trained.
        params, frozen = jax.tree.map(lambda a: jnp.array(a, jnp.float32, copy=True), model.params), None
    else:
        params = low_rank.adapters(recipe.lora, model.family, model.config, make_key(recipe.seed))
        if model.mesh is not None:
            params = jax.device_put(params, NamedSharding(model.mesh, P()))
        frozen = model.params
    moves = optimizer(recipe)
    with computing(model):
        begun = jax.jit(moves.init)(params)
    state = State(params, begun, jnp.int32(0))
    if model.mesh is None:
        return state, frozen
    # What the optimizer knows of a parameter lies where that does, the rest on every device: from the first update on, and
    # again after a restart.
    everywhere = NamedSharding(model.mesh, P())
    places = jax.tree.map(lambda a: a.sharding, params)
    move = partial(optax.tree.map_params, moves, jax.device_put, begun, places)
    begun = move(transform_non_params=lambda a: jax.device_put(a, everywhere))
    return State(params, begun, jax.device_put(state.step, everywhere)), frozen


def _placed(rows: Row, mesh: Any) -> Row:
    return rows if mesh is None else jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P(DATA))), rows)


def _model(model: Model, recipe: Recipe, frozen: Any, params: Any) -> Model:
    """The model with trained parameters, in its own dtypes."""
    if recipe.lora is not None:
        params = low_rank.merged(recipe.lora, frozen, params)
    trained = jax.tree.map(lambda a, like: jax.device_put(a.astype(like.dtype), like.sharding), params, model.params)
    return dataclasses.replace(model, params=trained)


def _checked(pending: list[tuple], examples: Examples) -> dict[str, Any]:
    """What to log of some updates. Raises `TrainingError` if a loss or a gradient is not finite."""
    for step, losses, logged in (pending := jax.device_get(pending)):
        if not np.isfinite(losses).all() or not np.isfinite(logged["gradient norm"]):
            bad = np.flatnonzero(~np.isfinite(losses))
            which = examples.which(step)
            where = (
                f"trajectories {which[bad].tolist()} of those kept"
                if bad.size
                else f"its gradient, trajectories {which.tolist()}"
            )
            numbers = (step * examples.recipe.rows + (bad if bad.size else np.arange(len(losses)))).tolist()
            raise TrainingError(
                f"update {step}: the loss is not finite at examples {numbers} ({where}); the last checkpoint is good. "
                "Take a lower rate, or look at these trajectories and at the model's weights"
            )
    names = pending[0][2]
    entry = {"loss": float(np.mean([losses for _, losses, _ in pending]))}
    entry |= {name: float(np.mean([logged[name] for *_, logged in pending])) for name in names}
    return {name: round(value, 5) for name, value in entry.items()}
