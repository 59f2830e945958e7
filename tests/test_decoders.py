"""The law of every decoder, drawn from the registry, and each decoder against its rule written as a loop."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS
from deciding import begin, decide
from hypothesis import given, settings
from hypothesis import strategies as st

from djax.caching import CACHES
from djax.decoding import DECODERS, Credit, Edit, Entropy, Factor, Fixed, FreeDave, Hierarchy, Threshold
from djax.decoding.smoothing import Smoothing
from djax.kernels.vocabulary import find_peaks, peaks_on_cpu, plain_peaks
from djax.pytree import classes

ROWS, BLOCK, VOCAB, MASK = 3, 8, 11, 9
# A plug of every kind, at both ends of its numbers. A decoder that is in the registry but not here fails the test.
MADE = {
    "threshold": [Threshold(0.9), Threshold(0.01), Threshold(2.0), Threshold(0.9, slack=0.0), Threshold(0.3, order="left")],
    "fixed": [
        *(Fixed(1), Fixed(5), Fixed(steps=3), Fixed(2, order="random"), Fixed(steps=20, order="random")),
        Fixed(2, order="left"),
    ],
    "credit": [Credit(), Credit(Fixed(2), alpha=3.0, gamma=0.0, beta=1.0)],
    "hierarchy": [Hierarchy(), Hierarchy(high=2.0, low=0.0)],
    "factor": [Factor(), Factor(5.0)],
    "entropy": [Entropy(), Entropy(0.0), Entropy(3.0)],
    "freedave": [FreeDave(drafts=3), FreeDave(Fixed(1, order="left"), 2), FreeDave(Threshold(0.5), 4)],
    "edit": [Edit(), Edit(Credit(), tau=0.2, post_steps=0), Edit(Fixed(2, order="random"), tau=2.0)],
}
PLUGS = [plug for name in DECODERS for plug in MADE[name]]


@pytest.fixture(scope="module")
def step():
    """Jitted once: numbers are leaves, so all plugs of a kind share a program."""

    @jax.jit
    def run(plug, logits, masked, seed):
        key = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.zeros(logits.shape[0], jnp.int32))
        state = begin(plug, logits.shape[0], BLOCK, VOCAB)
        cold = decide(plug, state, logits, masked, mask_id=MASK, key=key if plug.draws else None)
        warm = decide(plug, state, logits, masked, mask_id=MASK, key=key, temperature=0.7)
        return cold, warm

    return run


@st.composite
def cases(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(size=(ROWS, BLOCK, VOCAB)) * draw(st.sampled_from([0.1, 1.0, 8.0, 60.0]))
    if draw(st.booleans()):
        logits = np.round(logits)  # exact ties
    if draw(st.booleans()):
        logits[rng.random((ROWS, BLOCK)) < draw(st.sampled_from([0.3, 1.0])), MASK] = 500.0  # the mask id on top
    masked = rng.random((ROWS, BLOCK)) < draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
    return logits.astype(np.float32), masked, draw(st.integers(0, 1000))


@pytest.mark.parametrize("plug", PLUGS, ids=repr)
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_the_law(step, plug, case):
    logits, masked, seed = case
    state = begin(plug, ROWS, BLOCK, VOCAB)
    for after, tokens, accept in step(plug, logits, masked, seed):
        if not plug.edits:
            assert not np.any(np.asarray(accept) & ~masked), "what is written stood as a mask"
        accepts = np.any(np.asarray(accept) & masked, axis=1)
        assert np.array_equal(accepts, np.any(masked, axis=1)), "every row with a mask goes on"
        assert not np.any(np.asarray(accept) & (np.asarray(tokens) == MASK)), "the mask id is never accepted"
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    together = step(plug, logits, masked, seed)
    for b in range(ROWS):
        alone = step(plug, logits[[b] * ROWS], masked[[b] * ROWS], seed)
        for (_, tokens, accept), (_, tokens_alone, accept_alone) in zip(together, alone, strict=True):
            np.testing.assert_array_equal(tokens[b], tokens_alone[0], "rows do not look at each other")
            np.testing.assert_array_equal(accept[b], accept_alone[0], "rows do not look at each other")


def softmax(z):
    e = np.exp(z.astype(np.float64) - z.max())
    return e / e.sum()


def candidates_by_loop(logits, masked):
    """Position to (token, confidence): argmax of the logits; the mask id only disqualifies while others are left."""
    found = {s: (int(np.argmax(logits[s])), softmax(logits[s])) for s in range(BLOCK) if masked[s]}
    eligible = {s: (t, p[t]) for s, (t, p) in found.items() if t != MASK}
    if eligible or not found:
        return eligible
    others = [v for v in range(VOCAB) if v != MASK]
    best = {s: max(others, key=lambda v, s=s: (logits[s, v], -v)) for s in found}
    return {s: (t, found[s][1][t]) for s, t in best.items()}


@settings(max_examples=60, deadline=None)
@given(case=cases(), tau=st.sampled_from([0.05, 0.5, 0.9, 1.5]))
def test_threshold_by_loop(step, case, tau):
    logits, masked, seed = case
    (_, tokens, accept), _ = step(Threshold(tau), logits, masked, seed)
    for b in range(ROWS):
        found = candidates_by_loop(logits[b], masked[b])
        bound = min(tau, max((c for _, c in found.values()), default=0.0) - 1e-5)
        for s in range(BLOCK):
            if s in found and abs(found[s][1] - bound) > 1e-6:  # float32 decides the rest
                assert accept[b, s] == (found[s][1] >= bound)
            if accept[b, s]:
                assert tokens[b, s] == found[s][0]


@settings(max_examples=60, deadline=None)
@given(case=cases(), per_step=st.sampled_from([1, 3]))
def test_fixed_by_loop(step, case, per_step):
    logits, masked, seed = case
    (_, _, accept), _ = step(Fixed(per_step), logits, masked, seed)
    for b in range(ROWS):
        found = candidates_by_loop(logits[b], masked[b])
        assert accept[b].sum() == min(per_step, len(found))
        worst = min((found[s][1] for s in range(BLOCK) if accept[b, s]), default=1.0)
        left = max((c for s, (_, c) in found.items() if not accept[b, s]), default=0.0)
        assert worst >= left - 1e-6


@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_without_slack_a_threshold_above_one_is_one_token(step, case):
    logits, masked, seed = case
    for (_, tokens, accept), (_, one_token, one) in zip(
        step(Threshold(2.0, slack=0.0), logits, masked, seed), step(Fixed(1), logits, masked, seed), strict=True
    ):
        np.testing.assert_array_equal(accept, one)
        np.testing.assert_array_equal(tokens, one_token)


def test_the_slack_takes_what_is_that_close_to_the_best(step):
    """dInfer's 1e-5: at confidences 0.5, 0.5 - 4e-6 and 0.5 - 4e-5 the first two go together."""
    logits = np.zeros((ROWS, BLOCK, VOCAB), np.float32)
    logits[:, :3, 4] = [np.log(10 * p / (1 - p)) for p in (0.5, 0.5 - 4e-6, 0.5 - 4e-5)]
    masked = np.ones((ROWS, BLOCK), bool)
    for plug, together in ((Threshold(2.0), 2), (Threshold(2.0, slack=0.0), 1), (Threshold(2.0, slack=1e-4), 3)):
        (_, _, accept), _ = step(plug, logits, masked, 0)
        assert np.asarray(accept).tolist() == [[s < together for s in range(BLOCK)]] * ROWS


