"""The compiled programs a process keeps: the last ones used, each compiled once however many threads ask for it."""

import threading
import time
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import jax
import numpy as np

R = TypeVar("R")


def kinds(arguments: object) -> Hashable:
    """What a program's arguments are, without their values: their tree, and each leaf's shape, dtype and place."""
    leaves, tree = jax.tree.flatten(arguments)
    return tree, tuple((np.shape(a), getattr(a, "dtype", type(a)), getattr(a, "sharding", None)) for a in leaves)


class Programs:
    """A bounded store of compiled programs, safe under threads.

    Invariants: at most `most` programs are kept, also while others compile; a key is compiled by one thread at a time, and a
    thread that asks for it meanwhile waits for that one. If the compile fails, its error goes to the thread that ran it, and a
    waiting thread tries anew.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock = threading.Lock()
        # In the order of their use, the oldest first.
        self._kept: dict[Hashable, Any] = {}
        self._compiling: dict[Hashable, threading.Event] = {}

    def get(self, key: Hashable, compile: Callable[[], R]) -> tuple[R, float]:
        """The program of a key, and the seconds it took to get it: 0 if it was kept."""
        began = time.perf_counter()
        waited = False
        while True:
            with self._lock:
                if key in self._kept:
                    program = self._kept[key] = self._kept.pop(key)
                    return program, time.perf_counter() - began if waited else 0.0
                done = self._compiling.get(key)
                if done is None:
                    done = self._compiling[key] = threading.Event()
                    break
            waited = True
            done.wait()
        try:
            program = compile()
            with self._lock:
                while len(self._kept) >= self.most:
                    del self._kept[next(iter(self._kept))]
                self._kept[key] = program
        finally:
            with self._lock:
                del self._compiling[key]
            done.set()
        return program, time.perf_counter() - began

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()


# A program of a CPU takes hundreds of memory mappings, of which Linux gives a process 65,530: without a bound a long sweep over
# decoders or lengths ends in an abort.
PROGRAMS = Programs(most=32)
