"""The runs of configs/, by the name of their file."""

import importlib
from pathlib import Path
from typing import TypeVar

from djax.errors import OptionError

T = TypeVar("T")


def find_config(name: str, kind: type[T]) -> T:
    """RUN of a file of configs/, which must be of this kind."""
    from djax import configs

    there = sorted(p.stem for p in Path(configs.__file__).parent.glob("*.py") if p.stem != "__init__")
    runs = {n: importlib.import_module(f"djax.configs.{n}").RUN for n in there}
    fitting = {n: run for n, run in runs.items() if isinstance(run, kind)}
    if name not in fitting:
        raise OptionError(f"config: unknown {name!r}; there are: {', '.join(fitting)}")
    return fitting[name]
