"""The one program: a whole decode as one jitted `while_loop`, and the public `generate` around it.

The loop names no decoder, cache policy or model family; it keeps their contracts (`decoding/contract.py`,
`caching/contract.py`, `models/`). Each row has its own block pointer and counters and never waits for another:
`generate([a, b, c])` gives every row the canvas, forwards and refreshes it gets alone.
"""

import dataclasses
import os
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from djax import text
from djax.caching import CACHES, Uncached
from djax.caching.contract import Policy
from djax.checks import boolean, real_number, whole_number
from djax.compilation import enable_cache
from djax.decoding import DECODERS
from djax.decoding.contract import Decoder, Tick
from djax.decoding.threshold import Threshold
from djax.errors import BatchError, CanvasError, OptionError, TripCapError
from djax.model import Model
from djax.models.layers import Cache


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of the call that made a generation, shared by all rows of its batch. compile is 0 when nothing compiled."""

    compile: float
    decode: float


@dataclasses.dataclass(frozen=True)
class Generation:
    """One answer.

    text:      the decoded tokens; None if the model has no tokenizer.
    tokens:    int32 `[n]`, generated ids up to, not including, the first EOS. Prompt tokens never count.
    canvas:    int32 `[P + gen_length]`, the sequence as the program left it; after an early stop the rest is EOS.
    forwards:  network forwards this row took part in, window and whole-canvas alike.
    refreshes: how many of them refilled the cache.
    """

    text: str | None
    tokens: np.ndarray
    canvas: np.ndarray
    forwards: int
    refreshes: int
    timing: Timing

    @property
    def tokens_per_forward(self) -> float:
        return len(self.tokens) / self.forwards


class Request(NamedTuple):
    """What one decode is asked, all traced: new prompts, lengths, seeds or thresholds compile nothing.

    tokens int32 `[B, L]`: prompt, then masks, then padding. prompt, total int32 `[B]`: where the prompt and the canvas
    end. start int32 `[B]`: where the first block starts. seed uint32 `[B]`. temperature, early_stop, cap: scalars.
    """

    tokens: jax.Array
    prompt: jax.Array
    total: jax.Array
    start: jax.Array
    seed: jax.Array
    temperature: jax.Array
    early_stop: jax.Array
    cap: jax.Array


class Rows(NamedTuple):
    """The part of the carry that has one entry a row.

    tokens       int32 `[B, L]`, the canvas.
    active       bool `[B]`, still decoding.
    start        int32 `[B]`, first position of the current block.
    block        int32 `[B]`, its index.
    iteration    int32 `[B]`, turns of the loop so far.
    forwards     int32 `[B]`, network forwards so far.
    refreshes    int32 `[B]`, those that refilled the cache.
    call         int32 `[B]`, decode calls in the current block.
    cached_block int32 `[B]`, block in which the cache was last filled; -1 while it is empty.
    decoder      the decoder's state, any pytree with leading axis B.
    """

    tokens: jax.Array
    active: jax.Array
    start: jax.Array
    block: jax.Array
    iteration: jax.Array
    forwards: jax.Array
    refreshes: jax.Array
    call: jax.Array
    cached_block: jax.Array
    decoder: Any


class Carry(NamedTuple):
    """rows: see `Rows`. cache: each layer's (k, v) `[B, L, G, K]`, () without a cache. trips: turns so far, scalar."""

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


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x `[B, L, ...]` at index `[B, W]`, clipped to the canvas."""
    index = jnp.clip(index, 0, x.shape[1] - 1)
    return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)


def _decode_block(
    rows: Rows, logits: jax.Array, ask: Request, decoder: Decoder, running: jax.Array, mask_id: int, sampled: bool
) -> Rows:
    """Hand the block's logits `[B, S, V]` of one forward to the decoder and write what it accepts; `running` bool `[B]`."""
    block = logits.shape[1]
    at = rows.start[:, None] + jnp.arange(block)[None, :]
    here = (at < ask.total[:, None]) & running[:, None]
    masked = (_take(rows.tokens, at) == mask_id) & here
    tick = Tick(rows.iteration, rows.forwards, rows.block, rows.call, jnp.int32(mask_id), ask.temperature)
    # The key depends on the row's own seed and counter, not on its place in the batch.
    key = jax.vmap(lambda s, f: jax.random.fold_in(jax.random.key(s), f))(ask.seed, rows.forwards) if sampled else None
    state, tokens, accept = decoder.step(rows.decoder, logits, masked, tick, key)
    offset = jnp.arange(rows.tokens.shape[1])[None, :] - rows.start[:, None]
    write = _take(accept, offset) & _in_block(rows, ask.total, block) & running[:, None]
    one = running.astype(jnp.int32)
    keep = partial(jax.tree.map, lambda new, old: jnp.where(running.reshape((-1,) + (1,) * (new.ndim - 1)), new, old))
    return rows._replace(
        tokens=jnp.where(write, _take(tokens, offset), rows.tokens),
        forwards=rows.forwards + one,
        call=rows.call + one,
        decoder=keep(state, rows.decoder),
    )


