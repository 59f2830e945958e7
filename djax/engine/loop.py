"""The one program: a whole decode, from masks to tokens, as one jitted `while_loop` over a carry.

It names no decoder, cache policy or model family; it keeps their contracts (`decoding/contract.py`,
`caching/contract.py`, `models/`). The carry is a value: `start` lays rows out, `run` goes on with them, `join` puts a new row
into a free slot. Each row has its own request, block pointer and counters and never waits for another: a row gets the
canvas, forwards and refreshes it gets alone, whenever it joined.
"""

from collections.abc import Callable
from functools import partial, reduce
from operator import or_
from typing import Any

import jax
import jax.numpy as jnp

from djax.caching.contract import Plan
from djax.decoding.contract import Look, Tick, Verdict
from djax.decoding.not_before import NotBefore
from djax.decoding.smoothing import Smoothing
from djax.engine.carry import (
    NOTHING,
    Carry,
    KeysAndValues,
    Request,
    Rows,
    Spec,
    Tree,
    copy_block,
    get_row,
    put_row,
    start,
    take,
    with_its_kernels,
)
from djax.engine.frame import frame_windows, list_widths
from djax.kernels.sight import HIDDEN_RANK
from djax.models.contract import Params
from djax.models.layers import Cache
from djax.models.sight import rank_keys, see
from djax.runtime.process import make_key

# The widest window whose logits are made all at once, a row.
AT_ONCE = 256


# The events that end a `run` early: none, a row has ended, a row has finished a block.
NO_EVENT, ROW_ENDED, BLOCK_FINISHED = range(3)


def keep_rows(running: jax.Array, new: Tree, old: Tree) -> Tree:
    """The new leaves in running rows `[B]`, the old ones in the others."""
    return jax.tree.map(lambda n, o: jnp.where(running.reshape((-1,) + (1,) * (n.ndim - 1)), n, o), new, old)


def find_block(rows: Rows[jax.Array], total: jax.Array, block: int) -> jax.Array:
    """Bool `[B, L]`: the canvas positions of each row's current block."""
    at = jnp.arange(rows.tokens.shape[1])[None, :]
    return (at >= rows.start[:, None]) & (at < jnp.minimum(rows.start + block, total)[:, None])


