"""New directories that appear whole or not at all, whatever happens to the process that writes them."""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import signal
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from djax import checks
from djax.errors import CheckpointError, OptionError, shorten

_LOCK, _PARTIAL = ".being-written", ".partial"
# What a write meets that no program can mend, as the system and as libraries spell it.
_FULL = {
    errno.ENOSPC: ("the disk is full", ("[ENOSPC]", "No space left")),
    errno.EDQUOT: ("the disk quota is used up", ("[EDQUOT]", "quota exceeded")),
    errno.EFBIG: ("the system allows no file of this size", ("[EFBIG]", "File too large")),
}


def free(directory: str | os.PathLike) -> Path:
    """The path, if nothing is there yet. Raises `OptionError`."""
    path = checks.path(directory, "directory")
    try:
        there = os.path.lexists(path)
    except (OSError, ValueError) as error:  # names no file can have
        raise OptionError(f"{shorten(repr(directory))}: expected the path of a new directory: {error}") from error
    if there:
        raise OptionError(f"{path}: already exists; choose another directory or remove it")
    return path


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block has ended. Only the main thread is ever interrupted, so others need nothing."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    held = []
    signal.signal(signal.SIGINT, lambda *_: held.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)


class new_directory:
    """A directory beside the wanted one, renamed to it when the block ends well and removed when it does not.

    What killed processes have left of the same directory is removed first, at whatever moment they were killed: nobody holds
    its lock. Raises `OptionError` if the directory exists or cannot be made, and `CheckpointError` where the disk is full.

    No generator: an interruption between its yield and the block would leave the directory.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        self._final = free(directory)

    def __enter__(self) -> Path:
        self._partial: Path | None = None
        try:
            with uninterrupted():
                self._partial, self._lock = _begin(self._final)
                # For an interruption in the few instructions that neither this nor __exit__ protects.
                self._at_exit = weakref.finalize(self, _remove, self._partial, self._lock, os.getpid())
        except (OSError, ValueError) as error:
            if (reason := _why_full(error)) is not None:
                raise CheckpointError(f"{self._final}: {reason}; nothing was left there") from error
            raise OptionError(f"{shorten(repr(str(self._final)))}: cannot be made: {error}") from error
        except BaseException:
            self._give_up()
            raise
        return self._partial

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            try:
                with uninterrupted():
                    self._finish()
            except BaseException as failed:
                error = failed
                raise
            finally:
                if error is not None:
                    self._give_up()
            return
        self._give_up()
        reason = None if isinstance(error, CheckpointError) else _why_full(error)
        if reason is not None:
            raise CheckpointError(f"{self._final}: {reason}; nothing was left there") from error

    def _finish(self) -> None:
        assert self._partial is not None, "entered"
        # Temporary files are private; the finished checkpoint gets the permissions any new file of the user gets.
        umask = os.umask(0)
        os.umask(umask)
        self._partial.chmod(0o777 & ~umask)
        for file in filter(Path.is_file, self._partial.iterdir()):
            file.chmod(0o666 & ~umask)
        try:
            self._partial.rename(self._final)
        except OSError:
            free(self._final)  # somebody else was faster
            raise
        self._at_exit.detach()
        (self._final / _LOCK).unlink()
        self._lock.close()

    def _give_up(self) -> None:
        if self._partial is not None:
            _remove(self._partial, self._lock, os.getpid())
            self._at_exit.detach()


def _begin(final: Path) -> tuple[Path, IO[bytes]]:
    """A directory of its own, and its lock, held."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.glob(f".{glob.escape(final.name)}.*{_PARTIAL}"):
        _remove_if_abandoned(left)
    while True:
        partial = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=_PARTIAL, dir=final.parent))
        # Before it is locked somebody may take it for abandoned, and remove it.
        with contextlib.suppress(FileNotFoundError):
            try:
                lock = (partial / _LOCK).open("wb")
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            if os.fstat(lock.fileno()).st_nlink:
                return partial, lock
            lock.close()


def _remove(partial: Path, lock: IO[bytes], process: int) -> None:
    """Remove a directory that will not be finished, in the process that made it, and not in one forked from it.

    A library's threads may still write into it after an error, so it is removed until it stays away.
    """
    if os.getpid() != process:
        return
    with uninterrupted():
        away = 0
        for _ in range(200):
            with contextlib.suppress(OSError):
                _empty(partial)
                partial.rmdir()
            away = 0 if os.path.lexists(partial) else away + 1
            if away == 6:
                break
            time.sleep(0.02)
        lock.close()


def _why_full(error: BaseException) -> str | None:
    """Why nothing more could be written, whichever library met it; None if the error is another."""
    todo: list[BaseException | None] = [error]
    seen: set[int] = set()
    while todo:
        one = todo.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        number, text = getattr(one, "errno", None), str(one)
        for code, (reason, spellings) in _FULL.items():
            if number == code or any(spelling in text for spelling in spellings):
                return reason
        todo += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
    return None


def _remove_if_abandoned(partial: Path) -> None:
    with contextlib.suppress(OSError):  # somebody writes there, or it is none of ours
        with contextlib.suppress(FileNotFoundError), (partial / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _empty(partial)
        partial.rmdir()


def _empty(partial: Path) -> None:
    """Remove all that is in it, the lock last: an interrupted removal leaves a lock or an empty directory."""
    for entry in partial.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != _LOCK:
            entry.unlink()
    (partial / _LOCK).unlink(missing_ok=True)
