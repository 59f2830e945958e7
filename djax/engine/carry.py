"""What a decode carries: each row's request, its progress and its cache. `start` lays rows out, `join` puts a new one into a
free slot. A row never looks at another, so it gets what it gets alone, whenever it joined.
"""

import dataclasses
from collections.abc import Callable
from functools import wraps
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from djax.caching.contract import Policy
from djax.decoding.contract import Decoder
from djax.decoding.smoothing import Smoothing
from djax.engine.frame import frame_windows
from djax.engine.trace import A, Record
from djax.kernels.choice import Kernels, use_kernels
from djax.models.contract import Config, Params
from djax.models.family import Family

Plugs = tuple[Decoder[Any], Policy, Smoothing | None]
# Each layer's (k, v); () without a cache.
KeysAndValues = tuple[tuple[jax.Array, jax.Array], ...]
# Stands in a field whose array a program does not carry: no leaf of the carry.
NOTHING: Any = ()


R = TypeVar("R")
Tree = TypeVar("Tree")


class Request(NamedTuple, Generic[A]):
    """What each row is asked, all traced: new prompts, lengths, seeds or thresholds compile nothing.

    tokens      int32 `[B, L]`: prompt, then masks, then padding. () in a carry, whose rows have the canvas.
    prompt      int32 `[B]`, where the prompt ends.
    total       int32 `[B]`, where the canvas ends; 0 in a slot that is free.
    least       int32 `[B]`, the position before which no EOS is proposed.
    start       int32 `[B]`, where the first block starts.
    seed        uint32 `[B]`.
    temperature float32 `[B]`.
    top_p       float32 `[B]`, 1 cuts nothing. () in the carry of a program that cuts nothing, as is top_k.
    top_k       int32 `[B]`, 0 cuts nothing.
    early_stop  bool `[B]`.
    cap         int32 `[B]`, the turns after which a row that still has masks is given up.
    numbers     the leaves of the plugs in the order of `Spec.plugs`, each with leading axis B.
    """

    tokens: A
    prompt: A
    total: A
    least: A
    start: A
    seed: A
    temperature: A
    top_p: A
    top_k: A
    early_stop: A
    cap: A
    numbers: tuple[A, ...]


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is static to a program. Equal ones share it, and a carry belongs to the spec it was started with.

    family, config: of the model. block: S. sampled: decoders get a random key. traced: every forward is recorded.
    plugs: the tree of decoder, policy and smoothing, without their numbers. kinds: their classes. truncated: rows may draw from
    fewer than all tokens. kernels: which ones the program may have.
    """

    family: Family
    config: Config
    block: int
    sampled: bool
    traced: bool
    plugs: jax.tree_util.PyTreeDef
    kinds: tuple[Any, ...]
    truncated: bool = False
    kernels: Kernels = "djax"

    def build(self, numbers: tuple[jax.Array, ...]) -> Plugs:
        """Decoder, policy and smoothing with these numbers."""
        return jax.tree.unflatten(self.plugs, numbers)


class Rows(NamedTuple, Generic[A]):
    """The part of the carry that a row's own forwards change.

    tokens       int32 `[B, L]`, the canvas.
    active       bool `[B]`, still decoding.
    start        int32 `[B]`, first position of the current block.
    block        int32 `[B]`, its index.
    done         bool `[B]`, whether its decoder asks for no further forward of it.
    stop         bool `[B]`, whether its decoder ended the row.
    iteration    int32 `[B]`, turns of the loop so far.
    forwards     int32 `[B]`, network forwards so far.
    refreshes    int32 `[B]`, those that refilled the cache.
    positions    int32 `[B]`, canvas positions run through the network, over all forwards.
    call         int32 `[B]`, decode calls in the current block.
    cached_block int32 `[B]`, block in which the cache was last filled; -1 while it is empty.
    cached       int32 `[B]`, up to which position the cache is final; () unless the policy commits what windows read.
    drafts       int32 `[B, D, S]`, what the next forward reads of the block; () unless the decoder has drafts.
    drafted      int32 `[B]`, how many of them; () likewise.
    saved        int32 `[B]`, forwards that verified drafts made needless; () likewise.
    decoder      the decoder's state, any pytree with leading axis B.
    soft         `[B, L, D]`, the embeddings the next forward reads; () without smoothing, when the tokens' own are read.
    trace        the record so far (`trace.Record`); () unless asked for.
    """

    tokens: A
    active: A
    start: A
    block: A
    done: A
    stop: A
    iteration: A
    forwards: A
    refreshes: A
    positions: A
    call: A
    cached_block: A
    cached: A
    drafts: A
    drafted: A
    saved: A
    decoder: Any
    soft: A
    trace: Record[A]


class Carry(NamedTuple):
    """rows: see `Rows`. asks: each row's request. cache: each layer's (k, v) `[B, G, L * K]`, () without a cache."""

    rows: Rows[jax.Array]
    asks: Request[jax.Array]
    cache: KeysAndValues


def get_row(tree: Tree, b: jax.Array) -> Tree:
    """Row b of every leaf, keeping the batch axis."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, b, 1), tree)


