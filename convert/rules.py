"""A rule says which part of which parameter a checkpoint's tensor fills; a table of rules is applied strictly, both ways.

Strictly: every tensor of the checkpoint is used exactly once, every parameter is filled exactly once, shapes and dtypes
are checked before anything is read, and what is wrong is reported all at once.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from djax.errors import CheckpointError, list_problems

FLOATS = ("F64", "F32", "F16", "BF16")
# What torch's wrappers (DataParallel, torch.compile, FSDP, activation checkpoints) add to the names of what they wrap.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

Path = tuple[str, ...]


class AttentionShape(Protocol):
    """What every family's tables read of its Config."""

    @property
    def heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def groups(self) -> int: ...
    @property
    def vocab(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Rule:
    """source tensor of this `shape` fills `params[target][index]`.

    rows: the part of the source that does so, of its first axis; other rules take the others. transpose: the source's last
    two axes are swapped first (torch stores `[out, in]`); 1-d tensors never are. What is left is reshaped to the region,
    so heads split off by themselves. order: which feature of the region's last axis comes from which.
    """

    source: str
    shape: tuple[int, ...]
    target: Path
    index: Any = ...
    transpose: bool = True
    rows: slice | None = None
    order: tuple[int, ...] | None = None

    @property
    def part(self) -> tuple[int, ...]:
        """The shape of what this rule takes of its source."""
        return self.shape if self.rows is None else (self.rows.stop - self.rows.start, *self.shape[1:])

    @property
    def is_copy(self) -> bool:
        """Whether the parameter is the tensor as it is."""
        return self.index is ... and self.rows is None and self.order is None and not self._swaps

    @property
    def _swaps(self) -> bool:
        return self.transpose and len(self.shape) > 1

    def fill(self, leaf: np.ndarray, tensor: np.ndarray) -> None:
        """Write the rule's part of `tensor` into its region of `leaf`, casting to the leaf's dtype."""
        region = leaf[self.index]
        tensor = tensor if self.rows is None else tensor[self.rows]
        if self._swaps:
            swapped = (*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2])
            if region.shape == swapped and self.order is None:
                return _copy_swapped(region, tensor)
            tensor = _swapped(tensor)
        tensor = tensor.reshape(region.shape)
        region[...] = tensor if self.order is None else tensor[..., self.order]

    def extract(self, leaf: np.ndarray) -> np.ndarray:
        """The inverse of `fill`: the part of the tensor, contiguous."""
        region = leaf[self.index]
        if self.order is not None:
            region = region[..., np.argsort(self.order)]
        if not self._swaps:
            return np.ascontiguousarray(region.reshape(self.part))
        swapped = (*self.part[:-2], self.part[-1], self.part[-2])
        return _swapped(region.reshape(swapped))


def _swapped(tensor: np.ndarray) -> np.ndarray:
    """The last two axes swapped, in memory, too."""
    out = np.empty((*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2]), tensor.dtype)
    _copy_swapped(out, tensor)
    return out


def _copy_swapped(out: np.ndarray, tensor: np.ndarray) -> None:
    """Write tensor, its last two axes swapped, into out, which may have another dtype. In strips as wide as half a cache line:
    seven times as fast as one copy, which would fetch each line anew for each of its elements."""
    strip = 32 // tensor.dtype.itemsize
    for at in range(0, tensor.shape[-2], strip):
        out[..., at : at + strip] = tensor[..., at : at + strip, :].swapaxes(-1, -2)


