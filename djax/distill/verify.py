"""Which answers are right: verifiers, asked under a time limit, and the two that ship.

A verifier is a function (problem, answer) -> score: the problem as it was given to `record` (a mapping with its "prompt"), the
answer's text, and a number from 0 to 1, or a bool. An answer is kept when its score reaches a limit.
"""

import contextlib
import math
import numbers
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from djax.distill.store import Problem, Store, Trajectory
from djax.errors import OptionError, TraceError, VerifierError
from djax.training.problems import stated_result

Verifier = Callable[[Problem, str], float]


def exact(problem: Problem, answer: str) -> float:
    """1 if the number after the answer's last `####` is the problem's "result"."""
    return float(stated_result(answer) == problem["result"])


def python(problem: Problem, answer: str, *, seconds: float = 10.0, megabytes: int = 1024) -> float:
    """1 if the answer, a Python snippet or a Markdown text with one, runs and the problem's "tests" (Python) pass after it.

    It runs in a process of its own, which is killed with its group when the time is over: isolated mode, an empty directory and
    environment, nothing on standard input; limits of the system on processor time, memory and file size, and for users other
    than root on new processes; sockets, other programs, and writing or removing files are refused by an audit hook. That holds
    off accidents and careless code, and code that ends early without passing. It is no prison: code that looks for a way out of
    Python's own hooks finds one, so use a container besides where answers may mean harm.
    """
    done = secrets.token_hex(16)
    source = f"{done}\n{snippet(answer)}\n\n{problem['tests']}\n"
    command = [sys.executable, "-I", "-S", "-B", "-c", _RUNNER, str(math.ceil(seconds)), str(megabytes << 20)]
    with tempfile.TemporaryDirectory(prefix="djax-sandbox-") as directory, tempfile.TemporaryFile() as given:
        given.write(source.encode(errors="replace"))
        given.seek(0)
        process = subprocess.Popen(
            command,
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env={},
            start_new_session=True,
        )
        with process.stdout:
            said = _read(process.stdout.fileno(), len(done), time.monotonic() + seconds)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    # Exit codes prove nothing: the snippet may have left early.
    return float(said == done.encode())


def _read(pipe: int, most: int, until: float) -> bytes:
    """What comes out of a pipe, up to one byte more than `most`, its end, or a time."""
    said = b""
    while len(said) <= most and select.select([pipe], [], [], max(until - time.monotonic(), 0))[0]:
        part = os.read(pipe, most + 1 - len(said))
        if not part:
            break
        said += part
    return said


def snippet(answer: str) -> str:
    """The code in an answer: its first fenced block, or all of it."""
    parts = answer.split("```")
    if len(parts) < 3:
        return answer
    language, _, rest = parts[1].partition("\n")
    return rest if language.strip().lower() in ("", "python", "py", "python3") else parts[1]


# What runs in the sandbox: reads a word and the source, limits itself, runs the source, and says the word if it came through.
_RUNNER = """
import os, resource, sys

def hook(event, arguments, writing=os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
    kind = event.split(".")[0]
    refused = kind in ("socket", "subprocess", "ctypes", "pty", "shutil", "sqlite3", "resource", "ftplib", "smtplib", "urllib")
    refused |= kind in ("fcntl", "signal")
    refused |= kind == "os" and event not in ("os.listdir", "os.scandir", "os.fwalk", "os.walk", "os.putenv", "os.unsetenv")
    if event == "open":
        refused = bool(arguments[2] & writing) if isinstance(arguments[2], int) else True
    if event == "import":
        refused = arguments[0] in ("_posixsubprocess", "_ctypes", "_sqlite3", "_socket")
    if refused:
        raise PermissionError(event + " is not allowed here")

def main():
    word, source = sys.stdin.buffer.read().decode().split("\\n", 1)
    seconds, size = int(sys.argv[1]), int(sys.argv[2])
    say = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    for what, limit in (("CPU", seconds), ("AS", size), ("FSIZE", 0), ("NOFILE", 64), ("CORE", 0), ("NPROC", 0)):
        hard = resource.getrlimit(getattr(resource, "RLIMIT_" + what))[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(getattr(resource, "RLIMIT_" + what), (limit, limit))
    code = compile(source, "answer.py", "exec")
    sys.addaudithook(hook)
    exec(code, {"__name__": "__main__"})
    os.write(say, word.encode())
    os._exit(0)

main()
"""

VERIFIERS: dict[str, Verifier] = {"exact": exact, "python": python}


def ask(verifier: Verifier, problem: Problem, answer: str, seconds: float, where: str) -> float:
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
    if not isinstance(score, numbers.Real | np.bool_) or not 0 <= score <= 1:
        raise VerifierError(f"{where}: the verifier {name} said {score!r}; expected a number from 0 to 1, or a bool")
    return float(score)


def keep(
    store: Store,
    verifier: Verifier | str,
    *,
    least: float = 1.0,
    first: int | None = None,
    verifier_seconds: float = 60.0,
    progress: Callable[[int], None] | None = None,
) -> list[Trajectory]:
    """The trajectories whose answer's score is at least `least`, in the store's order.

    verifier: a function, or the name of one that ships, whose scores are kept beside the parts, so that it is asked once.
    first: only of so many first trajectories, None for all. `progress` is called with the number done. Raises `VerifierError`,
    which leaves the store as it is, and `TraceError` if nothing is kept.
    """
    check = known(verifier)
    shipped = isinstance(verifier, str)
    name = name_of(verifier)
    kept, count, best = [], 0, 0.0
    for n in range(store.parts):
        part = store.part(n)
        if first is not None:
            part = part[: max(first - count, 0)]
        scores = store.scores(n, verifier) if shipped else None
        if scores is None or len(scores) < len(part):
            where = f"{store.directory}, part {n}, trajectory "
            scores = [ask(check, t.problem, t.text or "", verifier_seconds, where + str(i)) for i, t in enumerate(part)]
            if shipped:
                store.write_scores(n, verifier, scores)
        scores = scores[: len(part)]
        kept += [t for t, score in zip(part, scores, strict=True) if score >= least]
        count += len(part)
        best = max([best, *scores])
        if progress is not None:
            progress(count)
    if not kept:
        raise TraceError(
            f"{store.directory}: none of {count} trajectories has a score of {least:g} by the verifier {name} (the best has "
            f"{best:g}); record more, with surer settings, or look whether the verifier reads these answers"
        )
    return kept


def name_of(verifier: Verifier | str) -> str:
    return verifier if isinstance(verifier, str) else getattr(verifier, "__name__", type(verifier).__name__)


def known(verifier: Verifier | str) -> Verifier:
    if callable(verifier):
        return verifier
    if verifier not in VERIFIERS:
        raise OptionError(f"verifier: expected a function or one of {', '.join(VERIFIERS)}, got {verifier!r}")
    return VERIFIERS[verifier]


def need(problems: Sequence[Mapping[str, Any]], verifier: Verifier | str) -> None:
    """Raise `OptionError` if the shipped verifier's field is missing in a problem."""
    field = {"exact": "result", "python": "tests"}.get(verifier if isinstance(verifier, str) else "")
    if field is not None:
        for n, problem in enumerate(problems):
            if field not in problem:
                raise OptionError(f"problem {n}: the verifier {verifier} needs its {field!r}; it has {', '.join(problem)}")
