"""Train a masked-diffusion model from scratch on the generated problems; interrupted runs go on where they stopped."""

import dataclasses
import random
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from djax import checkpoint, text
from djax.compilation import enable_cache
from djax.directories import new_directory
from djax.errors import CheckpointError, OptionError
from djax.kernels.choice import with_wanted_kernels
from djax.model import Model
from djax.models import FAMILIES
from djax.models.family import Family
from djax.process import make_key, with_own_settings
from djax.sharding import find_devices
from djax.training import data, objective, tokenizer
from djax.training.run_directory import append, begin, forget_after, has_checkpoints, open_checkpoints, writing


@dataclasses.dataclass(frozen=True)
class Stage:
    """Train until `until` steps on canvases of these lengths, one drawn a step; a short canvas holds only short problems.

    drills is the share of rows that are plain arithmetic, easy the share of their sums that are on single digits. A
    model trained on canvases of one length alone is lost on any other, shorter ones too: mix them.
    """

    until: int
    lengths: tuple[int, ...]
    drills: float
    easy: float = 0.0


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run from scratch.

    architecture: the config.json of the model, without the token ids (they come from the tokenizer).
    stages:       canvas lengths over time; the last `until` is the run's number of steps.
    rate, adam_rate: peak learning rates of Muon (matrices) and Adam (embedding, head, router, norms).
    warmup, cooldown: steps of linear rise to the peak and of linear fall to 0 at the end.
    balance:      weight of the router's load-balancing loss.
    """

    family: str
    architecture: dict[str, Any]
    stages: tuple[Stage, ...]
    rows: int = 64
    rate: float = 0.02
    adam_rate: float = 3e-3
    warmup: int = 100
    cooldown: int = 1000
    balance: float = 0.01
    clip: float = 1.0
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.stages[-1].until

    def stage(self, step: int) -> Stage:
        return next(s for s in self.stages if step < s.until)


class State(NamedTuple):
    """What a checkpoint holds. step: int32 scalar, steps done. The random state is a function of the step."""

    params: Any
    optimizer: Any
    step: jax.Array


def optimizer(run: Run) -> optax.GradientTransformation:
    """Muon on the matrices of the layers, Adam on the rest: per wall-clock second on a CPU, Muon's loss was well ahead of
    AdamW's from the first minutes on (configs/small.py has the figures)."""

    def schedule(step: jax.Array) -> jax.Array:
        rise = jnp.minimum(1.0, (step + 1) / run.warmup)
        return rise * jnp.clip((run.steps - step) / run.cooldown, 0.0, 1.0)

    moves = muon(lambda step: run.rate * schedule(step), lambda step: run.adam_rate * schedule(step))
    return optax.chain(optax.clip_by_global_norm(run.clip), moves)


def muon(rate: optax.Schedule, adam_rate: optax.Schedule, **options: Any) -> optax.GradientTransformation:
    """Muon on the matrices of attention and experts, Adam on the rest; options are optax's."""
    as_matrix = optax.contrib.MuonDimensionNumbers
    axes = {"qkv": as_matrix(0, (1, 3)), "o": as_matrix((0, 1), 2)}
    axes |= {"w_in": as_matrix(1, 2), "w_out": as_matrix(1, 2)}

    def matrices(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: axes.get(path[-1].key), params)

    return optax.contrib.muon(rate, adam_learning_rate=adam_rate, muon_weight_dimension_numbers=matrices, **options)


@partial(jax.jit, static_argnames=("family", "config", "run"), donate_argnums=0)
def train_step(
    state: State, tokens: jax.Array, response: jax.Array, *, family: Family, config: Any, run: "_Hashable"
) -> tuple[State, dict[str, jax.Array]]:
    """One step on tokens int32 `[B, L]`, response bool `[B, L]`; returns the new state and the loss's parts."""
    key = jax.random.fold_in(make_key(run.it.seed), state.step)

    def total(params: Any) -> tuple[jax.Array, dict]:
        return objective.loss(family, params, config, key, tokens, response, run.it.balance)

    gradient, parts = jax.grad(total, has_aux=True)(state.params)
    update, new = optimizer(run.it).update(gradient, state.optimizer, state.params)
    return State(optax.apply_updates(state.params, update), new, state.step + 1), parts


@dataclasses.dataclass(frozen=True, eq=False)
class _Hashable:
    """A run as a static argument of jit: compared by identity, since its architecture is a dict."""

    it: Run


