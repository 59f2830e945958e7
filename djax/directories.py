"""New directories that appear whole or not at all, whatever happens to the process that writes them."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from djax.errors import OptionError

_LOCK = ".being-written"


def free(directory: str | os.PathLike) -> Path:
    """The path, if nothing is there yet."""
    path = Path(directory).expanduser()
    if path.exists():
        raise OptionError(f"{path}: already exists; choose another directory or remove it")
    return path


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike) -> Iterator[Path]:
    """A directory beside the wanted one, renamed to it when the block ends well and removed when it does not.

    What a killed process has left of the same directory is removed first: its lock is free. Raises `OptionError` if the
    directory exists.
    """
    final = free(directory)
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.glob(f".{final.name}.*"):
        _remove_if_abandoned(left)
    partial = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        with (partial / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield partial
            # Temporary files are private; the finished checkpoint gets the permissions any new file of the user gets.
            umask = os.umask(0)
            os.umask(umask)
            partial.chmod(0o777 & ~umask)
            for file in filter(Path.is_file, partial.iterdir()):
                file.chmod(0o666 & ~umask)
            partial.rename(final)
            (final / _LOCK).unlink()
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _remove_if_abandoned(partial: Path) -> None:
    try:
        with (partial / _LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(partial)
    except OSError:  # no lock, so none of ours; or somebody writes there
        return