def check(found: Mapping[str, tuple[tuple[int, ...], str]], rules: list[Rule], leaves: Mapping[Path, tuple[int, ...]]) -> None:
    """Compare a checkpoint's tensors (name -> shape, dtype name) and the model's parameters (path -> shape) with the rules.

    Raises `CheckpointError` with everything that is wrong: missing, unexpected, misshapen and wrongly typed tensors, and
    parameters that the table would not fill exactly once (a mistake in djax, not in the checkpoint). A prefix that names
    have or lack is one problem, and what else is wrong is found as if it were mended.
    """
    wanted = {rule.source: rule for rule in rules}
    renamed, prefix = undo_prefix(found, wanted.keys())
    wrong = [] if prefix is None else [prefix]
    found = {renamed[name]: kind for name, kind in found.items()}
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
    filled: Counter[Path] = Counter()
    taken: Counter[str] = Counter()
    for rule in rules:
        filled[rule.target] += math.prod(rule.part)
        taken[rule.source] += rule.part[0]
    wrong += [
        f"rule table: {n} rows of {name} are taken, of {wanted[name].shape[0]}"
        for name, n in taken.items()
        if n != wanted[name].shape[0]
    ]
    for path in sorted({*leaves, *filled}):
        size = math.prod(leaves[path]) if path in leaves else 0
        if filled[path] != size:
            wrong.append(f"rule table: parameter {'.'.join(path)} has {size} elements, rules fill {filled[path]}")
    if wrong:
        raise CheckpointError(f"{len(wrong)} problems with the checkpoint's tensors:\n  {list_problems(wrong)}")


def undo_prefix(found: Iterable[str], wanted: Set[str]) -> tuple[dict[str, str], str | None]:
    """The names that tensors would have without a prefix that most of them have too much, or with one that most lack.

    Returns found name -> name, each as it is where no such prefix is seen, and a sentence about the prefix, or None.
    """
    names = set(found)
    votes: Counter[tuple[str, str]] = Counter()
    for name in names - wanted:
        votes.update(("has", name[: -len(rest)]) for rest in _without_first(name) if rest in wanted)
        unwrapped = _unwrap(name)
        if unwrapped != name and unwrapped in wanted:
            votes["wrapped", ""] += 1
    for name in wanted - names:
        votes.update(("lacks", name[: -len(rest)]) for rest in _without_first(name) if rest in names - wanted)
    same = {name: name for name in names}
    if not votes:
        return same, None
    (how, prefix), count = votes.most_common(1)[0]
    if 2 * count <= len(names - wanted):
        return same, None

    def rename(name: str) -> str:
        if name in wanted:
            return name
        if how == "has":
            return name.removeprefix(prefix)
        new = _unwrap(name) if how == "wrapped" else prefix + name
        return new if new in wanted else name

    renamed = {name: rename(name) for name in sorted(names)}
    taken = Counter(renamed.values())
    renamed = {name: new if taken[new] == 1 else name for name, new in renamed.items()}
    changed = [name for name, new in renamed.items() if new != name]
    if how == "has":
        what, cure = f"begin with {prefix!r}, which is no part of them", f"remove {prefix!r} from the names"
    elif how == "lacks":
        what, cure = f"lack {prefix!r} at their beginning", f"put {prefix!r} before them"
    else:
        what, cure = "have parts that wrappers of torch add", f"remove {' and '.join(map(repr, _WRAPPERS))} from them"
    cure += ", or save the state_dict of the model itself" if how != "lacks" else ""
    return renamed, f"names: {len(changed)} of {len(names)} tensors' names {what} ({changed[0]} the first); {cure}"


def _without_first(name: str) -> Iterator[str]:
    """The name without its first part, its first two, and so on up to four."""
    for _ in range(4):
        _, dot, name = name.partition(".")
        if not dot:
            return
        yield name


def _unwrap(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def load(parts: list[Rule], shape: tuple[int, ...], dtype: npt.DTypeLike, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """The parameter that these rules fill, one source tensor at a time."""
    if len(parts) == 1 and parts[0].is_copy:
        return read(parts[0].source).astype(dtype, copy=False)
    leaf = np.empty(shape, dtype)
    for source, group in groupby(parts, key=lambda rule: rule.source):
        tensor = read(source)
        for rule in group:
            rule.fill(leaf, tensor)
        del tensor
    return leaf


def unload(rules: list[Rule], get: Callable[[Path], np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `load`: yield each HF tensor in the parameters' dtype, in the order of the rules, in which those of one
    source stand together."""
    last: Path | None = None
    leaf: np.ndarray | None = None
    for source, group in groupby(rules, key=lambda rule: rule.source):
        parts = list(group)
        if parts[0].target != last:
            leaf = None  # or two would be in memory
            last, leaf = parts[0].target, get(parts[0].target)
        assert leaf is not None, "a first target is another one than None"
        tensors = [rule.extract(leaf) for rule in parts]
        yield source, tensors.pop() if len(tensors) == 1 else np.concatenate(tensors)
