"""Reading the numbers of a HF config.json: every absent, malformed or unimplemented setting is named, all of them at once."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from djax.errors import UnsupportedModelError, list_problems, shorten
from djax.models.contract import Config

# Programs count positions, tokens and what they add to them in 32 bits, XLA and numpy count bytes in 64.
_MOST, _MOST_ELEMENTS = 2**30, 2**48


def list_settings(config: Config) -> dict[str, Any]:
    """A family's Config as JSON values. more_eos_ids is listed only if there are any, so that everything which was
    written or hashed of a config with one EOS id stays as it is."""
    settings = dataclasses.asdict(config)
    return {key: value for key, value in settings.items() if key != "more_eos_ids" or value}


class EndIds:
    """What every family's Config knows of the tokens that end an answer."""

    eos_id: int
    more_eos_ids: tuple[int, ...]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Any of them ends an answer. The first, `eos_id`, fills what an early stop leaves."""
        return (self.eos_id, *self.more_eos_ids)


class Reader:
    """Reads one config.json for one family; `done` raises what was wrong.

    only: values that the family's models leave at what is implemented. Anything else changes the forward pass, so it is
    refused, not ignored; an absent key is fine.
    """

    def __init__(self, family: str, hf: Mapping[str, Any], only: Mapping[str, tuple]) -> None:
        self._family, self._hf = family, hf
        self.wrong = [f"{k}={_show(hf[k])} (implemented: {ok[0]!r})" for k, ok in only.items() if k in hf and hf[k] not in ok]

    def __call__(self, key: str, kind: type, default: object = None) -> Any:
        """A positive number of this kind; `default` where the key is absent or null and there is a default."""
        return self._number(key, self._hf.get(key), kind, default)

    def _number(self, key: str, value: Any, kind: type, default: Any) -> Any:
        value = default if value is None else value
        most = _MOST if kind is int else 2**53
        is_number = isinstance(value, int | kind) and not isinstance(value, bool)
        good = is_number and 0 < value <= most
        if not good:
            what = f"whole number up to {most}" if isinstance(value, int) and value > most else "whole number"
            self.wrong.append(f"{key}={_show(value)} (expected: a positive {what if kind is int else 'number'})")
        return kind(value) if good else kind(1)

    def flag(self, key: str) -> bool:
        """True only where it says so."""
        if self._hf.get(key) not in (True, False, None):
            self.wrong.append(f"{key}={_show(self._hf[key])} (expected: true, false or null)")
        return bool(self._hf.get(key))

    def rope_theta(self) -> float:
        """Its own key, or transformers 5's table of rotary settings."""
        rope, value = self._rope(), self._hf.get("rope_theta")
        if rope:
            for key in ("rope_type", "type"):
                if rope.get(key, "default") != "default":
                    self.wrong.append(f"rope_parameters.{key}={_show(rope[key])} (implemented: 'default')")
            if self._hf.get("rope_theta") is not None and value != rope.get("rope_theta"):
                self.wrong.append(f"rope_theta={_show(value)} (rope_parameters says {_show(rope.get('rope_theta'))})")
            value = rope.get("rope_theta")
        return self._number("rope_theta", value, float, None)

    def rotated(self, head_dim: int) -> int:
        """How many features of a head rotary turns: `partial_rotary_factor`, at the top or in the table of rotary settings."""
        key = "partial_rotary_factor"
        inner, value = self._rope().get(key), self._hf.get(key)
        if inner is not None and value is not None and inner != value:
            self.wrong.append(f"{key}={_show(value)} (rope_parameters says {_show(inner)})")
        return round(head_dim * self._number(key, inner if value is None else value, float, 1.0))

    def _rope(self) -> Mapping[str, Any]:
        rope = self._hf.get("rope_parameters")
        if not isinstance(rope, dict | None):
            said = f"rope_parameters={_show(rope)} (expected: an object)"
            self.wrong += [] if said in self.wrong else [said]
            return {}
        return rope or {}

    def heads(self, heads: int, groups: int, head_dim: int) -> None:
        """Groups that divide the heads, and heads in halves."""
        if heads % groups:
            self.wrong.append(f"num_key_value_heads={groups} (expected: a divisor of num_attention_heads={heads})")
        if head_dim % 2 and not self.wrong:
            self.wrong.append(f"head_dim={head_dim} (expected: even, for rotary positions)")

    def sizes(self, layers: int, experts: int = 1) -> None:
        """No more layers and experts than a table of them can be made for."""
        if layers * experts > 1_000_000:
            self.wrong.append(f"{layers} layers of {experts} experts (expected: a million at most, together)")

    def experts(self, experts: int, top: int) -> None:
        if top > experts:
            self.wrong.append(f"num_experts_per_tok={top} (expected: at most num_experts={experts})")

    def parameter(self, *sizes: int) -> None:
        """The shape of a large parameter, which must not have more elements than can be counted."""
        if math.prod(sizes) > _MOST_ELEMENTS and not self.wrong:
            self.wrong.append(f"a parameter of shape {list(sizes)} (expected: at most {_MOST_ELEMENTS} elements)")

    def done(self) -> None:
        """Raises `UnsupportedModelError` if anything was wrong."""
        if self.wrong:
            raise UnsupportedModelError(
                f"config.json asks for what {self._family} in djax does not have: {list_problems(self.wrong, '; ')}"
            )


def _show(value: object) -> str:
    return shorten(repr(value))
