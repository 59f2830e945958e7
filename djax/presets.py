"""Published ways to decode, by name: the files of configs/presets."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from djax.caching import CACHES
from djax.checks import plain_text, show
from djax.decoding import DECODERS
from djax.decoding.smoothing import SMOOTHINGS
from djax.engine.options import make_options
from djax.errors import OptionError
from djax.pytree import classes

_SHIPPED = {*DECODERS.values(), *CACHES.values(), *SMOOTHINGS.values()}


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
    check_preset(chosen, plain)
    return chosen


def check_preset(chosen: Mapping[str, Any], name: str) -> None:
    """Check that a preset has no option that does not exist, and no plug but djax's own: it is data,
    and what it names must not be executed. Raises `TypeError` or `OptionError`."""
    make_options(chosen, f"djax.configs.presets.{name}")
    for option in ("decoder", "cache", "smoothing"):
        value = chosen.get(option)
        kinds = {type(value), *jax.tree.leaves(classes(value))}
        if value is not None and not kinds <= _SHIPPED:
            got = show(value)
            raise OptionError(f"preset {name}: {option}: expected one of djax's own, got {got}")
