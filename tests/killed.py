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
