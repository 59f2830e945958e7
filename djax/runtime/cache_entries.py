"""Entries of the compile cache, written whole and checked when they are read.

jax writes an entry in place, says of one that was cut short, in each process, that it cannot be read, and never replaces it.
"""

import hashlib
from pathlib import Path
from typing import Any

import jax

from djax.storage.files import write

_DIGEST = hashlib.sha256().digest_size


class Entries:
    """jax's cache interface over a directory. An entry is what jax gave, compressed, and its SHA-256."""

    def __init__(self, directory: Path) -> None:
        self._path = directory

    def get(self, key: str) -> bytes | None:
        """What was put, None if nothing was. One that is damaged is removed, and so compiled again."""
        file = self._file(key)
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            return None
        value, digest = data[:-_DIGEST], data[-_DIGEST:]
        if hashlib.sha256(value).digest() == digest:
            return value
        file.unlink(missing_ok=True)
        return None

    def put(self, key: str, value: bytes) -> None:
        write(self._file(key), value + hashlib.sha256(value).digest(), mode=0o600)

    def clear(self) -> None:
        """jax drops its caches; files stay, as those of its own cache do."""

    def _file(self, key: str) -> Path:
        return self._path / f"{key}-cache"


def keep_entries_whole(directory: Path) -> None:
    """Have jax use `Entries` for its cache in `directory`. A jax that has changed inside, or that is to bound its cache, keeps
    its own way."""
    try:
        from jax._src import compilation_cache as inside

        known = inside._cache is None and inside._cache_initialized is False
    except (ImportError, AttributeError):
        return
    bound: int = getattr(jax.config, "jax_compilation_cache_max_size")  # noqa: B009  (its stubs lack it)
    if known and bound == -1:
        with inside._cache_initialized_mutex:
            entries: Any = Entries(directory)  # jax asks for these methods alone
            inside._cache, inside._cache_initialized = entries, True