def _finish_blocks(rows: Rows, ask: Request, block: int, mask_id: int, eos_id: int) -> Rows:
    """Move rows whose block has no mask left to the next block, or end them: at EOS (early stop) or at the canvas' end."""
    inside = _in_block(rows, ask.total, block)
    finished = rows.active & ~jnp.any(inside & (rows.tokens == mask_id), axis=1)
    at = jnp.arange(rows.tokens.shape[1])[None, :]
    generated = inside & (at >= ask.prompt[:, None])
    stop = finished & ask.early_stop & jnp.any(generated & (rows.tokens == eos_id), axis=1)
    start = jnp.where(finished, rows.start + block, rows.start)
    fill = stop[:, None] & (at >= start[:, None]) & (at < ask.total[:, None])
    return rows._replace(
        tokens=jnp.where(fill, eos_id, rows.tokens),
        active=rows.active & ~stop & (start < ask.total),
        start=start,
        block=rows.block + finished,
        iteration=rows.iteration + rows.active,
        call=jnp.where(finished, 0, rows.call),
    )


@partial(jax.jit, static_argnames=("family", "config", "block", "sampled"))
def decode(
    params: Any, ask: Request, decoder: Decoder, policy: Policy, *, family: Any, config: Any, block: int, sampled: bool
) -> Carry:
    """The program: from masks to tokens in one `while_loop`.

    A turn runs the whole canvas of each row whose policy asks for it, one row at a time (an inner loop: a refresh then
    costs nothing to rows that need none, and the cache is updated in place), then one window step for all rows.
    Returns the last carry; `rows.active` there is true only for rows that hit the cap on turns.
    """
    batch, length = ask.tokens.shape
    before, after = policy.reach()
    width = before + block + after
    everywhere = jnp.arange(length, dtype=jnp.int32)[None, :]

    def full(carry: Carry, pending: jax.Array, plan: Any) -> tuple[Carry, jax.Array]:
        """One pending row's whole canvas: decode its block from it, and keep its K/V if the policy has a cache."""
        b = jnp.argmax(pending)
        rows, asked = _row(carry.rows, b), _per_row(ask, partial(_row, b=b))
        x = family.embed(params, config, rows.tokens)
        x, fresh = family.trunk(params, config, x, everywhere, everywhere < asked.total[:, None])
        x = _take(x, rows.start[:, None] + jnp.arange(block)[None, :])
        refresh = _row(plan.refresh, b)
        rows = _decode_block(
            rows, family.unembed(params, config, x), asked, decoder, jnp.array([True]), config.mask_id, sampled
        )
        rows = rows._replace(
            refreshes=rows.refreshes + refresh, cached_block=jnp.where(refresh, rows.block, rows.cached_block)
        )
        # A warm-up forward is kept too: nothing reads it before the first refresh replaces it.
        cache = _put_row(carry.cache, fresh, b) if policy.keeps else ()
        return carry._replace(rows=_put_row(carry.rows, rows, b), cache=cache), pending.at[b].set(False)

    def window(rows: Rows, cache: tuple, running: jax.Array) -> Rows:
        """The block and its reach for all running rows, against the cache with the window's own positions hidden."""
        left = rows.start[:, None] - before
        at = left + jnp.arange(width, dtype=jnp.int32)[None, :]
        valid = (at >= 0) & (at < ask.total[:, None]) & running[:, None]
        own = (everywhere >= left) & (everywhere < left + width)
        visible = (everywhere < ask.total[:, None]) & ~own
        x = family.embed(params, config, _take(rows.tokens, at))
        x, _ = family.trunk(params, config, x, at, valid, Cache(cache, visible))
        logits = family.unembed(params, config, x[:, before : before + block])
        return _decode_block(rows, logits, ask, decoder, running, config.mask_id, sampled)

    def turn(carry: Carry) -> Carry:
        rows = carry.rows
        tick = Tick(rows.iteration, rows.forwards, rows.block, rows.call, jnp.int32(config.mask_id), ask.temperature)
        plan = policy.plan(tick, rows.cached_block)
        carry, _ = jax.lax.while_loop(
            lambda c: jnp.any(c[1]), lambda c: full(c[0], c[1], plan), (carry, plan.full & rows.active)
        )
        rows = carry.rows
        if policy.keeps:
            # Entered as a loop of at most one trip: turns in which every row warms up pay for no window, and unlike
            # `lax.cond` a loop never copies what it carries.
            rows, _ = jax.lax.while_loop(
                lambda c: jnp.any(c[1]),
                lambda c: (window(c[0], carry.cache, c[1]), jnp.zeros_like(c[1])),
                (rows, plan.window & rows.active),
            )
        rows = _finish_blocks(rows, ask, block, config.mask_id, config.eos_id)
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
        call=zero,
        cached_block=zero - 1,
        decoder=decoder.init(batch, block, config.vocab),
    )
    cache = family.empty_cache(params, config, batch, length) if policy.keeps else ()
    return jax.lax.while_loop(
        lambda c: jnp.any(c.rows.active) & (c.trips < ask.cap), turn, Carry(rows, cache, jnp.int32(0))
    )


