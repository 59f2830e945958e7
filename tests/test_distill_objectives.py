"""What the distillation losses are: against NumPy loops, against finite differences, and which positions they touch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import djax
from djax import distill
from djax.distill.objectives import OBJECTIVES, Row, View
from djax.distill.pairs import PAIRS
from djax.errors import OptionError
from djax.plugs import parse

MASK = 99
# A canvas of 16, prompt of 5, blocks of 4 from position 4 on: block 0 holds one prompt token and three generated ones. The last
# block was never decoded (an early stop filled it), and three positions are padding.
ACCEPTED = np.array([-1] * 5 + [0, 1, 0] + [2, 2, 3, 2] + [-1] * 4 + [-1] * 3, np.int32)
TOKENS = np.arange(10, 29, dtype=np.int32)
ROW = Row(*map(jnp.asarray, (TOKENS, ACCEPTED)), *map(jnp.int32, (5, 16, 4, 4, 4)))
KEYS = jax.random.split(jax.random.key(0), 300)


def views(objective, progress=0.0):
    """Each key's views, as a list of lists."""
    found = jax.jit(jax.vmap(lambda key: objective.views(key, ROW, jnp.float32(progress), MASK)))(KEYS)
    return [[jax.tree.map(lambda a, n=n: np.asarray(a)[n], view) for view in found] for n in range(len(KEYS))]


def states():
    """Every state of the row by the definition: the prompt, and what was accepted before."""
    return [
        np.where((np.arange(19) < 5) | (np.arange(19) >= 16) | ((ACCEPTED >= 0) & (ACCEPTED < i)), TOKENS, MASK)
        for i in range(5)
    ]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("pairs", [distill.Uniform(), distill.Stride(2), distill.Stride(9), distill.Curriculum(1, 4)])
def test_a_view_of_compression_is_a_state_and_what_is_revealed_up_to_a_later_one(pairs, inside):
    pairs = type(pairs)(**{**pairs.__dict__, "inside_block": inside})
    block_of = {0: 2, 1: 2, 2: 4, 3: 4}  # each forward's block ends with this state
    seen = set()
    for (view,) in views(distill.Compression(pairs), progress=0.25):
        i = next(i for i, state in enumerate(states()) if (state == view.tokens).all())
        fitting = [j for j in range(i + 1, 5) if ((ACCEPTED >= i) & (ACCEPTED < j) == view.target).all()]
        assert len(fitting) == 1, "the targets are what a later state reveals"
        (j,) = fitting
        assert j <= (block_of[i] if inside else 4)
        if isinstance(pairs, distill.Stride):
            assert j == min(i + pairs.forwards, block_of[i] if inside else 4)
        if isinstance(pairs, distill.Curriculum):
            assert j == min(i + 2, block_of[i] if inside else 4), "halfway from 1 to 4 forwards, rounded to even"
        assert view.weight == 0.25
        seen.add((i, j))
    if isinstance(pairs, distill.Uniform):
        every = {(i, j) for i in range(4) for j in range(i + 1, (block_of[i] if inside else 4) + 1)}
        assert seen == every


def test_a_curriculum_grows():
    pairs = distill.Curriculum(1, 4, grown=0.5, inside_block=False)
    ends = jnp.full(19, 4)

    def jump(progress):
        return max(int(j - i) for i, j in (pairs.draw(key, jnp.int32(4), ends, jnp.float32(progress)) for key in KEYS[:40]))

    assert [jump(p) for p in (0.0, 0.17, 0.34, 0.5, 1.0)] == [1, 2, 3, 4, 4]


def test_the_two_views_of_certainty_partition_the_active_block():
    actives = set()
    masks = set()
    for one, other in views(distill.Certainty()):
        assert not (one.target & other.target).any()
        active = np.flatnonzero(one.target | other.target)
        assert active.tolist() in ([5, 6, 7], [8, 9, 10, 11]), "one block that was decoded, its generated part"
        actives.add(active[0])
        for view in (one, other):
            assert (view.tokens[view.target] == MASK).all()
            rest = np.setdiff1d(active, np.flatnonzero(view.target))
            assert (view.tokens[rest] == TOKENS[rest]).all()
            assert (view.tokens[: active[0]] == TOKENS[: active[0]]).all(), "before it all is shown"
            assert (view.tokens[active[-1] + 1 : 16] == MASK).all(), "after it all is masked"
        masks.add(one.target.tobytes())
    assert actives == {5, 8}
    assert len(masks) > 15, "every row draws its own mask"


def test_plain_masks_the_answer_at_every_level():
    counts = []
    for (view,) in views(distill.Plain()):
        assert not view.target[:5].any()
        assert not view.target[16:].any()
        np.testing.assert_array_equal(view.tokens, np.where(view.target, MASK, TOKENS))
        counts.append(view.target.sum())
    assert set(counts) == set(range(12))


