"""What the process around a call may change: jax's settings, which djax overrides, and a fork, which it refuses."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

from djax.errors import ForkError, OptionError

# jax's defaults for every setting that changes what a computation gives, or whether it runs.
SETTINGS: tuple[tuple[Callable[..., Any], Any], ...] = (
    (jax.enable_x64, False),
    (jax.numpy_dtype_promotion, "standard"),
    (jax.default_matmul_precision, None),
    (jax.default_prng_impl, "threefry2x32"),
    (jax.threefry_partitionable, True),
    (jax.disable_jit, False),
    (jax.no_tracing, False),
    (jax.debug_nans, False),
    (jax.debug_infs, False),
    (jax.debug_key_reuse, False),
    (jax.transfer_guard, "allow"),
)
P = ParamSpec("P")
R = TypeVar("R")
_used = False
_forked = False


@contextlib.contextmanager
def own_settings() -> Iterator[None]:
    """Compute as under jax's defaults, whatever the user has set (`SETTINGS`), in this thread until the block ends.

    Raises `ForkError` in a process that was forked from one in which jax already ran.
    """
    global _used
    if _forked:
        raise ForkError(
            "this process was forked from one in which jax had already computed, whose threads it lacks: it would wait for "
            "them forever; start it with multiprocessing.get_context('spawn') or 'forkserver', or load the model after the fork"
        )
    _used = True
    with contextlib.ExitStack() as stack:
        for setting, value in SETTINGS:
            stack.enter_context(setting(value))
        yield


def with_own_settings(function: Callable[P, R]) -> Callable[P, R]:
    """Run all of a public function under `own_settings`."""

    @functools.wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> R:
        with own_settings():
            return function(*arguments, **options)

    return run


def refuse_transfer_guard(error: Exception) -> None:
    """Raise `OptionError` if jax refused a transfer: a guard of the whole process binds the threads of Orbax, too, in which
    `own_settings` does not hold."""
    for way in ("host_to_device", "device_to_host", "device_to_device"):
        if f"Disallowed {way.replace('_', '-')} transfer" in str(error):
            name = f"jax_transfer_guard_{way}"
            raise OptionError(
                f"the setting {name} forbids Orbax to move parameters; set it to 'allow' for this call"
            ) from error


def make_key(seed: jax.Array | int) -> jax.Array:
    """jax.random.key(seed) for a seed below 2**32, under every setting of jax: of threefry2x32, with no offset."""
    low = jnp.asarray(seed, jnp.uint32)
    return jax.random.wrap_key_data(jnp.stack([jnp.zeros_like(low), low], axis=-1), impl="threefry2x32")


def _note_fork() -> None:
    global _forked
    bridge = sys.modules.get("jax._src.xla_bridge")
    started = getattr(bridge, "backends_are_initialized", lambda: _used)
    _forked = _forked or _used or started()


os.register_at_fork(after_in_child=_note_fork)
