"""Published ways to decode, by name: the files of configs/presets."""

import importlib
from pathlib import Path
from typing import Any

from djax.checks import plain_text, show
from djax.errors import OptionError
from djax.options import make_options


def presets() -> list[str]:
    """The names there are."""
    from djax.configs import presets as package

    return sorted(file.stem for file in Path(package.__file__).parent.glob("*.py") if file.stem != "__init__")


def preset(name: str) -> dict[str, Any]:
    """The options of `djax.generate` that make up a published way to decode; those it does not name are yours.

    djax.generate(model, question, **djax.preset("dinfer_vicinity") | dict(gen_length=256)). Raises `OptionError`.
    """
    plain = plain_text(name)
    if plain not in presets():
        raise OptionError(f"preset: unknown {show(name)}; there are: {', '.join(presets())}")
    chosen = dict(importlib.import_module(f"djax.configs.presets.{plain}").PRESET)
    make_options(chosen, f"djax.configs.presets.{plain}")  # a preset has no option that does not exist
    return chosen
