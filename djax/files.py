"""Files of text and JSON: read as UTF-8 in every locale, written whole or not at all."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Levels of a JSON value. What is parsed is written, compared and printed later, each time by a recursion that has a limit.
_DEEPEST = 100


def write(file: str | os.PathLike, data: str | bytes) -> None:
    """Replace a file atomically: a killed process or a full disk leaves the old file or the new one, and nothing else.

    Text is written as UTF-8 with its newlines as they are. The data reaches the disk before the name does. The file gets the
    permissions any new file of the user gets. Raises `OSError`, after which the old file is still there.
    """
    file = Path(file)
    data = data.encode() if isinstance(data, str) else data
    handle, partial = tempfile.mkstemp(prefix=f".{file.name[:100]}.", suffix=".partial", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(out.fileno(), 0o666 & ~umask)
            os.fsync(out.fileno())
        os.replace(partial, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def read_text(file: str | os.PathLike) -> str:
    """A file's text, decoded as UTF-8 whatever the locale; a byte order mark is no part of it.

    Newlines stay as they are. Raises `OSError`, or `UnicodeDecodeError` (a `ValueError`) for other bytes.
    """
    return decode(Path(file).read_bytes())


def decode(data: bytes) -> str:
    """Bytes as UTF-8 text, without a byte order mark. Raises `UnicodeDecodeError`, a `ValueError`."""
    return data.decode("utf-8-sig")


def parse_json(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """A JSON value. Raises `ValueError` for anything else, also for one nested too deep, which json itself does not.

    pairs: json's `object_pairs_hook`.
    """
    try:
        value = json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("nested too deep") from None
    inner = [value] if _nests(value) else []
    for _ in range(_DEEPEST):
        inner = [x for outer in inner for x in (outer.values() if isinstance(outer, dict) else outer) if _nests(x)]
        if not inner:
            return value
    raise ValueError("nested too deep")


def _nests(value: Any) -> bool:
    return isinstance(value, dict | list)
