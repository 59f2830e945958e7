"""The tensors of a HF checkpoint directory, whether in one safetensors file or in shards with an index."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from djax.errors import CheckpointError, PathError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # as HF cuts them


class TensorFiles:
    """Names, shapes and dtypes of all tensors at once, values one at a time. Memory-mapped; a context manager.

    Raises `PathError` if there is no checkpoint or a shard is absent, `CheckpointError` if a file is damaged or the index
    and the shards disagree.
    """

    def __init__(self, directory: Path) -> None:
        self._where: dict[str, Path] = {}
        self._open: dict[Path, safe_open] = {}
        self.found: dict[str, tuple[tuple[int, ...], str]] = {}
        index = directory / INDEX
        files = self._shards(index) if index.is_file() else {directory / SINGLE: None}
        for path, expected in files.items():
            if not path.is_file():
                if expected is None:
                    raise PathError(f"{directory}: expected {SINGLE} or {INDEX} there, found neither")
                raise PathError(f"{path}: this shard is listed in {INDEX} but is not there; download it again")
            try:
                handle = safe_open(path, framework="np")
                names = set(handle.keys())
                for name in names:
                    part = handle.get_slice(name)
                    self.found[name] = tuple(part.get_shape()), part.get_dtype()
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from error
            if expected is not None and names != expected:
                absent, extra = sorted(expected - names), sorted(names - expected)
                raise CheckpointError(f"{path}: disagrees with {INDEX}: absent {absent[:5]}, not listed {extra[:5]}")
            self._open[path] = handle
            self._where.update(dict.fromkeys(names, path))

    @staticmethod
    def _shards(index: Path) -> dict[Path, set[str]]:
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            shards: dict[Path, set[str]] = {}
            for name, file in weight_map.items():
                if Path(file).name != file:
                    raise CheckpointError(f"{index}: shard {file!r} points outside the checkpoint's directory")
                shards.setdefault(index.parent / file, set()).add(name)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: expected JSON with a 'weight_map' of tensor to file: {error!r}") from error
        return shards

    def read(self, name: str) -> np.ndarray:
        try:
            return self._open[self._where[name]].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._where[name]}: tensor {name} cannot be read: {error}") from error

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.clear()


def write(directory: Path, sizes: dict[str, int], tensors: Iterator[tuple[str, np.ndarray]], limit: int = SHARD_BYTES) -> None:
    """Write tensors (in the order and with the bytes that `sizes` announces) as one file, or as shards with an index.

    One shard is in memory at a time.
    """
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
    for file, names in zip(files, shards, strict=True):
        part = dict(next(tensors) for _ in names)
        assert list(part) == names
        save_file(part, directory / file, metadata={"format": "pt"})
    if many:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