LOGITS = np.random.default_rng(0).normal(size=(6, 7)).astype(np.float32) * 2
TARGET = np.array([0, 1, 1, 0, 1, 1], bool)
# Right at positions 1 and 4 of the targets, and at 0 and 3, which are none.
RIGHT = np.array([1, 1, 0, 1, 1, 0], bool)
ANSWERS = np.where(RIGHT, LOGITS.argmax(-1), (LOGITS.argmax(-1) + 1) % 7).astype(np.int32)
VIEW = View(jnp.zeros(6, jnp.int32), jnp.asarray(TARGET), jnp.float32(0.25))


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def by_loop(objective, logits):
    surprise, entropies = [], []
    for s in np.flatnonzero(TARGET):
        p = softmax(logits[s])
        surprise.append(-np.log(p[ANSWERS[s]]))
        if p.argmax() == ANSWERS[s]:
            q = softmax(logits[s] / getattr(objective, "temperature", 1))
            entropies.append(-sum(x * np.log(x) for x in q))
    if isinstance(objective, distill.Compression):
        return (sum(surprise) + objective.beta * sum(entropies)) * 0.25
    if isinstance(objective, distill.Certainty):
        return np.mean(surprise) + objective.beta * (np.mean(entropies) if entropies else 0)
    return sum(surprise) * 0.25


@pytest.mark.parametrize(
    "objective",
    [
        distill.Compression(),
        distill.Compression(beta=1.5),
        distill.Certainty(),
        distill.Certainty(beta=0.5, temperature=2),
        distill.Plain(),
    ],
)
def test_losses_and_their_gradients_by_loop_and_finite_differences(objective):
    def loss(logits):
        return objective.loss(logits, jnp.asarray(ANSWERS), VIEW)[0]

    np.testing.assert_allclose(loss(jnp.asarray(LOGITS)), by_loop(objective, LOGITS), rtol=1e-5)
    gradient = np.asarray(jax.grad(loss)(jnp.asarray(LOGITS)))
    assert (gradient[~TARGET] == 0).all(), "exactly, outside of what counts"
    step = 1e-4
    for s, v in np.ndindex(LOGITS.shape):
        change = np.zeros(LOGITS.shape)
        change[s, v] = step
        found = (by_loop(objective, LOGITS + change) - by_loop(objective, LOGITS - change)) / (2 * step)
        np.testing.assert_allclose(gradient[s, v], found, atol=2e-5)


def test_entropy_only_sharpens_what_is_right():
    def loss(logits, beta):
        return distill.Certainty(beta=beta).loss(logits, jnp.asarray(ANSWERS), VIEW)[0]

    of_entropy = np.asarray(jax.grad(loss)(jnp.asarray(LOGITS), 2.0) - jax.grad(loss)(jnp.asarray(LOGITS), 0.0))
    assert (of_entropy[~(TARGET & RIGHT)] == 0).all()
    assert (np.abs(of_entropy[TARGET & RIGHT]).max(axis=-1) > 1e-3).all()
    wrong = jnp.asarray((LOGITS.argmax(-1) + 1) % 7)
    parts = distill.Certainty().loss(jnp.asarray(LOGITS), wrong, VIEW)[1]
    assert float(parts["entropy"]) == 0, "nothing is right: plain cross entropy"
    # Two symbols (a, 0) at temperature 1/2: the entropy is that of a coin with sigmoid(2a), and its gradient pushes a up.
    a, view = jnp.float32(0.3), View(jnp.zeros(1, jnp.int32), jnp.array([True]), jnp.float32(1))
    entropy = lambda a: distill.Certainty().loss(jnp.array([[a, 0.0]]), jnp.array([0]), view)[1]["entropy"]  # noqa: E731
    p = 1 / (1 + np.exp(-0.6))
    np.testing.assert_allclose(entropy(a), -p * np.log(p) - (1 - p) * np.log(1 - p), rtol=1e-6)
    assert jax.grad(entropy)(a) < 0


def test_what_is_wrong_is_said():
    with pytest.raises(OptionError, match=r"Certainty\(beta=\.\.\.\): expected a finite number at least 0"):
        distill.Certainty(beta=-1)
    with pytest.raises(OptionError, match=r"Stride\(forwards=\.\.\.\): expected a whole number, at least 1"):
        distill.Stride(0)
    with pytest.raises(OptionError, match=r"Compression\(pairs=\.\.\.\): expected one of Uniform"):
        distill.Compression(djax.Threshold)
    registry = {**OBJECTIVES, **PAIRS}
    assert parse("Compression(Stride(4))", registry, "--objectives") == distill.Compression(distill.Stride(4))
    for name, kind in registry.items():
        assert parse(repr(kind()), registry, name) == kind()
