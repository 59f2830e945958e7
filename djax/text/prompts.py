"""What users pass as prompts or token ids, read into plain values: strings, chats, and integer arrays without padding."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from djax.checks import integral, is_array, plain_array, reading, scalar, show, type_name
from djax.errors import DjaxError, PromptError

FORMS = (
    "a string, a list of strings, chat messages, a list of chats, token ids, a list of token ids, or a tokenizer's output "
    "with input_ids and attention_mask"
)
IDS, MASK = "input_ids", "attention_mask"
# Of prompts, and of the ids of a prompt: more than any memory decodes, and few enough to be looked at one by one.
MOST = 2**22
# Of all ids of an array together, which may claim a size that it takes no memory to hold (numpy.broadcast_to).
MOST_TOGETHER = 2**28
# Values inside values, in chat messages.
_DEEPEST = 32
_BYTES = bytes | bytearray | memoryview

Chat = list[dict[str, Any]]


def read(prompts: object, pads: Collection[int]) -> tuple[list[str | Chat | np.ndarray], bool]:
    """Every prompt as a string, as a chat of plain dicts or as integers `[P]`, and whether a single prompt came.

    A mapping with input_ids and attention_mask, such as a tokenizer returns, loses its padding, on either side. pads: the ids
    that fill a row up. An array whose rows begin or end with different numbers of them is refused, because padding would be
    decoded as text; lists of ids are taken literally. Raises `PromptError`.
    """
    with reading("prompts", PromptError):
        return _read(prompts, pads)


def _read(prompts: Any, pads: Collection[int]) -> tuple[list[str | Chat | np.ndarray], bool]:
    if isinstance(prompts, str):
        return [str.__str__(prompts)], True
    if isinstance(prompts, Mapping):
        rows, single = _tokenized(prompts, "prompts", pads)
        return list(rows), single
    if is_array(prompts):
        array = plain_array(prompts, "prompts", PromptError)
        if array.ndim not in (1, 2):
            raise PromptError(f"prompts: expected token ids of shape [P] or [B, P], got an array of shape {array.shape}")
        _check_ids(array, "prompts")
        if array.ndim == 1:
            return [array], True
        refuse_padded(array, pads, "prompts", f"pass the tokenizer's whole output ({IDS} and {MASK}), or lists of ids")
        return list(array), False
    if not _is_list(prompts):
        raise PromptError(f"prompts: expected {FORMS}, got {type_name(prompts)}")
    items = _items(prompts, "prompts")
    if not items:
        raise PromptError(f"prompts: expected {FORMS}, got an empty list")
    kinds = {_kind(item) for item in items}
    if kinds == {"message"}:
        return [_chat(items, "prompt 0")], True
    if kinds == {"id"}:
        return [_listed(items, "prompt 0")], True
    if "other" in kinds or len(kinds) > 1:
        raise PromptError(f"prompts: expected {FORMS}, got a list of {sorted({type_name(p) for p in items})}")
    return [_one(item, f"prompt {i}", pads) for i, item in enumerate(items)], False


def _kind(item: Any) -> str:
    if isinstance(item, str):
        return "text"
    if isinstance(item, Mapping):
        return "tokenized" if IDS in item else "message"
    if _is_list(item):
        return "list"
    if is_array(item) and np.ndim(item):
        return "list"
    return "other" if integral(scalar(item)) is None else "id"


def _one(item: Any, where: str, pads: Collection[int]) -> str | Chat | np.ndarray:
    """One prompt of a list of them."""
    if isinstance(item, str):
        return str.__str__(item)
    if isinstance(item, Mapping):
        (ids, *more), single = _tokenized(item, where, pads)
        if more or not single:
            raise PromptError(f"{where}: expected {IDS} of one prompt, of shape [P]; pass a mapping of several prompts alone")
        return ids
    if is_array(item):
        array = plain_array(item, where, PromptError)
        if array.ndim != 1:
            raise PromptError(f"{where}: expected token ids as integers of shape [P], got an array of shape {array.shape}")
        _check_ids(array, where)
        return array
    items = _items(item, where)
    return _chat(items, where) if items and isinstance(items[0], Mapping) else _listed(items, where)


def _listed(items: list[Any], where: str) -> np.ndarray:
    ids = _integers(items)
    if ids is None:
        raise PromptError(f"{where}: expected token ids as integers of shape [P], got {show(items)}")
    return ids


def _tokenized(given: Mapping, where: str, pads: Collection[int]) -> tuple[list[np.ndarray], bool]:
    """The rows of a tokenizer's output, without what its mask hides."""
    if IDS not in given:
        raise PromptError(
            f"{where}: expected {FORMS}, got a {type_name(given)} without {IDS}; one chat message is a list of one mapping"
        )
    names = f"{where}[{IDS!r}]", f"{where}[{MASK!r}]"
    ids = whole_rows(given[IDS], names[0], PromptError)
    if ids is None:
        raise PromptError(f"{names[0]}: expected integers of shape [P] or [B, P], got {show(given[IDS])}")
    if not len(ids):
        raise PromptError(f"{names[0]}: expected at least one token, got an empty prompt")
    single = isinstance(ids, np.ndarray) and ids.ndim == 1
    rows = _rows(ids)
    mask = given[MASK] if MASK in given else None
    if mask is None:
        if not single and isinstance(ids, np.ndarray):
            refuse_padded(ids, pads, names[0], f"pass {MASK} with it, or lists of ids")
        return rows, single
    seen = whole_rows(mask, names[1], PromptError, bools=True)
    if seen is None:
        raise PromptError(f"{names[1]}: expected ones and zeros in the shape of {IDS}, got {show(mask)}")
    alone = isinstance(seen, np.ndarray) and seen.ndim == 1
    masks = _rows(seen)
    if alone != single or [len(s) for s in masks] != [len(row) for row in rows]:
        raise PromptError(f"{names[1]}: expected the shape of {IDS}, rows of {_lengths(rows)}, got rows of {_lengths(masks)}")
    out = []
    for i, (row, s) in enumerate(zip(rows, masks, strict=True)):
        start, end = span(s, f"{names[1]}, row {i}")
        out.append(row[start:end])
    return out, single