@pytest.mark.parametrize("order", ["confidence", "random"])
def test_fixed_steps_by_schedule(order):
    """Seven masks in three forwards: 3, 2, 2 (the remainder goes first); in twenty: one each, until they are gone."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(2, BLOCK, VOCAB)).astype(np.float32)
    logits[:, :, MASK] = -9.0  # every mask is a candidate
    for steps, counts in ((3, [3, 2, 2]), (20, [1] * 7)):
        plug, masked = Fixed(steps=steps, order=order), np.ones((2, BLOCK), bool)
        masked[0, 2] = masked[1, 5] = False
        state = begin(plug, 2, BLOCK, VOCAB)
        for call, count in enumerate(counts):
            keys = jax.random.split(jax.random.key(call), 2) if plug.draws else None
            state, _, accept = decide(plug, state, logits, masked, mask_id=MASK, key=keys, call=call)
            assert np.asarray(accept).sum(axis=1).tolist() == [count] * 2
            masked = masked & ~np.asarray(accept)
        assert not masked.any()


def test_random_order_is_uniform_and_takes_the_same_tokens():
    rng = np.random.default_rng(5)
    logits, rows = np.tile(rng.normal(size=(1, BLOCK, VOCAB)).astype(np.float32) * 5, (3000, 1, 1)), 3000
    logits[:, :, MASK] = -99.0
    masked = np.ones((rows, BLOCK), bool)
    masked[:, 1] = False
    keys = jax.random.split(jax.random.key(0), rows)
    _, tokens, accept = decide(Fixed(1, order="random"), (), logits, masked, mask_id=MASK, key=keys)
    _, sure, _ = decide(Fixed(1), (), logits, masked, mask_id=MASK)
    share = np.asarray(accept).mean(axis=0)
    np.testing.assert_allclose(share, masked[0] / 7, atol=0.03)
    np.testing.assert_array_equal(tokens, sure, "at temperature 0 the key draws the order alone")


def softmax_rows(logits):
    return np.stack([softmax(row) for row in logits])


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_hierarchy_by_loop(step, case):
    """Each maximal run of masks: its best if above low, any above high, the row's best; nothing that proposes the mask."""
    logits, masked, seed = case
    (_, _, accept), _ = step(Hierarchy(0.9, 0.4), logits, masked, seed)
    for b in range(ROWS):
        p = softmax_rows(logits[b]).max(axis=1)
        if len(set(np.round(p[masked[b]], 6))) < masked[b].sum():
            continue  # near ties: float32 decides
        expected = set()
        runs = [list(g) for m, g in itertools.groupby(range(BLOCK), key=lambda s, b=b: masked[b, s]) if m]
        for run in runs:
            best = max(run, key=lambda s: p[s])
            expected |= {s for s in run if p[s] > 0.9 or (s == best and p[s] > 0.4)}
        everywhere = [s for run in runs for s in run]
        if everywhere:
            expected.add(max(everywhere, key=lambda s: p[s]))
        found = candidates_by_loop(logits[b], masked[b])
        expected &= set(found)
        if everywhere and not expected:
            expected = {max(found, key=lambda s: found[s][1])}
        stuck = np.all(logits[b][masked[b]].argmax(axis=-1) == MASK)
        if not stuck:  # then every position proposes another token; the law's test has that case
            assert set(np.flatnonzero(accept[b])) == expected


