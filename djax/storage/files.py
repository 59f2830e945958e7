"""Files of text and JSON: read as UTF-8 in every locale, written whole or not at all."""

import contextlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from djax.errors import OptionError

# Levels of a JSON value. What is parsed is written, compared and printed later, each time by a recursion that has a limit.
_DEEPEST = 100


def write(file: str | os.PathLike, data: str | bytes, mode: int = 0o666) -> None:
    """Replace a file atomically: a killed process or a full disk leaves the old file or the new one, and nothing else.

    Text is written as UTF-8 with its newlines as they are. The data reaches the disk before the
    name does. mode: the permissions, less the umask; by default those of any new file. Raises
    `OSError`, after which the old file is still there.
    """
    file = Path(file)
    data = data.encode() if isinstance(data, str) else data
    partial = file.parent / f".{file.name[:40]}.{secrets.token_hex(8)}.partial"
    # The system subtracts the umask: reading it means setting it, for other threads' new files too.
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def expand_home(path: str | os.PathLike) -> Path:
    """A path, a leading ~ or ~user expanded. Raises `OptionError` if that user has no home directory."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise OptionError(f"{path}: expected a path, {Path(path).parts[0]} is no known home directory") from None


def read_text(file: str | os.PathLike) -> str:
    """A file's text, decoded as UTF-8 whatever the locale; a byte order mark is no part of it.

    Newlines stay as they are. Raises `OSError`, or `UnicodeDecodeError` (a `ValueError`) for other bytes.
    """
    return decode(Path(file).read_bytes())


def decode(data: bytes) -> str:
    """Bytes as UTF-8 text, without a byte order mark. Raises `UnicodeDecodeError`, a `ValueError`."""
    return data.decode("utf-8-sig")


def parse_json(
    text: str,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
    integer: Callable[[str], Any] | None = None,
) -> Any:
    """A JSON value. Raises `ValueError` for anything else, also for one nested too deep, which json itself does not.

    pairs, integer: json's `object_pairs_hook` and `parse_int`.
    """
    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_int=integer)
    except RecursionError:
        raise ValueError("nested too deep") from None
    inner = [value] if _nests(value) else []
    for _ in range(_DEEPEST):
        inner = [x for outer in inner for x in (outer.values() if isinstance(outer, dict) else outer) if _nests(x)]
        if not inner:
            return value
    raise ValueError("nested too deep")


def _nests(value: object) -> bool:
    return isinstance(value, dict | list)
