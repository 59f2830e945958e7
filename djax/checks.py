"""Checks of the public door: one sentence that names the argument, the expectation, what came and what would work."""

import math
import numbers
from typing import Any

import jax
import numpy as np

from djax.errors import OptionError

INT32_MAX = 2**31 - 1


def number(
    plug: Any,
    field: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    optional: bool = False,
) -> None:
    """Check a real field of a plug in its `__post_init__`, and store it as a float: 2 and 2.0 must not compile apart.
    None passes where it is optional."""
    value = getattr(plug, field)
    if not _inside_jax(value) and not (optional and value is None):
        name = f"{type(plug).__name__}({field}=...)"
        object.__setattr__(plug, field, real_number(value, name, above=above, at_least=at_least, at_most=at_most))


def integer(plug: Any, field: str, *, at_least: int, at_most: int = INT32_MAX, optional: bool = False) -> None:
    """Check an integer field of a plug in its `__post_init__`, and store it as an int; None passes where it is optional."""
    value = getattr(plug, field)
    if not _inside_jax(value) and not (optional and value is None):
        name = f"{type(plug).__name__}({field}=...)"
        object.__setattr__(plug, field, whole_number(value, name, at_least=at_least, at_most=at_most))


def flag(plug: Any, field: str) -> None:
    """Check a true-or-false field of a plug in its `__post_init__`."""
    value = getattr(plug, field)
    if not _inside_jax(value):
        object.__setattr__(plug, field, boolean(value, f"{type(plug).__name__}({field}=...)"))


def one_of(plug: Any, field: str, words: tuple[str, ...]) -> None:
    """Check a static field of a plug that is one of a few words."""
    value = getattr(plug, field)
    if value not in words:
        raise OptionError(f"{type(plug).__name__}({field}=...): expected one of {', '.join(words)}, got {value!r}")


def real_number(
    value: Any, name: str, *, above: float | None = None, at_least: float | None = None, at_most: float | None = None
) -> float:
    """`value` as a float that is finite and within its bounds even when rounded to float32, or `OptionError`."""
    value = _scalar(value)
    limits = (("above", above), ("at least", at_least), ("at most", at_most))
    expected = "expected a finite number" + "".join(f" {word} {limit}" for word, limit in limits if limit is not None)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise OptionError(f"{name}: {expected}, got {value!r} of type {type(value).__name__}")
    with np.errstate(over="ignore", under="ignore"):
        rounded = float(np.float32(float(value)))
    low = (above is not None and rounded <= above) or (at_least is not None and rounded < at_least)
    if not math.isfinite(rounded) or low or (at_most is not None and rounded > np.float32(at_most)):
        raise OptionError(f"{name}: {expected}, got {value!r}")
    return float(value)


def whole_number(value: Any, name: str, *, at_least: int, at_most: int = INT32_MAX) -> int:
    """`value` as an int within its bounds, or `OptionError`: bools and floats are not whole numbers, however round."""
    value = _scalar(value)
    expected = f"expected a whole number, at least {at_least} and at most {at_most}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise OptionError(f"{name}: {expected}, got {value!r} of type {type(value).__name__}")
    if not at_least <= value <= at_most:
        raise OptionError(f"{name}: {expected}, got {value}")
    return int(value)


def boolean(value: Any, name: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise OptionError(f"{name}: expected True or False, got {value!r} of type {type(value).__name__}")
    return bool(value)


def plug(value: Any, name: str, methods: tuple[str, ...], there_are: str) -> None:
    """Check that `value` is an instance (not a class) with the methods of its contract, and a pytree."""
    if isinstance(value, type) or not all(callable(getattr(value, m, None)) for m in methods):
        raise OptionError(f"{name}: expected one of {there_are}, got {value!r}")
    if any(leaf is value for leaf in jax.tree.leaves(value)):
        raise OptionError(
            f"{name}: {type(value).__name__} has the methods but is no pytree; decorate the class with djax.pytree"
        )


def _scalar(value: Any) -> Any:
    """Array scalars, numpy's and jax's, as the plain value they hold."""
    return value.item() if isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0 else value


def _inside_jax(value: Any) -> bool:
    """jax rebuilds plugs with tracers, shapes, shardings or placeholder objects in their fields; those are no user's."""
    if isinstance(value, jax.core.Tracer) or type(value) is object:
        return True
    return type(value).__module__.split(".")[0] in ("jax", "jaxlib") and not isinstance(value, jax.Array)
