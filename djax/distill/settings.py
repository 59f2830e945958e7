"""How answers are decoded while they are recorded or judged, as one value: `djax.generate`'s options."""

import dataclasses
from typing import Any

from djax.caching import CACHES
from djax.decoding import DECODERS, Threshold
from djax.errors import OptionError
from djax.plugs import parse
from djax.smoothing import SMOOTHINGS


@dataclasses.dataclass(frozen=True)
class Settings:
    """The same names as `djax.generate`; what its repr prints, `--recordings` reads back."""

    gen_length: int = 128
    block_length: int = 32
    decoder: Any = Threshold()  # noqa: RUF009  (frozen, so one default is one value)
    cache: Any = None
    smoothing: Any = None
    temperature: float = 0.0
    early_stop: bool = True
    align_blocks: bool = True

    @classmethod
    def read(cls, text: str, name: str) -> "Settings":
        """From `Settings(gen_length=256, decoder=Threshold(0.8), cache=Dual())`. Raises `OptionError`."""
        found = parse(text, {**DECODERS, **CACHES, **SMOOTHINGS, "settings": cls}, name)
        if not isinstance(found, cls):
            raise OptionError(f"{name}: expected Settings(...), got {text!r}")
        return found

    def options(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
