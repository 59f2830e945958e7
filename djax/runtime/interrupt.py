"""Ctrl-C in the `djax` command: one line and exit status 130 at any moment, and no traceback.

Only a process that is the command gets this, not a program that imports djax. What comes before this module is imported, while
the interpreter starts, is Python's own to answer.
"""

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

STATUS = 130
# How long the main thread may take to notice an interrupt before the process ends without it: Python's handlers wait while
# XLA compiles or runs.
PATIENCE = 2.0
# A second interrupt within this time is the same Ctrl-C: a terminal sends one to each process, and a wrapper
# passes its own on.
SAME = 1.0
_AGAIN = b"\0"  # no signal has this number


def leave(signum: int | None = None, frame: object = None) -> NoReturn:
    """End the process here and now, with the one line."""
    with contextlib.suppress(OSError):
        os.write(2, b"djax: interrupted\n")
    os._exit(STATUS)


def leave_while_importing() -> None:
    """Until `hold` an interrupt ends the process, if it is the command: there is nothing yet that would need cleaning up."""
    given = sys.orig_argv
    command = os.path.basename(sys.argv[0]) == "djax" or ("-m", "djax.cli") in itertools.pairwise(given)
    # A process that was started to ignore interrupts, or handles them itself, stays as it is.
    if command and _main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)


def _main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def hold() -> Iterator[Callable[[], bool]]:
    """Inside, an interrupt is raised as `KeyboardInterrupt` once, so that what is half done is cleaned up; a second one a while
    later, or a main thread that does not come back from XLA, ends the process. Yields a function: did an interrupt come?

    Does nothing unless `leave_while_importing` did something.
    """
    if not _main_thread() or signal.getsignal(signal.SIGINT) is not leave:
        yield lambda: False
        return
    came: list[float] = []  # when the interrupt that is being raised came
    raised = threading.Event()

    def interrupt(signum: int, frame: object) -> None:
        if not came:
            came.append(time.monotonic())
            raised.set()
            raise KeyboardInterrupt

    # C's part of a signal handler writes into this pipe at once, wherever the main thread is.
    inlet, outlet = os.pipe()
    os.set_blocking(outlet, False)

    def watch() -> None:
        while kind := os.read(inlet, 1):
            if kind == _AGAIN:
                time.sleep(0.01)  # until the main thread is out of what swallowed it
                raised.clear()
                came.clear()
                main = threading.main_thread().ident
                assert main is not None, "the main thread runs"
                signal.pthread_kill(main, signal.SIGINT)
            elif kind[0] == signal.SIGINT:
                while not raised.wait(PATIENCE) or time.monotonic() - came[0] > SAME:
                    # Another handler holds interrupts back for a while, as the removal of what is half-written does.
                    if signal.getsignal(signal.SIGINT) in (interrupt, leave):
                        leave()
                    time.sleep(0.02)

    def report(problem: Any) -> None:
        """An interrupt that came in a finalizer, where nothing can be raised, is raised again."""
        if came and issubclass(problem.exc_type, KeyboardInterrupt):
            os.write(outlet, _AGAIN)
        else:
            ignored(problem)

    ignored = sys.unraisablehook
    threading.Thread(target=watch, name="djax interrupts", daemon=True).start()
    sys.unraisablehook = report
    signal.set_wakeup_fd(outlet, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: bool(came)
    finally:
        # While the interpreter ends there is nobody to catch anything.
        signal.signal(signal.SIGINT, (lambda signum, frame: os._exit(STATUS)) if came else leave)
