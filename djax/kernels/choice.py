"""Which kernels a program may have: a static value that is read once at a public door and passed down to what is traced."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Literal, ParamSpec, TypeVar, get_args

import jax

from djax.errors import OptionError

ENVIRONMENT = "DJAX_KERNELS"
# "djax": djax's own kernels, Pallas on a GPU and C++ on a CPU. "portable": those of them that run
# in a process without djax. "xla": XLA's operations alone, to compare with, or in doubt.
Kernels = Literal["djax", "portable", "xla"]
P = ParamSpec("P")
R = TypeVar("R")
# A context of jax: of each thread its own, and part of the key under which jax caches a trace.
_traced = jax.make_user_context("djax")


def read_choice() -> Kernels:
    """What DJAX_KERNELS asks for. Only public doors call it, never code that is traced.

    Raises `OptionError` for a value that is neither "djax" nor "xla".
    """
    choice = os.environ.get(ENVIRONMENT, "djax")
    if choice == "djax":
        return "djax"
    if choice == "xla":
        return "xla"
    raise OptionError(f"{ENVIRONMENT}: expected 'djax' or 'xla', got {choice!r}")


def restrict_to_portable(kernels: Kernels) -> Kernels:
    """The choice for a program that is to run in a process without djax."""
    return "portable" if kernels == "djax" else kernels


@contextlib.contextmanager
def use_kernels(kernels: Kernels) -> Iterator[None]:
    """What this thread traces inside has these kernels. Invariant: other threads do not notice,
    and no trace that jax cached under another choice is used."""
    assert kernels in get_args(Kernels), kernels
    with _traced(kernels):
        yield


def without_kernels() -> contextlib.AbstractContextManager[None]:
    """What this thread traces inside is XLA's operations alone: for shapes, which no kernel changes,
    and which must not wait for a compiler."""
    return use_kernels("xla")


def traced_kernels() -> Kernels:
    """The kernels of what is traced now; "djax" outside of any `use_kernels`."""
    return _traced.value


def with_wanted_kernels(function: Callable[P, R]) -> Callable[P, R]:
    """Run all of a public function with the kernels that DJAX_KERNELS asks for when it is called."""

    @functools.wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> R:
        with use_kernels(read_choice()):
            return function(*arguments, **options)

    return run
