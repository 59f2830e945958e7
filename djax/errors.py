"""The errors djax raises at its public door.

Each message names the argument, what was expected, what came and what would work. All of them are `DjaxError`;
those about a value are `ValueError` too, so callers that know nothing of djax still catch them.
"""

from collections.abc import Sequence
from typing import Any

MOST_PROBLEMS, MOST_CHARACTERS = 10, 300


class DjaxError(Exception):
    """Base of every error djax raises on purpose."""


class OptionError(DjaxError, ValueError):
    """An argument of a public function or an option of the CLI is illegal or does not apply."""


class PromptError(DjaxError, ValueError):
    """A prompt cannot be turned into tokens, or its tokens cannot be decoded over."""


class CanvasError(DjaxError, ValueError):
    """Prompt and generation length together do not fit the model."""


class BatchError(DjaxError, ValueError):
    """A batch does not fit the memory of the device."""


class CheckpointError(DjaxError, ValueError):
    """A checkpoint is missing, damaged, or does not hold exactly what its config says."""


class PathError(CheckpointError, FileNotFoundError):
    """A checkpoint's path, or a file it must hold, does not exist."""


class UnsupportedModelError(CheckpointError):
    """The checkpoint is of a family, or uses a feature, that djax does not implement."""


class ForkError(DjaxError, RuntimeError):
    """The process was forked from one in which jax had already run; a computation in it would never end."""


class TripCapError(DjaxError, RuntimeError):
    """The decoding loop reached its cap with masks left: a decoder broke its law of progress, or the model is not finite.

    generations: the rows of that program as far as they came, each with its trace. A row with masks left has no text.
    """

    def __init__(self, message: str, generations: list[Any]) -> None:
        super().__init__(message)
        self.generations = generations


class TraceError(DjaxError, ValueError):
    """Recorded trajectories are missing, damaged, or of another model, tokenizer or settings."""


class VerifierError(DjaxError, RuntimeError):
    """A verifier raised, hung, or said something that is no score."""


class TrainingError(DjaxError, RuntimeError):
    """A training cannot go on: the loss is not finite, or the disk is full. The last good checkpoint is kept."""


def shorten(text: str, most: int = MOST_CHARACTERS) -> str:
    """Text from a file or a caller as an error shows it: of any length, so only its first characters."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def list_problems(problems: Sequence[str], separator: str = "\n  ") -> str:
    """The first ten problems, and how many more there are. Each may hold two values that are shortened already."""
    more = len(problems) - MOST_PROBLEMS
    shown = [shorten(problem, 3 * MOST_CHARACTERS) for problem in problems[:MOST_PROBLEMS]]
    return separator.join([*shown, f"and {more} more"] if more > 0 else shown)