def _per_row(ask: Request, f: Any) -> Request:
    """Apply f to the fields of a request that have a batch axis."""
    return Request(*(f(a) if a.ndim else a for a in ask))


def generate(
    model: Model,
    prompts: Any,
    *,
    gen_length: int = 128,
    block_length: int = 32,
    decoder: Decoder = Threshold(),  # noqa: B008  (frozen, so one default for all calls is one value)
    cache: Policy | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    early_stop: bool = True,
    align_blocks: bool = True,
    max_batch: int | None = None,
) -> Generation | list[Generation]:
    """Answer one prompt or many; see `text.encode` for the forms of `prompts`. One prompt gives one `Generation`.

    gen_length:   tokens of canvas after the prompt; an answer ends at the first EOS.
    block_length: blocks are filled one after another, each of this many positions.
    decoder:      which tokens a forward accepts (`djax.Threshold`, `djax.Fixed`).
    cache:        None, `djax.Dual` or `djax.Vicinity`: what is run at each forward.
    temperature:  0 takes the most likely token; above, Gumbel noise from `seed` is added to choose it. Rows of a batch
                  draw the same noise they would draw alone.
    early_stop:   end a row after the first block with an EOS; otherwise fill its whole canvas.
    align_blocks: block borders at multiples of block_length from the canvas' start (dInfer's start_block_align), so the
                  first block may begin inside the prompt; otherwise at the prompt's end.
    max_batch:    at most this many prompts a program; more are decoded in groups. Changes no answer.

    Law: each row gets the canvas, forwards and refreshes it gets alone (float32, ties apart), whatever the batch.
    Raises `OptionError`, `PromptError`, `CanvasError` or `BatchError` before anything compiles, `TripCapError` if a
    decoder breaks its law of progress.
    """
    gen_length = whole_number(gen_length, "gen_length", at_least=1)
    block_length = whole_number(block_length, "block_length", at_least=1)
    seed = whole_number(seed, "seed", at_least=0, at_most=2**32 - 1)
    temperature = real_number(temperature, "temperature", at_least=0.0)
    early_stop, align_blocks = boolean(early_stop, "early_stop"), boolean(align_blocks, "align_blocks")
    _is_plug(decoder, "decoder", ("init", "step"), DECODERS)
    policy = Uncached() if cache is None else cache
    _is_plug(policy, "cache", ("reach", "plan"), CACHES)
    ids, single = text.encode(model.tokenizer, prompts, model.config.vocab, model.config.mask_id)
    for i, prompt in enumerate(ids):
        if len(prompt) + gen_length > model.config.max_positions:
            raise CanvasError(
                f"prompt {i}: {len(prompt)} tokens + gen_length {gen_length} = {len(prompt) + gen_length} positions, the model "
                f"has {model.config.max_positions}; gen_length may be {max(0, model.config.max_positions - len(prompt))} at most"
            )
    group = len(ids) if max_batch is None else min(len(ids), whole_number(max_batch, "max_batch", at_least=1))
    asks = [
        _request(ids[i : i + group], group, gen_length, block_length, model.config, seed, temperature, early_stop, align_blocks)
        for i in range(0, len(ids), group)
    ]
    plugs = jax.tree.map(_as_leaf, (decoder, policy))
    for ask in asks:
        _check_memory(model, ask, *plugs, block_length)
    enable_cache()
    out: list[Generation] = []
    for ask in asks:
        out += _run(model, ask, *plugs, block_length)[: len(ids) - len(out)]
    return out[0] if single else out


def _is_plug(plug: Any, name: str, methods: tuple[str, ...], registry: dict[str, type]) -> None:
    if isinstance(plug, type) or not all(callable(getattr(plug, m, None)) for m in methods):
        made = ", ".join(f"djax.{c.__name__}(...)" for c in registry.values() if c is not Uncached)
        none = " or None" if Uncached in registry.values() else ""
        raise OptionError(f"{name}: expected one of {made}{none}, got {plug!r}")


def _as_leaf(value: Any) -> np.ndarray:
    """Plug numbers as 32-bit arrays: a Python float and a numpy one must not compile apart."""
    return np.asarray(value, np.float32 if isinstance(value, float | np.floating) else np.int32)