def _rows(whole: np.ndarray | list[np.ndarray]) -> list[np.ndarray]:
    """The rows of what `whole_rows` reads; one row is an array of one axis."""
    return [whole] if isinstance(whole, np.ndarray) and whole.ndim == 1 else list(whole)


def span(mask: np.ndarray, where: str) -> tuple[int, int]:
    """Where the ones of an attention mask `[P]` begin and end, or `PromptError`."""
    if np.any((mask != 0) & (mask != 1)):
        raise PromptError(f"{where}: expected ones and zeros, got {show(mask.tolist())}")
    ones = np.flatnonzero(mask)
    if not ones.size:
        raise PromptError(f"{where}: expected at least one 1, got zeros alone, which leave no token")
    start, end = int(ones[0]), int(ones[-1]) + 1
    if end - start != ones.size:
        raise PromptError(f"{where}: expected zeros only before or after the ones, got holes: {show(mask.tolist())}")
    return start, end


def refuse_padded(
    array: np.ndarray, pads: Collection[int], name: str, cure: str, *, end: Collection[int] | None = None
) -> None:
    """`PromptError` if the rows of `array` `[B, P]` begin or end with different numbers of pad ids: a padded batch without its
    mask. end: the pad ids that count at the end, where others do."""
    if len(array) < 2 or not array.size:
        return
    for side, ids, columns in (("begins", pads, array), ("ends", pads if end is None else end, array[:, ::-1])):
        real = ~np.isin(columns, list(ids))
        runs = np.where(real.any(axis=1), real.argmax(axis=1), array.shape[1])
        if runs.min() != runs.max():
            most, least = int(np.argmax(runs)), int(np.argmin(runs))
            named = ", ".join(map(str, sorted(ids)))
            raise PromptError(
                f"{name}: row {most} {side} with {runs[most]} pad ids ({named}), row {least} with {runs[least]}: "
                f"padding would be read as text; {cure}, which are taken literally"
            )


