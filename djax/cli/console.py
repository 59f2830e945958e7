"""What a command prints: its result, and on standard error how far it is."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from djax.errors import OptionError


def say(text: object, end: str = "\n") -> None:
    """Print, so that whoever reads the output has it at once, and a disk that is full is one sentence."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OptionError(f"standard output cannot be written: {error.strerror}") from error


@contextmanager
def show_working(console: Console, what: str) -> Iterator[None]:
    """A spinner with the seconds so far, on standard error; nothing where that is not a terminal."""
    began = time.monotonic()
    with console.status(f"{what} ...", spinner="line" if console.options.ascii_only else "dots"):
        yield
    if console.is_terminal:
        console.print(f"{what}: {time.monotonic() - began:.1f} s", style="dim")


def make_note(console: Console) -> Callable[[str], None]:
    """A function that prints a line of progress on standard error, as it is."""
    return lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)
