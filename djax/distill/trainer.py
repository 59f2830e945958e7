"""Train a model on kept trajectories; a run that was killed goes on where it stopped, bit for bit.

Which trajectory an example is, and how it is masked, follows from the run's seed and the example's number alone: neither the
number of devices nor a restart changes it.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from djax.checks import number, plug
from djax.distill.lora import Adapters, Lora
from djax.distill.objectives import Compression, Row
from djax.distill.store import Trajectory, checksum
from djax.distill.supervised import Supervised
from djax.errors import OptionError
from djax.models.model import Model
from djax.runtime.compilation import enable_cache
from djax.runtime.process import with_own_settings
from djax.training.contract import Batches, Objective, Weights
from djax.training.plan import Plan, check_plan, check_rows
from djax.training.trainer import Evaluate, fit


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train.

    objectives: what is learned (`objectives.py`), their losses added; or one `Objective` of `training.contract`, on batches of
                `Row`s, to which `balance` means nothing.
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
        check_plan(self)
        number(self, "balance", at_least=0)
        if self.muon is not None and self.lora is not None:
            raise OptionError("Recipe(muon=...): expected None with lora, whose adapters AdamW moves")
        if not self.objectives:
            raise OptionError("Recipe(objectives=...): expected at least one, got none")
        if len(self.objectives) == 1 and isinstance(self.objectives[0], Objective):
            return
        for objective in self.objectives:
            plug(
                *(objective, "Recipe(objectives=...)", ("views", "loss")),
                "Compression(...), Certainty(...), Plain(...)",
            )

    def plan(self) -> Plan:
        """The trainer's part of it."""
        fields = {f.name for f in dataclasses.fields(self)} & {f.name for f in dataclasses.fields(Plan)}
        # Full float32 products where the network computes in float32, whatever the model's own
        # dtype is.
        precision = "highest" if self.dtype == "float32" else None
        return Plan(**{name: getattr(self, name) for name in fields}, precision=precision)

    def objective(self) -> Objective:
        """Its objectives as one: they add up, unless one brings a loss of whole batches itself."""
        if isinstance(self.objectives[0], Objective):
            return self.objectives[0]
        return Supervised(self.objectives, self.balance)


@dataclasses.dataclass(frozen=True, eq=False)
class Examples(Batches):
    """Kept trajectories as arrays, one row each: the fields of `Row` with a leading axis, padded to the longest."""

    rows: Row[np.ndarray]
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
        orders: dict[int, np.ndarray] = {
            int(e): np.random.default_rng([self.recipe.seed, int(e)]).permutation(len(self)) for e in set(numbers // len(self))
        }
        return np.array([orders[n // len(self)][n % len(self)] for n in numbers.tolist()])

    def batch(self, step: int) -> Row[np.ndarray]:
        which = self.which(step)
        return jax.tree.map(lambda a: a[which], self.rows)

    def count(self, batch: Row[np.ndarray]) -> int:
        return int(batch.total.sum())

    def name(self, step: int, rows: np.ndarray) -> str:
        return f"trajectories {self.which(step)[rows].tolist()} of those kept"


@with_own_settings
def train(
    model: Model,
    kept: Sequence[Trajectory],
    recipe: Recipe,
    directory: str | Path,
    *,
    evaluate: Evaluate | None = None,
    console: Console | None = None,
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
    enable_cache()
    examples = Examples.of(kept, recipe)
    check_rows(recipe, model)
    weights = Weights() if recipe.lora is None else Adapters(recipe.lora)
    return fit(
        model,
        recipe.objective(),
        recipe.plan(),
        directory,
        batches=examples,
        weights=weights,
        described=_describe(model, examples, recipe),
        evaluate=evaluate,
        console=console,
    ).model


def _describe(model: Model, examples: Examples, recipe: Recipe) -> dict[str, Any]:
    """What tells a run from others."""
    data = hashlib.sha256(b"".join(a.tobytes() for a in examples.rows)).hexdigest()
    return {"recipe": repr(recipe), "model": checksum(model), "trajectories": len(examples), "data": data}
