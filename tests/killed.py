"""Processes that are killed, cheaply: each is forked, within milliseconds, from one that has only imported what they need."""

import multiprocessing
import signal
import sys

# No device is ever asked for in the process they are forked from: what jax and Orbax start in threads would be lost by a fork.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["djax.conversion", "djax.training", "orbax.checkpoint.experimental.v1", "transformers"])


def start(function, *arguments, **options):
    process = CONTEXT.Process(target=function, args=arguments, kwargs=options)
    process.start()
    return process


def end(process):
    """Whether it came to its end, rather than being killed. Fails if it failed."""
    process.join()
    code = process.exitcode
    process.close()
    assert code in (0, -signal.SIGKILL)
    return code == 0


def die_at(operation):
    """Kill this process just before its n-th operation on files from now on, counted from 0."""
    left = operation

    def hook(event, arguments):
        nonlocal left
        if event == "open" or event.startswith(("os.", "fcntl.")):
            left -= 1
            if left < 0:
                signal.raise_signal(signal.SIGKILL)

    sys.addaudithook(hook)


def interrupt_at(*operations):
    """Interrupt this process, as Ctrl-C does, just before these of its operations on files from now on, counted from 0."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seen = -1

    def hook(event, arguments):
        nonlocal seen
        if event == "open" or event.startswith(("os.", "fcntl.")):
            seen += 1
            if seen in operations:
                signal.raise_signal(signal.SIGINT)

    sys.addaudithook(hook)