def put_row(tree: Tree, row: Tree, b: jax.Array) -> Tree:
    return jax.tree.map(lambda a, r: jax.lax.dynamic_update_slice_in_dim(a, r, b, axis=0), tree, row)


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x `[B, L, ...]` at index `[B, W]`, clipped to the canvas."""
    index = jnp.clip(index, 0, x.shape[1] - 1)
    return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)


def with_its_kernels(function: Callable[..., R]) -> Callable[..., R]:
    """A function of a spec, traced with the kernels that the spec names, whoever traces it."""

    @wraps(function)
    def traced(*arguments: object, spec: Spec, **others: object) -> R:
        with use_kernels(spec.kernels):
            return function(*arguments, spec=spec, **others)

    return traced


@with_its_kernels
def start(params: Params, ask: Request[jax.Array], *, spec: Spec) -> Carry:
    """The carry before the first forward of its rows. Those with an empty canvas are free slots."""
    batch, length = ask.tokens.shape
    decoder, policy, smoothing = spec.build(ask.numbers)
    zero = jnp.zeros(batch, jnp.int32)
    no = jnp.zeros(batch, bool)
    # A window is committed whole, also where it goes beyond the canvas.
    beyond = frame_windows(policy, spec.family, spec.block, length).width if policy.commits else 0
    rows = Rows(
        tokens=ask.tokens,
        active=ask.start < ask.total,
        start=ask.start,
        block=zero,
        done=no,
        stop=no,
        iteration=zero,
        forwards=zero,
        refreshes=zero,
        positions=zero,
        call=zero,
        cached_block=zero - 1,
        cached=zero if policy.commits else NOTHING,
        drafts=copy_block(ask.tokens, ask.start, decoder.drafts, spec.block) if decoder.drafts else NOTHING,
        drafted=zero + 1 if decoder.drafts else NOTHING,
        saved=zero if decoder.drafts else NOTHING,
        decoder=jax.vmap(lambda _, numbers: spec.build(numbers)[0].init(spec.block, spec.config.vocab))(zero, ask.numbers),
        trace=Record.start(batch, length, spec.block, decoder.post_steps) if spec.traced else NOTHING,
        soft=NOTHING if smoothing is None else spec.family.embed(params, spec.config, ask.tokens),
    )
    cache = spec.family.empty_cache(params, spec.config, batch, length + beyond) if policy.keeps else ()
    ask = ask._replace(tokens=NOTHING)
    # What nothing reads is not carried.
    return Carry(rows, ask if spec.truncated else ask._replace(top_p=NOTHING, top_k=NOTHING), cache)


def copy_block(tokens: jax.Array, start: jax.Array, drafts: int, block: int) -> jax.Array:
    """int32 `[B, D, S]`: the block from `start` on, as each of the drafts."""
    here = take(tokens, start[:, None] + jnp.arange(block, dtype=jnp.int32)[None, :])
    return jnp.broadcast_to(here[:, None, :], (len(tokens), drafts, block))


@with_its_kernels
def join(params: Params, carry: Carry, ask: Request[jax.Array], b: jax.Array, *, spec: Spec) -> Carry:
    """The carry with the one row of `ask` in slot b, whose row must have ended. Its cache is not touched: what is there is
    hidden until the row's first refresh replaces it."""
    new = start(params, ask, spec=spec)
    return carry._replace(rows=put_row(carry.rows, new.rows, b), asks=put_row(carry.asks, new.asks, b))
