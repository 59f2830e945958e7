"""The `djax` command.

Each subcommand is a dataclass in a file of its own: its fields are the options, its `run` does the work. Heavy modules are
imported inside `run`.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import tyro
from rich.console import Console

from djax.cli.bench import Bench
from djax.cli.compile import CompileAhead
from djax.cli.console import say
from djax.cli.convert import Convert
from djax.cli.decoding_options import START, Decoding, find_preset
from djax.cli.distill import Distill
from djax.cli.evaluate import Evaluate
from djax.cli.explain import Explain
from djax.cli.generate import Generate
from djax.cli.info import Info
from djax.cli.streams import drop_output, escape_output, open_closed_streams
from djax.cli.train import Train
from djax.errors import DjaxError
from djax.runtime import interrupt


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exits with 2 and one line on standard error for anything a user can mend.

    arguments: those of the process by default, which then is the command and nothing else: an interrupt ends it.
    """
    if arguments is None:
        open_closed_streams()
    try:
        with interrupt.hold() as interrupted, escape_output():
            code = _run(arguments, interrupted)
    except KeyboardInterrupt:  # between the lines above
        print("djax: interrupted", file=sys.stderr)
        sys.exit(interrupt.STATUS)
    if interrupted():
        # Not by way of what the interpreter and libraries do at exit, which may wait for threads or be interrupted again.
        os._exit(code)
    if code:
        sys.exit(code)


def _run(arguments: list[str] | None, interrupted: Callable[[], bool]) -> int:
    """Run a command and say how it ended: its exit code."""
    console = Console(stderr=True)
    commands: dict[str, Callable[..., Any]] = {
        "generate": Generate,
        "explain": Explain,
        "compile": CompileAhead,
        "info": Info,
        "convert": Convert,
        "train": Train,
        "distill": Distill,
        "evaluate": Evaluate,
        "bench": Bench,
    }

    def complain(text: str) -> None:
        console.print(f"djax: {text}", style="red", markup=False, highlight=False, soft_wrap=True)

    before = START.set(Decoding())
    try:
        try:
            arguments = sys.argv[1:] if arguments is None else arguments
            name = find_preset(arguments)
            if name is not None:
                START.set(Decoding.of(name))
            about = "A JAX engine for diffusion language models."
            tyro.extras.subcommand_cli_from_dict(commands, prog="djax", description=about, args=arguments).run(console)
        finally:
            say("", end="")  # what help left in the buffer: the interpreter's own flush could only print an error
    except BaseException as error:
        if interrupted() or isinstance(error, KeyboardInterrupt):
            drop_output()
            # Also where a library has made another error of the interrupt.
            complain("interrupted")
            return interrupt.STATUS
        if isinstance(error, BrokenPipeError):
            # Whoever read the output has enough.
            drop_output()
            return 141
        if isinstance(error, DjaxError | OSError):
            drop_output()
            complain(str(error))
            return 2
        raise
    finally:
        START.reset(before)
    return 0