def whole_rows(value: Any, name: str, kind: type[DjaxError], *, bools: bool = False) -> np.ndarray | list[np.ndarray] | None:
    """Integers as an array `[P]`, `[B, P]`, or, if they came as a list of rows, as a list of arrays; None if they are none.

    bools: whether True and False are 1 and 0. Raises `kind` for what cannot be read at all.
    """
    with reading(name, kind):
        if is_array(value):
            array = plain_array(value, name, kind)
            array = array.astype(np.int8) if bools and array.dtype == bool else array
            whole = array.ndim in (1, 2) and (array.dtype.kind in "iu" or not array.size)
            return array if whole and array.size <= MOST_TOGETHER else None
        if not _is_list(value):
            return None
        items = _items(value, name, kind)
        if not items or not (_is_list(items[0]) or (is_array(items[0]) and np.ndim(items[0]))):
            return _integers(items, bools)
        found = [whole_rows(item, name, kind, bools=bools) for item in items]
        rows = [row for row in found if isinstance(row, np.ndarray) and row.ndim == 1]
        return rows if len(rows) == len(found) else None


def _integers(items: list[Any], bools: bool = False) -> np.ndarray | None:
    """One array of whole numbers, None if an item is none. Those that no int64 holds stay as they are, for the error."""
    if set(map(type, items)) == {int}:  # nearly always, and tenfold faster
        whole = items
    else:
        plain = [scalar(item) for item in items]
        whole = [int(i) if bools and type(i) is bool else integral(i) for i in plain]
        if any(i is None for i in whole):
            return None
    try:
        return np.array(whole, np.int64)
    except OverflowError:
        return np.array(whole, object)


def _items(given: Sequence, where: str, kind: type[DjaxError] = PromptError) -> list[Any]:
    """A sequence's items, as many as it says it has."""
    count = len(given)
    if count > MOST:
        raise kind(f"{where}: expected at most {MOST} prompts, and {MOST} tokens a prompt, got {count}")
    items = list(itertools.islice(iter(given), count))
    if len(items) != count:
        raise kind(f"{where}: the {type_name(given)} says it has {count} items and gives {len(items)}")
    return items


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | _BYTES) and not is_array(value)


def _check_ids(array: np.ndarray, where: str) -> None:
    if array.size and array.dtype.kind not in "iu":
        shape = "[P]" if array.ndim == 1 else "[B, P]"
        raise PromptError(f"{where}: expected token ids as integers of shape {shape}, got {array.dtype} of shape {array.shape}")
    if len(array) > MOST or array.size > MOST_TOGETHER:
        raise PromptError(
            f"{where}: expected at most {MOST} prompts, {MOST} tokens a prompt and {MOST_TOGETHER} together, got {array.shape}"
        )
    if array.ndim == 2 and not len(array):
        raise PromptError(f"{where}: expected {FORMS}, got an empty list")


def _chat(messages: list[Any], where: str) -> Chat:
    """A chat's messages as plain dicts, all values of JSON's kinds."""
    chat = [_plain(message, where) for message in messages]
    if not all(isinstance(message, dict) for message in chat):
        raise PromptError(f"{where}: expected chat messages with the strings 'role' and 'content', got {show(messages)}")
    return chat


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    if depth > _DEEPEST:
        raise PromptError(f"{where}: expected chat messages, got values nested deeper than {_DEEPEST}")
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        value = value.item()
    if value is None or type(value) is bool:  # isinstance believes a class that says it is another
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__index__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        keys = _items(list(itertools.islice(iter(value), MOST + 1)), where)
        if not all(isinstance(key, str) for key in keys):
            raise PromptError(f"{where}: expected chat messages whose keys are strings, got {show(value)}")
        return {str.__str__(key): _plain(value[key], where, depth + 1) for key in keys}
    if _is_list(value):
        return [_plain(item, where, depth + 1) for item in _items(value, where)]
    raise PromptError(
        f"{where}: expected chat messages with the strings 'role' and 'content', got a {type_name(value)} in one: {show(value)}"
    )


def _lengths(rows: list[np.ndarray]) -> str:
    return show([len(row) for row in rows])
