"""Checks of the public door: one sentence that names the argument, the expectation, what came and what would work.

Reading an argument may run code of its own (`__array__`, `__len__`, `__repr__`, a plug's methods). `reading` turns whatever
that raises into a typed error, so that nothing an argument holds comes out of a public function as anything else.
"""

import contextlib
import math
import numbers
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from djax.errors import DjaxError, OptionError

INT32_MAX = 2**31 - 1
# The longest value an error shows. A repr may be as long as the value it stands for.
_SHOWN = 400
# Decoders may hold decoders; jax and repr follow them by recursion.
MOST_NESTED = 16


@contextlib.contextmanager
def reading(name: str, kind: type[DjaxError] = OptionError) -> Iterator[None]:
    """Raise `kind`, naming the argument, for what its own code raises. Typed errors and interrupts pass."""
    try:
        yield
    except (DjaxError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # libraries derive panics from BaseException
        raise kind(f"{name}: reading it raised {describe(error)}") from error


def describe(error: BaseException) -> str:
    """An error's type and words in one line."""
    try:
        words = " ".join(str(error).split())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        words = ""
    return _cut(f"{type_name(error)}: {words}" if words else type_name(error))


def show(value: object) -> str:
    """The value's repr, cut to a length that an error can hold. Values that cannot be printed are named by their type."""
    try:
        text = repr(value)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # also of int, which refuses to print more than 4300 digits
        text = f"a {type_name(value)} that cannot be printed"
    return _cut(text)


def type_name(value: object) -> str:
    """The name of its type, whatever the type's metaclass says."""
    return type.__dict__["__name__"].__get__(type(value))


def _cut(text: str) -> str:
    # No terminal or log can write lone surrogates. A repr may be of a subclass of str.
    text = str.__str__(text)[: _SHOWN + 1].encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def number(
    plug: object,
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
    if not _is_traced(value) and not (optional and value is None):
        name = f"{type(plug).__name__}({field}=...)"
        object.__setattr__(plug, field, real_number(value, name, above=above, at_least=at_least, at_most=at_most))


def integer(plug: object, field: str, *, at_least: int, at_most: int = INT32_MAX, optional: bool = False) -> None:
    """Check an integer field of a plug in its `__post_init__`, and store it as an int; None passes where it is optional."""
    value = getattr(plug, field)
    if not _is_traced(value) and not (optional and value is None):
        name = f"{type(plug).__name__}({field}=...)"
        object.__setattr__(plug, field, whole_number(value, name, at_least=at_least, at_most=at_most))


def flag(plug: object, field: str) -> None:
    """Check a true-or-false field of a plug in its `__post_init__`."""
    value = getattr(plug, field)
    if not _is_traced(value):
        object.__setattr__(plug, field, boolean(value, f"{type(plug).__name__}({field}=...)"))


def one_of(plug: object, field: str, words: tuple[str, ...]) -> None:
    """Check a static field of a plug that is one of a few words."""
    object.__setattr__(plug, field, word(getattr(plug, field), f"{type(plug).__name__}({field}=...)", words))


def word(value: object, name: str, words: Sequence[str], more: str = "") -> str:
    """`value` as one of a few words, or `OptionError`. more: what else is allowed, for the message."""
    plain = plain_text(value)
    if plain is None or plain not in words:
        raise OptionError(f"{name}: expected one of {', '.join(words)}{more}, got {show(value)}")
    return plain


def plain_text(value: object) -> str | None:
    """A string itself, not of a subclass, whose methods may be others; None for all else."""
    return str.__str__(value) if issubclass(type(value), str) else None


def real_number(
    value: object, name: str, *, above: float | None = None, at_least: float | None = None, at_most: float | None = None
) -> float:
    """`value` as a float that is finite and within its bounds even when rounded to float32, or `OptionError`."""
    limits = (("above", above), ("at least", at_least), ("at most", at_most))
    expected = "expected a finite number" + "".join(f" {word} {limit}" for word, limit in limits if limit is not None)
    with reading(f"{name}: {expected}"):
        came = scalar(value)
        if type(came) is bool or not isinstance(came, numbers.Real):
            raise OptionError(f"{name}: {expected}, got {show(value)} of type {type_name(value)}")
        try:
            # Not float(), which a subclass may replace.
            plain = float.__float__(came) if isinstance(came, float) else float(came)
        except OverflowError:
            plain = math.inf
        with np.errstate(over="ignore", under="ignore"):
            rounded = float(np.float32(plain))
    low = (above is not None and rounded <= above) or (at_least is not None and rounded < at_least)
    if not math.isfinite(rounded) or low or (at_most is not None and rounded > np.float32(at_most)):
        raise OptionError(f"{name}: {expected}, got {show(came)}")
    return plain


def whole_number(value: object, name: str, *, at_least: int, at_most: int = INT32_MAX) -> int:
    """`value` as an int within its bounds, or `OptionError`: bools and floats are not whole numbers, however round."""
    expected = f"expected a whole number, at least {at_least} and at most {at_most}"
    with reading(f"{name}: {expected}"):
        plain = integral(scalar(value))
    if plain is None:
        raise OptionError(f"{name}: {expected}, got {show(value)} of type {type_name(value)}")
    if not at_least <= plain <= at_most:
        raise OptionError(f"{name}: {expected}, got {show(plain)}")
    return plain


def whole_numbers(value: object, name: str, count: int, **bounds: int) -> list[int]:
    """One whole number for each of `count` prompts, from a sequence or array of them or from one for all, or `OptionError`."""
    with reading(name):
        values: Any = value
        if is_array(value):
            array = plain_array(value, name)
            if array.ndim > 1:
                raise OptionError(f"{name}: expected one whole number, or one a prompt, got an array of shape {array.shape}")
            several, values = array.ndim == 1, array
        else:
            several = isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)
        if several:
            if len(values) != count:
                raise OptionError(
                    f"{name}: expected one whole number, or one for each of the {count} prompts, got {len(values)}"
                )
            values = [values[i] for i in range(count)]
    if not several:
        return [whole_number(value, name, **bounds)] * count
    return [whole_number(one, name, **bounds) for one in values]


def boolean(value: object, name: str) -> bool:
    """`value` as a bool, or `OptionError`: numbers are not true or false."""
    with reading(f"{name}: expected True or False"):
        plain = scalar(value)
        if type(plain) is not bool:  # isinstance believes a class that says it is another
            raise OptionError(f"{name}: expected True or False, got {show(value)} of type {type_name(value)}")
    return plain


def path(value: object, name: str) -> Path:
    """`value` as a path, with a leading ~ expanded, or `OptionError`."""
    return Path(path_text(value, name)).expanduser()


def path_text(value: object, name: str, kind: type[DjaxError] = OptionError) -> str:
    """`value` as the text of a path, there or not; `OptionError` for what is no path, `kind` for one that cannot be."""
    with reading(name):
        if not isinstance(value, str | os.PathLike):
            raise OptionError(f"{name}: expected a path, got {show(value)} of type {type_name(value)}")
        plain = plain_text(os.fspath(value))
        if plain is None:
            raise OptionError(f"{name}: expected a path as text, got {show(value)} of type {type_name(value)}")
    try:
        os.stat(Path(plain).expanduser())
    except (FileNotFoundError, NotADirectoryError):
        pass
    # ValueError is for null characters and lone surrogates, RuntimeError for the home of a user who has none.
    except (ValueError, RuntimeError) as error:
        raise kind(f"{name}: {show(plain)} is no path: {error}") from error
    except OSError as error:
        raise kind(f"{name}: {show(plain)} cannot be used: {error.strerror}") from error
    return plain


def plug(value: object, name: str, contract: type | tuple[str, ...], there_are: str) -> None:
    """Check that `value` keeps its contract, a base class to extend or methods to have, and is a pytree."""
    with reading(name):
        if isinstance(contract, type):
            keeps = issubclass(type(value), contract)
            there_are += f", or a class of your own that extends djax.{contract.__name__}"
        else:
            keeps = not isinstance(value, type) and all(callable(getattr(value, m, None)) for m in contract)
        if not keeps:
            raise OptionError(f"{name}: expected one of {there_are}, got {show(value)}")
        leaves = jax.tree.leaves(value)
    if any(leaf is value for leaf in leaves):
        raise OptionError(f"{name}: {type_name(value)} is no pytree; decorate the class with djax.pytree")


def is_array(value: object) -> bool:
    """Whether it is an array of numpy, jax or torch, or presents itself as one. Its own code may run (`reading`)."""
    return not isinstance(value, type) and hasattr(value, "__array__")


def plain_array(value: object, name: str, kind: type[DjaxError] = OptionError) -> np.ndarray:
    """An array of anybody's as numpy's own, of bools, integers or floats. Raises `kind` for what is hidden or is none of these.

    numpy counts timedeltas among the integers, and forgets the mask of a masked array.
    """
    with reading(name, kind):
        array = np.asanyarray(value)
        if isinstance(array, np.ma.MaskedArray):
            if np.any(np.ma.getmaskarray(array)):
                raise kind(
                    f"{name}: expected an array without hidden values, got a masked array that hides some; pass what its mask "
                    "leaves (`.compressed()`), or for prompts a mapping with input_ids and attention_mask"
                )
            array = array.data
        array = np.asarray(array)
        if array.dtype.kind == "V":  # bfloat16, int4 and the like are no kinds of numpy's own
            for wide, kinds in ((np.float64, jnp.floating), (np.int64, jnp.integer)):
                array = array.astype(wide) if jnp.issubdtype(array.dtype, kinds) else array
        if array.dtype.kind not in "biuf":
            raise kind(f"{name}: expected an array of numbers, got {array.dtype} of shape {array.shape}")
    return array


def scalar(value: Any) -> Any:
    """Scalars of numpy, jax and torch as the plain number they hold, None for those that are no numbers; anything else as it
    is. Its own code may run (`reading`)."""
    if isinstance(value, int | float | str) or not is_array(value) or np.ndim(value) != 0:
        return value
    try:
        return plain_array(value, "").item()
    except OptionError:
        return None


def integral(value: object) -> int | None:
    """A plain whole number as an int itself, not of a subclass; None for bools and all else."""
    if type(value) is bool or not isinstance(value, numbers.Integral):
        return None
    # Not int(), which a subclass may replace.
    return int.__index__(value) if isinstance(value, int) else int(value)


def _is_traced(value: object) -> bool:
    """Whether jax is tracing a function that makes this plug: then its numbers have no values yet."""
    return issubclass(type(value), jax.core.Tracer)
