"""Read the number that an answer states, exactly. A text that is no number is not read as some part of it that is one."""

import re
import unicodedata
from fractions import Fraction

# What may stand before and after a number: Markdown, LaTeX, quotes, currency ($ stands for all), the end of a sentence.
_BEFORE, _AFTER = r"""[*_`~"'“”(\[{\\$ ]""", r"""[*_`~"'“”)\]}\\$%.,;:! ]"""
_MINUS = "−–－﹣"  # noqa: RUF001  (what is written for a minus)


def _decimal(name: str) -> str:
    """A pattern of digits with or without decimals, thousands set apart by one kind of sign: each three digits, none but 0."""
    thousands = rf"(?!0)\d{{1,3}}(?P<{name}>[,_'\u2019\u00a0\u2009\u202f])\d{{3}}(?:(?P={name})\d{{3}})*"
    return rf"(?:{thousands}|\d+)(?:\.\d*)?|\.\d+"


# Possessive, so that no text takes long.
_LINE = re.compile(
    rf"{_BEFORE}*+(?P<sign>[-+{_MINUS}])?(?:(?! ){_BEFORE})*+(?P<top>{_decimal('a')})"
    rf"(?:[eE](?P<power>[-+{_MINUS}]?\d{{1,4}})|[/\u2044](?P<bottom>{_decimal('b')}))?+"
    rf"{_AFTER}*+(?:(?<![\d.,])(?P<words>[^\W\d_].*))?"
)
_FRACTION = re.compile(r"(\d?)\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
# Words after a number that make it another one: a figure, or a scale.
_FIGURE = re.compile(r"\W*+\d")
_SCALE = re.compile(
    r"\b(?:(?i:hundred|thousand|million|billion|trillion|lakh|crore|dozen|half|halve|third|quarter)s?|[kKMB]|[bm]n)\b"
)
# Python makes no number of more digits than these from text, unless it is told to.
_DIGITS = 4000


def stated_result(text: str) -> Fraction | None:
    r"""The number after the last `####` of an answer; None if no number, or more than one, stands there.

    Read is the rest of that line, or the next line with something in it. The number may have a sign, thousands set apart
    (1,234), decimals, an exponent (1e3) or a denominator (5/2); around it Markdown, LaTeX (`\boxed{}`, `\frac{}{}`, `$`),
    currency and percent signs (50% is 50) and a period; and after a space words, such as a unit. So 1,23 and 12k are no
    numbers, and nor are 12 million, 2 1/2, 3 to 5 and x = 12.
    """
    _, mark, rest = text.rpartition("####")
    line = rest.strip().split("\n")[0].strip() if mark else ""
    line = "".join("$" if unicodedata.category(c) == "Sc" else c for c in line)
    for written, meant in (("\\,", ","), ("{,}", ","), ("\\boxed", "")):
        line = line.replace(written, meant)
    # A digit before a fraction makes a mixed number.
    line = _FRACTION.sub(lambda found: f"{found[1]} " * bool(found[1]) + f"{found[2].strip()}/{found[3].strip()}", line)
    found = _LINE.fullmatch(line)
    if found is None:
        return None
    words = found["words"] or ""
    if _SCALE.search(words) or any(_FIGURE.match(word) for word in words.split()):
        return None
    try:
        number = _number(found["top"]) / (_number(found["bottom"]) if found["bottom"] else 1)
        if found["power"]:
            number *= Fraction(10) ** int(re.sub(f"[{_MINUS}]", "-", found["power"]))
    except (ValueError, ZeroDivisionError):
        return None
    return -number if found["sign"] and found["sign"] != "+" else number


def _number(digits: str) -> Fraction:
    """Raises `ValueError` for more digits than Python reads."""
    whole, _, decimals = "".join(c for c in digits if c.isdecimal() or c == ".").partition(".")
    if len(whole) + len(decimals) > _DIGITS:
        raise ValueError("too many digits")
    return Fraction(int(whole + decimals or "0"), 10 ** len(decimals))
