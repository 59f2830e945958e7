"""FreeDave: what the authors' own code does, and the tokens of its static decode under every cache."""

import dataclasses
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS
from tiny import CONFIG, tiny_model

import djax
from djax.decoding.contract import Look, Tick
from djax.errors import OptionError

FOLDER = GOLDENS / "systems_a" / "freedave"
TRACES = json.loads((FOLDER / "shared.json").read_text())["traces"]
ARRAYS = np.load(FOLDER / "shared.npz")
# Its eager mode writes what it did not verify with this attention, and its tokens differ from the static decode's.
REPLAYED = [trace for trace in TRACES if trace["checkpoint"] == "dense_a" and not trace["settings"]["eager_acceptance_mode"]]
# A static decode and its drafts under each cache, leftmost first, with a threshold, and the early exit.
QUICK = {"s01-0", "s01-3", "s06-2", "s07-3", "s09-2", "p01-1", "x01-1"}


def mark(trace):
    return pytest.param(trace, id=trace["id"], marks=pytest.mark.every if trace["id"] in QUICK else pytest.mark.long)


def read_settings(trace):
    """The decode of a trace in djax's words."""
    settings = trace["settings"]
    order = "left" if settings["alg_temp"] == -1 else "confidence"
    tau = settings["confidence_threshold"]
    inner = djax.Fixed(1, order=order) if tau is None else djax.Threshold(tau, slack=0, order=order)
    drafted = trace["method"] == "freedave"
    return dict(
        decoder=djax.FreeDave(inner, drafts=settings["draft_steps"]) if drafted else inner,
        cache={"none": None, "dual": djax.Dual(surplus=False), "prefix": djax.Prefix(surplus=False)}[trace["cache"]],
        gen_length=trace["gen_length"],
        block_length=trace["block_length"],
        early_stop=settings["early_exit"],
        align_blocks=False,
        trace=True,
    )


@pytest.mark.parametrize("trace", [mark(trace) for trace in REPLAYED])
def test_the_authors_traces(dense, trace):
    """Final tokens, the state after each acceptance, forwards; token instances where there is a cache (their code has no decode
    without one, and the recorded one counts the window alone)."""
    model = dataclasses.replace(dense, config=dataclasses.replace(dense.config, eos_id=trace["eos_id"]))
    out = djax.generate(model, ARRAYS[f"{trace['id']}/prompt"][0].tolist(), **read_settings(trace))
    assert out.canvas.tolist() == ARRAYS[f"{trace['id']}/final"][0].tolist()
    assert out.forwards == trace["forwards"]
    if trace["cache"] != "none":
        assert out.positions == trace["instances"]
    wrote = out.trace.accepted_at[out.prompt_length :]
    events = ARRAYS[f"{trace['id']}/step_map"]
    if trace["method"] == "freedave" and trace["settings"]["confidence_threshold"] is None:
        # A forward writes what it accepted and what follows; the authors write that with the next event.
        written = [events[wrote == f] for f in range(out.forwards) if (wrote == f).any()]
        assert all(one.max() <= two.min() for one, two in itertools.pairwise(written))


def prompts():
    rng = np.random.default_rng(7)
    return [rng.integers(0, CONFIG.eos_id, n).tolist() for n in (5, 11, 18)]


@pytest.mark.parametrize(
    "cache",
    [
        None,
        djax.Dual(every=3),
        pytest.param(djax.Prefix(every=4, surplus=False), marks=pytest.mark.long),
        djax.Vicinity(4, 4, warmup=3, every=5),
        pytest.param(djax.Dual(), marks=pytest.mark.long),
    ],
    ids=repr,
)
@pytest.mark.parametrize("drafts", [pytest.param(1, marks=pytest.mark.long), 4])
def test_its_tokens_are_the_static_ones_under_every_cache(cache, drafts):
    """Also where refreshes depend on a count: the static forwards are counted, and no draft passes the next refresh."""
    model, many = tiny_model(), prompts()
    options = dict(gen_length=24, block_length=8, cache=cache, early_stop=False)
    static = djax.generate(model, many, decoder=djax.Fixed(1), **options)
    drafted = djax.generate(model, many, decoder=djax.FreeDave(drafts=drafts), **options)
    for one, two, prompt in zip(static, drafted, many, strict=True):
        assert one.canvas.tolist() == two.canvas.tolist() and one.refreshes == two.refreshes
        assert two.forwards == one.forwards if drafts == 1 else two.forwards <= one.forwards
        alone = djax.generate(model, prompt, decoder=djax.FreeDave(drafts=drafts), **options)
        assert (alone.canvas.tolist(), alone.forwards, alone.positions) == (two.canvas.tolist(), two.forwards, two.positions)
    if drafts > 1:
        assert sum(two.forwards for two in drafted) < sum(one.forwards for one in static)


def test_the_rule_on_its_own():
    """Three drafts: the second agrees with what follows the first, the third not with what follows the second."""
    mask, vocab = 9, 10
    decoder = djax.FreeDave(drafts=3)

    def likes(*pairs):
        """Logits of four positions: (token, how sure)."""
        rows = np.zeros((4, vocab), np.float32)
        for n, (token, sure) in enumerate(pairs):
            rows[n, token] = sure
        return rows

    drafts = jnp.array([[1, mask, mask, mask], [1, 2, mask, mask], [1, 2, 3, mask]])
    logits = jnp.stack(
        [
            likes((1, 9), (2, 8), (3, 5), (4, 1)),  # after 1 comes 2, as drafted
            likes((1, 9), (2, 8), (5, 7), (4, 6)),  # after 2 comes 5, not 3; then 4
            likes((1, 9), (2, 8), (3, 8), (7, 9)),
        ]
    )
    zero = jnp.int32(0)
    look = Look(
        *(logits, drafts[0], jnp.ones(4, bool), jnp.arange(4), Tick(zero, zero, zero, zero), jnp.int32(mask)),
        *(jnp.float32(-jnp.inf), jnp.float32(0), None),
        drafts=drafts,
        read=jnp.int32(3),
    )
    _, verdict = decoder.step((), look)
    assert verdict.tokens.tolist() == [1, 2, 5, mask]
    assert (int(verdict.kept), int(verdict.steps), bool(verdict.done)) == (1, 2, False)
    assert int(verdict.drafted) == 2, "the accepted state had two masks"
    assert verdict.drafts.tolist()[:2] == [[1, 2, 5, mask], [1, 2, 5, 4]]
    _, unread = decoder.step((), look._replace(read=jnp.int32(1)))
    assert int(unread.kept) == 0 and unread.tokens.tolist() == [1, 2, mask, mask]


def test_bad_input():
    for inner in (djax.Fixed(2), djax.Fixed(steps=4), djax.Fixed(1, order="random"), djax.Factor(), djax.Credit()):
        with pytest.raises(OptionError, match=r"FreeDave\(inner=...\): expected djax.Fixed\(1\)"):
            djax.FreeDave(inner)
    for drafts in (0, 257, True):
        with pytest.raises(OptionError, match=r"FreeDave\(drafts=...\): expected"):
            djax.FreeDave(drafts=drafts)
    with pytest.raises(OptionError, match=r"temperature: expected 0 with drafts"):
        djax.generate(tiny_model(), [1], gen_length=8, decoder=djax.FreeDave(), temperature=0.5)
    with pytest.raises(OptionError, match=r"decoder: expected at most 8 drafts, .* block_length, got FreeDave.*drafts=9"):
        djax.generate(tiny_model(), [1], gen_length=8, block_length=8, decoder=djax.FreeDave(drafts=9))
