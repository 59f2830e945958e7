"""Reading the numbers of a HF config.json: every absent, malformed or unimplemented setting is named, all of them at once."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from djax.errors import UnsupportedModelError


def list_settings(config: Any) -> dict[str, Any]:
    """A family's Config as JSON values. more_eos_ids is listed only if there are any, so that everything which was
    written or hashed of a config with one EOS id stays as it is."""
    settings = dataclasses.asdict(config)
    return {key: value for key, value in settings.items() if key != "more_eos_ids" or value}


class Reader:
    """Reads one config.json for one family; `done` raises what was wrong.

    only: values that the family's models leave at what is implemented. Anything else changes the forward pass, so it is
    refused, not ignored; an absent key is fine.
    """

    def __init__(self, family: str, hf: Mapping[str, Any], only: Mapping[str, tuple]) -> None:
        self._family, self._hf = family, hf
        self.wrong = [f"{k}={hf[k]!r} (implemented: {ok[0]!r})" for k, ok in only.items() if k in hf and hf[k] not in ok]

    def __call__(self, key: str, kind: type, default: Any = None) -> Any:
        """A positive number of this kind; `default` where the key is absent or null and there is a default."""
        return self._number(key, self._hf.get(key), kind, default)

    def _number(self, key: str, value: Any, kind: type, default: Any) -> Any:
        value = default if value is None else value
        good = isinstance(value, int | kind) and not isinstance(value, bool) and 0 < value < 2**53
        if not good:
            self.wrong.append(f"{key}={value!r} (expected: a positive {'whole number' if kind is int else 'number'})")
        return kind(value) if good else kind(1)

    def flag(self, key: str) -> bool:
        """True only where it says so."""
        if self._hf.get(key) not in (True, False, None):
            self.wrong.append(f"{key}={self._hf[key]!r} (expected: true, false or null)")
        return bool(self._hf.get(key))

    def rope_theta(self) -> float:
        """Its own key, or transformers 5's table of rotary settings."""
        rope, value = self._hf.get("rope_parameters") or {}, self._hf.get("rope_theta")
        if not isinstance(rope, dict):
            self.wrong.append(f"rope_parameters={rope!r} (expected: an object)")
            rope = {}
        if rope:
            if rope.get("rope_type", "default") != "default":
                self.wrong.append(f"rope_parameters.rope_type={rope['rope_type']!r} (implemented: 'default')")
            if "rope_theta" in self._hf and value != rope.get("rope_theta"):
                self.wrong.append(f"rope_theta={value!r} (rope_parameters says {rope.get('rope_theta')!r})")
            value = rope.get("rope_theta")
        return self._number("rope_theta", value, float, None)

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

    def done(self) -> None:
        """Raises `UnsupportedModelError` if anything was wrong."""
        if self.wrong:
            raise UnsupportedModelError(
                f"config.json asks for what {self._family} in djax does not have: " + "; ".join(self.wrong)
            )
