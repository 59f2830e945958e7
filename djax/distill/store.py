"""Trajectories on disk: a directory of parts that is only ever appended to, each part one small file.

A trajectory is how one answer was decoded: the finished canvas, the forward that accepted each position, how sure the model
was. That is enough to have every canvas the decode went through; a few hundred bytes each. `store.json` says which model and
which settings they came from. What a killed process was writing is not there; the parts before it are.
"""

import dataclasses
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from djax.errors import TraceError
from djax.models.model import Model
from djax.storage.files import expand_home, parse_json, read_text, write
from djax.tasks.verify import Question as Question
from djax.training.checksum import checksum as checksum

MANIFEST, FORMAT = "store.json", 1
_PART = "part-{:05d}.npz"
# Of the verifiers that ship. 2: `exact` reads whole numbers, `python` runs under the system's limits.
_RULES = 2
# Bounds of what is read: bytes of a part, unpacked, and positions of a canvas.
LARGEST, LONGEST = 1 << 30, 1 << 20
NUMBERS = ("seed", "prompt", "start", "block", "forwards")


@dataclasses.dataclass(frozen=True, eq=False)
class Trajectory:
    """How one answer was decoded. L is the canvas, F the forwards.

    problem:     what was asked, as it was given: "prompt", and what a verifier needs ("result", "tests", ...).
    text:        the answer.
    tokens:      int32 `[L]`, the finished canvas.
    accepted_at: int32 `[L]`, the forward (from 0) that accepted the position's token; -1 for the prompt and for what an early
                 stop filled with EOS, which no state shows.
    confidence:  float16 `[L]`, the token's probability then; 0 where none.
    seed:        of the draw, where the temperature was above 0.
    prompt:      where the generated part of the canvas begins. start, block: where its first block does, and a block's length.
    forwards:    F.
    """

    problem: Question
    text: str | None
    tokens: np.ndarray
    accepted_at: np.ndarray
    confidence: np.ndarray
    seed: int
    prompt: int
    start: int
    block: int
    forwards: int

    def state(self, forwards: int, mask_id: int) -> np.ndarray:
        """s_i of dInfer's appendix C.1, counted from the start: the canvas `[L]` after so many forwards."""
        shown = (self.accepted_at >= 0) & (self.accepted_at < forwards)
        shown[: self.prompt] = True
        return np.where(shown, self.tokens, mask_id).astype(np.int32)


def tokenizer_checksum(model: Model) -> str | None:
    """SHA-256 of the tokenizer and its chat template."""
    words = model.tokenizer
    if words is None:
        return None
    template = words.chat_template or ""
    if not isinstance(template, str):  # several, by name
        template = json.dumps(template, sort_keys=True)
    return hashlib.sha256((words.backend_tokenizer.to_str() + template).encode()).hexdigest()


class Store:
    """A directory of trajectories. `Store(directory)` opens one; `Store.create` makes or goes on with one.

    Raises `TraceError` for a directory that is none, is damaged, or is of another model, tokenizer or settings.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        self.directory = expand_home(directory)
        try:
            self.manifest = parse_json(read_text(self.directory / MANIFEST))
            kind, self.settings = self.manifest["format"], dict(self.manifest["settings"])
        except FileNotFoundError as error:
            raise TraceError(
                f"{self.directory}: no trajectories there ({MANIFEST} is missing); djax.distill.record makes some"
            ) from error
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise TraceError(f"{self.directory / MANIFEST}: cannot be read: {error}") from error
        if kind != FORMAT:
            raise TraceError(f"{self.directory}: trajectories of format {kind!r}, expected {FORMAT}")

    @classmethod
    def create(cls, directory: str | os.PathLike, model: Model, settings: Mapping[str, Any]) -> "Store":
        """Open the store, or begin one, of this model and these settings (JSON values)."""
        path = expand_home(directory)
        if not (path / MANIFEST).exists():
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise TraceError(f"{path}: cannot be a directory: {error}") from error
            # What a process that was killed at this very moment has left is none of the user's.
            if any(not file.name.startswith(f".{MANIFEST}.") for file in path.iterdir()):
                raise TraceError(f"{path}: is not empty and holds no trajectories; choose another directory")
            described = {"format": FORMAT, "settings": dict(settings), "model": repr(model)}
            described |= {"checksum": checksum(model), "tokenizer": tokenizer_checksum(model)}
            _write(path / MANIFEST, json.dumps(described, indent=1) + "\n")
            return cls(path)
        store = cls(path)
        store.check(model)
        wrong = [k for k in {*store.settings, *settings} if store.settings.get(k) != settings.get(k)]
        if wrong:
            there = ", ".join(f"{k}={store.settings.get(k)!r}" for k in sorted(wrong))
            raise TraceError(f"{path}: holds trajectories of other settings ({there}); choose another directory")
        return store

    def check(self, model: Model) -> None:
        """Raise `TraceError` unless the trajectories are this model's, and its tokenizer's."""
        if self.manifest.get("tokenizer") != tokenizer_checksum(model):
            raise TraceError(f"{self.directory}: trajectories of another tokenizer; record them with this model")
        if self.manifest.get("checksum") != checksum(model):  # which the ids of its tokens then fit
            raise TraceError(
                f"{self.directory}: trajectories of another model, {self.manifest.get('model')}, not of {model!r}; record them "
                "with this one, or load the one they came from"
            )

    @property
    def parts(self) -> int:
        """How many parts there are: 0, 1, ... without a gap."""
        n = 0
        while (self.directory / _PART.format(n)).exists():
            n += 1
        return n

    @property
    def bytes(self) -> int:
        return sum((self.directory / _PART.format(n)).stat().st_size for n in range(self.parts))

    def write(self, n: int, trajectories: Sequence[Trajectory]) -> None:
        """Write part n, the next one, whole or not at all."""
        _write(self.directory / _PART.format(n), packed(trajectories))

    def part(self, n: int) -> list[Trajectory]:
        file = self.directory / _PART.format(n)
        try:
            return unpacked(file.read_bytes())
        except Exception as error:  # a zip of arrays and JSON raises many kinds where it is damaged; all mean the same
            raise TraceError(f"{file}: cannot be read: {error}; remove it and those after it, and record them again") from error

    def scores(self, n: int, verifier: str) -> list[float] | None:
        """What a verifier said of a part's trajectories, if it was asked."""
        try:
            found = parse_json(read_text(self._scores(n, verifier)))
        except (OSError, ValueError):
            return None  # they are made again
        return found if isinstance(found, list) and all(isinstance(x, float) for x in found) else None

    def write_scores(self, n: int, verifier: str, scores: Sequence[float]) -> None:
        _write(self._scores(n, verifier), json.dumps(list(scores)))

    def _scores(self, n: int, verifier: str) -> Path:
        # Scores of a verifier that judged otherwise once are not read: raise the number with its rule.
        return self.directory / f"{_PART.format(n)}.{verifier}-{_RULES}.json"

    def __iter__(self) -> Iterator[Trajectory]:
        for n in range(self.parts):
            yield from self.part(n)


