"""The one program: a whole decode, from masks to tokens, as one jitted `while_loop`.

It names no decoder, cache policy or model family; it keeps their contracts (`decoding/contract.py`,
`caching/contract.py`, `models/`). Each row has its own block pointer and counters and never waits for another:
`generate([a, b, c])` gives every row the canvas, forwards and refreshes it gets alone.
"""

from functools import partial, reduce
from operator import or_
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from djax import native
from djax.caching.contract import Policy, appends
from djax.decoding.contract import Decoder, Tick, edits, post_steps, probability
from djax.models.layers import Cache
from djax.process import make_key
from djax.sharding import split
from djax.smoothing import Smoothing
from djax.trace import Record

# A logit that no softmax and no argmax chooses; finite, for decoders that multiply a probability of 0 by its logarithm.
NEVER = -1e30
# The widest window whose logits are made all at once, a row.
AT_ONCE = 256


class Request(NamedTuple):
    """What one decode is asked, all traced: new prompts, lengths, seeds or thresholds compile nothing.

    tokens int32 `[B, L]`: prompt, then masks, then padding. prompt, total int32 `[B]`: where the prompt and the canvas
    end. least int32 `[B]`: the position before which no EOS is proposed. start int32 `[B]`: where the first block starts.
    seed uint32 `[B]`. temperature, early_stop, cap: scalars.
    """

    tokens: jax.Array
    prompt: jax.Array
    total: jax.Array
    least: jax.Array
    start: jax.Array
    seed: jax.Array
    temperature: jax.Array
    early_stop: jax.Array
    cap: jax.Array


class Editing(NamedTuple):
    """Where a row's block stands with a decoder that edits.

    post    int32 `[B]`, forwards that began with no mask in the current block.
    changed bool `[B]`, whether the row's last forward wrote a token.
    """

    post: jax.Array
    changed: jax.Array


class Rows(NamedTuple):
    """The part of the carry that has one entry a row.

    tokens       int32 `[B, L]`, the canvas.
    active       bool `[B]`, still decoding.
    start        int32 `[B]`, first position of the current block.
    block        int32 `[B]`, its index.
    iteration    int32 `[B]`, turns of the loop so far.
    forwards     int32 `[B]`, network forwards so far.
    refreshes    int32 `[B]`, those that refilled the cache.
    positions    int32 `[B]`, canvas positions run through the network, over all forwards.
    call         int32 `[B]`, decode calls in the current block.
    cached_block int32 `[B]`, block in which the cache was last filled; -1 while it is empty.
    decoder      the decoder's state, any pytree with leading axis B.
    soft         `[B, L, D]`, the embeddings the next forward reads; () without smoothing, when the tokens' own are read.
    trace        the record so far (`trace.Record`); () unless asked for.
    editing      see `Editing`; () for decoders that do not edit.
    """

    tokens: jax.Array
    active: jax.Array
    start: jax.Array
    block: jax.Array
    iteration: jax.Array
    forwards: jax.Array
    refreshes: jax.Array
    positions: jax.Array
    call: jax.Array
    cached_block: jax.Array
    decoder: Any
    soft: Any
    trace: Any
    editing: Any


class Carry(NamedTuple):
    """rows: see `Rows`. cache: each layer's (k, v) `[B, G, L * K]`, () without a cache. trips: turns so far, scalar."""

    rows: Rows
    cache: tuple
    trips: jax.Array


def _row(tree: Any, b: jax.Array) -> Any:
    """Row b of every leaf, keeping the batch axis."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, b, 1), tree)


def _put_row(tree: Any, row: Any, b: jax.Array) -> Any:
    return jax.tree.map(lambda a, r: jax.lax.dynamic_update_slice_in_dim(a, r, b, axis=0), tree, row)


def _in_block(rows: Rows, total: jax.Array, block: int) -> jax.Array:
    """Bool `[B, L]`: the canvas positions of each row's current block."""
    at = jnp.arange(rows.tokens.shape[1])[None, :]
    return (at >= rows.start[:, None]) & (at < jnp.minimum(rows.start + block, total)[:, None])


