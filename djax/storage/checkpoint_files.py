"""The files of a checkpoint directory. All are opened through one door, so that no link leads out of the directory.

A checkpoint is somebody else's: a file in it may be a link to a secret, a fifo that blocks, a device that never ends, or
gigabytes where kilobytes belong. `open_file` refuses all of these before a byte is read.
"""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from djax.errors import CheckpointError, shorten
from djax.storage import files

# Bytes of text that are read at most; safetensors' own limit for a header.
MOST_TEXT = 100_000_000
# Where the Hugging Face hub's client keeps the files of a repository, under names that are digests.
_HUB_REPOSITORY, _HUB_BLOB = re.compile(r"models--[^/]+"), re.compile(r"[0-9a-f]+")


def is_there(directory: Path, name: str) -> bool:
    """Whether the directory has an entry of this name, of whatever kind. Raises `CheckpointError` if no file can have it."""
    try:
        os.lstat(directory / name)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: {shorten(repr(name))} cannot be looked up: {shorten(str(error))}") from error
    return True


def open_file(directory: Path, name: str) -> int | None:
    """A descriptor of a checkpoint's file, open for reading; None if nothing has this name.

    A link may lead to a file within the directory, to the hub cache's own copies if the directory is one of its snapshots, and
    to a blob of any model in a hub cache (what downloads into a directory of their own used to be). Raises `CheckpointError`
    for any other link, for a broken one, and for what is no regular file.
    """
    if not is_there(directory, name):
        return None
    path = directory / name
    target = _resolve(directory, path)
    try:
        if not stat.S_ISREG(os.stat(target).st_mode):
            raise OSError("it is no regular file")
        # Not blocking, and checked again: what lies there may have been exchanged meanwhile.
        handle = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError("it is no regular file")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return handle


def _resolve(directory: Path, path: Path) -> Path:
    """What a path of a checkpoint leads to. Raises `CheckpointError` if that is not the checkpoint's."""
    try:
        home, target = directory.resolve(strict=True), path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # Python 3.11 raises RuntimeError for a link to itself
        raise CheckpointError(f"{path}: a link that leads nowhere: {error}") from error
    if home.parent.name == "snapshots":
        is_blob = target.is_relative_to(home.parent.parent / "blobs")
    else:
        is_blob = _is_hub_blob(target)
    if not is_blob and not target.is_relative_to(home):
        raise CheckpointError(f"{path}: a link that points outside the checkpoint's directory, to {target}")
    return target


def _is_hub_blob(target: Path) -> bool:
    blobs = target.parent
    named = _HUB_BLOB.fullmatch(target.name) and _HUB_REPOSITORY.fullmatch(blobs.parent.name)
    return bool(named) and blobs.name == "blobs"


def read_bytes(directory: Path, name: str) -> bytes | None:
    """A whole file; None if nothing has this name. Raises `CheckpointError` as `open_file` does, and for more than 100 MB."""
    handle = open_file(directory, name)
    if handle is None:
        return None
    try:
        with os.fdopen(handle, "rb") as file:
            size = os.fstat(handle).st_size
            if size > MOST_TEXT:
                raise CheckpointError(f"{directory / name}: expected at most {MOST_TEXT} bytes, there are {size}")
            return file.read()
    except OSError as error:
        raise CheckpointError(f"{directory / name}: cannot be read: {error.strerror or error}") from error


def read_text(directory: Path, name: str) -> str | None:
    """A file as UTF-8 text, without a byte order mark; None if nothing has this name. Raises `CheckpointError`."""
    data = read_bytes(directory, name)
    try:
        return None if data is None else files.decode(data)
    except ValueError as error:
        raise CheckpointError(f"{directory / name}: expected text in UTF-8: {error}") from error


def read_json(directory: Path, name: str) -> Any:
    """A file's JSON; None if nothing has this name. Raises `CheckpointError` if it is none, or names a key twice."""
    data = read_bytes(directory, name)
    try:
        return None if data is None else files.parse_json(files.decode(data), unique)
    except ValueError as error:
        raise CheckpointError(f"{directory / name}: expected JSON: {shorten(str(error))}") from error


def read_object(directory: Path, name: str) -> dict[str, Any] | None:
    """A file's JSON object; None if nothing has this name. Raises `CheckpointError` for anything else."""
    value = read_json(directory, name)
    if not isinstance(value, dict) and (value is not None or is_there(directory, name)):
        raise CheckpointError(f"{directory / name}: expected a JSON object, got {type(value).__name__}")
    return value


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's pairs as a dict. Raises `ValueError` for a key that is there twice."""
    out = dict(pairs)
    if len(out) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, _ in pairs if counts[key] > 1)
        raise ValueError(f"{shorten(repr(twice))} is there twice")
    return out


def list_files(directory: Path, name: str, ending: str) -> Iterator[str]:
    """The files of a folder with this ending, named from the directory; none if there is no folder."""
    if not is_there(directory, name):
        return
    folder = _resolve(directory, directory / name)
    try:
        entries = sorted(os.listdir(folder)) if folder.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"{directory / name}: cannot be read: {error.strerror or error}") from error
    yield from (f"{name}/{entry}" for entry in entries if entry.endswith(ending))


def check_tree(directory: Path, name: str) -> None:
    """Check all files below a folder that another library reads. Raises `CheckpointError` as `open_file` does."""
    todo, seen = [directory / name], set()
    while todo:
        path = todo.pop()
        target = _resolve(directory, path)
        try:
            mode = os.stat(target).st_mode
            if stat.S_ISDIR(mode) and target not in seen:
                seen.add(target)
                todo += [path / entry for entry in os.listdir(target)]
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
            raise CheckpointError(f"{path}: cannot be read: it is no regular file")
