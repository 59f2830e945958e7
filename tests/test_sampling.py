"""top_p and top_k: the one candidate rule against a plain loop, what is drawn, and what a program without them holds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_batch_and_loop import facts
from tiny import tiny_model
from toy import toy_model

import djax
from djax.decoding.contract import Look, Tick, candidates, keep_likeliest
from djax.engine.loop import decode
from djax.engine.request import prepare
from djax.errors import OptionError

POSITIONS, VOCAB, MASK = 16, 23, 5


def plain(logits, temperature, top_p, top_k):
    """The rule for one position, in float64: the ids that may be drawn besides the mask id, and by how little the last of them
    was needed, or not."""
    others = sorted((i for i in range(len(logits)) if i != MASK), key=lambda i: (-logits[i], i))
    if 0 < top_k < len(others):
        others = [i for i in others if logits[i] >= logits[others[top_k - 1]]]
    weights = np.exp((logits[others].astype(np.float64) - logits[others[0]]) / (temperature or 1))
    mass = np.cumsum(weights / weights.sum())
    if top_p == 1:
        return set(others), 1.0
    return set(others[: np.searchsorted(mass, top_p) + 1]), np.abs(mass - top_p).min()


def drawn_logits(rng, *, ties):
    logits = rng.normal(size=(POSITIONS, VOCAB)) * rng.choice([0.5, 2.0, 6.0])
    logits = np.round(logits) if ties else logits
    logits[rng.random(POSITIONS) < 0.3, MASK] = 9.0
    return logits.astype(np.float32)


@pytest.fixture(scope="module")
def look_at():
    """`candidates` and `keep_likeliest` of one row, compiled once."""

    @jax.jit
    def run(logits, seed, temperature, top_p, top_k):
        where, zero = jnp.ones(POSITIONS, bool), jnp.int32(0)
        tokens = jnp.where(jnp.arange(POSITIONS) < POSITIONS - 2, MASK, 0)
        at, tick = jnp.arange(POSITIONS), Tick(zero, zero, zero, zero)
        look = Look(logits, tokens, where, at, tick, jnp.int32(MASK), jnp.float32(0), temperature, jax.random.key(seed))
        kept = keep_likeliest(logits, jnp.int32(MASK), temperature, top_p, top_k)
        return candidates(look), candidates(look._replace(top_p=top_p, top_k=top_k)), kept

    return lambda logits, seed, t, p, k: run(logits, seed, jnp.float32(t), jnp.float32(p), jnp.int32(k))


def test_what_may_be_drawn_is_the_plain_rule(look_at):
    cut = checked = 0
    for case in range(60):
        rng = np.random.default_rng(case)
        logits = drawn_logits(rng, ties=case % 2)
        temperature, top_p = float(rng.choice([0.0, 0.3, 1.0, 2.5])), float(rng.choice([1.0, 0.95, 0.7, 0.2, 1e-6]))
        top_k = int(rng.choice([0, 1, 2, 5, VOCAB - 2, VOCAB, 10**6]))
        (whole, _, _), (tokens, confidence, candidate), kept = look_at(logits, case, temperature, top_p, top_k)
        noise = np.asarray(jax.random.gumbel(jax.random.key(case), logits.shape, mode="low"))
        noisy = logits + np.float32(temperature) * noise
        share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        for s in range(POSITIONS):
            may, margin = plain(logits[s], temperature, top_p, top_k)
            if margin < 1e-5:
                continue
            assert set(np.flatnonzero(kept[s])) == may | {MASK}
            # The mask id competes as it did; who wins against it is a candidate.
            best = max(may, key=lambda i: (noisy[s, i], -i))
            wins = noisy[s, best] > noisy[s, MASK] or (noisy[s, best] == noisy[s, MASK] and best < MASK)
            assert int(tokens[s]) == (best if wins else MASK)
            assert bool(candidate[s]) == (wins and s < POSITIONS - 2)
            np.testing.assert_allclose(confidence[s], share[s, int(tokens[s])], rtol=1e-4)
            checked, cut = checked + 1, cut + (int(tokens[s]) != int(whole[s]))
    assert checked > 800 and cut > 100


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (1.0, VOCAB), (0.3, 0), (1e-30, 1), (0.5, 3)])
def test_neutral_values_and_temperature_0_change_nothing(look_at, top_p, top_k):
    neutral = top_p == 1.0
    for seed in range(20):
        logits = drawn_logits(np.random.default_rng(seed), ties=seed % 2)
        for temperature in (0.0, 0.9) if neutral else (0.0,):
            whole, cut, _ = look_at(logits, seed, temperature, top_p, top_k)
            for a, b in zip(whole, cut, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_leave_the_likeliest(look_at, value):
    logits = drawn_logits(np.random.default_rng(0), ties=False)
    logits[0], logits[1, 3] = value, value
    _, (_, confidence, candidate), kept = look_at(logits, 0, 1e-45, 0.5, 2)
    some = np.asarray(kept)[:, [i for i in range(VOCAB) if i != MASK]].any(axis=1)
    assert some[1:].all() and (some[0] or np.isnan(value))
    if np.isnan(value):
        assert not np.asarray(candidate)[:2].any() and np.isnan(np.asarray(confidence)[:2]).all()


def test_what_is_drawn_has_the_frequencies_of_the_cut_softmax():
    """20,000 draws of one position: each frequency within five standard deviations, and nothing else is drawn."""
    logits = np.linspace(2.0, -2.0, VOCAB).astype(np.float32)
    logits[MASK] = -60.0
    temperature, count = 0.8, 20_000
    zero = jnp.int32(0)

    @partial(jax.jit, static_argnames="cut")
    def draw(seeds, top_p, top_k, cut):
        def one(seed):
            look = Look(
                *(jnp.asarray(logits)[None], jnp.full(1, MASK), jnp.ones(1, bool), jnp.zeros(1, jnp.int32)),
                *(Tick(zero, zero, zero, zero), jnp.int32(MASK), jnp.float32(0), jnp.float32(temperature)),
                key=jax.random.key(seed),
            )
            return candidates(look._replace(top_p=top_p, top_k=top_k) if cut else look)[0][0]

        return jax.vmap(one)(seeds)

    for top_p, top_k in ((0.6, 0), (1.0, 4), (0.8, 6), (1.0, 0)):
        tokens = np.asarray(draw(jnp.arange(count), jnp.float32(top_p), jnp.int32(top_k), cut=(top_p, top_k) != (1.0, 0)))
        may, _ = plain(logits, temperature, top_p, top_k)
        share = np.where(np.isin(np.arange(VOCAB), list(may)), np.exp(logits.astype(np.float64) / temperature), 0)
        share /= share.sum()
        found = np.bincount(tokens, minlength=VOCAB) / count
        assert set(np.flatnonzero(found)) <= may
        assert (np.abs(found - share) <= 5 * np.sqrt(share * (1 - share) / count)).all()


PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6] * 9, [5, 3]]
ROWS = dict(temperature=[0.9, 0.9, 0.0, 1.4], top_p=[0.5, 1.0, 0.4, 0.9], top_k=[0, 0, 3, 5], seed=[1, 2, 3, 4])
SHAPE = dict(gen_length=24, block_length=8, decoder=djax.Threshold(0.3), early_stop=False)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def alone(model):
    return [djax.generate(model, p, **SHAPE, **{k: v[i] for k, v in ROWS.items()}) for i, p in enumerate(PROMPTS)]


def test_rows_with_values_of_their_own_get_what_they_get_alone(model, alone):
    """One of them cuts nothing, and one draws nothing."""
    together = djax.generate(model, PROMPTS, **SHAPE, **ROWS)
    for one, out in zip(alone, together, strict=True):
        assert facts(out) == facts(one)
    heat, seeds = ROWS["temperature"], ROWS["seed"]
    whole = [djax.generate(model, PROMPTS[i], **SHAPE, temperature=heat[i], seed=seeds[i]) for i in range(3)]
    assert facts(whole[0]) != facts(alone[0]), "a cut draws something else"
    assert [facts(g) for g in whole[1:]] == [facts(g) for g in alone[1:3]]


def test_rows_that_join_an_engine(model, alone):
    engine = djax.Engine(model, rows=2, canvas=64, truncates=True, **SHAPE)
    slots, found = {}, {}
    for i, prompt in enumerate(PROMPTS):
        while not engine.free:
            found |= {slots.pop(b): out for b, out in engine.run(until="row").items()}
        slots[engine.join(prompt, **{k: v[i] for k, v in ROWS.items()})] = i
    found |= {slots.pop(b): out for b, out in engine.run().items()}
    for i, one in enumerate(alone):
        assert facts(found[i]) == facts(one)


def test_an_engine_without_refuses_them():
    engine = djax.Engine(toy_model(), rows=1, canvas=64)
    for given in (dict(top_p=0.9), dict(top_k=3), dict(top_p=0.9, temperature=0.5)):
        with pytest.raises(OptionError, match=r"top_p, top_k: expected 1.0 and 0 in an engine .* truncates=False"):
            engine.join([1], gen_length=8, **given)
    engine.join([1], gen_length=8, top_p=1, top_k=0, temperature=0.5)
    djax.Engine(toy_model(), rows=1, canvas=64, top_p=0.5, temperature=0.5).join([1], gen_length=8)
    with pytest.raises(OptionError, match="truncates: expected True or False, got 1"):
        djax.Engine(toy_model(), truncates=1)


def test_a_program_that_cuts_nothing_holds_no_sort():
    model = toy_model()

    def sorts(**options):
        asked = prepare(model, PROMPTS[:2], djax.Options(gen_length=24, block_length=8, **options))
        spec = asked.spec(model, asked.asks[0])
        text = jax.jit(partial(decode, spec=spec)).lower(model.params, asked.asks[0]).as_text("hlo")
        assert (" sort(" in text) == spec.truncated
        return spec.truncated

    assert not sorts()
    assert not sorts(temperature=0.7)
    assert not sorts(temperature=0.7, top_p=[1.0, 1], top_k=0)
    assert not sorts(top_p=0.5, top_k=3), "nothing is drawn at temperature 0"
    assert sorts(temperature=0.7, top_p=[1.0, 0.5])
    assert sorts(temperature=0.7, top_k=[0, 3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(top_p=0), "top_p: expected a finite number above 0.0 at most 1.0, got 0"),
        (dict(top_p=1.01), "top_p: .* got 1.01"),
        (dict(top_p=float("nan")), "top_p: .* got nan"),
        (dict(top_p=True), "top_p: .* got True of type bool"),
        (dict(top_p="0.9"), "top_p: .* got '0.9' of type str"),
        (dict(top_p=[0.9]), "top_p: expected one, or a list with one for each of the 2 prompts, got 1"),
        (dict(top_p=[0.9, -1]), "top_p: .* got -1"),
        (dict(top_k=-1), "top_k: expected a whole number, at least 0 .* got -1"),
        (dict(top_k=1.0), "top_k: .* got 1.0 of type float"),
        (dict(top_k=True), "top_k: .* got True of type bool"),
        (dict(top_k=[1, 2, 3]), "top_k: expected one whole number, or one for each of the 2 prompts, got 3"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(OptionError, match=message):
        djax.generate(toy_model(), [[1], [2]], **options)
