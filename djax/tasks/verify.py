"""Which answers are right: verifiers, asked under a time limit, and the two that ship.

A verifier is a function (problem, answer) -> score: the problem as it was given to `record` (a mapping with its "prompt"), the
answer's text, and a number from 0 to 1, or a bool. An answer is kept when its score reaches a limit.
"""

import ast
import decimal
import math
import numbers
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from djax.errors import OptionError, VerifierError
from djax.tasks import sandbox
from djax.tasks.stated import stated_result

# What is asked, as it was given, with what a verifier needs.
Question = Mapping[str, Any]
Verifier = Callable[[Question, str], float]


def exact(problem: Question, answer: str) -> float:
    """1 if the number after the answer's last `####` is the problem's "result", as numbers: 12.0 is 12, 3.5 is not 3.

    What counts as a number there: `djax.tasks.stated`. Raises `OptionError` for a result that is no number: text such as
    "12" too, because whether it means the number is not for a verifier to guess.
    """
    return float(stated_result(answer) == _number(problem["result"]))


def _number(result: object) -> Fraction:
    """A result exactly; a float is the decimal it prints as, which is what a file had. Raises `OptionError`."""
    if isinstance(result, numbers.Rational) and not isinstance(result, bool):
        return Fraction(int(result.numerator), int(result.denominator))
    if isinstance(result, float) and math.isfinite(result):
        return Fraction(float.__repr__(result))
    if isinstance(result, decimal.Decimal) and result.is_finite():
        return Fraction(result)
    hint = "; write it without quotes" if isinstance(result, str) and stated_result(f"#### {result}") is not None else ""
    raise OptionError(
        f'the verifier exact compares numbers: expected a finite number as "result", got {result!r:.100} '
        f"({type(result).__name__}){hint}"
    )


def python(problem: Question, answer: str, *, seconds: float = 10.0, megabytes: int = 1024) -> float:
    """1 if the answer, a Python snippet or a Markdown text with one, runs and the problem's "tests" (Python) pass after it.

    To pass, the tests, compiled apart from the answer and run in the namespace it leaves, must come to their end; the answer
    can neither see their text nor say so in their place. They run in a process of their own, with the standard library and an
    empty directory, environment and input, for at most `seconds` and in `megabytes` of memory. It may compute, import, look at
    the clock and read the standard library. Other files, anything written, other processes, threads, signals, and sockets are
    refused three times over: by Python's functions being taken away and an audit hook; on Linux (x86-64, AArch64) by a filter
    that lets through only the system calls a computing Python needs; from Linux 5.13 on by a rule on which files may be read
    (Landlock). A superuser's process drops its privileges. The process is killed when its time is over.

    What is left: the tests trust what they call. An answer whose objects claim to equal everything, or that defines a `len` of
    its own, passes tests that do not look closer, and one may read the names that tests define while they call it. Code that
    corrupts the interpreter's own memory is held by the system alone, and might then be judged right. On systems without these
    filters, such as macOS, only Python's hooks hold: where answers may mean harm there, use a container besides.

    Raises `OptionError` for tests that are no Python text, `VerifierError` if no process starts.
    """
    tests = _check_text(problem["tests"])
    return float(sandbox.run(snippet(answer), tests, seconds=seconds, megabytes=megabytes).passed)


def _check_text(tests: object) -> str:
    """The tests, if they are text that does something. Raises `OptionError`."""
    if not isinstance(tests, str) or not tests.strip():
        raise OptionError(
            f'the verifier python runs text: expected Python code as "tests", got {tests!r:.100} ({type(tests).__name__}); '
            "join a list of lines by newlines"
        )
    return tests


def _check_tests(tests: object) -> None:
    """Raise `OptionError` unless the tests are Python that can fail."""
    text = _check_text(tests)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the parser thinks of their style
            steps = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise OptionError(f'the verifier python: expected Python code as "tests", got {text!r:.100}: {error}') from error
    if not steps:
        raise OptionError(f'the verifier python: expected "tests" that can fail, got {text!r:.100}, which any answer passes')


def snippet(answer: str) -> str:
    """The code in an answer: its first fenced block, or all of it."""
    parts = answer.split("```")
    if len(parts) < 3:
        return answer
    language, _, rest = parts[1].partition("\n")
    return rest if language.strip().lower() in ("", "python", "py", "python3") else parts[1]


VERIFIERS: dict[str, Verifier] = {"exact": exact, "python": python}


def ask(verifier: Verifier, problem: Question, answer: str, seconds: float, where: str) -> float:
    """The verifier's score. Raises `VerifierError`, naming `where`, if it raises, takes longer than `seconds` or says no score.

    A verifier that hangs is left behind in a thread that does not keep the process from ending.
    """
    said: list[Any] = []
    raised: list[BaseException] = []

    def call() -> None:
        try:
            said.append(verifier(problem, answer))
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=call, daemon=True, name="djax verifier")
    thread.start()
    thread.join(seconds)
    name = getattr(verifier, "__name__", repr(verifier))
    if thread.is_alive():
        raise VerifierError(
            f"{where}: the verifier {name} has said nothing for {seconds:g} s; mend it, or pass more verifier_seconds"
        )
    if raised:
        error = raised[0]
        raise VerifierError(f"{where}: the verifier {name} raised {type(error).__name__}: {error}") from error
    score = said[0]
    is_number = isinstance(score, numbers.Real | np.bool_)
    if not is_number or not 0 <= score <= 1:
        raise VerifierError(f"{where}: the verifier {name} said {score!r}; expected a number from 0 to 1, or a bool")
    return float(score)


def name_of(verifier: Verifier | str) -> str:
    return verifier if isinstance(verifier, str) else getattr(verifier, "__name__", type(verifier).__name__)


def known(verifier: Verifier | str) -> Verifier:
    if callable(verifier):
        return verifier
    if verifier not in VERIFIERS:
        raise OptionError(f"verifier: expected a function or one of {', '.join(VERIFIERS)}, got {verifier!r}")
    return VERIFIERS[verifier]


def need(problems: Sequence[Mapping[str, Any]], verifier: Verifier | str) -> None:
    """Raise `OptionError`, naming the problem, if the shipped verifier's field is missing or is nothing it can judge by."""
    checks: dict[str, tuple[str, Callable[[Any], object]]] = {
        "exact": ("result", _number),
        "python": ("tests", _check_tests),
    }
    if not isinstance(verifier, str) or verifier not in checks:
        return
    field, check = checks[verifier]
    for n, problem in enumerate(problems):
        if field not in problem:
            raise OptionError(f"problem {n}: the verifier {verifier} needs its {field!r}; it has {', '.join(problem)}")
        try:
            check(problem[field])
        except OptionError as error:
            raise OptionError(f"problem {n}: {error}") from None
