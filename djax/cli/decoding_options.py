"""How an answer is decoded, as options of a command: those of `djax.generate`, and presets of them."""

import argparse
import contextvars
import dataclasses
import functools
import operator
from typing import Annotated, Any

from tyro.conf import UseAppendAction, arg

from djax.cli.arguments import read_argument
from djax.engine.options import FIELDS, describe, is_repeated, list_types

PRESET = """A published way to decode, whose values then are the defaults of the options below (with --help: shown there):
llada, fast_dllm_prefix, fast_dllm_dual, dinfer_vicinity, dinfer_credit or dinfer_hierarchy."""
# Options that are no part of how an answer is decoded: commands have them, or what needs them, of their own.
APART = ("trace", "max_batch")
# Options that are given as text.
PLUGS = ("decoder", "cache", "smoothing")
OWN = "FILE.py:NAME(...) is a class of your own in that Python file, which is executed."


def describe_flag(option: str) -> str:
    """The documentation of an option of `djax.generate`, as a sentence."""
    text = describe(option)
    return text[0].upper() + text[1:]


def spell(option: str, value: Any) -> Any:
    """An option's value as the command line has it."""
    if option in PLUGS:
        return "none" if value is None else repr(value)
    return tuple(value or ()) if is_repeated(option) else value


def _make_flag(option: str) -> tuple[str, Any, Any]:
    """An option of `djax.generate` as one of a command: name, type and default."""
    kind: Any = functools.reduce(operator.or_, list_types(option))
    described = arg(help=describe_flag(option))
    if option in PLUGS:
        kind = Annotated[str, arg(help=f"{describe_flag(option)} {OWN}")]
    elif is_repeated(option):
        kind = Annotated[tuple[str, ...], described, UseAppendAction]
    else:
        kind = Annotated[kind, described]
    return option, kind, dataclasses.field(default=spell(option, FIELDS[option].default))


_preset = "preset", Annotated[str | None, arg(help=PRESET)], None
# Any: type checkers know no class that is made while the program runs.
_Fields: Any = dataclasses.make_dataclass("Fields", [_preset, *(_make_flag(n) for n in FIELDS if n not in APART)])


@dataclasses.dataclass
class Decoding(_Fields):
    """How an answer is decoded; the same names and defaults as `djax.generate`."""

    @classmethod
    def of(cls, name: str | None) -> "Decoding":
        """The defaults; with a name, those of a preset."""
        from djax.presets import preset

        chosen = preset(name) if name is not None else {}
        return cls(name, **{option: spell(option, value) for option, value in chosen.items()})

    def options(self) -> dict[str, Any]:
        """What to pass to `djax.generate`."""
        from djax.plug_files import read_plugs

        options = {name: getattr(self, name) for name in FIELDS if name not in APART}
        options |= read_plugs({name: options[name] for name in PLUGS})
        for name in options:
            if name not in PLUGS and is_repeated(name):
                options[name] = tuple(read_argument(text, f"--{name}") for text in options[name]) or None
        return options


# What a command's decoding options start from while its arguments are read.
START: contextvars.ContextVar[Decoding] = contextvars.ContextVar("START")
DecodingOptions = Annotated[Decoding, arg(name="")]


def get_start() -> Decoding:
    """What the arguments start from: the defaults, or a preset's values."""
    return START.get(Decoding())


def find_preset(arguments: list[str]) -> str | None:
    """The preset that the arguments name, read before the others: they start from its values."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--preset", nargs="?")  # without a value it is None here, and an error of the command itself
    return reader.parse_known_args(arguments)[0].preset
