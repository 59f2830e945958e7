"""A parameter tree as an Orbax checkpoint (the v1 API): written one leaf at a time, restored onto any devices, read by leaf."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from flax import traverse_util

from djax.storage.directories import uninterrupted

# Leaves are cut into pieces of at most this, so that a device that has a part of one reads little else, and written in groups
# of about as many bytes as the second.
PIECE, GROUP = 1 << 26, 1 << 28
# Bytes that are under way at once while a checkpoint is restored, or its largest leaf's.
AT_ONCE = 1 << 30
Leaf = tuple[tuple[str, ...], Any]


def write(directory: Path, leaves: Iterator[Leaf]) -> None:
    """Write leaves, arrays of numpy or jax, as they come; `directory` must not exist, and is no checkpoint before the last.

    Not compressed: weights hardly get smaller, and compressing them takes longer than writing them.
    """
    from orbax.checkpoint.experimental import v1 as orbax

    directory = directory.resolve()
    with _context():
        group: dict[tuple[str, ...], np.ndarray] = {}
        for path, leaf in leaves:
            group[path] = leaf
            del leaf  # or it would be held until the next one has come
            if sum(a.nbytes for a in group.values()) >= GROUP:
                with uninterrupted():
                    orbax.partial.save(directory, traverse_util.unflatten_dict(group))
                group.clear()
        # Orbax goes on writing after an interruption, also into directories that have been removed meanwhile.
        with uninterrupted():
            if group:
                orbax.partial.save(directory, traverse_util.unflatten_dict(group))
            orbax.partial.finalize(directory)


def describe(directory: Path) -> dict[tuple[str, ...], tuple[tuple[int, ...], np.dtype]]:
    """Each leaf's shape and dtype as they are in the files."""
    from orbax.checkpoint.experimental import v1 as orbax

    with _context():
        tree = orbax.metadata(directory.resolve()).metadata
    return {path: (tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in traverse_util.flatten_dict(tree).items()}


def restore(directory: Path, tree: object) -> Any:
    """The whole tree, each leaf of the shape and dtype and on the devices that `tree` (of `ShapeDtypeStruct`s) says."""
    from orbax.checkpoint.experimental import v1 as orbax

    context = _context()
    # Read all at once, what is under way would come on top of what is done: half of a checkpoint again, on two cores.
    largest = max(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in traverse_util.flatten_dict(tree).values())
    context.memory.read_concurrent_bytes = max(AT_ONCE, largest + 1)
    with context:
        return orbax.load(directory.resolve(), tree)


def read(directory: Path, path: tuple[str, ...], shape: tuple[int, ...], dtype: npt.DTypeLike) -> np.ndarray:
    """One leaf, on the host."""
    from orbax.checkpoint.experimental import v1 as orbax

    with _context(partial_load=True):
        tree = orbax.load(directory.resolve(), traverse_util.unflatten_dict({path: np.empty(shape, dtype)}))
    return traverse_util.flatten_dict(tree)[path]


def _context(partial_load: bool = False) -> Any:
    from orbax.checkpoint.experimental import v1 as orbax

    context = orbax.Context()
    context.array.saving.storage_options.chunk_byte_size = PIECE
    context.array.saving.use_compression = False
    context.array.saving.enable_post_merge_validation = False
    context.pytree.loading.partial_load = partial_load
    # What is saved is not changed meanwhile, so it need not be copied first.
    context.memory.deepcopy_host_arrays = False
    return context