@settings(max_examples=60, deadline=None)
@given(case=cases(), f=st.sampled_from([0.3, 1.0, 4.0]))
def test_factor_by_loop(step, case, f):
    logits, masked, seed = case
    (_, _, accept), _ = step(Factor(f), logits, masked, seed)
    for b in range(ROWS):
        sure = sorted((c for _, c in candidates_by_loop(logits[b], masked[b]).values()), reverse=True)
        margins = [(n + 1) * (1 - c) - f for n, c in enumerate(sure, start=1)]
        if any(abs(m) < 1e-5 for m in margins):
            continue  # float32 decides
        count = max([n for n, m in enumerate(margins, start=1) if m < 0], default=min(1, len(sure)))
        assert accept[b].sum() == count


@settings(max_examples=60, deadline=None)
@given(case=cases(), theta=st.sampled_from([0.0, 0.5, 1.5]))
def test_entropy_by_loop(step, case, theta):
    logits, masked, seed = case
    (_, _, accept), _ = step(Entropy(theta), logits, masked, seed)
    for b in range(ROWS):
        found = candidates_by_loop(logits[b], masked[b])
        entropy = {s: float(-(softmax(logits[b, s]) * np.log(softmax(logits[b, s]) + 1e-300)).sum()) for s in found}
        if any(abs(h - theta) < 1e-5 for h in entropy.values()):
            continue
        low = {s for s, h in entropy.items() if h <= theta}
        got = set(np.flatnonzero(accept[b]))
        assert low <= got
        if not low and found:
            assert len(got) == 1
            assert entropy[got.pop()] <= min(entropy.values()) + 1e-5