def packed(trajectories: Sequence[Trajectory]) -> bytes:
    """Many trajectories as one compressed npz. The EOS that an early stop filled in is not kept, each number in as few bytes
    as the largest needs, problems and texts as JSON."""
    ends = [_end(t) for t in trajectories]
    flat = {
        "tokens": np.concatenate([t.tokens[:end] for t, end in zip(trajectories, ends, strict=True)]),
        # 0 where nothing accepted the position.
        "accepted_at": np.concatenate([t.accepted_at[t.prompt : end] + 1 for t, end in zip(trajectories, ends, strict=True)]),
        "end": np.array(ends),
        "length": np.array([len(t.tokens) for t in trajectories]),
        "fill": np.array([t.tokens[-1] for t in trajectories]),
    }
    flat |= {name: np.array([getattr(t, name) for t in trajectories]) for name in NUMBERS}
    small: dict[str, Any] = {name: a.astype(np.min_scalar_type(int(a.max(initial=0)))) for name, a in flat.items()}
    small["confidence"] = np.concatenate([t.confidence[t.prompt : e] for t, e in zip(trajectories, ends, strict=True)])
    small["confidence"] = small["confidence"].astype(np.float16)
    words = json.dumps([[dict(t.problem), t.text] for t in trajectories])
    small["words"] = np.frombuffer(words.encode(), np.uint8)
    file = io.BytesIO()
    np.savez_compressed(file, **small)
    return file.getvalue()


def _end(t: Trajectory) -> int:
    """Up to where the canvas says more than its last token does."""
    kept = np.flatnonzero((t.tokens != t.tokens[-1]) | (t.accepted_at >= 0))
    return max(t.prompt, int(kept[-1]) + 1 if kept.size else 0)


def unpacked(data: bytes) -> list[Trajectory]:
    """Raises many kinds of errors for what `packed` did not make, before it takes much memory."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        if sum(member.file_size for member in file.infolist()) > LARGEST:
            raise ValueError(f"it would take more than {LARGEST} bytes")
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        got = {name: file[name] for name in file.files}
    words = parse_json(got["words"].tobytes().decode())
    out, token, position = [], 0, 0
    for b, (problem, text) in enumerate(words):
        prompt, end, length = (int(got[name][b]) for name in ("prompt", "end", "length"))
        if not 0 <= prompt <= end <= length <= LONGEST or token + end > len(got["tokens"]):
            raise ValueError("lengths that contradict each other")
        tokens = np.full(length, got["fill"][b], np.int32)
        accepted, confidence = np.full(length, -1, np.int32), np.zeros(length, np.float16)
        tokens[:end] = got["tokens"][token : token + end]
        accepted[prompt:end] = got["accepted_at"][position : position + end - prompt].astype(np.int32) - 1
        confidence[prompt:end] = got["confidence"][position : position + end - prompt]
        token, position = token + end, position + end - prompt
        numbers = {name: int(got[name][b]) for name in NUMBERS}
        out.append(Trajectory(problem, text, tokens, accepted, confidence, **numbers))
    return out


def _write(file: Path, data: str | bytes) -> None:
    """`files.write`, whose errors are `TraceError`."""
    try:
        write(file, data)
    except OSError as error:
        raise TraceError(f"{file}: cannot be written: {error}; what was there before is untouched") from error
