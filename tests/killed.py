"""Processes that are killed, cheaply: each is forked, within milliseconds, from one that has only imported what they need."""

import multiprocessing
import os
import random
import signal
import sys
import time

# `DJAX_TEST_MOMENTS=40 pytest -n 0 -s tests -k killed` kills each of them so often: conversions both ways, recording, both
# trainings, compiling; it prints what came of it.
MOMENTS = os.environ.get("DJAX_TEST_MOMENTS")

# No device is ever asked for in the process they are forked from: what jax and Orbax start in threads would be lost by a fork.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["djax.checkpoints.conversion", "djax.training", "orbax.checkpoint.experimental.v1", "transformers"]
)


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


def kill_at_moments(count, begin, writes, check, what):
    """Kill processes at `count` moments and check what each has left: a third from start to end, a third from where they begin
    to write to their end, a third at operations on files.

    begin: (operation) starts one; unless that is None it kills itself at this operation (`die_at`).
    writes: () whether it has begun to write. check: () sees what is left, goes on with it, and clears it away.
    Prints how many were killed before their end; fails unless half of them were.
    """
    rng = random.Random(0)

    def wait_until_it_writes(process):
        while process.is_alive() and not writes():
            time.sleep(0.001)

    for _ in range(2):  # the first starts the process that the others are forked from
        began = time.monotonic()
        process = begin(None)
        wait_until_it_writes(process)
        before = time.monotonic() - began
        assert end(process), "it comes to its end if it is left alone"
        seconds = time.monotonic() - began
        check()
    cut = tried = 0
    while tried < count or (cut < count / 2 and tried < 3 * count):
        process = begin(int(2 ** rng.uniform(0, 8)) if tried % 3 == 2 else None)
        if tried % 3 == 0:
            wait_until_it_writes(process)
            time.sleep(rng.uniform(0, seconds - before))
            process.kill()
        elif tried % 3 == 1:
            time.sleep(rng.uniform(0, seconds))
            process.kill()
        cut += not end(process)
        check()
        tried += 1
    print(f"{what}: killed {cut} of {tried} before their end, nothing lost")
    assert cut >= count / 2


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
