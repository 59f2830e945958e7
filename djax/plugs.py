"""Decoders and caches as text: `Threshold(0.9)`, `vicinity(16, 16, warmup=4)`, `none`; what their repr prints reads back."""

import ast
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from djax.checks import describe, plain_text, show
from djax.errors import DjaxError, OptionError

# Plugs spelled out take some hundred characters. Python's parser and what reads its trees go by recursion.
_LONGEST = 4000


def parse(text: str, registry: Mapping[str, type], name: str, check: Callable[[ast.expr], None] | None = None) -> Any:
    """Build the plug that `text` spells, a call or a bare name, upper or lower case; plugs may hold plugs.

    Nothing is executed: only names of the registry, numbers and None are understood. Raises `OptionError` naming the
    option, what there is, or the arguments the plug takes.

    registry: the classes by name in lower case. check: gets the parsed text before anything is built.
    """
    plain = plain_text(text)
    if plain is None or len(plain) > _LONGEST:
        raise OptionError(f"{name}: expected text of at most {_LONGEST} characters, got {show(text)}")
    try:
        tree = ast.parse(plain.strip(), mode="eval").body
        if check is not None:
            check(tree)
        return _build(tree, registry, name)
    except OptionError:
        raise
    # ValueError is for null characters and lone surrogates.
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        like = f"write it like {_example(registry)}"
        if ".py:" in plain:
            like = "only --decoder, --cache and --smoothing on the command line take a class from a file"
        raise OptionError(f"{name}: cannot read {show(text)}; {like}") from error


def _build(node: ast.expr, registry: Mapping[str, type], name: str) -> Any:
    if isinstance(node, ast.Constant) and node.value is None:
        node = ast.Name("none")  # so that repr(None) reads back
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name):
        raise OptionError(f"{name}: cannot read {show(ast.unparse(node))}; write it like {_example(registry)}")
    kind = registry.get(call.func.id.lower())
    if kind is None:
        raise OptionError(f"{name}: unknown {show(call.func.id)}; there are: {', '.join(sorted(registry))}")
    takes = getattr(kind, "__dataclass_fields__", {})  # type(None), a registry's "none", takes nothing
    given = [k.arg for k in call.keywords]
    there = {*list(takes)[: len(call.args)], *given}
    if (
        len(call.args) > len(takes)
        or set(given) - set(takes)
        or len(there) < len(call.args) + len(given)
        or not there.issuperset(field for field in takes if _is_required(takes[field]))
    ):
        raise OptionError(f"{name}: {ast.unparse(node)} does not fit {_spell(kind)}")
    positional = [_value(a, registry, name) for a in call.args]
    named = {k.arg: _value(k.value, registry, name) for k in call.keywords if k.arg is not None}
    try:
        return kind(*positional, **named)
    except DjaxError:
        raise
    except Exception as error:  # a user's own class
        raise OptionError(f"{name}: {ast.unparse(node)} raised {describe(error)}") from error


def _value(node: ast.expr, registry: Mapping[str, type], name: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return _build(node, registry, name)


def _example(registry: Mapping[str, type]) -> str:
    return " or ".join(map(_spell, registry.values()))


def _spell(kind: type) -> str:
    """A call of the class with its defaults; of a user's own class, which may not be made without
    arguments, by its fields."""
    if kind is type(None) or kind.__module__.split(".")[0] == "djax":
        return repr(kind())
    fields = getattr(kind, "__dataclass_fields__", {}).values()
    shown = []
    for field in fields:
        if field.init:
            has_default = field.default is not dataclasses.MISSING
            shown.append(f"{field.name}={show(field.default)}" if has_default else field.name)
    return f"{kind.__name__}({', '.join(shown)})"


def _is_required(field: dataclasses.Field) -> bool:
    return field.init and field.default is field.default_factory is dataclasses.MISSING


def spelled(registry: Mapping[str, type]) -> str:
    """How a user of the Python door writes each of them."""
    return ", ".join("None" if name == "none" else f"djax.{kind.__name__}(...)" for name, kind in registry.items())
