"""A rule says which part of which parameter a checkpoint's tensor fills; a table of rules is applied strictly, both ways.

Strictly: every tensor of the checkpoint is used exactly once, every parameter is filled exactly once, shapes and dtypes
are checked before anything is read, and what is wrong is reported all at once.
"""

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from djax.errors import CheckpointError

FLOATS = ("F64", "F32", "F16", "BF16")

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """source tensor of this `shape` fills `params[target][index]`.

    transpose: the source's last two axes are swapped first (torch stores `[out, in]`); 1-d tensors never are. What is
    left is reshaped to the region, so heads split off by themselves.
    """

    source: str
    shape: tuple[int, ...]
    target: Path
    index: Any = ...
    transpose: bool = True

    @property
    def _swaps(self) -> bool:
        return self.transpose and len(self.shape) > 1

    def fill(self, leaf: np.ndarray, tensor: np.ndarray) -> None:
        """Write `tensor` into its region of `leaf`, casting to the leaf's dtype."""
        region = leaf[self.index]
        region[...] = (tensor.swapaxes(-1, -2) if self._swaps else tensor).reshape(region.shape)

    def extract(self, leaf: np.ndarray) -> np.ndarray:
        """The inverse of `fill`: the tensor of shape `shape`, contiguous."""
        if not self._swaps:
            return np.ascontiguousarray(leaf[self.index].reshape(self.shape))
        swapped = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return np.ascontiguousarray(leaf[self.index].reshape(swapped).swapaxes(-1, -2))


def check(found: Mapping[str, tuple[tuple[int, ...], str]], rules: list[Rule], leaves: Mapping[Path, tuple[int, ...]]) -> None:
    """Compare a checkpoint's tensors (name -> shape, dtype name) and the model's parameters (path -> shape) with the rules.

    Raises `CheckpointError` with everything that is wrong: missing, unexpected, misshapen and wrongly typed tensors, and
    parameters that the table would not fill exactly once (a mistake in djax, not in the checkpoint).
    """
    wrong = []
    wanted = {rule.source: rule for rule in rules}
    for name, rule in wanted.items():
        if name not in found:
            wrong.append(f"missing: {name} {list(rule.shape)}")
            continue
        shape, dtype = found[name]
        if tuple(shape) != rule.shape:
            wrong.append(f"shape: {name} is {list(shape)}, the config asks for {list(rule.shape)}")
        if dtype not in FLOATS:
            wrong.append(f"dtype: {name} is {dtype}, expected one of {', '.join(FLOATS)}")
    wrong += [f"unexpected: {name} {list(found[name][0])}" for name in found if name not in wanted]
    filled = Counter()
    for rule in rules:
        filled[rule.target] += math.prod(rule.shape)
    for path in sorted({*leaves, *filled}):
        size = math.prod(leaves[path]) if path in leaves else 0
        if filled[path] != size:
            wrong.append(f"rule table: parameter {'.'.join(path)} has {size} elements, rules fill {filled[path]}")
    if wrong:
        raise CheckpointError("\n  ".join([f"{len(wrong)} problems with the checkpoint's tensors:", *wrong]))


def load(
    rules: list[Rule], leaves: Mapping[Path, tuple[int, ...]], dtype: Any, read: Callable[[str], np.ndarray]
) -> Iterator[tuple[Path, np.ndarray]]:
    """Yield each parameter, complete, in `dtype`: one in memory at a time, filled one source tensor at a time."""
    by_target = defaultdict(list)
    for rule in rules:
        by_target[rule.target].append(rule)
    for path, parts in by_target.items():
        leaf = np.empty(leaves[path], dtype)
        for rule in parts:
            rule.fill(leaf, read(rule.source))
        yield path, leaf


def unload(rules: list[Rule], get: Callable[[Path], np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `load`: yield each HF tensor in the parameters' dtype, in the order of the rules."""
    last, leaf = None, None
    for rule in rules:
        if rule.target != last:
            last, leaf = rule.target, get(rule.target)
        yield rule.source, rule.extract(leaf)
