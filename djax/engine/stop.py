"""Stop strings: what a user gives, and where they end an answer."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from djax.checks import plain_text, show, type_name
from djax.errors import OptionError

MOST = 16
# A prefix of the tokens may end inside a character of up to four bytes, whose replacement characters are more than one.
_SLACK = 8


def read(value: Any, count: int) -> list[tuple[str, ...]]:
    """The stop strings of each of `count` prompts, () for none.

    None, a string, or a list or tuple of strings holds for all prompts. A list or tuple with a list, a tuple or None in it has
    one entry for each prompt, and no string of its own. Raises `OptionError`.
    """
    if type(value) not in (list, tuple) or not any(one is None or type(one) in (list, tuple) for one in value):
        return [_strings(value, "stop")] * count
    if len(value) != count:
        raise OptionError(f"stop: expected strings, or a list with one entry for each of the {count} prompts, got {len(value)}")
    for i, one in enumerate(value):
        if one is not None and type(one) not in (list, tuple):
            raise OptionError(
                f"stop: expected in entry {i} of a list with one entry a prompt None or a list of strings, got {show(one)} "
                f"of type {type_name(one)}"
            )
    return [_strings(one, f"stop, prompt {i}") for i, one in enumerate(value)]


def _strings(value: Any, name: str) -> tuple[str, ...]:
    given = () if value is None else value if type(value) in (list, tuple) else (value,)
    if len(given) > MOST:
        raise OptionError(f"{name}: expected at most {MOST} strings, got {len(given)}")
    plain = []
    for one in given:
        text = plain_text(one)
        if text is None:
            raise OptionError(f"{name}: expected None, a string or a list of strings, got {show(one)} of type {type_name(one)}")
        if not text:
            raise OptionError(f"{name}: expected strings of at least one character, got ''")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise OptionError(f"{name}: expected text that UTF-8 can write, got {show(text)}: {error}") from error
        plain.append(text)
    return tuple(plain)


def find(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where the first of the strings stands in the text, the longest if several stand there, and which; None without any."""
    found = [(at, -len(stop), stop) for stop in stops if (at := text.find(stop)) >= 0]
    return (min(found)[0], min(found)[2]) if found else None


def count_before(decode: Callable[[np.ndarray], str], tokens: np.ndarray, before: str) -> int:
    """How many of the leading tokens, at most, have a text that `before`, a beginning of all tokens' text, begins with."""
    low, high = 0, len(tokens)
    # Texts grow with their tokens, but for characters at the end that are not whole.
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(decode(tokens[:middle])) <= len(before) else (low, middle - 1)
    start = min(len(tokens), low + _SLACK)
    return next(n for n in range(start, -1, -1) if n == 0 or before.startswith(decode(tokens[:n])))
