"""Results as files, and the README's parts that are made from them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from djax.errors import OptionError
from djax.storage.files import parse_json, read_text, write


def write_lines(file: Path, lines: Iterable[dict[str, Any]]) -> None:
    """JSON, one measurement a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file, "".join(json.dumps(line) + "\n" for line in lines))


def read_lines(file: Path) -> list[dict[str, Any]]:
    """What `write_lines` wrote. Raises `OptionError`, which names the line, for anything else."""
    lines = []
    try:
        texts = read_text(file).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{file}: cannot be read: {error}") from error
    for n, text in enumerate(texts, 1):
        if text.strip():
            try:
                lines.append(parse_json(text))
            except ValueError as error:
                raise OptionError(f"{file}, line {n}: {error}; remove the line to measure it again") from error
            if not isinstance(lines[-1], dict):
                raise OptionError(f"{file}, line {n}: expected an object, got {text:.60}; remove the line to measure it again")
    return lines


def with_part(readme: str, name: str, text: str) -> str:
    """A README with what stands between the two marks of a benchmark made anew. Raises `OptionError` if they are not there."""
    begin, end = f"<!-- djax bench {name} writes this -->", f"<!-- end of {name} -->"
    if readme.count(begin) != 1 or readme.count(end) != 1:
        raise OptionError(f"--readme: expected one line {begin} and one line {end}")
    before, rest = readme.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def put(readme: Path | None, name: str, text: str) -> None:
    """Write a benchmark's part into a README, if one is given."""
    if readme is not None:
        write(readme, with_part(read_text(readme), name, text))