def is_any(tokens: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    """Which of the tokens are one of the ids: bool of the tokens' shape."""
    return reduce(or_, (tokens == one for one in ids))


def take_part(kv: jax.Array, part: jax.Array, parts: int) -> jax.Array:
    """Of keys or values `[B, G, parts * W * K]`, one after another, those of each row's `part` `[B]`."""
    batch, groups, _ = kv.shape
    each = kv.reshape(batch, groups, parts, -1)
    return jnp.take_along_axis(each, part[:, None, None, None], axis=2)[:, :, 0]


def find_ticks(rows: Rows[jax.Array], smoothed: bool) -> Tick:
    """Where each row stands, `[B]` each. What verified drafts saved counts as if it had been run."""
    saved = rows.saved if len(rows.saved) else 0
    forwards = rows.forwards + saved
    # dInfer counts a turn that refreshes as one iteration, but with smoothing as the two forwards it is.
    return Tick(forwards if smoothed else rows.iteration + saved, forwards, rows.block, rows.call)


@with_its_kernels
def run(params: Params, carry: Carry, turns: jax.Array | None = None, until: jax.Array | None = None, *, spec: Spec) -> Carry:
    """Go on until every row has ended or, with `turns` and `until` (int32 scalars), until so many turns are spent or the event
    happens (`ROW_ENDED`, `BLOCK_FINISHED`, `NO_EVENT`).

    A turn runs the whole canvas of each row whose policy asks for it, one row at a time (an inner loop: a refresh then costs
    nothing to rows that need none, and the cache is updated in place), then one window step for all rows. In a block-causal
    family with a cache that grows, rows that have entered a block take that turn's window two blocks wide. A row that has spent
    its cap stays active and takes no further turn.
    """
    loop = _Loop(params, spec, carry)
    if turns is None or until is None:
        return jax.lax.while_loop(lambda c: jnp.any(find_running(c)), loop.turn, carry)

    def go_on(state: tuple[Carry, jax.Array, jax.Array]) -> jax.Array:
        carry, left, happened = state
        return jnp.any(find_running(carry)) & (left > 0) & ~happened

    def turn(state: tuple[Carry, jax.Array, jax.Array]) -> tuple[Carry, jax.Array, jax.Array]:
        old, left, _ = state
        new = loop.turn(old)
        # Also one that has spent its cap.
        ended = jnp.any(find_running(old) & ~find_running(new))
        finished = jnp.any(old.rows.block != new.rows.block)
        happened = ((until == ROW_ENDED) & ended) | ((until == BLOCK_FINISHED) & finished)
        return new, left - 1, happened

    return jax.lax.while_loop(go_on, turn, (carry, turns, jnp.bool_(False)))[0]


def decode(params: Params, ask: Request[jax.Array], *, spec: Spec) -> Rows[jax.Array]:
    """`start`, then `run` to the end: the program of `djax.generate`.

    Returns the rows as they end, less what only the loop needs; `active` is true only for rows that hit their cap on turns.
    """
    rows = run(params, start(params, ask, spec=spec), spec=spec).rows
    return rows._replace(decoder=(), soft=NOTHING)


def find_running(carry: Carry) -> jax.Array:
    """Bool `[B]`: the rows that take the next turn."""
    return carry.rows.active & (carry.rows.iteration < carry.asks.cap)


class _Loop:
    """The turns of a loop over a carry of B rows and canvases of L positions, for one set of parameters."""

    def __init__(self, params: Params, spec: Spec, carry: Carry) -> None:
        self.params, self.spec = params, spec
        self.family, self.config, self.block = spec.family, spec.config, spec.block
        self.batch, self.length = carry.rows.tokens.shape
        self.decoder, self.policy, self.smoothing = spec.build(carry.asks.numbers)
        self.frame = frame_windows(self.policy, self.family, self.block, self.length)
        self.widths = list_widths(self.batch, self.length)
        # Nothing after a row's block is run, or seen.
        self.causal = spec.family.visibility != "all"
        self.everywhere = jnp.arange(self.length, dtype=jnp.int32)[None, :]

    def turn(self, carry: Carry) -> Carry:
        """One turn of every running row."""
        running = find_running(carry)
        plan = self.plan(carry)
        pending = plan.full & running
        for width in self.widths:
            fits = pending & (carry.asks.total <= width)
            carry, _ = jax.lax.while_loop(lambda c: jnp.any(c[1]), partial(self.full, plan, width), (carry, fits))
            pending &= ~fits
        if self.policy.appends:
            carry = self.append(carry, plan.append & running)
        if self.policy.keeps:
            carry = self.run_windows(carry, plan.window & running & ~carry.rows.stop)
        return carry._replace(rows=self.finish_blocks(carry.rows, carry.asks, running))

    def run_windows(self, carry: Carry, inside: jax.Array) -> Carry:
        """One window of the rows `inside` bool `[B]`, whose K/V go into their caches if the policy
        commits: what is not final yet is hidden, and overwritten by the next window.

        Entered as a loop of at most one trip: turns in which every row warms up pay for no window, and unlike `lax.cond` a loop
        never copies what it carries.
        """
        commits = self.policy.commits
        carry = carry._replace(rows=self.limit_drafts(carry.rows, carry.asks))
        left = self.find_left(carry)
        room = self.make_room(carry, self.frame.width) if commits else ()
        rows, fresh, _ = jax.lax.while_loop(
            lambda c: jnp.any(c[2]),
            lambda c: (*self.window(carry._replace(rows=c[0]), c[2]), jnp.zeros_like(c[2])),
            (carry.rows, room, inside),
        )
        return carry._replace(rows=rows, cache=self.put(carry.cache, fresh, left, inside) if commits else carry.cache)

    def plan(self, carry: Carry) -> Plan:
        """What each row runs in this turn, `[B]` each."""
        ticks = find_ticks(carry.rows, self.smoothing is not None)
        return jax.vmap(lambda numbers, tick, cached: self.spec.build(numbers)[1].plan(tick, cached))(
            carry.asks.numbers, ticks, carry.rows.cached_block
        )

    def limit_drafts(self, rows: Rows[jax.Array], asks: Request[jax.Array]) -> Rows[jax.Array]:
        """No draft goes past the whole canvas that the policy would run next, if every step were a forward of its own."""
        if not self.decoder.drafts:
            return rows
        ticks, later = find_ticks(rows, self.smoothing is not None), jnp.arange(1, self.decoder.drafts + 1, dtype=jnp.int32)

        def count(numbers: tuple[jax.Array, ...], tick: Tick, cached: jax.Array) -> jax.Array:
            """How many steps there are before it."""
            after = lambda n: tick._replace(iteration=tick.iteration + n, forward=tick.forward + n)  # noqa: E731
            policy = self.spec.build(numbers)[1]
            full = jax.vmap(lambda n: jnp.asarray(policy.plan(after(n), cached).full))(later)
            return jnp.min(jnp.where(full, later, self.decoder.drafts))

        most = jax.vmap(count)(asks.numbers, ticks, rows.cached_block)
        return rows._replace(drafted=jnp.minimum(rows.drafted, most))

    def full(self, plan: Plan, width: int, state: tuple[Carry, jax.Array]) -> tuple[Carry, jax.Array]:
        """One pending row's whole canvas: decode its block from it, and keep its K/V if the policy has a cache.

        width: of the array that holds the canvas, at most L."""
        carry, pending = state
        b = jnp.argmax(pending)
        rows, asks, refresh = get_row((carry.rows, carry.asks, plan.refresh), b)
        at = self.everywhere[:, :width]
        rows, fresh = self.forward_and_decode(rows, asks, at, rows.start[:, None], jnp.array([True]), None)
        rows = rows._replace(refreshes=rows.refreshes + refresh, cached_block=jnp.where(refresh, rows.block, rows.cached_block))
        # A warm-up forward is kept too: nothing reads it before the first refresh replaces it.
        cache = put_row(carry.cache, fresh, b) if self.policy.keeps else ()
        return carry._replace(rows=put_row(carry.rows, rows, b), cache=cache), pending.at[b].set(False)

    def find_left(self, carry: Carry) -> jax.Array:
        """Where each row's window starts, int32 `[B]`: as far before its block as the policy reaches, or where a cache ends
        that commits what windows read."""
        return carry.rows.cached if self.policy.commits else carry.rows.start - self.frame.left

    def window(self, carry: Carry, running: jax.Array) -> tuple[Rows[jax.Array], KeysAndValues]:
        """The block and its reach for all running rows, against the cache with the window's own positions hidden. Returns the
        rows, and the window's K/V if they are to be committed."""
        rows, width = carry.rows, self.frame.width
        left = self.find_left(carry)[:, None]
        at = left + jnp.arange(width, dtype=jnp.int32)[None, :]
        everywhere = self.everywhere
        if self.causal:
            visible = everywhere < left
        else:
            outside = (everywhere < left) | (everywhere >= left + width)
            visible = (everywhere < carry.asks.total[:, None]) & outside
        # Before a row's first refresh its slot holds zeros, or the row that was there before it joined.
        visible &= rows.cached_block[:, None] >= 0
        skip = rows.start[:, None] - left if self.policy.commits else self.frame.left
        rows, fresh = self.forward_and_decode(rows, carry.asks, at, skip, running, self.show(carry, visible))
        return rows, fresh if self.policy.commits else ()

    def show(self, carry: Carry, visible: jax.Array) -> Cache:
        """The cache with the canvas positions `visible` bool `[B, L]` to be seen."""
        ranks = rank_keys(self.family.visibility, self.everywhere, visible, self.block)
        if self.policy.commits:
            ranks = jnp.pad(ranks, ((0, 0), (0, self.frame.width)), constant_values=HIDDEN_RANK)
        return Cache(carry.cache, ranks)

    def make_room(self, carry: Carry, positions: int) -> KeysAndValues:
        """Zeroed K/V of so many positions of each row, for what a forward inside a loop will give."""
        size = positions * self.config.head_dim
        return jax.tree.map(lambda c: jnp.zeros((self.batch, c.shape[1], size), c.dtype), carry.cache)

    def put(self, cache: KeysAndValues, fresh: KeysAndValues, left: jax.Array, running: jax.Array) -> KeysAndValues:
        """The cache with the fresh K/V `[B, G, W * K]` of the running rows at their positions from `left` `[B]` on."""

        def one(state: tuple[KeysAndValues, jax.Array]) -> tuple[KeysAndValues, jax.Array]:
            cache, pending = state
            b = jnp.argmax(pending)
            where = (b, 0, left[b] * self.config.head_dim)
            cache = jax.tree.map(lambda c, f: jax.lax.dynamic_update_slice(c, get_row(f, b), where), cache, fresh)
            return cache, pending.at[b].set(False)

        return jax.lax.while_loop(lambda c: jnp.any(c[1]), one, (cache, running))[0]

    def append(self, carry: Carry, running: jax.Array) -> Carry:
        """The block and the one before it, which has no masks left and joins the cache, for all running rows."""
        block, head = self.block, self.config.head_dim
        left = carry.rows.start - block
        at = left[:, None] + jnp.arange(2 * block, dtype=jnp.int32)[None, :]
        seen = self.show(carry, self.everywhere < left[:, None])
        size = block * head

        def forward(state: tuple) -> tuple:
            rows, fresh = self.forward_and_decode(state[0], carry.asks, at, block, state[2], seen)
            rows = rows._replace(cached_block=jnp.where(state[2], rows.block, rows.cached_block))
            return rows, jax.tree.map(lambda a: a[:, :, :size], fresh), jnp.zeros_like(state[2])

        # Two loops, the one reading the cache and the other writing it: done in one, XLA would copy all of it in between.
        room = self.make_room(carry, block)
        rows, finished, _ = jax.lax.while_loop(lambda c: jnp.any(c[2]), forward, (carry.rows, room, running))
        return carry._replace(rows=rows, cache=self.put(carry.cache, finished, left, running))

    def forward_and_decode(
        self,
        rows: Rows[jax.Array],
        asks: Request[jax.Array],
        at: jax.Array,
        skip: jax.Array | int,
        running: jax.Array,
        cache: Cache | None,
    ) -> tuple[Rows[jax.Array], KeysAndValues]:
        """One network forward of the positions `at` `[B, W]` of the running rows, the block from `skip` on in it."""
        family, config, params, block = self.family, self.config, self.params, self.block
        smoothing = self.smoothing
        valid = (at >= 0) & (at < asks.total[:, None]) & running[:, None]
        if self.causal:
            valid &= at < rows.start[:, None] + block - self.frame.unread
        if self.decoder.drafts:
            return self.verify(rows, asks, at, skip, running, cache, valid)
        read = take(rows.tokens, at)
        x = family.embed(params, config, read) if smoothing is None else take(rows.soft, at)
        x, fresh = family.trunk(params, config, x, at, see(family.visibility, at, valid, block), cache)
        # The positions whose logits are of the block.
        skip = skip - family.shift
        # Smoothing wants the logits of every position: of a window they are made once, and the block's cut from them.
        wide = None
        if smoothing is not None and cache is not None and x.shape[1] <= AT_ONCE and isinstance(skip, int):
            wide = family.unembed(params, config, x)
            logits = wide[:, skip : skip + block]
        else:
            logits = family.unembed(params, config, take(x, skip + jnp.arange(block)[None, :]))
        decoded, _ = self.decode_block(rows, asks, logits, running, whole=cache is None)
        decoded = decoded._replace(positions=rows.positions + jnp.sum(valid, axis=1, dtype=jnp.int32))
        decoded = self.find_final(decoded, read, at, valid)
        if smoothing is None:
            return decoded, fresh
        tokens = take(decoded.tokens, at)
        soft = family.embed(params, config, tokens)
        weight = self.follow_ramp(lambda own, forwards: own.weight(forwards), rows, asks)
        weight = weight[:, None, None].astype(soft.dtype)
        still = (tokens == config.mask_id)[..., None]
        expected = family.expected_embedding(params, config, x, smoothing.top, wide)
        soft = jnp.where(still, soft + weight * expected, soft)
        offset = self.everywhere - at[:, :1]
        covered = (offset >= 0) & (offset < at.shape[1]) & take(valid, offset)
        return decoded._replace(soft=jnp.where(covered[..., None], take(soft, offset), rows.soft)), fresh

    def follow_ramp(
        self,
        number: Callable[[Smoothing, jax.Array], jax.Array],
        rows: Rows[jax.Array],
        asks: Request[jax.Array],
    ) -> jax.Array:
        """A number of each row's own smoothing at its forward count, float32 `[B]`."""

        def find(numbers: tuple[jax.Array, ...], forwards: jax.Array) -> jax.Array:
            own = self.spec.build(numbers)[2]
            assert own is not None, "smoothing is static: one row's is every row's"
            return number(own, forwards)

        return jax.vmap(find)(asks.numbers, rows.forwards)

    def verify(
        self,
        rows: Rows[jax.Array],
        asks: Request[jax.Array],
        at: jax.Array,
        skip: jax.Array | int,
        running: jax.Array,
        cache: Cache | None,
        valid: jax.Array,
    ) -> tuple[Rows[jax.Array], KeysAndValues]:
        """`forward_and_decode` of D drafts of the block. A window holds them one after another, each a copy that sees itself
        and the cache. Without a cache each is a canvas of its own; where a canvas refills one, the first is read alone."""
        family, config, block = self.family, self.config, self.block
        (batch, window), alone = at.shape, cache is None
        drafts = 1 if alone and self.policy.keeps else self.decoder.drafts
        offset = at - rows.start[:, None]
        each = jnp.clip(offset, 0, block - 1)[:, None, :]
        each = jnp.take_along_axis(rows.drafts[:, :drafts], jnp.broadcast_to(each, (batch, drafts, window)), axis=2)
        inside = ((offset >= 0) & (offset < block))[:, None, :]
        tokens = jnp.where(inside, each, take(rows.tokens, at)[:, None, :])
        there = jnp.arange(drafts)[None, :] < rows.drafted[:, None]
        shown = valid[:, None, :] & there[:, :, None]
        places = jnp.broadcast_to(at[:, None, :], tokens.shape)
        shape = (batch * drafts, window) if alone else (batch, drafts * window)
        sight = see(family.visibility, places.reshape(shape), shown.reshape(shape), block)
        if not alone:
            copy = 1 + jnp.arange(drafts * window, dtype=jnp.int32)[None, :] // window
            sight = sight._replace(copy=jnp.broadcast_to(copy, shape), own=sight.context)
        x = family.embed(self.params, config, tokens.reshape(shape))
        x, fresh = family.trunk(self.params, config, x, places.reshape(shape), sight, cache)
        x = x.reshape(batch * drafts, window, -1)
        rows_of = jnp.broadcast_to(jnp.asarray(skip), (batch, 1)) - family.shift + jnp.arange(block)[None, :]
        x = take(x, jnp.repeat(rows_of, drafts, axis=0)).reshape(batch, drafts * block, -1)
        logits = family.unembed(self.params, config, x).reshape(batch, drafts, block, -1)
        logits = jnp.broadcast_to(logits, (batch, self.decoder.drafts, *logits.shape[2:]))
        read = jnp.sum(there, axis=1, dtype=jnp.int32)
        decoded, verdict = self.decode_block(rows, asks, logits, running, alone, read)
        decoded = decoded._replace(positions=rows.positions + jnp.sum(shown, axis=(1, 2), dtype=jnp.int32))
        if not self.policy.commits:
            return decoded, fresh
        kept = jnp.clip(jnp.zeros_like(read) if verdict.kept is None else verdict.kept, 0, read - 1)
        tokens = jnp.take_along_axis(tokens, kept[:, None, None], axis=1)[:, 0]
        if drafts > 1:
            fresh = jax.tree.map(lambda a: take_part(a, kept, drafts), fresh)
        return self.find_final(decoded, tokens, at, valid), fresh

    def find_final(self, rows: Rows[jax.Array], read: jax.Array, at: jax.Array, valid: jax.Array) -> Rows[jax.Array]:
        """Where a cache commits what a window `at` `[B, W]` read, move its end to the first position that is not final: one
        that still holds the mask, or was read `[B, W]` as another token."""
        if not self.policy.commits:
            return rows
        now = take(rows.tokens, at)
        final = valid & (now == read) & (now != self.config.mask_id)
        end = at[:, 0] + jnp.sum(jnp.cumprod(final, axis=1), axis=1, dtype=jnp.int32)
        # What predicts the first mask is read again.
        masks = jnp.where(rows.tokens == self.config.mask_id, self.everywhere, self.length)
        end = jnp.minimum(end, jnp.min(masks, axis=1) - self.family.shift)
        # Where nothing was read, nothing has changed.
        return rows._replace(cached=jnp.where(jnp.any(valid, axis=1), end, rows.cached))

    def decode_block(
        self,
        rows: Rows[jax.Array],
        asks: Request[jax.Array],
        logits: jax.Array,
        running: jax.Array,
        whole: bool,
        read: jax.Array | None = None,
    ) -> tuple[Rows[jax.Array], Verdict]:
        """Hand the block's logits `[B, S, V]` of one forward to each row's decoder and write what it says.

        running bool `[B]`: the rows that take part. whole: the forward ran the whole canvas. With drafts the logits are
        `[B, D, S, V]`, and read int32 `[B]` is how many the forward read.
        """
        spec, mask_id = self.spec, jnp.int32(self.config.mask_id)
        at = rows.start[:, None] + jnp.arange(self.block, dtype=jnp.int32)[None, :]
        before = take(rows.tokens, at)
        may_write = (at >= asks.prompt[:, None]) & (at < asks.total[:, None]) & running[:, None]
        smoothing, floor = self.smoothing, jnp.full(rows.forwards.shape, -jnp.inf)
        if smoothing is not None:
            floor = self.follow_ramp(lambda own, forwards: own.least(forwards), rows, asks)

        def step(state: Any, ask: Request[jax.Array], tick: Tick, *looked: Any) -> tuple[Any, Verdict]:
            # The key depends on the row's own seed and counter, not on its place in the batch.
            key = jax.random.fold_in(make_key(ask.seed), tick.forward) if spec.sampled else None
            logits, tokens, may_write, at, floor, drafts, read = looked
            decoder = NotBefore(spec.build(ask.numbers)[0], ask.least, self.config.eos_ids)
            look = Look(logits, tokens, may_write, at, tick, mask_id, floor, ask.temperature, key, drafts=drafts, read=read)
            return decoder.step(state, look._replace(top_p=ask.top_p, top_k=ask.top_k) if spec.truncated else look)

        ticks = find_ticks(rows, smoothing is not None)
        drafts = rows.drafts if self.decoder.drafts else None
        state, verdict = jax.vmap(step)(rows.decoder, asks, ticks, logits, before, may_write, at, floor, drafts, read)
        offset = self.everywhere - rows.start[:, None]
        changed = may_write & (verdict.tokens != before)
        masks_left = jnp.any(may_write & (verdict.tokens == mask_id), axis=1)
        write = take(changed, offset) & find_block(rows, asks.total, self.block) & running[:, None]
        trace = NOTHING
        if spec.traced:
            confidence = take(verdict.confidence, offset)
            trace = rows.trace.add(rows.forwards, rows.start, verdict.proposals, write, confidence, running, whole)
        one = running.astype(jnp.int32)
        if self.decoder.drafts:
            assert verdict.drafts is not None and verdict.drafted is not None, "of a decoder with drafts"
            steps = one if verdict.steps is None else jnp.where(running, verdict.steps, 1)
            rows = rows._replace(
                saved=rows.saved + jnp.maximum(steps, 1) - 1,
                drafts=keep_rows(running, verdict.drafts, rows.drafts),
                drafted=jnp.where(running, jnp.clip(verdict.drafted, 1, self.decoder.drafts), rows.drafted),
            )
        if self.decoder.advances:
            assert verdict.advance is not None, "of a decoder that advances"
            # Never past a mask, and a block that is done is left as a whole.
            decided = ~may_write | (verdict.tokens != mask_id)
            most = jnp.sum(jnp.cumprod(decided, axis=1), axis=1, dtype=jnp.int32)
            moves = running & ~(verdict.done & ~masks_left)
            rows = rows._replace(start=rows.start + jnp.where(moves, jnp.clip(verdict.advance, 0, most), 0))
        return rows._replace(
            tokens=jnp.where(write, take(verdict.tokens, offset), rows.tokens),
            # A block with masks is never done, whatever its decoder says.
            done=jnp.where(running, verdict.done & ~masks_left, rows.done),
            stop=rows.stop | (running & verdict.stop),
            forwards=rows.forwards + one,
            call=rows.call + one,
            decoder=keep_rows(running, state, rows.decoder),
            trace=trace,
        ), verdict

    def finish_blocks(self, rows: Rows[jax.Array], asks: Request[jax.Array], running: jax.Array) -> Rows[jax.Array]:
        """Move rows whose block is done to the next one, or end them: at an EOS (early stop), at their decoder's word, or at
        the canvas' end. Any of the EOS ids ends a row, the first one fills what follows."""
        eos_ids = self.config.eos_ids
        finished = running & (rows.done | rows.stop)
        at = self.everywhere
        start = jnp.where(finished, rows.start + self.block, rows.start)
        generated = (at >= asks.prompt[:, None]) & (at < jnp.minimum(start, asks.total)[:, None])
        ends = running & asks.early_stop & jnp.any(generated & is_any(rows.tokens, eos_ids), axis=1)
        fill = ends[:, None] & (at >= start[:, None]) & (at < asks.total[:, None])
        fill |= rows.stop[:, None] & (rows.tokens == self.config.mask_id) & (at < asks.total[:, None])
        if self.decoder.drafts:
            fresh = copy_block(rows.tokens, start, self.decoder.drafts, self.block)
            drafted = jnp.where(finished, 1, rows.drafted)
            rows = rows._replace(drafts=keep_rows(finished, fresh, rows.drafts), drafted=drafted)
        return rows._replace(
            tokens=jnp.where(fill, eos_ids[0], rows.tokens),
            active=rows.active & ~ends & ~rows.stop & (start < asks.total),
            start=start,
            block=rows.block + finished,
            done=rows.done & ~finished,
            iteration=rows.iteration + running,
            call=jnp.where(finished, 0, rows.call),
        )