def test_credit_by_loop():
    """Three calls of a block and the first of the next, against the formula position by position."""
    rng = np.random.default_rng(0)
    plug = Credit(Threshold(0.6), alpha=0.9, gamma=0.3, beta=0.7)
    state, credit = begin(plug, 1, BLOCK, VOCAB), np.zeros((BLOCK, VOCAB))
    for call in (0, 1, 2, 0):
        logits = (2 * rng.normal(size=(1, BLOCK, VOCAB))).astype(np.float32)
        masked = rng.random((1, BLOCK)) < 0.7
        state, tokens, accept = decide(plug, state, logits, masked, mask_id=MASK, call=call)
        credit = credit * 0.7 if call else np.zeros_like(credit)
        for s in range(BLOCK):
            if masked[0, s]:
                p = softmax(logits[0, s])
                credit[s, p.argmax()] += p.max() ** 0.3
        np.testing.assert_allclose(state[0][0], credit, rtol=1e-5, atol=1e-7)
        fused = (logits + 0.9 * np.log1p(credit)).astype(np.float32)
        _, expected_tokens, expected = decide(Threshold(0.6), (), fused, masked, mask_id=MASK, call=call)
        np.testing.assert_array_equal(accept, expected)
        np.testing.assert_array_equal(np.where(accept, tokens, 0), np.where(accept, expected_tokens, 0))


def test_credit_without_weight_is_its_inner_decoder(step):
    rng = np.random.default_rng(1)
    logits, masked = rng.normal(size=(ROWS, BLOCK, VOCAB)).astype(np.float32) * 4, rng.random((ROWS, BLOCK)) < 0.6
    for (_, tokens, accept), (_, inner_tokens, inner_accept) in zip(
        step(Credit(Threshold(0.5), alpha=0.0), logits, masked, 5), step(Threshold(0.5), logits, masked, 5), strict=True
    ):
        np.testing.assert_array_equal(tokens, inner_tokens)
        np.testing.assert_array_equal(accept, inner_accept)


RECORDED = json.loads((GOLDENS / "decoders.json").read_text())