def bucket(length: int) -> int:
    """The padded canvas length: multiples of 64 up to 1024, then of 256. What is padded is seen by nobody."""
    step = 64 if length <= 1024 else 256
    return -(-length // step) * step


def _request(
    ids: Sequence[np.ndarray],
    rows: int,
    gen_length: int,
    block: int,
    config: Any,
    seed: int,
    temperature: float,
    early_stop: bool,
    align_blocks: bool,
) -> Request:
    """Lay the prompts out as canvases. Rows beyond the prompts have an empty canvas and never start."""
    prompt = np.array([len(p) for p in ids] + [0] * (rows - len(ids)), np.int32)
    total = np.where(prompt > 0, prompt + gen_length, 0).astype(np.int32)
    tokens = np.full((rows, bucket(int(total.max()))), config.eos_id, np.int32)
    for b, p in enumerate(ids):
        tokens[b, : len(p)] = p
        tokens[b, len(p) : total[b]] = config.mask_id
    return Request(
        tokens=tokens,
        prompt=prompt,
        total=total,
        start=prompt // block * block if align_blocks else prompt,
        seed=np.full(rows, seed, np.uint32),
        temperature=np.float32(temperature),
        early_stop=np.bool_(early_stop),
        # Every turn of an unfinished row accepts a token, so no row takes more turns than it has masks.
        cap=np.int32(gen_length),
    )


def _check_memory(model: Model, ask: Request, decoder: Decoder, policy: Policy, block: int) -> None:
    """Refuse a batch whose carry and largest activations cannot fit the device; an estimate from below."""
    rows, length = ask.tokens.shape
    c = model.config
    shapes = [jax.eval_shape(lambda: decoder.init(rows, block, c.vocab))]
    if policy.keeps:
        shapes.append(jax.eval_shape(lambda p: model.family.empty_cache(p, c, rows, length), model.params))
    carried = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(shapes))
    logits = 4 * rows * block * c.vocab if policy.keeps else 4 * block * c.vocab
    need = model.parameter_bytes + carried + logits + 4 * c.heads * length * length
    have = device_memory()
    if need > have:
        raise BatchError(
            f"{rows} prompts on a canvas of {length} need at least {need / 2**30:.1f} GiB, the device has {have / 2**30:.1f} GiB; "
            f"pass max_batch (it changes no answer), or lower gen_length (now {int(ask.cap)})"
        )


def device_memory() -> int:
    """Bytes of memory of the default device; on a CPU, of the machine."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


_programs: dict[Any, Any] = {}


def program(model: Model, ask: Request, decoder: Decoder, policy: Policy, block: int) -> tuple[Any, float]:
    """The compiled decode for these shapes, and the seconds it took to get it: 0 if this process had it already."""
    statics = dict(family=model.family, config=model.config, block=block, sampled=bool(ask.temperature > 0))
    leaves, tree = jax.tree.flatten((model.params, ask, decoder, policy))
    key = (tree, tuple((a.shape, a.dtype, getattr(a, "sharding", None)) for a in leaves), *statics.values())
    if key in _programs:
        return _programs[key], 0.0
    began = time.perf_counter()
    # Full float32 products on every platform: GPUs would otherwise round float32 operands to TF32. No effect on bfloat16.
    with jax.default_matmul_precision("highest"):
        _programs[key] = decode.lower(model.params, ask, decoder, policy, **statics).compile()
    return _programs[key], time.perf_counter() - began


def _run(model: Model, ask: Request, decoder: Decoder, policy: Policy, block: int) -> list[Generation]:
    compiled, compiling = program(model, ask, decoder, policy, block)
    began = time.perf_counter()
    last = compiled(model.params, ask, decoder, policy)
    rows = jax.device_get(last.rows._replace(decoder=()))
    timing = Timing(compile=compiling, decode=time.perf_counter() - began)
    if rows.active.any():
        stuck = np.flatnonzero(rows.active).tolist()
        raise TripCapError(
            f"rows {stuck} still hold masks after {int(ask.cap)} turns: the decoder {type(decoder).__name__} accepted nothing "
            "in some turn, against its contract (djax/decoding/contract.py)"
        )
    return [_generation(model, rows, ask, b, timing) for b in range(len(ask.prompt)) if ask.total[b]]


def _generation(model: Model, rows: Rows, ask: Request, b: int, timing: Timing) -> Generation:
    canvas = rows.tokens[b, : ask.total[b]]
    answer = canvas[ask.prompt[b] :]
    ends = np.flatnonzero(answer == model.config.eos_id)
    answer = answer[: ends[0]] if ends.size else answer
    return Generation(
        text=text.decode(model.tokenizer, answer),
        tokens=answer,
        canvas=canvas,
        forwards=int(rows.forwards[b]),
        refreshes=int(rows.refreshes[b]),
        timing=timing,
    )
