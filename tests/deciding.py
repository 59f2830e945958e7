"""Decoders called by hand: a batch of looks at drawn logits, mapped over rows as the loop maps them."""

from functools import partial

import jax
import jax.numpy as jnp

from djax.decoding.contract import Look, Tick


def begin(decoder, rows, block, vocab):
    """The states of fresh rows."""
    return jax.vmap(lambda _: decoder.init(block, vocab))(jnp.arange(rows))


def decide(
    decoder, state, logits, masked, *, mask_id, key=None, call=0, temperature=0.0, floor=-jnp.inf, tokens=None, may_write=None
):
    """One forward of rows: logits `[B, S, V]`, masked bool `[B, S]`, key `[B]` or None. tokens `[B, S]` are what stands there,
    a token of no meaning where they are not given; may_write `[B, S]`, all by default.

    Returns the states, the tokens that stand there then or are proposed, and bool `[B, S]`, where they are new.
    """
    masked, logits = jnp.asarray(masked), jnp.asarray(logits)
    other = 1 - jnp.minimum(mask_id, 1)
    before = jnp.where(masked, mask_id, other if tokens is None else tokens).astype(jnp.int32)
    may_write = jnp.ones(masked.shape, bool) if may_write is None else jnp.asarray(may_write)
    rows = len(masked)
    zero = jnp.zeros(rows, jnp.int32)
    ticks = Tick(zero, zero, zero, jnp.broadcast_to(jnp.asarray(call, jnp.int32), (rows,)))
    step = partial(_step, decoder, jnp.int32(mask_id), jnp.float32(floor), jnp.float32(temperature))
    state, verdict = jax.vmap(step)(state, logits, before, may_write, ticks, key)
    new = verdict.tokens != before
    return state, jnp.where(new, verdict.tokens, verdict.proposals), new


def _step(decoder, mask_id, floor, temperature, state, logits, tokens, may_write, tick, key):
    at = jnp.arange(len(tokens), dtype=jnp.int32)
    look = Look(logits, tokens, may_write, at, tick, mask_id, floor, temperature, key)
    if decoder.drafts:
        several = [jnp.broadcast_to(a[None], (decoder.drafts, *a.shape)) for a in (logits, tokens)]
        look = look._replace(logits=several[0], drafts=several[1], read=jnp.int32(1))
    return decoder.step(state, look)
