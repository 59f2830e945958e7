"""Decoders and caches as text: `Threshold(0.9)`, `vicinity(16, 16, warmup=4)`, `none`; what their repr prints reads back."""

import ast
from collections.abc import Mapping
from typing import Any

from djax.checks import plain_text, show
from djax.errors import OptionError

# Plugs spelled out take some hundred characters. Python's parser and what reads its trees go by recursion.
_LONGEST = 4000


def parse(text: str, registry: Mapping[str, type], name: str) -> Any:
    """Build the plug that `text` spells, a call or a bare name, upper or lower case; plugs may hold plugs.

    Nothing is executed: only names of the registry, numbers and None are understood. Raises `OptionError` naming the
    option, what there is, or the arguments the plug takes.
    """
    plain = plain_text(text)
    if plain is None or len(plain) > _LONGEST:
        raise OptionError(f"{name}: expected text of at most {_LONGEST} characters, got {show(text)}")
    try:
        return _build(ast.parse(plain.strip(), mode="eval").body, registry, name)
    except OptionError:
        raise
    # ValueError is for null characters and lone surrogates.
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise OptionError(f"{name}: cannot read {show(text)}; write it like {_example(registry)}") from error


def _build(node: ast.expr, registry: Mapping[str, type], name: str) -> Any:
    if isinstance(node, ast.Constant) and node.value is None:
        node = ast.Name("none")  # so that repr(None) reads back
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name):
        raise OptionError(f"{name}: cannot read {show(ast.unparse(node))}; write it like {_example(registry)}")
    kind = registry.get(call.func.id.lower())
    if kind is None:
        raise OptionError(f"{name}: unknown {show(call.func.id)}; there are: {', '.join(sorted(registry))}")
    takes = list(getattr(kind, "__dataclass_fields__", ()))  # type(None), a registry's "none", takes nothing
    given = [k.arg for k in call.keywords]
    if len(call.args) > len(takes) or set(given) - set(takes) or set(given) & set(takes[: len(call.args)]):
        raise OptionError(f"{name}: {ast.unparse(node)} does not fit {kind()!r}")
    return kind(
        *(_value(a, registry, name) for a in call.args), **{k.arg: _value(k.value, registry, name) for k in call.keywords}
    )


def _value(node: ast.expr, registry: Mapping[str, type], name: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return _build(node, registry, name)


def _example(registry: Mapping[str, type]) -> str:
    return " or ".join(repr(kind()) for kind in registry.values())


def spelled(registry: Mapping[str, type]) -> str:
    """How a user of the Python door writes each of them."""
    return ", ".join("None" if name == "none" else f"djax.{kind.__name__}(...)" for name, kind in registry.items())
