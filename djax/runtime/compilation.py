"""The persistent compilation cache: on by default, private to the user, easy to turn off.

A decode is one XLA program; compiling it takes seconds, reading it back a fraction of one.
"""

import os
import threading
import warnings

import jax
from jax.experimental.compilation_cache import compilation_cache

from djax.checks import path
from djax.errors import OptionError
from djax.runtime.cache_entries import keep_entries_whole
from djax.runtime.private import check_contents, default_directory, private_directory

ENVIRONMENT = "DJAX_COMPILE_CACHE"
_OFF = ("off", "0", "no", "false")
_lock = threading.RLock()
_decided = False


def compile_cache(directory: str | os.PathLike | None) -> None:
    """Keep compiled programs in `directory`, or keep none (None). Overrides the default and DJAX_COMPILE_CACHE.

    directory: an absolute path on a local disk; ~ is expanded. It is made private, with `OptionError` where it cannot be
    (`private_directory`), or where it holds what another user put there. For a remote cache use jax's own setting instead.
    """
    _keep_in(directory if directory is None else path(directory, "compile cache"), "compile cache")


def enable_cache() -> None:
    """Turn the default cache on, once, unless the user has decided: by `compile_cache`, by jax's own setting, or by
    the environment (DJAX_COMPILE_CACHE=off, or a directory). A default directory that cannot be used is a warning."""
    global _decided
    with _lock:
        if _decided:
            return
        wish = os.environ.get(ENVIRONMENT, "")
        here = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009  (its stubs lack it)
        if wish.lower() in _OFF or (not wish and here):
            _decided = True
        elif wish:
            _keep_in(wish, ENVIRONMENT)
        else:
            try:
                _keep_in(default_directory() / "xla", "compile cache")
            except (OSError, OptionError) as error:
                _decided = True
                warnings.warn(f"no compile cache, programs compile anew in each process: {error}", stacklevel=3)


def _keep_in(directory: str | os.PathLike | None, argument: str) -> None:
    """argument: how messages name the directory."""
    global _decided
    with _lock:
        if directory is not None:
            directory = private_directory(directory, argument)
            # jax loads what lies there without a look at whose it is.
            check_contents(directory, argument)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        jax.config.update("jax_compilation_cache_dir", directory and str(directory))
        # jax settles whether it has a cache at its first compile; a program that used jax before djax must ask anew.
        compilation_cache.reset_cache()
        if directory is not None:
            keep_entries_whole(directory)
        _decided = True
