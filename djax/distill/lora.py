"""Low-rank adapters (LoRA, arXiv 2106.09685) over a family's parameter tree: W + A @ B * (alpha / rank), merged where used.

Which axes of a matrix are its inputs follows from its logical axes, so every family has them: a matrix of attention, experts or
MLPs maps from or to "embed"; experts have an adapter each. Embedding, head, router and norms stay as they are.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from djax.checks import integer, number
from djax.errors import OptionError
from djax.models.contract import Config, Params
from djax.models.family import Family
from djax.models.model import Model
from djax.training.contract import Weights


@dataclasses.dataclass(frozen=True)
class Lora:
    """rank of the adapters; alpha scales them by alpha / rank, None is rank (as dParallel's)."""

    rank: int = 32
    alpha: float | None = None

    def __post_init__(self) -> None:
        integer(self, "rank", at_least=1)
        number(self, "alpha", above=0, optional=True)

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


def adapters(lora: Lora, family: Family, config: Config, key: jax.Array) -> Params:
    """The tree of adapters: for each matrix a `{"a": [E?, in, rank], "b": [E?, rank, out]}` in float32, b of zeros, so that
    the adapted model begins as the model itself."""
    out = {}
    for n, (path, (batch, inside, outside)) in enumerate(sorted(_matrices(family, config).items())):
        if lora.rank > min(inside, outside):
            raise OptionError(
                f"Lora(rank=...): expected at most {min(inside, outside)}, the size of {'/'.join(path)}, got {lora.rank}"
            )
        a = jax.random.normal(jax.random.fold_in(key, n), (*batch, inside, lora.rank)) * inside**-0.5
        out[path] = {"a": a, "b": jnp.zeros((*batch, lora.rank, outside))}
    return traverse_util.unflatten_dict(out)


@dataclasses.dataclass(frozen=True)
class Adapters(Weights):
    """The trainer's `Weights` for LoRA: the adapters are trained, the model is frozen."""

    lora: Lora

    def begin(self, model: Model, key: jax.Array) -> tuple[Params, Params]:
        params = adapters(self.lora, model.family, model.config, key)
        if model.mesh is not None:
            params = jax.device_put(params, NamedSharding(model.mesh, PartitionSpec()))
        return params, model.params

    def whole(self, trained: Params, frozen: Params) -> Params:
        return merged(self.lora, frozen, trained)


def merged(lora: Lora, params: Params, adapters: Params) -> Params:
    """The parameters with their adapters, in the parameters' own dtypes and shapes."""
    flat = traverse_util.flatten_dict(params)
    for path, pair in _pairs(adapters).items():
        w = flat[path]
        delta = jnp.einsum("...ir,...ro->...io", pair["a"], pair["b"]) * lora.scale
        flat[path] = (w.astype(jnp.float32) + delta.reshape(w.shape)).astype(w.dtype)
    return traverse_util.unflatten_dict(flat)


def _pairs(adapters: Params) -> dict[tuple[str, ...], dict[str, jax.Array]]:
    pairs: dict[tuple[str, ...], dict[str, jax.Array]] = {}
    for (*path, name), leaf in traverse_util.flatten_dict(adapters).items():
        pairs.setdefault(tuple(path), {})[name] = leaf
    return pairs


def _matrices(family: Family, config: Config) -> dict[tuple[str, ...], tuple[tuple[int, ...], int, int]]:
    """Each adapted parameter's path: its experts' axis, if it has one, and the sizes it maps from and to."""
    boxed = family.abstract(config, jnp.float32)
    shapes = {p: a.shape for p, a in traverse_util.flatten_dict(nn.meta.unbox(boxed)).items()}
    axes = {p: tuple(spec) for p, spec in traverse_util.flatten_dict(nn.get_partition_spec(boxed)).items()}
    found = {}
    for path, names in axes.items():
        skip = names[:1] == ("expert",)
        shape, names = shapes[path][skip:], names[skip:]
        if len(shape) < 2 or "vocab" in names or path[-1] == "router":
            continue
        batch = shapes[path][:skip]
        if names[0] == "embed":
            found[path] = batch, shape[0], math.prod(shape[1:])
        elif names[-1] == "embed":
            found[path] = batch, math.prod(shape[:-1]), shape[-1]
    return found
