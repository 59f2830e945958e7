"""The persistent compilation cache: on by default, private to the user, easy to turn off.

A decode is one XLA program; compiling it takes seconds, reading it back a fraction of one.
"""

import os
import stat
import warnings
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from djax.cache_entries import keep_entries_whole
from djax.errors import OptionError

ENVIRONMENT = "DJAX_COMPILE_CACHE"
_OFF = ("off", "0", "no", "false")
_decided = False


def compile_cache(directory: str | os.PathLike | None) -> None:
    """Keep compiled programs in `directory`, or keep none (None). Overrides the default and DJAX_COMPILE_CACHE.

    The directory is made private, with `OptionError` where it cannot be (`private_directory`).
    """
    global _decided
    if directory is not None:
        directory = private_directory(directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_compilation_cache_dir", directory and str(directory))
    # jax settles whether it has a cache at its first compile; a program that used jax before djax must ask anew.
    compilation_cache.reset_cache()
    if directory is not None:
        keep_entries_whole(directory)
    _decided = True


def enable_cache() -> None:
    """Turn the default cache on, once, unless the user has decided: by `compile_cache`, by jax's own setting, or by
    the environment (DJAX_COMPILE_CACHE=off, or a directory). A default directory that cannot be used is a warning."""
    global _decided
    if _decided:
        return
    wish = os.environ.get(ENVIRONMENT, "")
    if wish.lower() in _OFF or (not wish and jax.config.jax_compilation_cache_dir):
        _decided = True
    elif wish:
        compile_cache(wish)
    else:
        try:
            compile_cache(default_directory())
        except (OSError, OptionError) as error:
            _decided = True
            warnings.warn(f"no compile cache, programs compile anew in each process: {error}", stacklevel=3)


def private_directory(directory: str | os.PathLike) -> Path:
    """The directory, made if it is not there, private (mode 700): what it holds is code that later runs execute.

    Raises `OptionError` if it belongs to another user or others may write to it.
    """
    directory = Path(directory).expanduser()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = directory.stat()
    if info.st_uid != os.getuid():
        raise OptionError(f"compile cache {directory}: expected a directory of your own, it is user {info.st_uid}'s")
    if stat.S_IMODE(info.st_mode) & 0o022:
        raise OptionError(f"compile cache {directory}: others may write to it; run chmod 700 on it or choose another")
    directory.chmod(0o700)
    return directory


def default_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "djax" / "xla"
