"""The types that recur wherever a model is passed on: its config, its parameters, a dtype."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax.typing

# A tree of parameters: each name has an array or another tree.
Params = dict[str, Any]
# What numpy takes for a dtype: one of its own, a scalar type or a name.
DType = jax.typing.DTypeLike


class Config(Protocol):
    """What djax reads of every family's Config, a frozen dataclass that is hashable and so static to
    `jit`. A family's own network reads more. Letters as in the README.

    vocab: V. width: D. layers: N. heads: H. groups: G, key/value heads. head_dim: K. rope_theta: the
    base of rotary's frequencies. eps: of RMS norms. max_positions: the longest canvas. mask_id: what
    stands where nothing is decided. eos_id: the first of eos_ids, each of which ends an answer.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def vocab(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def groups(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def eps(self) -> float: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def mask_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], mask_id: int, eos_id: int, more_eos_ids: tuple[int, ...] = ()) -> "Config": ...


@runtime_checkable
class ExpertConfig(Config, Protocol):
    """Of a family whose layers have a router. experts: E. expert_width: F. top: J, experts a token."""

    @property
    def experts(self) -> int: ...
    @property
    def expert_width(self) -> int: ...
    @property
    def top(self) -> int: ...