@with_own_settings
@with_wanted_kernels
def train(run: Run, directory: Path, *, save_every: int = 200, log_every: int = 20, console: Any = None) -> Model:
    """Train, or go on training, in `directory`; returns the model and leaves it in `directory/model` in HF layout.

    `directory` gets run.json, tokenizer/, checkpoints/ (Orbax) and log.jsonl (step, examples, loss, tokens/s, seconds).
    Batches and noise depend on the seed and the step alone, so a run killed at any moment and started again equals an
    uninterrupted one. Raises `OptionError` if the directory holds a finished run or one with other settings, or files that
    are damaged where that cannot be made good; `TrainingError` if it cannot be written (disk full).

    console: where progress is shown, by default on standard output.
    """
    from orbax.checkpoint.experimental.v1 import training as orbax

    if (directory / "model").exists():
        raise OptionError(f"{directory / 'model'}: this run is finished; choose another directory or remove it")
    find_devices()  # before anything is written
    enable_cache()
    begin(directory, dataclasses.asdict(run))
    words = _tokenizer(run, directory)
    family = FAMILIES[run.family]
    hf = run.architecture | {"mask_token_id": words.mask_token_id, "eos_token_id": words.eos_token_id}
    config = family.config_type.from_hf(hf, mask_id=words.mask_token_id, eos_id=words.eos_token_id)

    params = family.init(config, make_key(run.seed))
    state = State(params, optimizer(run).init(params), jnp.int32(0))
    keep = orbax.preservation_policies.LatestN(2)
    log = directory / "log.jsonl"
    with open_checkpoints(directory, keep) as saved:
        if saved.latest is not None:
            state = saved.load(saved.latest.step, state)
        first, static = int(state.step), _Hashable(run)
        columns = ("{task.description}", "loss {task.fields[loss]:.4f}", "{task.fields[rate]:,.0f} tokens/s")
        quiet = console is not None and not console.is_terminal  # nobody watches; log.jsonl has it all
        bar = Progress(
            *map(TextColumn, columns), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console, disable=quiet
        )
        forget_after(log, first)
        with bar:
            task = bar.add_task("training", total=run.steps, completed=first, loss=float("nan"), rate=0.0)
            began, seen, losses = time.perf_counter(), 0, []
            for step in range(first, run.steps):
                rng = random.Random(f"train {run.seed} {step}")
                stage = run.stage(step)
                tokens, response = data.batch(
                    words, rng, run.rows, rng.choice(stage.lengths), stage.drills, stage.easy, config.eos_id
                )
                state, parts = train_step(state, tokens, response, family=family, config=config, run=static)
                losses.append(parts["diffusion"])
                seen += tokens.size
                done = step + 1
                if done % log_every == 0 or done == run.steps:
                    loss, seconds = float(sum(losses)) / len(losses), time.perf_counter() - began
                    entry = {"step": done, "examples": done * run.rows, "loss": round(loss, 5)}
                    entry |= {"balance": round(float(parts["balance"]), 3), "tokens_per_second": round(seen / seconds)}
                    append(log, entry | {"seconds": round(seconds, 1)})
                    bar.update(task, completed=done, loss=loss, rate=seen / seconds)
                    losses = []
                if done % save_every == 0 or done == run.steps:
                    with writing(directory):
                        saved.save(done, state)
    # bfloat16 on disk halves the shipped file; it is what every published LLaDA-MoE uses.
    stored = dict.fromkeys(checkpoint.hf_names(family, config), "BF16")
    model = Model(family, config, state.params, words, hf, stored)
    checkpoint.export_hf(model, directory / "model")
    return checkpoint.load(directory / "model")


def _tokenizer(run: Run, directory: Path) -> Any:
    """The run's tokenizer, made by its first start. One that is cut short, as a killed process of an older djax left it, is
    made again as long as nothing has been trained; afterwards another could be what checkpoints were not trained with."""
    there = directory / "tokenizer"
    try:
        words = text.load_tokenizer(there)
        if words is not None and tokenizer.is_whole(words):
            return words
        problem = "its files are not all there"
    except CheckpointError as error:
        problem = str(error)
    if has_checkpoints(directory):
        raise OptionError(f"{there}: is damaged ({problem}) beside checkpoints; restore it, or choose another directory")
    with writing(directory):
        shutil.rmtree(there, ignore_errors=True)
        with new_directory(there) as whole:
            tokenizer.train(whole, run.architecture["vocab_size"], run.seed)
    return text.load_tokenizer(there)
