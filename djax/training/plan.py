"""How to train, as one value, and the optimizer that follows from it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from djax.checks import flag, integer, number, one_of
from djax.errors import OptionError
from djax.models.contract import Params
from djax.models.model import Model

Schedule = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to train, whatever is learned from whatever batches.

    steps:      updates.
    rows:       examples an update, all devices together, in `accumulate` equal parts, one after
                another.
    rate:       peak learning rate of AdamW, reached after `warmup` updates. Every rate of a
                training is a peak that the one schedule scales.
    muon:       None, or the peak rate of Muon, which then moves the matrices of attention and
                experts instead.
    schedule:   "constant", "cosine" or "linear" to 0 over the last `cooldown` updates, by default
                all of those after the warm-up.
    weight_decay, betas, clip: of AdamW, on matrices only (of Muon, on its matrices), and the
                gradient's largest norm.
    dtype:      what the network computes in, "float32" or "bfloat16"; parameters and optimizer
                are float32.
    precision:  of products of float32 numbers: "highest", or None for the platform's own, which is
                TF32 on GPUs.
    remat:      compute each layer's activations again for the gradient instead of keeping them.
    save_every, evaluate_every, log_every: updates.
    seed:       of order, noise and new parameters.
    """

    steps: int
    rows: int
    accumulate: int = 1
    rate: float = 3e-4
    muon: float | None = None
    warmup: int = 50
    schedule: str = "cosine"
    cooldown: int | None = None
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    dtype: str = "float32"
    precision: str | None = "highest"
    remat: bool = False
    save_every: int = 100
    evaluate_every: int = 250
    log_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        check_plan(self)
        integer(self, "cooldown", at_least=0, optional=True)


class Planned(Protocol):
    """What a `Plan` shares with what one is made from."""

    @property
    def rows(self) -> int: ...
    @property
    def accumulate(self) -> int: ...


def check_plan(plan: Planned) -> None:
    """Check the fields that a `Plan` shares with what it is made from, under that class's name."""
    for name in ("steps", "rows", "accumulate", "save_every", "evaluate_every", "log_every"):
        integer(plan, name, at_least=1)
    for name in ("warmup", "seed"):
        integer(plan, name, at_least=0)
    for name in ("rate", "clip"):
        number(plan, name, above=0)
    number(plan, "muon", above=0, optional=True)
    number(plan, "weight_decay", at_least=0)
    one_of(plan, "schedule", ("constant", "cosine", "linear"))
    one_of(plan, "dtype", ("float32", "bfloat16"))
    flag(plan, "remat")
    if plan.rows % plan.accumulate:
        name = type(plan).__name__
        raise OptionError(f"{name}(rows={plan.rows}): expected a multiple of accumulate={plan.accumulate}")


def check_rows(plan: Planned, model: Model) -> None:
    """`OptionError` unless the devices' parts of the rows, and those of accumulation, are equal."""
    if plan.rows % (model.parts * plan.accumulate):
        raise OptionError(
            f"{type(plan).__name__}(rows={plan.rows}): expected a multiple of "
            f"accumulate={plan.accumulate} times the mesh's data={model.parts}"
        )


def make_schedule(plan: Plan, peak: float) -> Schedule:
    """The learning rate at each update, counted from 0, for a peak."""
    over = plan.steps - plan.warmup if plan.cooldown is None else plan.cooldown

    def rate(step: jax.Array) -> jax.Array:
        rise = jnp.minimum(1.0, (step + 1) / max(plan.warmup, 1))
        left = jnp.clip((plan.steps - step) / max(over, 1), 0.0, 1.0)
        cosine = 0.5 - 0.5 * jnp.cos(math.pi * left)
        shapes: dict[str, jax.Array | float] = {"constant": 1.0, "linear": left, "cosine": cosine}
        fall = shapes[plan.schedule]
        return peak * (rise * fall)

    return rate


def make_optimizer(plan: Plan) -> optax.GradientTransformation:
    """Clipping, then AdamW, or Muon on the matrices of the layers and Adam on the rest."""
    rate = make_schedule(plan, plan.rate)
    if plan.muon is not None:
        options = dict(weight_decay=plan.weight_decay)
        options |= dict(adam_b1=plan.betas[0], adam_b2=plan.betas[1])
        moves = _muon(make_schedule(plan, plan.muon), rate, **options)
    else:

        def matrices(params: Params) -> Any:
            return jax.tree.map(lambda a: a.ndim > 1, params)

        moves = optax.adamw(rate, *plan.betas, weight_decay=plan.weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(plan.clip), moves)


def _muon(rate: Schedule, adam_rate: Schedule, **options: object) -> optax.GradientTransformation:
    """Muon on the matrices of attention and experts, Adam on the rest; options are optax's."""
    as_matrix = optax.contrib.MuonDimensionNumbers
    axes = {"qkv": as_matrix(0, (1, 3)), "o": as_matrix((0, 1), 2)}
    axes |= {"w_in": as_matrix(1, 2), "w_out": as_matrix(1, 2)}

    def matrices(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: axes.get(path[-1].key), params)

    return optax.contrib.muon(rate, adam_learning_rate=adam_rate, muon_weight_dimension_numbers=matrices, **options)
