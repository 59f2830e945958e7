"""Checks of the public door: one sentence that names the argument, the expectation, what came and what would work."""

import math
import numbers
from typing import Any

import numpy as np

from djax.errors import OptionError


def number(
    plug: Any, field: str, *, above: float | None = None, at_least: float | None = None, at_most: float | None = None
) -> None:
    """Check a real field of a plug in its `__post_init__`, and store it as a float: 2 and 2.0 must not compile apart.

    Traced values pass: they were checked outside.
    """
    value = getattr(plug, field)
    if not _inside_jax(value):
        name = f"{type(plug).__name__}({field}=...)"
        object.__setattr__(plug, field, real_number(value, name, above=above, at_least=at_least, at_most=at_most))


def real_number(
    value: Any, name: str, *, above: float | None = None, at_least: float | None = None, at_most: float | None = None
) -> float:
    """`value` as a finite float within its bounds, or `OptionError`."""
    limits = (("above", above), ("at least", at_least), ("at most", at_most))
    bound = "".join(f" {word} {limit}" for word, limit in limits if limit is not None)
    expected = f"expected a finite number{bound}"
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real | np.number):
        raise OptionError(f"{name}: {expected}, got {value!r} of type {type(value).__name__}")
    below = (above is not None and value <= above) or (at_least is not None and value < at_least)
    if not math.isfinite(value) or below or (at_most is not None and value > at_most):
        raise OptionError(f"{name}: {expected}, got {value!r}")
    return float(value)


def boolean(value: Any, name: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise OptionError(f"{name}: expected True or False, got {value!r} of type {type(value).__name__}")
    return bool(value)


def integer(plug: Any, field: str, *, at_least: int, optional: bool = False) -> None:
    """Check an integer field of a plug in its `__post_init__`; None passes where the field is optional."""
    value = getattr(plug, field)
    if _inside_jax(value) or (optional and value is None):
        return
    whole_number(value, f"{type(plug).__name__}({field}=...)", at_least=at_least)


def whole_number(value: Any, name: str, *, at_least: int, at_most: int | None = None) -> int:
    """`value` as an int, or `OptionError`: bools and floats are not whole numbers, however round."""
    upper = f" and at most {at_most}" if at_most is not None else ""
    expected = f"expected a whole number, at least {at_least}{upper}"
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise OptionError(f"{name}: {expected}, got {value!r} of type {type(value).__name__}")
    if value < at_least or (at_most is not None and value > at_most):
        raise OptionError(f"{name}: {expected}, got {value}")
    return int(value)


def plug(value: Any, name: str, methods: tuple[str, ...], there_are: str) -> None:
    """Check that `value` is an instance (not a class) with the methods of its contract."""
    if isinstance(value, type) or not all(callable(getattr(value, m, None)) for m in methods):
        raise OptionError(f"{name}: expected one of {there_are}, got {value!r}")


def _inside_jax(value: Any) -> bool:
    """jax rebuilds plugs with tracers, shapes, shardings or placeholders in their fields; only plain values are a user's."""
    return not isinstance(value, int | float | complex | str | bytes | list | tuple | dict | np.generic | None)
