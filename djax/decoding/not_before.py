"""Keep an answer from ending early."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from djax import native
from djax.decoding.contract import NEVER, Decoder, Look, Verdict
from djax.pytree import pytree
from djax.sharding import split


@pytree
@dataclasses.dataclass(frozen=True)
class NotBefore(Decoder):
    """Exclude the tokens `ids` at canvas positions below `least`, then let `inner` decide: `min_gen_length` of a row.

    Every decode holds its decoder in one. ids: static; least: int32, 0 excludes nothing.
    """

    inner: Decoder
    least: int
    ids: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def draws(self) -> bool:  # type: ignore[override]
        return self.inner.draws

    @property
    def post_steps(self) -> int:  # type: ignore[override]
        return self.inner.post_steps

    @property
    def drafts(self) -> int:  # type: ignore[override]
        return self.inner.drafts

    def init(self, block: int, vocab: int) -> Any:
        return self.inner.init(block, vocab)

    def step(self, state: Any, look: Look) -> tuple[Any, Verdict]:
        early = look.at < self.least

        def shape(logits: jax.Array) -> jax.Array:
            return exclude(logits, early, self.ids)

        logits = jax.vmap(shape)(look.logits) if self.drafts else shape(look.logits)
        return self.inner.step(state, look._replace(logits=logits))


def exclude(logits: jax.Array, where: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    """Logits `[S, V]` with `NEVER` at the ids in the positions `where` bool `[S]`."""

    def columns(logits: jax.Array, where: jax.Array) -> jax.Array:
        for one in ids:
            column = jnp.where(where[:, None], NEVER, logits[:, one : one + 1])
            logits = jax.lax.dynamic_update_slice(logits, column, (0, one))
        return logits

    def everywhere(logits: jax.Array, where: jax.Array) -> jax.Array:
        excluded = jnp.any(jnp.arange(logits.shape[-1])[:, None] == jnp.array(ids)[None, :], axis=-1)
        return jnp.where(where[:, None] & excluded[None, :], NEVER, logits)

    @jax.custom_batching.custom_vmap
    def run(logits: jax.Array, where: jax.Array) -> jax.Array:
        # A GPU reads the logits through this, and writes none of it; a CPU would write all of them again.
        if split() or native.why_not(logits.dtype) is not None:
            return everywhere(logits, where)
        return jax.lax.platform_dependent(logits, where, cpu=columns, default=everywhere)

    @run.def_vmap
    def flatten(size: int, batched: list, logits: jax.Array, where: jax.Array) -> tuple[jax.Array, bool]:
        """All rows as one: mapped, an update of columns would become a scatter."""
        logits, where = (
            a if mapped else jnp.broadcast_to(a, (size, *a.shape)) for a, mapped in zip((logits, where), batched, strict=True)
        )
        return run(logits.reshape(-1, logits.shape[-1]), where.reshape(-1)).reshape(logits.shape), True

    return run(logits, where)
