"""The tensors of a HF checkpoint directory, in one safetensors file or in shards with an index: read, and written.

Nothing of a file is believed before it is checked, and nothing is allocated for it. Values are read by position, not mapped:
what a mapping has touched counts as memory until it ends, and a checkpoint may be larger than the machine has.
"""

import contextlib
import dataclasses
import json
import math
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import ml_dtypes
import numpy as np

from djax.errors import CheckpointError, PathError, list_problems, shorten
from djax.storage import checkpoint_files
from djax.storage.files import parse_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # as HF cuts them
AHEAD = 1 << 28  # bytes that the system is asked to fetch before they are read
# Bits an element, of every type that safetensors has. Only the floating ones of two bytes and more are read.
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8}
_BITS |= {
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
# In the order in which they stand in a file.
READ = {"F64": np.float64, "F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor lies: its file, and the bytes from the file's start."""

    file: Path
    start: int
    stop: int


class TensorFiles:
    """Names, shapes and dtypes of all tensors at once, values one at a time. A context manager.

    found: name -> shape and safetensors' name of the dtype. Raises `PathError` if there is no checkpoint or a shard is
    absent, `CheckpointError` if a file is damaged, points out of the directory, or the index and the shards disagree.
    """

    def __init__(self, directory: Path) -> None:
        self._where: dict[str, _Place] = {}
        self._open: dict[Path, int] = {}
        self._fetched: dict[Path, int] = {}
        self.found: dict[str, tuple[tuple[int, ...], str]] = {}
        try:
            listing = checkpoint_files.read_json(directory, INDEX)
            if listing is None and not checkpoint_files.is_there(directory, INDEX):
                shards: Mapping[str, set[str] | None] = {SINGLE: None}
                total = None
            else:
                shards, total = _shards(directory / INDEX, listing)
                _check_no_other(directory, shards)
            for name, expected in shards.items():
                self._add(directory, name, expected)
            if total not in (None, self.bytes):
                # No error: tools that wrote published indices counted shared or cast tensors differently.
                print(
                    f"djax: {directory / INDEX}: metadata.total_size says {total} bytes, the tensors have {self.bytes}; "
                    "if that is not known of this checkpoint, download it again",
                    file=sys.stderr,
                )
        except BaseException:
            self.close()
            raise

    def _add(self, directory: Path, name: str, expected: set[str] | None) -> None:
        path = directory / name
        file = checkpoint_files.open_file(directory, name)
        if file is None and expected is None:
            raise PathError(f"{directory}: expected {SINGLE} or {INDEX} there, found neither")
        if file is None:
            raise PathError(f"{path}: this shard is listed in {INDEX} but is not there; download it again")
        self._open[path] = file
        try:
            header = _header(file)
        except (OSError, ValueError) as error:
            reason = shorten(str(error))
            raise CheckpointError(f"{path}: not a whole safetensors file ({reason}); copy or download it again") from error
        if expected is not None and header.keys() != expected:
            absent, extra = sorted(expected - header.keys()), sorted(header.keys() - expected)
            raise CheckpointError(f"{path}: disagrees with {INDEX}: absent {_names(absent)}, not listed {_names(extra)}")
        for tensor, (shape, dtype, start, stop) in header.items():
            self.found[tensor] = shape, dtype
            self._where[tensor] = _Place(path, start, stop)

    @property
    def bytes(self) -> int:
        """Of all tensors together."""
        return sum(place.stop - place.start for place in self._where.values())

    def read(self, name: str) -> np.ndarray:
        """A tensor's values, in an array of their own. Only of the types in `READ`."""
        place, (shape, dtype) = self._where[name], self.found[name]
        out = np.empty(math.prod(shape), READ[dtype])
        view, at = out.view(np.uint8).data, place.start
        self._fetch_ahead(place)
        try:
            while len(view):
                got = os.preadv(self._open[place.file], [view[: 1 << 28]], at)
                if not got:
                    raise OSError("the file has become shorter")
                view, at = view[got:], at + got
        except OSError as error:
            raise CheckpointError(f"{place.file}: tensor {name} cannot be read: {error}") from error
        return out.reshape(shape)

    def _fetch_ahead(self, place: _Place) -> None:
        """Have the disk go on while what was read is worked on: tensors lie in a file about as they are read."""
        if hasattr(os, "posix_fadvise") and not AHEAD // 2 <= self._fetched.get(place.file, 0) - place.stop <= AHEAD:
            self._fetched[place.file] = place.stop + AHEAD
            os.posix_fadvise(self._open[place.file], place.stop, AHEAD, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _names(names: list[str]) -> str:
    return f"[{list_problems([repr(name) for name in names], ', ')}]"


def _shards(index: Path, listing: Any) -> tuple[dict[str, set[str]], int | float | None]:
    """The files an index names, the tensors of each, and the bytes of all tensors if it says how many these are."""
    weight_map = listing.get("weight_map") if isinstance(listing, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: expected JSON with a 'weight_map' of tensor to file")
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if file in ("", ".", "..") or "/" in file or "\0" in file:
            raise CheckpointError(f"{index}: shard {shorten(repr(file))} points outside the checkpoint's directory")
        shards.setdefault(file, set()).add(name)
    metadata = listing.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict | None) or isinstance(total, bool) or not isinstance(total, int | float | None):
        raise CheckpointError(f"{index}: expected 'metadata' with a number 'total_size', or without one")
    return shards, total


def _check_no_other(directory: Path, shards: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` if there are weights that the index does not know: one of the two is of another model."""
    if SINGLE not in shards and checkpoint_files.is_there(directory, SINGLE):
        raise CheckpointError(
            f"{directory}: {SINGLE} and {INDEX} are both there, and the index does not name {SINGLE}. If {SINGLE} has the "
            f"weights you want, remove {INDEX} and the {len(shards)} files it names; if not, remove {SINGLE}"
        )


def _header(file: int) -> dict[str, tuple[tuple[int, ...], str, int, int]]:
    """Name -> shape, dtype, first and last byte. Raises `ValueError` for anything that safetensors does not allow: the tensors
    must fill the file from the header to its end, without a gap and without an overlap."""
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a file")
    start = os.pread(file, 8, 0)
    size = int.from_bytes(start, "little")
    if len(start) < 8 or size > status.st_size - 8 or size > checkpoint_files.MOST_TEXT:
        raise ValueError(f"a header of {size} bytes in a file of {status.st_size}")
    entries = _parse_header(os.pread(file, size, 8))
    if not isinstance(entries, dict):
        raise ValueError("the header is no JSON object")
    metadata = entries.pop("__metadata__", None)
    if metadata is not None:
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("__metadata__ is no object of strings")
        _check_encodable([*metadata, *metadata.values()])
    _check_encodable(entries)
    out, begin = {}, 8 + size
    for name, entry in entries.items():
        shape, dtype, (first, last) = _entry(name, entry)
        out[name] = shape, dtype, begin + first, begin + last
    end = begin
    for name, (_, _, first, last) in sorted(out.items(), key=lambda item: item[1][2:]):
        if first != end:
            raise ValueError(f"tensor {name} begins at {first}, where the one before it ends is {end}")
        end = last
    if end != status.st_size:
        raise ValueError(f"the tensors end at {end}, the file at {status.st_size}")
    return out


def _parse_header(text: bytes) -> Any:
    """JSON as the safetensors library reads it: UTF-8 without a byte order mark, and whole numbers without a sign."""

    def count(digits: str) -> int:
        if digits.startswith("-"):
            raise ValueError(f"the number {digits}")
        return int(digits)

    return parse_json(text.decode("utf-8"), checkpoint_files.unique, count)


def _check_encodable(texts: Iterable[str]) -> None:
    """Raises `ValueError` for half of a surrogate pair, which JSON can spell and no text has."""
    for text in texts:
        text.encode()


def _entry(name: str, entry: object) -> tuple[tuple[int, ...], str, tuple[int, int]]:
    """One tensor of a header, checked by itself."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name} is not described by dtype, shape and data_offsets")
    shape, dtype, offsets = entry["shape"], entry["dtype"], entry["data_offsets"]

    def whole(numbers: object) -> bool:
        return isinstance(numbers, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)

    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"tensor {name} has the unknown dtype {dtype!r}")
    if not whole(shape) or len(shape) > 8 or not whole(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name} has shape {str(shape)[:80]} and data_offsets {str(offsets)[:80]}")
    if 0 in shape:
        raise ValueError(f"tensor {name} is empty, of shape {shape}")
    if 8 * (offsets[1] - offsets[0]) != math.prod(shape) * _BITS[dtype]:
        raise ValueError(f"tensor {name} of {dtype} {shape} takes other than its {offsets[1] - offsets[0]} bytes")
    return tuple(shape), dtype, (offsets[0], offsets[1])


def write(
    directory: Path,
    kinds: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    tensors: Iterator[tuple[str, np.ndarray]],
    limit: int = SHARD_BYTES,
) -> None:
    """Write tensors, of the shapes and dtypes that `kinds` announces, as one file, or as shards with an index.

    They may come in any order, and one is in memory at a time. The files are those that the safetensors library would write.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in kinds.items()}
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    many = len(shards) > 1
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" if many else SINGLE for i in range(1, len(shards) + 1)]
    missing = dict(kinds)
    with contextlib.ExitStack() as stack:
        places: dict[str, tuple[IO[Any], int]] = {}
        for file, names in zip(files, shards, strict=True):
            out = stack.enter_context((directory / file).open("wb"))
            header, offsets = _written_header({name: kinds[name] for name in names})
            out.write(header)
            places |= {name: (out, len(header) + offset) for name, offset in offsets.items()}
        for name, tensor in tensors:
            assert (tensor.shape, tensor.dtype) == missing.pop(name)
            shard, at = places[name]
            shard.seek(at)
            shard.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))
            del tensor  # or it would be held until the next one has come
    assert not missing
    if many:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def cast(
    tensors: Iterator[tuple[str, np.ndarray]], kinds: Mapping[str, tuple[tuple[int, ...], np.dtype]]
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors in the dtypes that `kinds` announces, copied only where they have others, and none held after it is given."""
    return map(lambda named: (named[0], named[1].astype(kinds[named[0]][1], copy=False)), tensors)


def _written_header(kinds: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> tuple[bytes, dict[str, int]]:
    """The start of a file, and each tensor's offset from its end: the widest first, then by name."""
    types = {np.dtype(dtype): name for name, dtype in READ.items()}
    rank = list(types).index
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in sorted(kinds.items(), key=lambda item: (rank(item[1][1]), item[0])):
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": types[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8 bytes, as the format asks for
    offsets = {name: entries[name]["data_offsets"][0] for name in kinds}
    return len(text).to_bytes(8, "little") + text, offsets