def _is_any(tokens: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    """Which of the tokens are one of the ids: bool of the tokens' shape."""
    return reduce(or_, (tokens == one for one in ids))


def _without_early_eos(logits: jax.Array, early: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    """logits `[B, S, V]`, every EOS struck at the positions `[B, S]` where an answer may not end yet."""

    def columns(logits: jax.Array) -> jax.Array:
        for eos_id in eos_ids:
            column = jnp.where(early[..., None], NEVER, logits[:, :, eos_id : eos_id + 1])
            logits = jax.lax.dynamic_update_slice(logits, column, (0, 0, eos_id))
        return logits

    def everywhere(logits: jax.Array) -> jax.Array:
        is_eos = _is_any(jnp.arange(logits.shape[-1])[None, None, :], eos_ids)
        return jnp.where(early[..., None] & is_eos, NEVER, logits)

    # A GPU reads the logits through this, and writes none of it; a CPU would write all of them again.
    if split() or native.why_not(logits.dtype) is not None:
        return everywhere(logits)
    return jax.lax.platform_dependent(logits, cpu=columns, default=everywhere)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x `[B, L, ...]` at index `[B, W]`, clipped to the canvas."""
    index = jnp.clip(index, 0, x.shape[1] - 1)
    return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)


def _decode_block(
    rows: Rows, logits: jax.Array, ask: Request, decoder: Decoder, running: jax.Array, tick: Tick, sampled: bool, whole: bool
) -> Rows:
    """Hand the block's logits `[B, S, V]` of one forward to the decoder and write what it accepts.

    running bool `[B]`: the rows that take part. whole: the forward ran the whole canvas.
    """
    block = logits.shape[1]
    at = rows.start[:, None] + jnp.arange(block)[None, :]
    here = (at < ask.total[:, None]) & running[:, None]
    before = _take(rows.tokens, at)
    masked = (before == tick.mask_id) & here
    # The key depends on the row's own seed and counter, not on its place in the batch.
    key = jax.vmap(lambda s, f: jax.random.fold_in(make_key(s), f))(ask.seed, rows.forwards) if sampled else None
    state, tokens, accept = decoder.step(rows.decoder, logits, masked, tick, key)
    editing = rows.editing
    if editing:
        editable = here & ~masked & (at >= ask.prompt[:, None]) & (editing.post < post_steps(decoder))[:, None]
        edited, replace = decoder.edit(logits, before, editable, tick)
        tokens, accept = jnp.where(editable, edited, tokens), accept | replace
        post = editing.post + (running & ~jnp.any(masked, axis=1))
        editing = Editing(post, jnp.where(running, jnp.any(accept, axis=1), editing.changed))
    offset = jnp.arange(rows.tokens.shape[1])[None, :] - rows.start[:, None]
    write = _take(accept, offset) & _in_block(rows, ask.total, block) & running[:, None]
    one = running.astype(jnp.int32)
    keep = partial(jax.tree.map, lambda new, old: jnp.where(running.reshape((-1,) + (1,) * (new.ndim - 1)), new, old))
    if rows.trace:
        confidence = _take(probability(logits, tokens, tick.mask_id), offset)
        trace = rows.trace.add(rows.forwards, rows.start, tokens, write, confidence, running, whole)
    else:
        trace = ()
    return rows._replace(
        tokens=jnp.where(write, _take(tokens, offset), rows.tokens),
        forwards=rows.forwards + one,
        call=rows.call + one,
        decoder=keep(state, rows.decoder),
        trace=trace,
        editing=editing,
    )


def _finish_blocks(rows: Rows, ask: Request, block: int, mask_id: int, eos_ids: tuple[int, ...], post: int) -> Rows:
    """Move rows whose block has no mask left to the next block, or end them: at EOS (early stop) or at the canvas' end.

    eos_ids: any of them ends a row, the first one fills what follows. post: the most forwards that a decoder that edits may
    spend on a block without masks.
    """
    inside = _in_block(rows, ask.total, block)
    finished = rows.active & ~jnp.any(inside & (rows.tokens == mask_id), axis=1)
    editing = rows.editing
    if editing:
        finished &= ~editing.changed | (editing.post >= post)
        editing = editing._replace(post=jnp.where(finished, 0, editing.post))
    at = jnp.arange(rows.tokens.shape[1])[None, :]
    generated = inside & (at >= ask.prompt[:, None])
    stop = finished & ask.early_stop & jnp.any(generated & _is_any(rows.tokens, eos_ids), axis=1)
    start = jnp.where(finished, rows.start + block, rows.start)
    fill = stop[:, None] & (at >= start[:, None]) & (at < ask.total[:, None])
    return rows._replace(
        tokens=jnp.where(fill, eos_ids[0], rows.tokens),
        active=rows.active & ~stop & (start < ask.total),
        start=start,
        block=rows.block + finished,
        iteration=rows.iteration + rows.active,
        call=jnp.where(finished, 0, rows.call),
        editing=editing,
    )


def reach(policy: Policy, length: int) -> tuple[int, int]:
    """How far a window goes beyond its block on a canvas. What would leave it on every side costs nothing, cut off here."""
    before, after = policy.reach()
    return min(before, length), min(after, length)


def decode(
    params: Any,
    ask: Request,
    decoder: Decoder,
    policy: Policy,
    smoothing: Smoothing | None,
    *,
    family: Any,
    config: Any,
    block: int,
    sampled: bool,
    traced: bool,
) -> Rows:
    """The program: from masks to tokens in one `while_loop`.

    A turn runs the whole canvas of each row whose policy asks for it, one row at a time (an inner loop: a refresh then
    costs nothing to rows that need none, and the cache is updated in place), then one window step for all rows. In a
    block-causal family with a cache that grows, rows that have entered a block take that turn's window two blocks wide.
    Returns the rows as they end, less what only the loop needs; `active` is true only for rows that hit the cap on turns. What
    stands after the star is static.
    """
    batch, length = ask.tokens.shape
    before, after = reach(policy, length)
    width = before + block + after if before else min(block + after, length)
    everywhere = jnp.arange(length, dtype=jnp.int32)[None, :]

    def tick_of(rows: Rows, ask: Request) -> Tick:
        # dInfer counts a turn that refreshes as one iteration, but with smoothing as the two forwards it is.
        iteration = rows.iteration if smoothing is None else rows.forwards
        least = jnp.full(rows.forwards.shape, -jnp.inf) if smoothing is None else smoothing.least(rows.forwards)
        return Tick(iteration, rows.forwards, rows.block, rows.call, least, jnp.int32(config.mask_id), ask.temperature)

    # Families whose blocks see themselves and what is before them: nothing after a row's block is run, or seen.
    causal = getattr(family, "BLOCK_CAUSAL", False)

    def forward_and_decode(
        rows: Rows, ask: Request, at: jax.Array, skip: jax.Array | int, running: jax.Array, cache: Cache | None
    ) -> tuple[Rows, tuple]:
        """One network forward of the positions `at` `[B, W]` of the running rows, the block from `skip` on in it."""
        valid = (at >= 0) & (at < ask.total[:, None]) & running[:, None]
        x = family.embed(params, config, _take(rows.tokens, at)) if smoothing is None else _take(rows.soft, at)
        if causal:
            valid &= at < rows.start[:, None] + block
            # Windows begin where a block does, as the canvas does.
            until = jnp.broadcast_to((jnp.arange(at.shape[1], dtype=jnp.int32) // block + 1) * block, at.shape)
            x, fresh = family.trunk(params, config, x, at, valid, cache, until)
        else:
            x, fresh = family.trunk(params, config, x, at, valid, cache)
        # Smoothing wants the logits of every position: of a window they are made once, and the block's cut from them.
        wide = None
        if smoothing is not None and cache is not None and x.shape[1] <= AT_ONCE:
            wide = family.unembed(params, config, x)
            logits = wide[:, skip : skip + block]
        else:
            logits = family.unembed(params, config, _take(x, skip + jnp.arange(block)[None, :]))
        early = rows.start[:, None] + jnp.arange(block)[None, :] < ask.least[:, None]
        logits = _without_early_eos(logits, early, config.eos_ids)
        decoded = _decode_block(rows, logits, ask, decoder, running, tick_of(rows, ask), sampled, whole=cache is None)
        decoded = decoded._replace(positions=rows.positions + jnp.sum(valid, axis=1, dtype=jnp.int32))
        if smoothing is None:
            return decoded, fresh
        tokens = _take(decoded.tokens, at)
        soft = family.embed(params, config, tokens)
        weight = smoothing.weight(rows.forwards)[:, None, None].astype(soft.dtype)
        still = (tokens == config.mask_id)[..., None]
        expected = family.expected_embedding(params, config, x, smoothing.top, wide)
        soft = jnp.where(still, soft + weight * expected, soft)
        offset = everywhere - at[:, :1]
        covered = (offset >= 0) & (offset < at.shape[1]) & _take(valid, offset)
        return decoded._replace(soft=jnp.where(covered[..., None], _take(soft, offset), rows.soft)), fresh

    def full(carry: Carry, pending: jax.Array, plan: Any) -> tuple[Carry, jax.Array]:
        """One pending row's whole canvas: decode its block from it, and keep its K/V if the policy has a cache."""
        b = jnp.argmax(pending)
        rows, asked = _row(carry.rows, b), _per_row(ask, partial(_row, b=b))
        refresh = _row(plan.refresh, b)
        rows, fresh = forward_and_decode(rows, asked, everywhere, rows.start[:, None], jnp.array([True]), None)
        rows = rows._replace(refreshes=rows.refreshes + refresh, cached_block=jnp.where(refresh, rows.block, rows.cached_block))
        # A warm-up forward is kept too: nothing reads it before the first refresh replaces it.
        cache = _put_row(carry.cache, fresh, b) if policy.keeps else ()
        return carry._replace(rows=_put_row(carry.rows, rows, b), cache=cache), pending.at[b].set(False)

    def window(rows: Rows, cache: tuple, running: jax.Array) -> Rows:
        """The block and its reach for all running rows, against the cache with the window's own positions hidden."""
        left = rows.start[:, None] - before
        at = left + jnp.arange(width, dtype=jnp.int32)[None, :]
        if causal:
            visible = everywhere < left
        else:
            visible = (everywhere < ask.total[:, None]) & ((everywhere < left) | (everywhere >= left + width))
        return forward_and_decode(rows, ask, at, before, running, Cache(cache, visible))[0]

    def append(carry: Carry, running: jax.Array) -> Carry:
        """The block and the one before it, which has no masks left and joins the cache, for all running rows."""
        left = carry.rows.start - block
        at = left[:, None] + jnp.arange(2 * block, dtype=jnp.int32)[None, :]
        seen = Cache(carry.cache, everywhere < left[:, None])
        size = block * config.head_dim

        def forward(loop: tuple) -> tuple:
            rows, fresh = forward_and_decode(loop[0], ask, at, block, loop[2], seen)
            rows = rows._replace(cached_block=jnp.where(loop[2], rows.block, rows.cached_block))
            return rows, jax.tree.map(lambda a: a[:, :, :size], fresh), jnp.zeros_like(loop[2])

        def put(loop: tuple) -> tuple:
            cache, pending = loop
            b = jnp.argmax(pending)
            where = (b, 0, left[b] * config.head_dim)
            cache = jax.tree.map(lambda c, f: jax.lax.dynamic_update_slice(c, _row(f, b), where), cache, finished)
            return cache, pending.at[b].set(False)

        # Two loops, the one reading the cache and the other writing it: done in one, XLA would copy all of it in between.
        nothing = jax.tree.map(lambda c: jnp.zeros((batch, c.shape[1], size), c.dtype), carry.cache)
        rows, finished, _ = jax.lax.while_loop(lambda c: jnp.any(c[2]), forward, (carry.rows, nothing, running))
        cache, _ = jax.lax.while_loop(lambda c: jnp.any(c[1]), put, (carry.cache, running))
        return carry._replace(rows=rows, cache=cache)

    def turn(carry: Carry) -> Carry:
        plan = policy.plan(tick_of(carry.rows, ask), carry.rows.cached_block)
        carry, _ = jax.lax.while_loop(
            lambda c: jnp.any(c[1]), lambda c: full(c[0], c[1], plan), (carry, plan.full & carry.rows.active)
        )
        if appends(policy):
            carry = append(carry, plan.append & carry.rows.active)
        rows = carry.rows
        if policy.keeps:
            # Entered as a loop of at most one trip: turns in which every row warms up pay for no window, and unlike
            # `lax.cond` a loop never copies what it carries.
            rows, _ = jax.lax.while_loop(
                lambda c: jnp.any(c[1]),
                lambda c: (window(c[0], carry.cache, c[1]), jnp.zeros_like(c[1])),
                (rows, plan.window & rows.active),
            )
        rows = _finish_blocks(rows, ask, block, config.mask_id, config.eos_ids, post_steps(decoder))
        return carry._replace(rows=rows, trips=carry.trips + 1)

    zero = jnp.zeros(batch, jnp.int32)
    rows = Rows(
        tokens=ask.tokens,
        active=ask.start < ask.total,
        start=ask.start,
        block=zero,
        iteration=zero,
        forwards=zero,
        refreshes=zero,
        positions=zero,
        call=zero,
        cached_block=zero - 1,
        decoder=decoder.init(batch, block, config.vocab),
        trace=Record.start(batch, length, block, post_steps(decoder)) if traced else (),
        soft=() if smoothing is None else family.embed(params, config, ask.tokens),
        editing=Editing(zero, jnp.zeros(batch, bool)) if edits(decoder) else (),
    )
    cache = family.empty_cache(params, config, batch, length) if policy.keeps else ()
    last = jax.lax.while_loop(lambda c: jnp.any(c.rows.active) & (c.trips < ask.cap), turn, Carry(rows, cache, jnp.int32(0)))
    return last.rows._replace(decoder=(), soft=(), editing=())


def _per_row(ask: Request, f: Any) -> Request:
    """Apply f to the fields of a request that have a batch axis."""
    return Request(*(f(a) if a.ndim else a for a in ask))
