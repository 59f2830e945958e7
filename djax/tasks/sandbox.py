"""Run an answer's code and its tests where they can do no harm, and learn whether the tests passed.

Each run has a process of its own, started twice. `sandbox_lock.py` goes first: it limits the process, asks the system to
refuse whatever a computing Python does not need, and then replaces itself by a fresh interpreter, because what it calls the
system with (ctypes) must not be in reach of the answer. That interpreter runs `sandbox_child.py`: the answer, its tests, and
after them a word that was drawn for this run.
"""

import contextlib
import dataclasses
import functools
import marshal
import math
import os
import platform
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from djax.errors import VerifierError
from djax.tasks.sandbox_filter import EXECVE, filter_program

# How long an interpreter may take to start, however little time its answer gets: a busy machine proves nothing.
START_SECONDS = 30.0
# Loads one of the two programs from where the descriptor stands: compiled here once, not by every interpreter.
_LOAD = "import marshal, os; exec(marshal.loads(os.read({}, {})))"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """passed: the tests ran to their end. calls_filtered, files_closed: whether the system refuses calls (seccomp) and
    files (Landlock) that the answer does not need; where it does not, only Python's own hooks do."""

    passed: bool
    calls_filtered: bool
    files_closed: bool


def run(code: str, tests: str, *, seconds: float, megabytes: int) -> Outcome:
    """Run `code`, then `tests` in the same namespace, for at most `seconds` and in `megabytes` of memory.

    Raises `VerifierError` if no interpreter starts there, which says nothing about the answer.
    """
    for strict in (True, False):
        started, passed = _start(code, tests, seconds, megabytes, strict)
        if len(started) == 2:
            return Outcome(passed, files_closed=started[:1] == b"1", calls_filtered=started[1:] == b"1")
        # An interpreter that lies where the rules about files do not expect it. No code has run yet.
    raise VerifierError(
        f"the sandbox of the verifier python did not start: {_interpreter()} needs more than {megabytes} MB or cannot run "
        "without privileges; pass more megabytes, or look what `python -I -S` says"
    )


def _start(code: str, tests: str, seconds: float, megabytes: int, strict: bool) -> tuple[bytes, bool]:
    """What the child said when it began (nothing if it never did), and whether it said the word at its end."""
    word = secrets.token_hex(16).encode()
    code_bytes = code.encode(errors="replace")
    lock, child = _compile("sandbox_lock.py"), _compile("sandbox_child.py")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="djax-sandbox-"))
        given = stack.enter_context(tempfile.TemporaryFile())
        given.write(lock + child + b"%s\n%d\n" % (word, len(code_bytes)) + code_bytes + tests.encode(errors="replace"))
        given.seek(0)
        reading, writing = os.pipe()
        stack.callback(os.close, reading)
        try:
            machine = platform.machine()
            program = filter_program(machine, writing).hex()
            file = given.fileno()
            numbers = (math.ceil(seconds), megabytes << 20, file, writing, int(strict), EXECVE.get(machine, 0))
            first, second = (_LOAD.format(file, len(part)) for part in (lock, child))
            process = subprocess.Popen(
                [_interpreter(), "-I", "-S", "-B", "-c", first, *map(str, numbers), program, second],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=directory,
                env={},
                pass_fds=(file, writing),
                start_new_session=True,
            )
        finally:
            os.close(writing)
        try:
            started = _read(reading, 2, time.monotonic() + max(seconds, START_SECONDS))
            # One byte more than the word: whoever says more has not said it.
            said = _read(reading, len(word) + 1, time.monotonic() + seconds) if len(started) == 2 else b""
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    # Exit codes prove nothing: the answer may have left early.
    return started, secrets.compare_digest(said, word)


@functools.cache
def _compile(name: str) -> bytes:
    """One of the two programs, as the interpreter that runs it has it: the one that runs this."""
    file = Path(__file__).with_name(name)
    return marshal.dumps(compile(file.read_text("utf-8"), str(file), "exec"))


def _interpreter() -> str:
    """The Python that this one's environment was made from: nothing but the standard library is wanted."""
    base = getattr(sys, "_base_executable", None)
    return base if base and os.access(base, os.X_OK) else sys.executable


def _read(pipe: int, most: int, until: float) -> bytes:
    """What comes out of a pipe, up to `most` bytes, its end, or a time."""
    ready = select.poll()  # select.select takes no descriptor above 1023
    ready.register(pipe, select.POLLIN)
    said = b""
    while len(said) < most and ready.poll(max(until - time.monotonic(), 0) * 1000):
        part = os.read(pipe, most - len(said))
        if not part:
            break
        said += part
    return said
