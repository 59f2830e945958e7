"""How answers are decoded while they are recorded or judged, as one value: `djax.generate`'s options."""

import dataclasses
from typing import Any

from djax.caching import CACHES
from djax.decoding import DECODERS
from djax.decoding.smoothing import SMOOTHINGS
from djax.engine.options import FIELDS
from djax.errors import OptionError
from djax.plugs import parse

# Stored runs are compared by their settings. These always name the options of the first stores, in this order; of the others
# those that are not at their default, so that a new option makes no store another one.
_ALWAYS = (
    *("gen_length", "block_length", "decoder", "cache", "smoothing", "temperature"),
    *("early_stop", "align_blocks"),
)
# What a recording sets itself, or what changes no answer.
_APART = ("seed", "trace", "max_batch")
_NAMES = (*_ALWAYS, *(name for name in FIELDS if name not in (*_ALWAYS, *_APART)))


_defaults = [(n, Any, dataclasses.field(default=FIELDS[n].default)) for n in _NAMES]
# Any: type checkers know no class that is made while the program runs.
_Fields: Any = dataclasses.make_dataclass("Fields", _defaults, frozen=True, repr=False)


@dataclasses.dataclass(frozen=True, repr=False)
class Settings(_Fields):
    """The options of `djax.generate`, less those of a recording; what its repr prints, `--recordings` reads back."""

    @classmethod
    def read(cls, text: str, name: str) -> "Settings":
        """From `Settings(gen_length=256, decoder=Threshold(0.8), cache=Dual())`. Raises `OptionError`."""
        found = parse(text, {**DECODERS, **CACHES, **SMOOTHINGS, "settings": cls}, name)
        if not isinstance(found, cls):
            raise OptionError(f"{name}: expected Settings(...), got {text!r}")
        return found

    def options(self) -> dict[str, Any]:
        """What to pass to `djax.generate`, and what a store remembers."""
        values = {name: getattr(self, name) for name in FIELDS if name in _NAMES}
        return {n: v for n, v in values.items() if n in _ALWAYS or v != FIELDS[n].default}

    def __repr__(self) -> str:
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in self.options().items())})"
