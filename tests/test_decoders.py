"""The law of every decoder, drawn from the registry, and each decoder against its rule written as a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from djax.decoding import DECODERS, Fixed, Threshold
from djax.decoding.contract import Tick

ROWS, BLOCK, VOCAB, MASK = 3, 8, 11, 9
# A plug of every kind, at both ends of its numbers. A decoder that is in the registry but not here fails the test.
MADE = {"threshold": [Threshold(0.9), Threshold(0.01), Threshold(2.0)], "fixed": [Fixed(1), Fixed(5)]}
PLUGS = [plug for name in DECODERS for plug in MADE[name]]


def tick(rows=ROWS, temperature=0.0):
    zero = jnp.zeros(rows, jnp.int32)
    return Tick(zero, zero, zero, zero, jnp.int32(MASK), jnp.float32(temperature))


@pytest.fixture(scope="module")
def step():
    """Jitted once: numbers are leaves, so all plugs of a kind share a program."""

    @jax.jit
    def run(plug, logits, masked, seed):
        key = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.zeros(logits.shape[0], jnp.int32))
        state = plug.init(logits.shape[0], BLOCK, VOCAB)
        cold = plug.step(state, logits, masked, tick(logits.shape[0]), None)
        warm = plug.step(state, logits, masked, tick(logits.shape[0], 0.7), key)
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
    state = plug.init(ROWS, BLOCK, VOCAB)
    for after, tokens, accept in step(plug, logits, masked, seed):
        assert not np.any(np.asarray(accept) & ~masked), "accept lies inside masked"
        assert np.array_equal(np.any(accept, axis=1), np.any(masked, axis=1)), "every row with a mask goes on"
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
    logits = np.array([0.0, 1.0, 2.0, -1.0], np.float32)
    plug, temperature, count = Threshold(0.01), 0.7, 4000
    where = Tick(*[jnp.zeros(1, jnp.int32)] * 4, jnp.int32(-1), jnp.float32(temperature))
    key = jax.random.split(jax.random.key(0), 1)
    _, tokens, _ = plug.step((), jnp.tile(jnp.asarray(logits), (1, count, 1)), jnp.ones((1, count), bool), where, key)
    seen = np.bincount(np.asarray(tokens)[0], minlength=4) / count
    np.testing.assert_allclose(seen, softmax(logits / temperature), atol=0.03)
