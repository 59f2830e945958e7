"""Train a masked-diffusion model from scratch on the generated problems; interrupted runs go on where they stopped."""

import dataclasses
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from djax import text
from djax.checkpoints import checkpoint
from djax.errors import CheckpointError, OptionError
from djax.kernels.choice import with_wanted_kernels
from djax.models import FAMILIES
from djax.models.model import Model
from djax.runtime.compilation import enable_cache
from djax.runtime.process import make_key, with_own_settings
from djax.runtime.sharding import find_devices
from djax.storage.directories import new_directory
from djax.text.contract import Tokenizer
from djax.training import data, tokenizer
from djax.training.contract import Batches
from djax.training.objective import Batch, Diffusion
from djax.training.plan import Plan
from djax.training.run_directory import begin, has_checkpoints, writing
from djax.training.trainer import Window, fit


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
    rate, adam_rate: peak learning rates of Muon (matrices) and Adam (embedding, head, router, norms): the trainer's `muon` and
                  `rate` (`plan.Plan`).
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


@dataclasses.dataclass(frozen=True)
class Problems(Batches):
    """Freshly drawn training problems, as `objective.Batch`es; words: the model's tokenizer."""

    run: Run
    words: Tokenizer
    eos_id: int

    def batch(self, step: int) -> Batch[np.ndarray]:
        run, stage = self.run, self.run.stage(step)
        rng = random.Random(f"train {run.seed} {step}")
        length = rng.choice(stage.lengths)
        share = stage.drills, stage.easy
        return Batch(*data.batch(self.words, rng, run.rows, length, *share, self.eos_id))


def make_plan(run: Run, save_every: int, log_every: int) -> Plan:
    """The trainer's plan of a run. Its `rate` is that of Adam, a run's `rate` that of Muon.

    Muon on the matrices of the layers, Adam on the rest: per wall-clock second on a CPU, Muon's
    loss was well ahead of AdamW's from the first minutes on (configs/small.py has the figures).
    """
    return Plan(
        run.steps,
        run.rows,
        muon=run.rate,
        rate=run.adam_rate,
        warmup=run.warmup,
        cooldown=run.cooldown,
        schedule="linear",
        weight_decay=0.0,
        clip=run.clip,
        precision=None,
        seed=run.seed,
        save_every=save_every,
        log_every=log_every,
    )


@with_own_settings
@with_wanted_kernels
def train(run: Run, directory: Path, *, save_every: int = 200, log_every: int = 20, console: Console | None = None) -> Model:
    """Train, or go on training, in `directory`; returns the model and leaves it in `directory/model` in HF layout.

    `directory` gets run.json, tokenizer/, checkpoints/ (Orbax) and log.jsonl (step, examples, loss, tokens/s, seconds).
    Batches and noise depend on the seed and the step alone, so a run killed at any moment and started again equals an
    uninterrupted one. Raises `OptionError` if the directory holds a finished run or one with other settings, or files that
    are damaged where that cannot be made good; `TrainingError` if it cannot be written (disk full) or the loss is not finite.

    console: where progress is shown, by default on standard output.
    """
    if (directory / "model").exists():
        raise OptionError(f"{directory / 'model'}: this run is finished; choose another directory or remove it")
    find_devices()  # before anything is written
    plan = make_plan(run, save_every, log_every)
    enable_cache()
    described = dataclasses.asdict(run)
    begin(directory, described)
    words = _tokenizer(run, directory)
    family = FAMILIES[run.family]
    mask_id, eos_id = words.mask_token_id, words.eos_token_id
    assert mask_id is not None and eos_id is not None, "as `tokenizer.train` writes them"
    hf = run.architecture | {"mask_token_id": mask_id, "eos_token_id": eos_id}
    config = family.config_type.from_hf(hf, mask_id=mask_id, eos_id=eos_id)

    # bfloat16 on disk halves the shipped file; it is what every published LLaDA-MoE uses.
    stored = dict.fromkeys(checkpoint.hf_names(family, config), "BF16")
    model = Model(family, config, family.init(config, make_key(run.seed)), words, hf, stored)

    def describe(window: Window) -> dict[str, Any]:
        done = window.step
        entry: dict[str, Any] = {"step": done, "examples": done * run.rows}
        entry |= {"loss": round(float(sum(window.losses)) / len(window.losses), 5)}
        if (balance := window.parts[-1].get("balance")) is not None:
            entry |= {"balance": round(float(balance), 3)}
        entry |= {"tokens_per_second": window.tokens_per_second}
        return entry | {"seconds": round(window.seconds, 1)}

    batches = Problems(run, words, config.eos_id)
    trained = fit(
        model,
        Diffusion(run.balance),
        plan,
        directory,
        batches=batches,
        described=described,
        describe=describe,
        keep=2,
        console=console,
    )
    checkpoint.export_hf(trained.model, directory / "model")
    return checkpoint.load(directory / "model")


def _tokenizer(run: Run, directory: Path) -> Tokenizer:
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
    made = text.load_tokenizer(there)
    assert made is not None, "just written"
    return made
