"""The contract every decoder keeps, and the candidate rule they share.

A decoder is a frozen dataclass, a `djax.pytree`, that extends `Decoder`. Its numbers are leaves (a sweep over them compiles
once, and they may differ from row to row); what sets a shape is a static field. It is written for one row:

    init(block, vocab) -> state                 any pytree of arrays
    step(state, look) -> state, verdict         pure

The loop maps both over the rows of a batch, so rows cannot look at each other. `look` is what the network read and said, the
verdict what stands there now. A decoder that holds another one (`Credit`, `Edit`, `NotBefore`) changes what the inner one sees
or what it returned. A decoder that verifies names `drafts`, D: each forward of a window then reads D versions of the block at
once, which see the context and themselves alone, and the verdict says what the next forward reads.

The invariant of every decoder, tested from the registry: it writes only at open positions and never the mask id; while masks
are left it writes at least one token; without `post_steps` it writes only where the mask stood, and its block is done when no
mask is left; the state keeps structure, shape and dtype.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp

from djax.checks import MOST_NESTED, plug, reading, show
from djax.errors import OptionError
from djax.kernels.vocabulary import find_best, find_peaks, find_two_best

# A decoder's memory of a row: any pytree of arrays, () for none.
State = TypeVar("State")


# Of an editing decoder a block: they set the trace's length.
MOST_POST_STEPS = 1024
# Of a decoder that verifies: they set a window's width.
MOST_DRAFTS = 256


class Tick(NamedTuple):
    """Where the decoding of a row stands: int32 scalars, counted from 0.

    iteration: turns of the loop since the row's start. A turn that refreshes the cache runs two forwards.
    forward:   network forwards of this row since its start.
    block:     index of the row's current block.
    call:      decode calls in the current block: a decoder's memory of a block starts anew at 0.
    """

    iteration: jax.Array
    forward: jax.Array
    block: jax.Array
    call: jax.Array


class Look(NamedTuple):
    """One forward of one row, as its decoder sees it. S positions of the current block, V tokens, D drafts.

    logits:  float32 `[S, V]`; of a decoder with drafts `[D, S, V]`.
    tokens:  int32 `[S]`, what stands there, and what the network read if there are no drafts; mask_id where nothing is decided
             yet.
    open:    bool `[S]`, the generated positions of the canvas: what the decoder may write.
    at:      int32 `[S]`, their positions on the canvas.
    tick:    see `Tick`.
    mask_id: int32 scalar.
    floor:   float32 scalar, a threshold that comparing decoders do not go below (smoothing's ramp); -inf without smoothing.
    temperature: float32 scalar.
    key:     the row's random key; None in a program that draws nothing.
    top_p:   float32 scalar, 1 cuts nothing; top_k: int32 scalar, 0 cuts nothing. None in a program that always draws from all
             tokens.
    drafts:  int32 `[D, S]`, what the network read; None without drafts.
    read:    int32 scalar, how many of them it read, the first ones: 1 where the whole canvas refilled a cache; None without.
    """

    logits: jax.Array
    tokens: jax.Array
    open: jax.Array
    at: jax.Array
    tick: Tick
    mask_id: jax.Array
    floor: jax.Array
    temperature: jax.Array
    key: jax.Array | None
    top_p: jax.Array | None = None
    top_k: jax.Array | None = None
    drafts: jax.Array | None = None
    read: jax.Array | None = None

    @property
    def masked(self) -> jax.Array:
        """Bool `[S]`: what is still to be decided."""
        return self.open & (self.tokens == self.mask_id)


class Verdict(NamedTuple):
    """What a decoder makes of a look.

    tokens:     int32 `[S]`, what stands there now.
    proposals:  int32 `[S]`, the token each position proposed, written or not: for the trace.
    confidence: float32 `[S]`, the probability of `tokens` under this forward's logits: for the trace, computed only there.
    done:       bool scalar, the block takes no further forward.
    stop:       bool scalar, the row ends here; positions that still hold the mask become EOS.

    Of a decoder with drafts, else None:
    drafts:     int32 `[D, S]`, what the next forward shall read of the block. A block just entered is read as it stands.
    drafted:    int32 scalar, how many of them, 1 to D.
    kept:       int32 scalar, which draft's keys and values stay where a cache commits what a window read.
    steps:      int32 scalar, the forwards without drafts that this one stands for, at least 1: what counting policies count.

    advance:    int32 scalar, how many leading positions the block leaves behind though it is not done: its start moves on by so
                many, and the drafts are of the block from there. None: blocks follow one another.
    """

    tokens: jax.Array
    proposals: jax.Array
    confidence: jax.Array
    done: jax.Array
    stop: jax.Array
    drafts: jax.Array | None = None
    drafted: jax.Array | None = None
    kept: jax.Array | None = None
    steps: jax.Array | None = None
    advance: jax.Array | None = None


class Decoder(Generic[State]):
    """Base of all decoders, with what a decoder need not say.

    State: the type of what `init` returns and `step` hands on.

    draws:      static, whether it needs a key at temperature 0, too.
    edits:      static, whether it also replaces tokens that it wrote.
    post_steps: static, the most forwards that a block may take after its last mask went.
    drafts:     static, D, the versions of the block that a window's forward reads; 0: what stands there.
    advances:   static, whether its verdicts move the block on before it is done.
    """

    if TYPE_CHECKING:
        # Read alone: a decoder says them by an attribute of its class, a field or a property.
        @property
        def draws(self) -> bool: ...
        @property
        def edits(self) -> bool: ...
        @property
        def post_steps(self) -> int: ...
        @property
        def drafts(self) -> int: ...
        @property
        def advances(self) -> bool: ...

    else:
        draws: bool = False
        edits: bool = False
        post_steps: int = 0
        drafts: int = 0
        advances: bool = False

    def init(self, block: int, vocab: int) -> State:
        """The state before a row's first forward. Decoders with more than () have their own."""
        del block, vocab
        nothing: Any = ()
        return nothing

    def step(self, state: State, look: Look) -> tuple[State, Verdict]:
        raise NotImplementedError


class Holder(Protocol):
    """A decoder that holds another one."""

    @property
    def inner(self) -> Decoder[Any]: ...


def write(look: Look, tokens: jax.Array, accept: jax.Array) -> Verdict:
    """The verdict of a decoder that writes tokens int32 `[S]` where accept bool `[S]` says, and is done without masks."""
    now = jnp.where(accept, tokens, look.tokens)
    return Verdict(
        tokens=now,
        proposals=tokens,
        confidence=probability(look.logits, now, look.mask_id),
        done=~jnp.any(look.open & (now == look.mask_id)),
        stop=jnp.bool_(False),
    )


def check_inner(decoder: Holder) -> None:
    """Check, in its `__post_init__`, the decoder that a decoder holds: one that edits is not held, since what holds it would
    have to know which of its writes replace."""
    name = f"{type(decoder).__name__}(inner=...)"
    plug(decoder.inner, name, Decoder, "the decoders of djax, such as djax.Threshold(0.9)")
    with reading(name):
        edits, drafts = bool(decoder.inner.edits), bool(decoder.inner.drafts)
    if drafts or decoder.inner.advances:
        raise OptionError(
            f"{name}: expected a decoder without drafts whose blocks follow one another, such as djax.Threshold(0.9); got "
            f"{show(decoder.inner)}"
        )
    if edits:
        raise OptionError(
            f"{name}: expected a decoder that does not edit, such as djax.Threshold(0.9); got {show(decoder.inner)}"
        )
    with reading(name):
        depth, inner = 0, decoder.inner
        while dataclasses.is_dataclass(inner) and hasattr(inner, "inner"):
            depth, inner = depth + 1, inner.inner
            if depth == MOST_NESTED:
                raise OptionError(f"{name}: expected at most {MOST_NESTED} decoders inside one another, got more")


def candidates(look: Look) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The token each position proposes, int32 `[S]`; its confidence, float32; and whether it is a candidate, bool.

    The token is the argmax of the logits, with Gumbel noise scaled by the temperature if there is a key, among those that
    `keep_likeliest` leaves; the confidence is its probability under all logits without noise (LLaDA, arXiv 2502.09992; dInfer).
    A masked position that proposes the mask id, which nothing cuts, is no candidate. If a row has masks but no candidate,
    the mask id is struck from its logits, so that the row still goes on; dInfer loops forever there. Ties go to the lower
    token id. Where the logits are not finite nothing is a candidate: such a model ends at the cap on turns with an error,
    not with an answer.
    """
    logits, masked, mask_id = look.logits, look.masked, look.mask_id
    if look.key is None:
        found = find_peaks(logits, mask_id)
        other, highest, of_mask_id, _ = found
    else:
        noise = jax.random.gumbel(look.key, logits.shape, logits.dtype, mode="low")
        noisy = logits + look.temperature * noise
        if look.top_p is not None and look.top_k is not None:
            noisy = jnp.where(keep_likeliest(logits, mask_id, look.temperature, look.top_p, look.top_k), noisy, -jnp.inf)
        other, highest, of_mask_id = find_two_best(noisy, mask_id)
    is_mask = (of_mask_id > highest) | ((of_mask_id == highest) & (mask_id < other))
    candidate = masked & ~is_mask
    stuck = ~jnp.any(candidate)
    takes_mask = is_mask & ~stuck
    tokens = jnp.where(takes_mask, mask_id, other)
    if look.key is None:
        # The chosen token's logit is at hand.
        confidence = found.share(jnp.where(takes_mask, of_mask_id, highest))
    else:
        confidence = probability(logits, tokens, mask_id)
    return tokens, confidence, (candidate | (masked & stuck)) & ~jnp.isnan(confidence)


def keep_likeliest(
    logits: jax.Array, mask_id: jax.Array, temperature: jax.Array, top_p: jax.Array, top_k: jax.Array
) -> jax.Array:
    """The tokens that may be drawn, bool `[S, V]` for logits `[S, V]`; always the likeliest one, and the mask id.

    Of softmax(logits / temperature) without the mask id: the top_k likeliest (0: all), with what ties with the last of them,
    as in HF; of their softmax the fewest, lower ids first on ties, whose mass reaches top_p (1: all).
    """
    positions, vocab = logits.shape
    ids = jnp.arange(vocab, dtype=jnp.int32)[None, :]
    is_mask_id = ids == mask_id
    # By rank and not by comparing with the last logit left: XLA may compute the logits anew, rounded differently (`find_best`).
    falling = jnp.where(is_mask_id, jnp.inf, -logits)
    falling, order = jax.lax.sort((falling, jnp.broadcast_to(ids, logits.shape)), num_keys=1, is_stable=True)
    last = jnp.clip(jnp.where(top_k > 0, top_k, vocab) - 1, 0, vocab - 1)
    inside = falling <= jax.lax.dynamic_slice_in_dim(falling, last, 1, axis=1)
    heat = jnp.where(temperature > 0, temperature, 1)
    mass = jnp.where(inside, jnp.exp((falling[:, :1] - falling) / heat), 0)
    before = jnp.cumsum(mass, axis=1) - mass
    # What rounding leaves of the mass must not matter where nothing is cut.
    inside &= (before < top_p * jnp.sum(mass, axis=1, keepdims=True)) | (top_p >= 1)
    inside |= ids == 0  # the likeliest, also where the logits are not finite
    rows = jnp.arange(positions)[:, None]
    return jnp.zeros(logits.shape, bool).at[rows, order].set(inside, unique_indices=True) | is_mask_id


def best_and_probability(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The token of the highest logit, as `find_best` has it, and its probability."""
    tokens, highest = find_best(logits)
    return tokens, _share(highest, logits, highest)


def probability(logits: jax.Array, tokens: jax.Array, mask_id: jax.Array) -> jax.Array:
    """softmax(logits)[tokens], float32 `[...]`.

    From the same `find_peaks` as `candidates`: XLA then sums the exponentials once for both.
    """
    return find_peaks(logits, mask_id).share(jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0])


def _share(chosen: jax.Array, logits: jax.Array, top: jax.Array) -> jax.Array:
    """exp(chosen) of the sum of exp(logits), all shifted by the maximum first: at logits of a hundred, subtracting a
    log-sum-exp would cost more than the 1e-5 by which decoders tell confidences apart."""
    return jnp.exp(chosen - top) / jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)


def by_confidence(confidence: jax.Array, candidate: jax.Array) -> jax.Array:
    """Each position's rank among the candidates, 0 the surest, ties to the lower position; the others come last."""
    order = jnp.argsort(jnp.where(candidate, -confidence, jnp.inf), stable=True)
    return jnp.argsort(order)


def first_best(confidence: jax.Array) -> jax.Array:
    """Bool `[S]`: the highest value, the first if there are several."""
    return jnp.arange(len(confidence)) == jnp.argmax(confidence)
