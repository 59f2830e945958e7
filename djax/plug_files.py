"""Plugs of a user's own from a Python file: `my_file.py:Margin(0.8)`.

Only the command line reads these: whoever names a file there asks for it to be executed. Presets
and the settings of recordings are data, so `plugs.parse` reads them and refuses files.
"""

import ast
import dataclasses
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from djax.caching import CACHES
from djax.caching.contract import Policy
from djax.checks import describe, plug, show
from djax.decoding import DECODERS
from djax.decoding.contract import Decoder
from djax.decoding.smoothing import SMOOTHINGS
from djax.errors import OptionError
from djax.plugs import parse, spelled

_FILE = re.compile(r"(.*?\.py):(.*)", re.DOTALL)
_CALL = re.compile(r"\s*\w+\s*\(")


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What an option takes: djax's own by name, and the base class or methods of a user's own."""

    registry: Mapping[str, type]
    contract: type | tuple[str, ...]

    def admits(self, kind: type) -> bool:
        if isinstance(self.contract, type):
            return issubclass(kind, self.contract)
        return all(callable(getattr(kind, method, None)) for method in self.contract)

    def demand(self) -> str:
        """What a class must do, as an error says it."""
        if isinstance(self.contract, type):
            return f"extend djax.{self.contract.__name__}"
        return f"have the methods {' and '.join(self.contract)}"


_KINDS = {
    "decoder": _Kind(DECODERS, Decoder),
    "cache": _Kind(CACHES, Policy),
    "smoothing": _Kind(SMOOTHINGS, ("weight", "least")),
}
_SHIPPED = {name: kind for of in _KINDS.values() for name, kind in of.registry.items()}


def read_plugs(texts: Mapping[str, str]) -> dict[str, Any]:
    """Build the plug that the text of each option (decoder, cache, smoothing) spells.

    A text is what `plugs.parse` reads, or FILE.py: in front of it. Then its names are the classes
    that the file defines and djax's own, and at least one is the file's. EXECUTES each file, once
    for all options that name it.

    Raises `OptionError`, naming the option: a file that is missing or raises (with the line), that
    lacks the class or gives it a name of djax's own, a class that breaks its contract, arguments
    that do not fit.
    """
    modules: dict[Path, types.ModuleType] = {}

    def load(path: str, name: str) -> types.ModuleType:
        file = Path(os.path.expanduser(path)).absolute()
        if file not in modules:
            modules[file] = _execute(file, f"{name}: {path}")
        return modules[file]

    return {name: _read(text, f"--{name}", _KINDS[name], load) for name, text in texts.items()}


def _read(text: str, name: str, kind: _Kind, load: Callable[[str, str], types.ModuleType]) -> Any:
    split = _FILE.fullmatch(text)
    if split is None:
        return parse(text, kind.registry, name)
    path, call = split.groups()
    if (_CALL.match(path) and not Path(path).is_file()) or _FILE.fullmatch(call):
        inner = re.split(r"[\s(,=]", path)[-1]
        how = f"{inner}:{text.replace(f'{inner}:', '')}"
        moved = _FILE.fullmatch(how)
        assert moved is not None, "it starts with a file"
        how = "one file" if moved.group(2).count(".py:") else how
        got = show(text)
        raise OptionError(f"{name}: a file goes in front of the whole; expected {how}, got {got}")
    module = load(path, name)
    classes = {n: value for n, value in vars(module).items() if isinstance(value, type)}
    defined = {n: found for n, found in classes.items() if found.__module__ == module.__name__}
    own = _choose(defined, kind, f"{name}: {path}")

    def check(tree: ast.expr) -> None:
        _check_names(tree, defined, own, kind, f"{name}: {path}")

    made = parse(call, {**own, **kind.registry}, name, check)
    plug(made, name, kind.contract, spelled(kind.registry))
    return made


def _execute(file: Path, where: str) -> types.ModuleType:
    """Run a file as a module that is named by its path, and so takes no other module's name."""
    if not file.is_file():
        raise OptionError(f"{where} does not exist or is not a file")
    key = str(file)
    module = types.ModuleType(key)
    module.__file__ = key
    sys.modules[key] = module  # where dataclasses look up annotations that are text
    try:
        # No import: that would leave compiled code next to the file.
        exec(compile(file.read_bytes(), key, "exec", dont_inherit=True), vars(module))
    except BaseException as error:  # also SystemExit: a script's end is not the command's
        del sys.modules[key]
        if isinstance(error, KeyboardInterrupt):
            raise
        line, words = _find_line(error, key), describe(error)
        if isinstance(error, SyntaxError) and error.filename == key:
            line, words = error.lineno, f"{type(error).__name__}: {error.msg}"
        raise OptionError(f"{where}{f', line {line}' if line else ''}: {words}") from error
    return module


def _find_line(error: BaseException, file: str) -> int | None:
    """The last line of the file that the error passed through."""
    passed = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in passed if frame.f_code.co_filename == file]
    return lines[-1] if lines else None


def _choose(defined: Mapping[str, type], kind: _Kind, where: str) -> dict[str, type]:
    """The classes that the option takes, by name in lower case, as `plugs.parse` looks them up."""
    own: dict[str, type] = {}
    for name, found in defined.items():
        shipped = _SHIPPED.get(name.lower())
        if shipped is not None and any(of.admits(found) for of in _KINDS.values()):
            shown = name if shipped is type(None) else shipped.__name__
            how = f"give the file's class {name} another name"
            raise OptionError(f"{where}: {shown} is djax's own; {how}")
        if not kind.admits(found):
            continue
        if own.setdefault(name.lower(), found) is not found:
            what = f"the names of two classes differ only in case: {name}"
            raise OptionError(f"{where}: {what}; rename one")
    return own


def _check_names(tree: ast.expr, defined: Mapping[str, type], own: Mapping[str, type], kind: _Kind, where: str) -> None:
    """Raise `OptionError` for names that the file does not define, for its classes that are no
    plugs, and if none of its classes is used."""
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    there = ", ".join(name for name in defined if name.lower() in own)
    there = there or f"no class that would {kind.demand()}"
    used = [own[name.lower()] for name in names if name.lower() in own]
    for name in names:
        if name in defined and name.lower() not in own:
            raise OptionError(f"{where}: its class {name} does not {kind.demand()}")
        if name.lower() not in {*own, *(kind.registry if used else ())}:
            raise OptionError(f"{where} defines no class {show(name)}; it has: {there}")
    if not used:
        raise OptionError(f"{where}: expected the name of a class; it has: {there}")
    for found in used:
        if not dataclasses.is_dataclass(found):
            raise OptionError(
                f"{where}: {found.__name__} is no dataclass; write @djax.pytree and "
                "@dataclasses.dataclass(frozen=True) above it"
            )
