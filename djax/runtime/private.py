"""Directories of code that djax executes later: nobody but the user and root can have changed them.

The rule is that of sshd's StrictModes, applied to every directory and link of the path: what is
neither the user's nor root's, or can be written by others, is refused. Others may write to a
directory with the sticky bit (/tmp), because there they cannot replace what is not theirs. The path
is checked from the top, so no part of it can be replaced after its check.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from djax.errors import OptionError

_LINKS = 40  # Linux follows no more
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def default_directory() -> Path:
    """`$XDG_CACHE_HOME/djax`, or `~/.cache/djax`. Raises `OptionError` if there is no home directory."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    if not os.path.isabs(cache):
        cache = os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(cache):
        raise OptionError(
            f"no home directory: expected HOME to be an absolute path, got {os.environ.get('HOME')!r}, or an entry of user "
            f"{os.getuid()} in the password database; set HOME, XDG_CACHE_HOME or DJAX_COMPILE_CACHE"
        )
    return Path(cache) / "djax"


def parse_directory(directory: Any, argument: str) -> Path:
    """A directory as an absolute path, ~ expanded. Raises `OptionError` for anything else."""
    expected = f"{argument}: expected a directory as an absolute path, such as ~/.cache/djax/xla"
    try:
        given = os.fspath(directory)
    except Exception:  # whatever another's __fspath__ raises
        given = None
    if not isinstance(given, str):
        raise OptionError(f"{expected}, got a value of type {type(directory).__name__}")
    shown = repr(given if len(given) <= 200 else f"{given[:200]}...")
    if "://" in given:
        raise OptionError(
            f"{expected}, got {shown}; djax keeps programs on local disks only: for a remote cache set jax's own "
            "JAX_COMPILATION_CACHE_DIR and leave djax's setting out"
        )
    path = os.path.expanduser(given)
    try:
        possible = os.path.isabs(path) and b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise OptionError(f"{expected}, got {shown}")
    return Path(path)


def private_directory(directory: str | os.PathLike, argument: str = "compile cache") -> Path:
    """The directory, made if it does not exist, private (mode 700): it holds code that later runs execute.

    argument: how messages name it. Invariant: nobody but the user and root can change, replace or
    redirect it. Raises `OptionError` if it cannot be made, belongs to another user, or could have
    been changed by others.
    """
    path = parse_directory(directory, argument)
    again = f"remove {path} and let djax make it again"
    try:
        real = _walk(path, argument, again)
        info = os.lstat(real)
        if real == Path("/"):
            raise OptionError(f"{argument}: expected a directory for this alone, got {path}")
        if info.st_uid != os.geteuid():
            raise OptionError(
                f"{argument} {path}: expected a directory of your own, it is user {info.st_uid}'s; choose another"
            )
        if info.st_mode & _OTHERS_WRITE:
            raise OptionError(f"{argument} {path}: others may write to it, and what it holds may be theirs; {again}")
        if stat.S_IMODE(info.st_mode) != 0o700:
            # Others could reach its files until now, so their own permissions mattered.
            for file, held in _contents(real):
                if held.st_mode & _OTHERS_WRITE and not stat.S_ISLNK(held.st_mode):
                    raise OptionError(f"{argument} {path}: others may write to {file.name} in it; {again}")
            os.chmod(real, 0o700)
    except OSError as error:
        raise OptionError(f"{argument} {path}: cannot be made or used: {error}; choose another") from None
    return path


def check_contents(directory: Path, argument: str = "compile cache") -> None:
    """Raise `OptionError` if a private directory holds what another user put there earlier."""
    try:
        for file, info in _contents(directory):
            if info.st_uid not in (0, os.geteuid()):
                raise OptionError(
                    f"{argument} {directory}: {file.name} in it is user {info.st_uid}'s; "
                    f"remove {directory} and let djax make it again"
                )
    except OSError as error:
        raise OptionError(f"{argument} {directory}: cannot be read: {error}; choose another") from None


def read_private(file: Path, at_most: int) -> bytes | None:
    """The bytes of a regular file of the user's own that nobody else may write to, else None.

    Links are not followed, and the file that is checked is the one that is read. Raises `OSError`
    if it cannot be read.
    """
    try:
        # A pipe of this name would be waited for.
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO):  # a link (EMLINK: BSD) or a socket
            return None
        raise
    try:
        info = os.fstat(handle)
        private = info.st_uid == os.geteuid() and not info.st_mode & _OTHERS_WRITE
        if not private or not stat.S_ISREG(info.st_mode) or info.st_size > at_most:
            return None
        with open(handle, "rb", closefd=False) as opened:
            return opened.read(at_most)
    finally:
        os.close(handle)


def _walk(path: Path, argument: str, again: str) -> Path:
    """Resolve an absolute path, checking each part and making directories that do not exist."""
    here, steps, links = Path("/"), list(reversed(path.parts[1:])), 0
    _check(here, os.lstat(here), path, argument, again)
    while steps:
        step = steps.pop()
        if step == "..":
            here = here.parent  # no links are left in it
            continue
        there = here / step
        try:
            info = os.lstat(there)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                os.mkdir(there, 0o700)
            info = os.lstat(there)
        if not stat.S_ISLNK(info.st_mode) and not stat.S_ISDIR(info.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
        if steps or stat.S_ISLNK(info.st_mode):
            _check(there, info, path, argument, again)
        if stat.S_ISLNK(info.st_mode):
            links += 1
            if links > _LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            target = Path(os.readlink(there))
            here = Path("/") if target.is_absolute() else here
            steps.extend(reversed(target.parts[1:] if target.is_absolute() else target.parts))
        else:
            here = there
    return here


def _check(place: Path, info: os.stat_result, path: Path, argument: str, again: str) -> None:
    """Raise `OptionError` if others can replace a link, or what lies below a directory."""
    if info.st_uid not in (0, os.geteuid()):
        raise OptionError(
            f"{argument} {path}: {place} is user {info.st_uid}'s, who could replace it; choose one below your own directories"
        )
    open_to_others = info.st_mode & _OTHERS_WRITE and not info.st_mode & stat.S_ISVTX
    if open_to_others and not stat.S_ISLNK(info.st_mode):
        raise OptionError(f"{argument} {path}: others may write to {place}; run chmod go-w {place}, then {again}")


def _contents(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """All files below a directory, links not followed. Other processes may remove some meanwhile."""
    for entry in list(os.scandir(directory)):
        with contextlib.suppress(FileNotFoundError):
            info = entry.stat(follow_symlinks=False)
            yield Path(entry.path), info
            if stat.S_ISDIR(info.st_mode):
                yield from _contents(Path(entry.path))