def recorded_plug(settings, threshold):
    if settings["decoder"] == "hierarchy":
        low = settings["low_threshold"]
        # dInfer's decaying threshold may come down to low, and high=None means there is none.
        return Hierarchy(2.0 if threshold is None else max(threshold, low + 1e-9), low)
    if settings["decoder"] == "credit":
        return Credit(Threshold(threshold), settings["credit_alpha"], settings["boost_gamma"], settings["decay_beta"])
    return Fixed(steps=settings["steps"]) if settings["decoder"] == "fixed" else Threshold(threshold)


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda c: c["id"])
def test_recorded_decoders(case):
    """Five calls in a row on given logits, token for token, until dInfer gets stuck on the mask token.

    dInfer's fixed decoder (recorded with mended code) spends part of a call's tokens on positions that propose the mask, which
    stay masked; djax takes the next candidates in their stead, so there dInfer's tokens are among djax's.
    """
    data, settings_ = np.load(GOLDENS / "decoders.npz"), case["settings"]
    defaults = {"credit_alpha": 0.7, "boost_gamma": 0.2, "decay_beta": 0.8}
    first, last = RECORDED["block"]
    x, mask = data[f"{case['id']}/x"].astype(np.int32), RECORDED["mask_id"]
    plug = recorded_plug(defaults | settings_, case["iter_threshold"][0] or settings_["threshold"])
    state = begin(plug, len(x), last - first, RECORDED["vocab"])
    for call, threshold in enumerate(case["iter_threshold"]):
        logits = data[f"{case['id']}/logits_x32"][call].astype(np.float32) / 32
        block = x[:, first:last]
        plug = recorded_plug(defaults | settings_, threshold or settings_["threshold"])
        state, tokens, accept = decide(plug, state, logits, block == mask, mask_id=mask, call=call)
        expected = data[f"{case['id']}/out"][call][:, first:last]
        got = np.where(accept, tokens, block)
        if settings_["decoder"] == "fixed":
            spent = np.sum(expected != block, axis=1) < np.sum(got != block, axis=1)
            assert np.all(np.argmax(logits, axis=-1)[spent][got[spent] != expected[spent]] != mask)
            assert np.all(np.any((block == mask) & (np.argmax(logits, axis=-1) == mask), axis=1)[spent])
            np.testing.assert_array_equal(np.where(expected != block, got, expected), expected)
            np.testing.assert_array_equal(got[~spent], expected[~spent])
            x[:, first:last] = expected
            continue
        moved = np.any(expected != block, axis=1) | ~np.any(block == mask, axis=1)
        np.testing.assert_array_equal(got[moved], expected[moved])
        assert np.all(np.sum(got != block, axis=1)[~moved] >= 1), "where dInfer writes nothing, djax goes on"
        if not moved.all():
            break
        x[:, first:last] = expected
    assert call > 0


def test_ties_go_to_the_lower_position(step):
    logits = np.zeros((ROWS, BLOCK, VOCAB), np.float32)
    logits[:, :, 4] = 3.0
    masked = np.ones((ROWS, BLOCK), bool)
    masked[1, :2] = False
    (_, tokens, accept), _ = step(Fixed(1), logits, masked, 0)
    assert np.asarray(accept).argmax(axis=1).tolist() == [0, 2, 0]
    assert np.all(np.asarray(tokens) == 4)


def test_noise_changes_tokens_but_not_confidence(step):
    rng = np.random.default_rng(0)
    logits = np.tile(rng.normal(size=(1, 1, VOCAB)).astype(np.float32), (ROWS, BLOCK, 1))
    masked = np.ones((ROWS, BLOCK), bool)
    _, (_, one, _) = step(Threshold(0.01), logits, masked, 1)
    _, (_, two, _) = step(Threshold(0.01), logits, masked, 2)
    assert np.any(np.asarray(one) != np.asarray(two))


def test_gumbel_noise_draws_from_the_tempered_softmax():
    """At temperature T the token is distributed as softmax(logits / T), as in LLaDA."""
    logits = np.array([0.0, 1.0, 2.0, -1.0, -1e9], np.float32)
    plug, temperature, count = Threshold(0.01), 0.7, 4000
    key, logits_ = jax.random.split(jax.random.key(0), 1), jnp.tile(jnp.asarray(logits), (1, count, 1))
    _, tokens, _ = decide(plug, (), logits_, np.ones((1, count), bool), mask_id=4, key=key, temperature=temperature)
    seen = np.bincount(np.asarray(tokens)[0], minlength=5) / count
    np.testing.assert_allclose(seen, softmax(logits / temperature), atol=0.03)


