"""What a method may need beyond djax's own: a family that sees the past, drafts that are verified, a cache that commits what
windows read, blocks that move on before they are done. Each is one class here, against a plain road to the same answer."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, DENSE, LLADA2, tiny_model

import djax
from djax.caching.contract import Plan
from djax.decoding.contract import candidates, first_best, write
from djax.engine import frame
from djax.errors import OptionError
from djax.models import llada


@djax.pytree
@dataclasses.dataclass(frozen=True)
class TwoDrafts(djax.Decoder):
    """One token at a time, the next one guessed: a forward reads the canvas and the canvas with the guess."""

    verified: bool = dataclasses.field(default=True, metadata={"static": True})
    drafts: ClassVar[int] = 2

    def step(self, state: Any, look: djax.decoding.contract.Look) -> tuple[Any, djax.Verdict]:
        reads = [
            look._replace(tokens=tokens, logits=logits, drafts=None)
            for tokens, logits in zip(look.drafts, look.logits, strict=True)
        ]
        after = [commit(read, 1) for read in reads]
        equal = jnp.all(reads[1].tokens == after[0]) if self.verified else True
        accepted = (look.read == 2) & equal
        read = jax.tree.map(lambda one, two: jnp.where(accepted, two, one), *reads)
        tokens = commit(read, 1)
        verdict = write(read, tokens, look.masked & (tokens != look.mask_id))
        return state, verdict._replace(
            tokens=tokens,
            drafts=jnp.stack([tokens, commit(read, 2)]),
            drafted=jnp.int32(2),
            kept=accepted.astype(jnp.int32),
        )


def commit(read, count):
    """The tokens with the `count` surest masks filled."""
    tokens, confidence, candidate = candidates(read)
    now = read.tokens
    for _ in range(count):
        sure = jnp.where(candidate & (now == read.mask_id), confidence, -jnp.inf)
        now = jnp.where(first_best(sure) & (sure > -jnp.inf), tokens, now)
    return now


@djax.pytree
@dataclasses.dataclass(frozen=True)
class Grow(djax.Policy):
    """The first forward reads all there is; then each reads what is not cached yet, and its end grows the cache."""

    commits: ClassVar[bool] = True

    def plan(self, tick, cached_block):
        del tick
        first = cached_block < 0
        return Plan(full=first, refresh=first, window=~first)


@djax.pytree
@dataclasses.dataclass(frozen=True)
class Leftmost(djax.Decoder):
    """One token a forward, the leftmost, whose position the block leaves behind at once."""

    advances: ClassVar[bool] = True

    def step(self, state, look):
        tokens, _, candidate = candidates(look)
        verdict = write(look, tokens, first_best(candidate.astype(jnp.float32)) & candidate)
        leading = jnp.sum(jnp.cumprod(verdict.tokens != look.mask_id), dtype=jnp.int32)
        return state, verdict._replace(done=jnp.bool_(False), advance=leading)


AR = dataclasses.replace(llada.FAMILY, name="toy_ar", visibility="past", shift=1)


@pytest.fixture(scope="module")
def causal():
    """A transformer that sees the past and predicts the token after each position."""
    return dataclasses.replace(tiny_model(config=DENSE), family=AR)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def prompts(count=3):
    rng = np.random.default_rng(4)
    return [rng.integers(0, CONFIG.eos_id, n).tolist() for n in (5, 11, 18)[:count]]


OPTIONS = dict(gen_length=24, block_length=8, early_stop=False)


@pytest.mark.parametrize("cache", [None, djax.Prefix(surplus=False), djax.Dual(), djax.Vicinity(4, 4, warmup=2)], ids=repr)
def test_two_drafts_give_the_tokens_of_one_in_fewer_forwards(model, cache):
    """Drafts lie along the window and see the context and themselves alone, or are canvases of their own."""
    many = prompts()
    one = djax.generate(model, many, decoder=djax.Fixed(1), cache=cache, **OPTIONS)
    two = djax.generate(model, many, decoder=TwoDrafts(), cache=cache, **OPTIONS)
    for a, b, prompt in zip(one, two, many, strict=True):
        assert a.canvas.tolist() == b.canvas.tolist()
        assert b.forwards <= a.forwards and b.refreshes == a.refreshes
        alone = djax.generate(model, prompt, decoder=TwoDrafts(), cache=cache, **OPTIONS)
        assert (alone.canvas.tolist(), alone.forwards, alone.positions) == (b.canvas.tolist(), b.forwards, b.positions)
    assert sum(b.forwards for b in two) < sum(a.forwards for a in one)
    if cache is None:
        # A block just entered is read as it stands, and then twice each time.
        for b, prompt in zip(two, many, strict=True):
            blocks = len(range(len(prompt) // 8 * 8, len(prompt) + 24, 8))
            assert b.positions == (blocks + 2 * (b.forwards - blocks)) * (len(prompt) + 24)


def test_unverified_drafts_give_other_tokens(model):
    one, two = (
        [o.canvas.tolist() for o in djax.generate(model, prompts(), decoder=d, **OPTIONS)]
        for d in (djax.Fixed(1), TwoDrafts(verified=False))
    )
    assert one != two


def decode_plainly(model, prompt, gen_length):
    """Autoregressive greedy decoding, a whole forward a token."""
    tokens = list(prompt)
    for _ in range(gen_length):
        logits = np.array(djax.logits(model, [tokens + [0] * (len(prompt) + gen_length - len(tokens))])[0, len(tokens) - 1])
        logits[model.config.mask_id] = -np.inf
        tokens.append(int(logits.argmax()))
    return tokens


def test_a_family_that_sees_the_past(causal):
    """What follows a position changes nothing there."""
    tokens = np.array([prompts()[2]])
    changed = tokens.copy()
    changed[0, 9:] = (changed[0, 9:] + 1) % CONFIG.eos_id
    one, two = djax.logits(causal, tokens), djax.logits(causal, changed)
    np.testing.assert_array_equal(one[0, :9], two[0, :9])
    assert np.abs(one[0, 9:] - two[0, 9:]).max() > 0.1


@pytest.mark.parametrize("cache", [None, Grow()], ids=["no cache", "Grow"])
def test_autoregressive_decoding_is_blocks_of_one(causal, cache):
    many = prompts()
    options = dict(gen_length=16, block_length=1, early_stop=False, decoder=djax.Fixed(1), cache=cache)
    for out, prompt in zip(djax.generate(causal, many, **options), many, strict=True):
        assert out.canvas.tolist() == decode_plainly(causal, prompt, 16)
        assert out.forwards == 16
        if cache is not None:
            # The prompt once, and then every token alone: the last one is never read.
            assert (out.refreshes, out.positions) == (1, len(prompt) + 15)


@pytest.mark.parametrize("block", [4, 8])
@pytest.mark.parametrize("decoder", [djax.Threshold(0.3), djax.Fixed(1), TwoDrafts(), Leftmost()], ids=repr)
def test_a_cache_that_commits_what_was_read_is_exact(causal, decoder, block):
    """Whatever leading part of a window is final: what is not is read again and overwritten."""
    many = prompts()
    options = dict(gen_length=24, block_length=block, early_stop=False, decoder=decoder)
    plain, cached = (djax.generate(causal, many, cache=cache, **options) for cache in (None, Grow()))
    for one, two, prompt in zip(plain, cached, many, strict=True):
        assert one.canvas.tolist() == two.canvas.tolist() and two.refreshes == 1
        assert two.positions < one.positions
        alone = djax.generate(causal, prompt, cache=Grow(), **options)
        assert (alone.canvas.tolist(), alone.positions) == (two.canvas.tolist(), two.positions)


def test_blocks_that_move_on_are_autoregressive_too(causal):
    for prompt in prompts():
        out = djax.generate(causal, prompt, gen_length=16, block_length=4, decoder=Leftmost(), early_stop=False, cache=Grow())
        assert out.canvas.tolist() == decode_plainly(causal, prompt, 16)
        assert out.forwards == 16


def test_a_row_that_moves_on_ends_at_its_first_eos(causal):
    """As with blocks of one."""
    ended = 0
    for seed in range(6):
        options = dict(gen_length=24, block_length=1, seed=seed, temperature=8.0)
        one = djax.generate(causal, prompts(), decoder=djax.Fixed(1), **options)
        two = djax.generate(causal, prompts(), decoder=Leftmost(), cache=Grow(), **options)
        for a, b in zip(one, two, strict=True):
            assert (a.canvas.tolist(), a.forwards, a.finish_reason) == (b.canvas.tolist(), b.forwards, b.finish_reason)
            ended += a.finish_reason == "stop"
    assert 0 < ended < 18


class Careless(Leftmost):
    """As `write` has it, with an advance that is far too long: it must not skip a block, nor leave a mask behind."""

    def step(self, state, look):
        state, verdict = super().step(state, look)
        done = ~jnp.any(look.open & (verdict.tokens == look.mask_id))
        return state, verdict._replace(done=done, advance=jnp.int32(100))


Careless = djax.pytree(dataclasses.dataclass(frozen=True)(Careless))


def test_a_block_moves_on_no_further_than_it_is_decided(causal):
    for prompt in prompts():
        out = djax.generate(causal, prompt, gen_length=16, block_length=4, decoder=Careless(), early_stop=False)
        assert out.canvas.tolist() == decode_plainly(causal, prompt, 16)


def test_canvases_of_their_own_width_in_a_batch(model, monkeypatch):
    """Here from 64 positions on, so that short rows of a batch are refreshed at a quarter and half of it."""
    monkeypatch.setattr(frame, "LONG", 64)
    rng = np.random.default_rng(9)
    many = [rng.integers(0, CONFIG.eos_id, n).tolist() for n in (20, 100, 104, 200)]
    for cache in (djax.Dual(every=3), djax.Vicinity(4, 4, warmup=2), None):
        options = dict(gen_length=24, block_length=8, cache=cache, decoder=djax.Threshold(0.4))
        for out, prompt in zip(djax.generate(model, many, **options), many, strict=True):
            alone = djax.generate(model, prompt, **options)
            assert (out.canvas.tolist(), out.forwards, out.positions) == (
                alone.canvas.tolist(),
                alone.forwards,
                alone.positions,
            )


@djax.pytree
@dataclasses.dataclass(frozen=True)
class Traced(djax.Decoder):
    drafts: int = 2


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (CONFIG, dict(decoder=Traced()), r"decoder: expected Traced.drafts to be static"),
        (CONFIG, dict(decoder=Leftmost(), cache=djax.Dual()), r"decoder: expected one whose blocks follow one another"),
        (DENSE, dict(decoder=djax.Edit(), cache=Grow()), r"decoder: expected one that does not edit, because Grow\(\) keeps"),
        (DENSE, dict(smoothing=djax.Smoothing()), r"smoothing: expected None, since the family toy_ar takes no soft"),
        (CONFIG, dict(cache=Grow()), r"cache: expected a cache that commits nothing for the family llada_moe; got Grow\(\)"),
        (DENSE, dict(cache=djax.Dual()), r"cache: expected None or a cache that commits what windows read .*toy_ar; got Dual"),
        (LLADA2, dict(decoder=Leftmost()), r"decoder: expected one whose blocks follow one another .*llada2.*got Leftmost"),
        (CONFIG, dict(decoder=TwoDrafts(), smoothing=djax.Smoothing()), r"smoothing: expected None with drafts"),
    ],
)
def test_what_does_not_fit_together_is_refused(config, options, message):
    model = tiny_model(config=config)
    model = dataclasses.replace(model, family=AR) if config is DENSE else model
    with pytest.raises(OptionError, match=message):
        djax.generate(model, [1, 2, 3], gen_length=8, block_length=8, **options)
    for inner in (TwoDrafts(), Leftmost()):
        with pytest.raises(OptionError, match=r"Credit\(inner=...\): expected a decoder without drafts"):
            djax.Credit(inner)


@djax.pytree
@dataclasses.dataclass(frozen=True)
class Wrong(djax.Decoder):
    drafts: ClassVar[int] = 3

    def step(self, state, look):
        tokens = look.tokens
        return state, write(look._replace(logits=look.logits[0]), tokens, look.masked)._replace(drafts=tokens[None])


def test_drafts_of_another_shape_are_refused(model):
    with pytest.raises(OptionError, match=r"Wrong: the drafts of its verdict: expected integer of shape \(3, 8\)"):
        djax.generate(model, [1, 2], gen_length=8, block_length=8, decoder=Wrong())
