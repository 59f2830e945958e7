"""How a plug becomes something that jax traces."""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

import jax

from djax.checks import reading, show
from djax.errors import OptionError

T = TypeVar("T", bound=type)


def pytree(cls: T) -> T:
    """Make a frozen dataclass a pytree: its fields are leaves, those with `metadata={"static": True}` set shapes.

    A field with `metadata={"later": True}` is printed only where it is not its default, so that
    what was printed and kept before there was such a field stays as it is.

    jax rebuilds a plug without its constructor, so attributes that are no fields are lost. Raises
    `OptionError` for a class that is no dataclass, or that jax knows already.

    Law: structures of different classes are never equal. With `jax.tree_util.register_dataclass` they are, where number of
    leaves and static values agree (jax 0.10.2): then `jit`, whose caches go by that equality, now and then runs the
    program of another class, a threshold's for a hierarchy, and nothing tells.
    """
    with reading("pytree"):
        given = issubclass(type(cls), type) and dataclasses.is_dataclass(cls)
    if not given:
        raise OptionError(f"pytree: expected a dataclass, got {show(cls)}; write @djax.pytree above @dataclasses.dataclass")
    leaves: list[str] = []
    static: list[str] = []
    for field in dataclasses.fields(cls):
        (static if field.metadata.get("static") else leaves).append(field.name)

    def flatten(plug: object) -> tuple[tuple, tuple]:
        return tuple(getattr(plug, n) for n in leaves), tuple(getattr(plug, n) for n in static)

    def flatten_with_keys(plug: object) -> tuple[tuple, tuple]:
        values, rest = flatten(plug)
        return tuple(zip(map(jax.tree_util.GetAttrKey, leaves), values, strict=True)), rest

    def unflatten(rest: tuple, values: Iterable[Any]) -> Any:
        # Not by the constructor: jax puts tracers, shapes and shardings into the fields, which its checks would refuse.
        plug: object = object.__new__(cls)
        for name, value in (*zip(leaves, values, strict=True), *zip(static, rest, strict=True)):
            object.__setattr__(plug, name, value)
        return plug

    if any(field.metadata.get("later") for field in dataclasses.fields(cls)):
        type.__setattr__(cls, "__repr__", _print)
    try:
        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    except ValueError as error:
        raise OptionError(f"pytree: {cls.__name__} is registered with jax already") from error
    return cls


def _print(plug: Any) -> str:
    shown = [f.name for f in dataclasses.fields(plug) if not f.metadata.get("later") or getattr(plug, f.name) != f.default]
    return f"{type(plug).__name__}({', '.join(f'{name}={getattr(plug, name)!r}' for name in shown)})"


def classes(tree: object) -> tuple:
    """The classes in a plug and in the plugs it holds: static to a program, so that plugs of a user's own, however they
    were registered, are never taken for one another."""
    if not dataclasses.is_dataclass(tree):
        return ()  # a number, whose dtype is the program's argument, or a static value, which the structure holds
    return type(tree), *(classes(getattr(tree, f.name)) for f in dataclasses.fields(tree))
