"""New directories that appear whole or not at all, whatever happens to the process that writes them."""

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from djax.errors import OptionError
from djax.files import expand_home

_LOCK, _PARTIAL = ".being-written", ".partial"


def free(directory: str | os.PathLike) -> Path:
    """The path, if nothing is there yet."""
    path = expand_home(directory)
    if path.exists():
        raise OptionError(f"{path}: already exists; choose another directory or remove it")
    return path


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike) -> Iterator[Path]:
    """A directory beside the wanted one, renamed to it when the block ends well and removed when it does not.

    What killed processes have left of the same directory is removed first, at whatever moment they were killed: nobody holds
    its lock. Raises `OptionError` if the directory exists.
    """
    final = free(directory)
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.glob(f".{glob.escape(final.name)}.*{_PARTIAL}"):
        _remove_if_abandoned(left)
    partial, lock = _begin(final)
    try:
        with lock:
            yield partial
            # Temporary files are private; the finished checkpoint gets the permissions any new file of the user gets.
            umask = os.umask(0)
            os.umask(umask)
            partial.chmod(0o777 & ~umask)
            for file in filter(Path.is_file, partial.iterdir()):
                file.chmod(0o666 & ~umask)
            try:
                partial.rename(final)
            except OSError:
                free(final)  # somebody else was faster
                raise
            (final / _LOCK).unlink()
    except BaseException:
        with contextlib.suppress(OSError):
            _empty(partial)
            partial.rmdir()
        raise


def _begin(final: Path) -> tuple[Path, IO[bytes]]:
    """A directory of its own, and its lock, held."""
    while True:
        partial = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=_PARTIAL, dir=final.parent))
        # Before it is locked somebody may take it for abandoned, and remove it.
        with contextlib.suppress(FileNotFoundError):
            lock = (partial / _LOCK).open("wb")
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock.fileno()).st_nlink:
                return partial, lock
            lock.close()


def _remove_if_abandoned(partial: Path) -> None:
    with contextlib.suppress(OSError):  # somebody writes there, or it is none of ours
        with contextlib.suppress(FileNotFoundError), (partial / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _empty(partial)
        partial.rmdir()


def _empty(partial: Path) -> None:
    """Remove all that is in it, the lock last: what is left by one who is killed meanwhile has a lock, or is empty."""
    for entry in partial.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != _LOCK:
            entry.unlink()
    (partial / _LOCK).unlink()
