"""Which two states of a trajectory are compared: from the earlier one the tokens up to the later one are to be predicted.

States count forwards: state i is the canvas after i forwards, 0 to F. A sampler is a frozen dataclass with
`draw(key, forwards, ends, progress) -> (i, j)`: one row's key, its F, `ends` int32, for each forward the last state of
the block it worked on, and how much of the training is done, 0 to 1. Law: 0 <= i < j <= F.
"""

import dataclasses

import jax
import jax.numpy as jnp

from djax.checks import INT32_MAX, flag, integer, number
from djax.pytree import pytree

Pair = tuple[jax.Array, jax.Array]


@pytree
@dataclasses.dataclass(frozen=True)
class Uniform:
    """Every i alike, then every j after it. inside_block: no further than to the end of the block that i is in."""

    inside_block: bool = True

    def __post_init__(self) -> None:
        flag(self, "inside_block")

    def draw(self, key: jax.Array, forwards: jax.Array, ends: jax.Array, progress: jax.Array) -> Pair:
        first, second = jax.random.split(key)
        i = jax.random.randint(first, (), 0, forwards)
        return i, jax.random.randint(second, (), i + 1, _last(i, forwards, ends, self.inside_block) + 1)


@pytree
@dataclasses.dataclass(frozen=True)
class Stride:
    """Every i alike, j that many forwards on, or at the end. A stride beyond every block's forwards always jumps to its end."""

    forwards: int = 4
    inside_block: bool = True

    def __post_init__(self) -> None:
        integer(self, "forwards", at_least=1)
        flag(self, "inside_block")

    def draw(self, key: jax.Array, forwards: jax.Array, ends: jax.Array, progress: jax.Array) -> Pair:
        i = jax.random.randint(key, (), 0, forwards)
        return i, jnp.minimum(i + self.forwards, _last(i, forwards, ends, self.inside_block))


@pytree
@dataclasses.dataclass(frozen=True)
class Curriculum:
    """A stride that grows from `first` to `last` forwards until `grown` of the training is done."""

    first: int = 1
    last: int = 16
    grown: float = 0.5
    inside_block: bool = True

    def __post_init__(self) -> None:
        integer(self, "first", at_least=1)
        integer(self, "last", at_least=1)
        number(self, "grown", above=0, at_most=1)
        flag(self, "inside_block")

    def draw(self, key: jax.Array, forwards: jax.Array, ends: jax.Array, progress: jax.Array) -> Pair:
        share = jnp.clip(progress / self.grown, 0.0, 1.0)
        stride = jnp.round(self.first + share * (self.last - self.first)).astype(jnp.int32)
        i = jax.random.randint(key, (), 0, forwards)
        return i, jnp.minimum(i + jnp.maximum(stride, 1), _last(i, forwards, ends, self.inside_block))


def _last(i: jax.Array, forwards: jax.Array, ends: jax.Array, inside_block: jax.Array | bool) -> jax.Array:
    """The last state that a pair which begins at i may end with."""
    here = jnp.maximum(ends.at[i].get(mode="fill", fill_value=INT32_MAX), i + 1)
    return jnp.where(inside_block, jnp.minimum(here, forwards), forwards)


PAIRS: dict[str, type] = {"uniform": Uniform, "stride": Stride, "curriculum": Curriculum}
