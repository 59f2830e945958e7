"""HF checkpoints to Orbax and back, on a machine with less memory than the checkpoint: one parameter in memory at a time."""

import dataclasses
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from djax.checkpoints.checkpoint import finite, known_dtype, known_not_finite, write_description, write_manifest
from djax.checkpoints.source import ORBAX, Source, kinds, opened, sum_bytes, written
from djax.convert import orbax_files, rules, safetensors_files
from djax.convert.safetensors_files import TensorFiles
from djax.errors import CheckpointError, OptionError
from djax.runtime.process import with_own_settings
from djax.storage.directories import free, new_directory
from djax.storage.files import expand_home

LAYOUTS = ("orbax", "hf")
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion did.

    bytes: of the parameters read. spoiled: tensors with values that are NaN or infinite. rounding: the largest error that a
    narrower dtype made, and in which tensor, if any was narrowed. verified: whether the output was read again and compared.
    """

    family: str
    layout: str
    dtype: str
    bytes: int
    seconds: float
    spoiled: tuple[str, ...]
    rounding: tuple[float, str] | None
    verified: bool


@with_own_settings
def convert(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    to: str = "orbax",
    dtype: str | None = None,
    verify: bool = False,
    not_finite: str = "refuse",
    progress: Progress | None = None,
) -> Report:
    """Convert a checkpoint that `djax.load` reads to an Orbax directory, or to HF's layout.

    dtype: "float32" or "bfloat16" for all parameters; None leaves them as they are. verify: read the output again, and the
    source, and compare. not_finite: as in `djax.load`. progress: called with what is done ("converting", "verifying"), bytes
    read and bytes in all.

    Out must not exist; it appears whole or not at all, and what a killed conversion has left is removed by the next one to the
    same place. An Orbax directory's manifest has the SHA-256 of every HF tensor and of every parameter, by name. Invariant: HF
    -> Orbax -> HF gives tensors equal bit for bit. Raises `OptionError`, `CheckpointError` (also where the disk is full) and
    what `djax.load` raises.
    """
    if to not in LAYOUTS:
        raise OptionError(f"--to: expected {' or '.join(LAYOUTS)}, got {to!r}")
    known_dtype(dtype)
    known_not_finite(not_finite)
    free(out)
    began = time.monotonic()
    with Examiner(not_finite) as examiner, opened(source, dtype, examiner) as read:
        if to == "orbax":
            _have_room(Path(out), sum(leaf.size * leaf.dtype.itemsize for leaf in read.shapes.values()))
        as_written = kinds(read.family, read.config, read.stored, read.dtype, dtype)
        examiner.narrowed_to = {name: kind for name, (_, kind) in as_written.items()}
        examiner.watch("converting", read.bytes, progress)
        with new_directory(out) as partial:
            if to == "orbax":
                leaves = ((path, examiner.sum(path, _get(read, path, examiner))) for path in read.order)
                orbax_files.write(partial / ORBAX, leaves)
            else:
                tensors = rules.unload(written(read.family, read.config), lambda path: _get(read, path, examiner))
                safetensors_files.write(partial, as_written, safetensors_files.cast(tensors, as_written))
            write_description(read, partial, dtype)
            digests, sums = examiner.digests(), examiner.sums()
            if verify:
                examiner.watch("verifying", read.bytes, progress)
                _verify_orbax(read, partial) if to == "orbax" else _verify_hf(read, partial, as_written)
                if examiner.digests() != digests:
                    raise CheckpointError(f"{read.directory}: the source changed while it was read")
            if to == "orbax":
                more: dict[str, Any] = {"parameters": sums, "sha256": digests or read.sha256}
                command = shlex.join(["djax", *sys.argv[1:]])
                more = {"source": str(read.directory), "command": command} | more
                write_manifest(partial, read.family, read.config, read.dtype, read.stored, **more)
    return Report(
        family=read.family.name,
        layout=to,
        dtype=str(np.dtype(read.dtype)),
        bytes=read.bytes,
        seconds=time.monotonic() - began,
        spoiled=tuple(examiner.spoiled),
        rounding=examiner.rounding,
        verified=verify,
    )


class Examiner:
    """Looks at each HF tensor as it is read, beside the reading: digest, values that are not finite, what rounding costs; and
    sums each parameter that is written."""

    def __init__(self, not_finite: str) -> None:
        self.spoiled: list[str] = []
        self.rounding: tuple[float, str] | None = None
        self.narrowed_to: dict[str, np.dtype] = {}
        self._finite = None if not_finite == "allow" else finite(self.spoiled, not_finite)
        self._digests: dict[str, str] = {}
        self._sums: dict[str, str] = {}
        self._worker = ThreadPoolExecutor(1)
        self._pending: Future | None = None
        self._progress: Callable[[int], None] = lambda done: None
        self._done = 0

    def watch(self, what: str, total: int, progress: Progress | None) -> None:
        """Begin to count from 0, and to forget."""
        self._done, self._digests, self._sums = 0, {}, {}
        self.spoiled.clear()
        self._progress = (lambda done: None) if progress is None else (lambda done: progress(what, done, total))

    def __call__(self, name: str, tensor: np.ndarray) -> None:
        """One tensor is looked at while the next is read, and no more: each is held as long as it is."""
        self._settle()
        self._pending = self._worker.submit(self._look, name, tensor)

    def read(self, size: int) -> None:
        """So many bytes more were read."""
        self._done += size
        self._progress(self._done)

    def sum(self, path: rules.Path, leaf: np.ndarray) -> np.ndarray:
        """Sum a parameter while it is written."""
        self._settle()
        self._pending = self._worker.submit(self._sum, ".".join(path), leaf)
        return leaf

    def sums(self) -> dict[str, str]:
        self._settle()
        return dict(sorted(self._sums.items()))

    def digests(self) -> dict[str, str]:
        self._settle()
        return dict(sorted(self._digests.items()))

    def _settle(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _sum(self, name: str, leaf: np.ndarray) -> None:
        self._sums[name] = sum_bytes(leaf)

    def _look(self, name: str, tensor: np.ndarray) -> None:
        self._digests[name] = sum_bytes(tensor)
        if self._finite is not None:
            self._finite(name, tensor)
        kind = self.narrowed_to.get(name, tensor.dtype)
        if kind.itemsize < tensor.dtype.itemsize:
            flat, some = tensor.reshape(-1), 1 << 20
            for part in (flat[at : at + some] for at in range(0, flat.size, some)):
                error = np.max(np.abs(part.astype(np.float64) - part.astype(kind).astype(np.float64)))
                self.rounding = max(self.rounding or (0.0, name), (float(error), name))
        self.read(tensor.nbytes)

    def __enter__(self) -> "Examiner":
        return self

    def __exit__(self, *error: object) -> None:
        self._worker.shutdown(cancel_futures=True)


def _get(read: Source, path: rules.Path, examiner: Examiner) -> np.ndarray:
    leaf = read.get(path)
    if read.layout == "Orbax":  # HF tensors are counted one by one
        examiner.read(leaf.nbytes)
    return leaf


def _verify_orbax(read: Source, partial: Path) -> None:
    for path, leaf in read.shapes.items():
        there = orbax_files.read(partial / ORBAX, path, leaf.shape, leaf.dtype)
        _equal(".".join(path), there, read.get(path))


def _verify_hf(read: Source, partial: Path, as_written: dict[str, tuple[tuple[int, ...], np.dtype]]) -> None:
    with TensorFiles(partial) as files:
        for name, tensor in rules.unload(written(read.family, read.config), read.get):
            _equal(name, files.read(name), tensor.astype(as_written[name][1], copy=False))


def _equal(name: str, there: np.ndarray, expected: np.ndarray) -> None:
    if there.dtype != expected.dtype or there.shape != expected.shape or there.tobytes() != expected.tobytes():
        raise CheckpointError(f"{name} was not written as it was read; is the disk sound?")


def _have_room(out: Path, need: int) -> None:
    parent = next(p for p in expand_home(out).absolute().parents if p.exists())
    have = shutil.disk_usage(parent).free
    if need > have:
        raise CheckpointError(f"{out}: needs {need / 1e9:.1f} GB, the disk has {have / 1e9:.1f} GB left")
