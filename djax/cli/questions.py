"""The questions of a command: its argument, a file or standard input."""

import sys
from pathlib import Path

from djax.cli.arguments import read_argument
from djax.errors import OptionError, PromptError
from djax.storage.files import decode


def read_questions(question: str | None, file: Path | None, *, lines: bool) -> list[tuple[int, str]]:
    """The questions, each with the number of its line, counted from 0."""
    if (question is None) == (file is None):
        raise OptionError("give either a question, or '-' for standard input, or --file FILE")
    if file is not None:
        text = _read(file)
    elif question == "-":
        text = _read(None)
    elif lines:
        raise OptionError("--lines goes with --file or '-', not with a question on the command line")
    else:
        assert question is not None, "one of the two is given"
        text = read_argument(question)
    if not lines:
        questions = [(0, text.strip())]
    else:
        # str.splitlines knows a dozen other ends of lines, which stand inside of questions.
        questions = [(n, line.removesuffix("\r")) for n, line in enumerate(text.split("\n"))]
    questions = [(n, text) for n, text in questions if text.strip()]
    if not questions:
        raise PromptError("the question is empty")
    return questions


def _read(file: Path | None) -> str:
    """The text of a file; None is standard input."""
    try:
        if file is None:
            if sys.stdin is None:
                raise PromptError("the question cannot be read: standard input is closed")
            return decode(sys.stdin.buffer.read())
        if not file.is_file():
            raise OptionError(f"--file: {file} does not exist or is not a file")
        return decode(file.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"the question cannot be read as UTF-8 text: {error}") from error
