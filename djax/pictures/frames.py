"""A decode as frames: what every position says, which forward accepted it, what every forward ran and proposed."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from djax.errors import OptionError

# The alphabet of byte-level BPE (GPT-2's): a printable byte is written as itself, the others as U+0100 and on, in order.
_PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
_VISIBLE = {"\n": "↵", "\t": "⇥"}


@dataclasses.dataclass(frozen=True)
class Forward:
    """One forward. start, end: its block, in canvas positions. whole: it ran the whole canvas rather than a window.

    accepted: how many tokens it accepted. done: how many all forwards up to it accepted.
    """

    start: int
    end: int
    whole: bool
    accepted: int
    done: int


@dataclasses.dataclass(frozen=True, eq=False)
class Replay:
    """One answer, forward by forward. L is its canvas, F its forwards, S the block length.

    A picture counts forwards from 1, so that step n is the canvas after n of them: 0 all masks, F the finished canvas.

    prompt:      how many positions the prompt takes.
    tokens:      int32 `[L]`, the finished canvas.
    accepted_at: int32 `[L]`, the step that shows the position first; 0 for the prompt, and for what an early stop filled,
                 which step F shows.
    confidence:  float32 `[L]`, how sure the forward was of what it accepted.
    forwards:    one `Forward` a step, step n at n - 1.
    borders:     where blocks start, those never entered too; 0 comes first where the prompt stands before the first block.
    proposals:   int32 `[F, S]`, the token each position of the forward's block proposed.
    words:       the piece of text, made visible, of every token of the canvas and of the proposals.
    special:     the ids that are not text, such as EOS; their pieces are their names.
    """

    prompt: int
    tokens: np.ndarray
    accepted_at: np.ndarray
    confidence: np.ndarray
    forwards: tuple[Forward, ...]
    borders: tuple[int, ...]
    proposals: np.ndarray
    words: Mapping[int, str]
    special: frozenset[int]

    @property
    def pieces(self) -> list[str]:
        """The finished canvas, a piece a position."""
        return [self.words[token] for token in self.tokens.tolist()]

    @property
    def generated(self) -> int:
        """Positions after the prompt."""
        return len(self.tokens) - self.prompt

    @property
    def filled(self) -> int:
        """Positions that no forward accepted: an early stop filled them."""
        return int(np.count_nonzero(self.accepted_at[self.prompt :] == 0))

    def states(self, step: int) -> np.ndarray:
        """`[L]` after `step` forwards: 'prompt', 'masked', 'accepted' or 'filled'."""
        accepted = self.accepted_at > 0
        waits = np.where(accepted, self.accepted_at, len(self.forwards)) > step
        states = np.where(waits, "masked", np.where(accepted, "accepted", "filled"))
        states[: self.prompt] = "prompt"
        return states

    def proposed(self, step: int) -> dict[int, int]:
        """Position to token: what forward number `step`, from 1, proposed where it left the mask in its block."""
        block = self.forwards[step - 1]
        left = block.start + np.flatnonzero(self.states(step)[block.start : block.end] == "masked")
        return dict(zip(left.tolist(), self.proposals[step - 1, left - block.start].tolist(), strict=True))


def replay(generation: Any, tokenizer: Any) -> Replay:
    """The replay of a `djax.Generation` that was made with `trace=True`.

    tokenizer: the model's; None shows ids.

    Law: the frames are the trace's: a position is masked at every step before `accepted_at`, and the last frame is the
    canvas. Raises `OptionError` for a generation without a trace.
    """
    trace, canvas = generation.trace, generation.canvas
    if trace is None:
        raise OptionError("trace: expected a generation with a record of its forwards, got none; decode with trace=True")
    counts = np.bincount(trace.accepted_at[trace.accepted_at >= 0], minlength=len(trace.starts))
    ends = np.minimum(trace.starts + trace.proposals.shape[1], len(canvas))
    columns = trace.starts, ends, trace.whole, counts, np.cumsum(counts)
    first = int(trace.starts[0])
    special = frozenset(() if tokenizer is None else tokenizer.all_special_ids)
    ids = np.union1d(canvas, trace.proposals).tolist()
    return Replay(
        prompt=generation.prompt_length,
        tokens=canvas,
        accepted_at=trace.accepted_at + 1,
        confidence=trace.confidence,
        forwards=tuple(Forward(*row) for row in zip(*(column.tolist() for column in columns), strict=True)),
        borders=(*([0] if first else []), *range(first, len(canvas), trace.proposals.shape[1])),
        proposals=trace.proposals,
        words={token: piece(tokenizer, token, token in special) for token in ids},
        special=special,
    )


def piece(tokenizer: Any, token: int, special: bool = False) -> str:
    """A token's text alone, never empty and all of it visible.

    A special token is its name; bytes that are no text alone are written `\\xe2`; an id the tokenizer does not know, or
    without a tokenizer any, is its number.
    """
    if tokenizer is None:
        return f" {token}"
    name = tokenizer.convert_ids_to_tokens(token)
    if name is None:
        return f"<{token}>"
    text = name if special else tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if "\ufffd" in text and all(c in _BYTES for c in name):
        text = bytes(_BYTES[c] for c in name).decode(errors="backslashreplace")
    if name.startswith("▁") and not text.startswith(" "):
        text = f" {text}"  # sentencepiece drops the space of what it takes for the first word
    return visible(text or name)


def visible(text: str) -> str:
    """The text with newlines and tabs as signs and whatever else does not print escaped. Spaces stay spaces."""
    return "".join(_VISIBLE.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)
