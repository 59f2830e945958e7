"""Results as files: written whole or not at all, and the README's parts that are made from them."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from djax.errors import OptionError


def write(file: Path, text: str) -> None:
    """A killed process leaves the old file or the new one."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, file)


def write_lines(file: Path, lines: Iterable[dict[str, Any]]) -> None:
    """JSON, one measurement a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file, "".join(json.dumps(line) + "\n" for line in lines))


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


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
        write(readme, with_part(readme.read_text(), name, text))