def test_the_best_is_found_however_sums_are_rounded():
    """The maximum and what equals it are found by two kernels, which may round a product and a sum differently.

    They do with the flags that the tests run with: the last token of the vocabulary was proposed instead.
    """
    rows, block, vocab = 4, 16, 1000

    @jax.jit
    def both(logits, credit, key):
        masked = jnp.ones((rows, block), bool)
        _, noisy, _ = decide(Threshold(), (), logits, masked, mask_id=MASK, key=key, temperature=0.8)
        (credit, _), fused, _ = decide(Credit(), (credit, ()), logits, masked, mask_id=MASK, call=1)
        return noisy, fused, credit

    # In a program of its own: what a program returns is computed once.
    draw = jax.jit(jax.vmap(lambda k: jax.random.gumbel(k, (block, vocab))))
    for seed in range(5):
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=(rows, block, vocab)).astype(np.float32)
        logits[..., MASK] = -30.0
        key = jax.random.split(jax.random.key(seed), rows)
        noisy, fused, credit = both(logits, rng.random(logits.shape, np.float32), key)
        for tokens, seen in ((noisy, logits + 0.8 * draw(key)), (fused, logits + 0.7 * np.log1p(credit))):
            at_token = np.take_along_axis(np.asarray(seen), np.asarray(tokens)[..., None], axis=-1)[..., 0]
            np.testing.assert_allclose(at_token, np.max(seen, axis=-1), rtol=1e-5)


def test_no_two_kinds_of_plug_have_one_structure():
    """jax caches programs by structure; with equal ones a program is now and then taken for another (djax.pytree)."""
    plugs = [kind() for kind in (*DECODERS.values(), *CACHES.values(), Smoothing)]
    for holder in (Credit, Edit):
        inside = [kind() for kind in DECODERS.values() if kind not in (holder, Threshold)]  # holder() holds a Threshold
        plugs += [holder(plug) for plug in inside if not plug.edits and not plug.drafts]
    structures = [jax.tree.structure(plug) for plug in plugs]
    for (one, a), (other, b) in itertools.combinations(zip(plugs, structures, strict=True), 2):
        assert a != b, (one, other)
        assert classes(one) != classes(other)


def vocabularies():
    """Logits `[2, 3, 64]` with whatever may stand there, and a mask id."""
    rng = np.random.default_rng(0)
    for case in range(60):
        logits = rng.normal(size=(2, 3, 64)).astype(np.float32) * rng.choice([1, 30])
        if case % 3 == 0:
            logits = np.round(logits / 10) * 10  # ties
        if case % 5 == 1:
            logits[rng.random(logits.shape) < 0.3] = -np.inf
        if case == 7:
            logits[:] = -np.inf
        if case == 8:
            logits[0, 1, 5] = np.inf
        if case in (9, 10):
            logits[1, 2, [3, 33][case % 2]] = np.nan
        mask_id = [0, 33, 63, int(logits[0, 0].argmax())][case % 4]
        yield jnp.asarray(logits), jnp.int32(mask_id)


@pytest.mark.cpp
def test_one_visit_of_the_vocabulary_finds_what_xla_s_passes_find():
    for logits, mask_id in vocabularies():
        got, expected = peaks_on_cpu(logits, mask_id), plain_peaks(logits, mask_id)
        for name in ("other", "highest", "of_mask_id"):
            np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)
        np.testing.assert_allclose(got.total, expected.total, rtol=2e-6)


@pytest.mark.cpp
def test_a_position_s_peaks_do_not_depend_on_the_others():
    for logits, mask_id in itertools.islice(vocabularies(), 8):
        together = peaks_on_cpu(logits, mask_id)
        alone = peaks_on_cpu(logits[1:, 1:2], mask_id)
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one, other[1:, 1:2])


@pytest.mark.cpp
def test_a_decode_asks_for_the_peaks_once():
    """Of a decoder and of the trace beside it."""
    logits = jnp.zeros((1, 4, 64))

    def step(logits):
        _, tokens, _ = decide(Threshold(0.9), (), logits, np.ones((1, 4), bool), mask_id=MASK)
        return tokens, find_peaks(logits, jnp.int32(MASK)).total

    text = jax.jit(step).lower(logits).compile().as_text()
    assert text.count('custom_call_target="djax_peaks') == 1


@pytest.mark.cpp
def test_a_gradient_through_the_peaks():
    for logits, mask_id in itertools.islice(vocabularies(), 4):
        got, expected = (
            jax.grad(lambda x, f=f, m=mask_id: jnp.sum(f(x, m).total))(logits) for f in (peaks_on_cpu, plain_peaks)
        )
        np.testing.assert_allclose(got, expected, atol=1e-5)
