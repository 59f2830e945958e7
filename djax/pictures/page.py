"""A decode as one HTML file that needs nothing else: no network, no fonts, no scripts but its own."""

import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from djax.errors import OptionError
from djax.pictures.frames import Replay
from djax.storage import files


def facts(question: str | None, generation: Any, settings: Mapping[str, Any]) -> dict[str, str]:
    """What stands above a picture: the question (None leaves it out), what the answer took, and how it was decoded."""
    return {
        **({} if question is None else {"question": question}),
        **({} if generation.text is None else {"answer": generation.text}),
        "forwards": str(generation.forwards),
        "refreshes": str(generation.refreshes),
        "tokens": str(len(generation.tokens)),
        "tokens per forward": f"{generation.tokens_per_forward:.2f}",
        **{name.replace("_", " "): "none" if value is None else str(value) for name, value in settings.items()},
    }


def check(path: Path) -> None:
    """Raise `OptionError` where `write` would; worth asking before a decode."""
    path = Path(path)
    cure = "name a file, new or to be replaced, in a directory that exists and that you may write to"
    try:
        if not path.parent.is_dir():
            problem = f"the directory {path.parent} does not exist"
        elif path.is_dir():
            problem = f"{path} is a directory"
        elif path.exists() and not path.is_file():
            problem = f"{path} is not a regular file"
        elif not os.access(path if path.exists() else path.parent, os.W_OK):
            problem = f"{path} cannot be written: permission denied"
        else:
            return
    except OSError as error:
        problem = f"{path} cannot be written: {error.strerror}"
    raise OptionError(f"--html: expected a file to write, but {problem}; {cure}")


def write(path: Path, replays: Sequence[Replay], facts: Sequence[Mapping[str, str]]) -> None:
    """Write the page of these replays, each with its facts: names and values in the order they are to be read.

    The file appears whole or not at all. No text of a token or a fact can end the data or become markup: the data holds
    no `<`, and the page only ever sets text. Raises `OptionError` if the file cannot be written.
    """
    path = Path(path)
    check(path)
    data = [{"facts": dict(fact), **_data(replay)} for replay, fact in zip(replays, facts, strict=True)]
    written = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    page = resources.files("djax.pictures").joinpath("page.html").read_text("utf-8").replace("@DATA@", written, 1)
    try:
        files.write(path, page)
    except OSError as error:
        raise OptionError(f"--html: {path} cannot be written: {error.strerror}; name a file elsewhere") from error


def _data(replay: Replay) -> dict[str, Any]:
    """What page.html reads.

    proposed: a position's proposals as step, token, step, token and so on, written only where they change.
    """
    proposed: dict[int, list[int]] = {}
    for step in range(1, len(replay.forwards) + 1):
        for position, token in replay.proposed(step).items():
            changes = proposed.setdefault(position, [])
            if not changes or changes[-1] != token:
                changes += [step, token]
    tokens = replay.tokens.tolist()
    needed = {*tokens, *(token for changes in proposed.values() for token in changes[1::2])}
    return {
        "prompt": replay.prompt,
        "tokens": tokens,
        "words": {token: replay.words[token] for token in sorted(needed)},
        "special": sorted(needed & replay.special),
        "acceptedAt": replay.accepted_at.tolist(),
        "confidence": np.round(replay.confidence.astype(float), 4).tolist(),
        "forwards": [[f.start, f.end, f.whole, f.accepted, f.done] for f in replay.forwards],
        "borders": replay.borders,
        "proposed": proposed,
    }
