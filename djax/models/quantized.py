"""Weights as int8, with a float32 scale for each channel: half the bytes of bfloat16, and products still summed in float32.

The matrices of attention, experts and dense MLPs are held so. Embedding, head, router and norms stay as they are: few bytes a
step, or decisions between values that differ by little.
"""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from djax.errors import CheckpointError

# The axes along which a matrix shares a scale: those its product sums over, so that there is a scale for each output. The
# experts' second matrices are the exception: on a GPU one product sums over all experts, too, whose outputs need a scale each,
# so there it is one for each of an expert's hidden features, its gate's and its up's like.
SHARED = {"qkv": (0,), "o": (0, 1), "w_in": (1,), "w_out": (2,)}
SHARED |= {f"{mlp}_{side}": (0,) for mlp in ("mlp", "shared") for side in ("in", "out")}
SCALE = "_scale"

Path = tuple[str, ...]


def quantize(path: Path, leaf: np.ndarray) -> Iterator[tuple[Path, np.ndarray]]:
    """A parameter as it is held: itself, or its int8 values and their scales, each largest value of its channel at 127.

    Raises `CheckpointError` for values that are not finite.
    """
    axes = SHARED.get(path[-1])
    if axes is None:
        yield path, leaf
        return
    out, scales = np.empty(leaf.shape, np.int8), np.empty(_scale_shape(leaf.shape, axes), np.float32)
    # An expert at a time, where there are any: float32 copies of all would take four times the bytes of the result.
    for part in range(len(leaf)) if 0 not in axes else (slice(None),):
        keep = axes if 0 in axes else tuple(axis - 1 for axis in axes)
        wide = leaf[part].astype(np.float32)
        largest = np.max(np.abs(wide), axis=keep, keepdims=True)
        if not np.isfinite(largest).all():
            raise CheckpointError(f"{'.'.join(path)} has values that are NaN or infinite: these cannot be quantised")
        scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
        out[part], scales[part] = np.rint(wide / scale).astype(np.int8), scale
    yield path, out
    yield _beside(path), scales


def abstract(leaves: Mapping[Path, jax.ShapeDtypeStruct]) -> dict[Path, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a model's parameters once they are quantised."""
    out = {}
    for path, leaf in leaves.items():
        axes = SHARED.get(path[-1])
        out[path] = leaf if axes is None else jax.ShapeDtypeStruct(leaf.shape, jnp.int8)
        if axes is not None:
            out[_beside(path)] = jax.ShapeDtypeStruct(_scale_shape(leaf.shape, axes), jnp.float32)
    return out


def logical_axes(axes: Mapping[Path, tuple[str | None, ...]]) -> dict[Path, tuple[str | None, ...]]:
    """Logical axes of a model's parameters once they are quantised: a scale lies with its weights."""
    out = dict(axes)
    for path, names in axes.items():
        shared = SHARED.get(path[-1])
        if shared is not None:
            out[_beside(path)] = tuple(None if n in shared else name for n, name in enumerate(names))
    return out


def _beside(path: Path) -> Path:
    """Where a matrix' scale is."""
    return (*path[:-1], path[-1] + SCALE)


def _scale_shape(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if n in axes else size for n, size in enumerate(shape))
