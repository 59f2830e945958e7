"""The standard streams of a process that is the command: closed ones, full disks, encodings that lack a character."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def drop_output() -> None:
    """What standard output still holds is written, or goes nowhere if it cannot be."""
    try:
        print(end="", flush=True)
    except OSError:
        with suppress(OSError):  # no file of the system, in a program that caught the output
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def open_closed_streams() -> None:
    """A closed standard stream's number would go to the next file that is opened, which then gets what is printed."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)
            if name != "stdin":  # a question that was to come from there is missed
                setattr(sys, name, os.fdopen(number, "w", encoding="utf-8"))


@contextmanager
def escape_output() -> Iterator[None]:
    """Inside, what the encoding of the output cannot say is printed as an escape, and no error."""
    changed = [(s, s.errors) for s in (sys.stdout, sys.stderr) if hasattr(s, "reconfigure")]
    for stream, _ in changed:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in changed:
            with suppress(OSError, ValueError):  # it was closed meanwhile
                stream.reconfigure(errors=errors)
