"""The one trainer: objectives with parameters, sight and batches of their own, and runs of before it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint.experimental.v1 import training as orbax
from runs_of_before import as_before
from test_distill_training import RECIPE, leaves, same, trajectories
from tiny import tiny_model

import djax
from djax import distill
from djax.distill.objectives import View
from djax.distill.trainer import Examples
from djax.errors import OptionError, TrainingError
from djax.kernels.sight import Sight
from djax.models.sight import see_in_order
from djax.training.contract import Batches, Draw, Network, Objective, Own
from djax.training.objective import Diffusion, surprise
from djax.training.plan import Plan, make_schedule
from djax.training.trainer import fit

PLAN = Plan(steps=6, rows=4, rate=3e-3, warmup=1, save_every=2, log_every=1)


@dataclasses.dataclass(frozen=True)
class Tempered(Objective, Batches):
    """The next token of the model's own answers, each position seeing those before it, at a
    temperature that is learned; a frozen copy of the model holds it back."""

    own_rate: float = 0.1

    def init(self, model, key):
        return Own({"temperature": jnp.float32(2)}, jax.tree.map(jnp.copy, model.params))

    def draw(self, step, policy):
        prompts = [[1 + step, n] for n in range(4)]
        options = dict(gen_length=16, block_length=8, early_stop=False, temperature=1.0)
        answers = djax.generate(policy(), prompts, seed=step, **options)
        return {"canvas": np.stack([a.canvas for a in answers])}

    def loss(self, net, params, own, batch, draw):
        tokens = batch["canvas"]
        order = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        sight = see_in_order(order >= 0, order)
        x, _ = net.read(params, tokens, sight)
        held, _ = net.read(own.frozen, tokens, sight)
        logits = net.logits(params, x)[:, :-1] / own.trained["temperature"]
        losses = jnp.mean(surprise(logits, tokens[:, 1:]), axis=1)
        pull = jnp.mean((x - held) ** 2, axis=(1, 2))
        return jnp.mean(losses + pull), (losses, {"pull": jnp.mean(pull)})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tempered")
    return fit(tiny_model(), Tempered(), PLAN, directory), directory


def test_an_objective_brings_parameters_sight_and_batches(whole):
    fitted, directory = whole
    log = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, 7))
    assert log[0]["pull"] == 0 < log[-1]["pull"], "away from the frozen copy"
    assert {"loss", "pull", "gradient norm", "tokens_per_second"} <= set(log[0])
    assert 0.05 < abs(float(fitted.own.trained["temperature"]) - 2) < 1, "by its own rate"
    for a, b in zip(jax.tree.leaves(fitted.own.frozen), leaves(tiny_model()), strict=True):
        np.testing.assert_array_equal(a, b)
    first, last = (Tempered().draw(5, lambda m=m: m) for m in (tiny_model(), fitted.model))
    assert (first["canvas"] != last["canvas"]).any(), "what it learns from is its own"


def test_it_goes_on_to_the_same_parameters(whole, tmp_path, monkeypatch):
    original = Tempered.draw

    def stop(self, step, policy):
        if step == 3:
            raise InterruptedError
        return original(self, step, policy)

    monkeypatch.setattr(Tempered, "draw", stop)
    with pytest.raises(InterruptedError):
        fit(tiny_model(), Tempered(), PLAN, tmp_path)
    monkeypatch.setattr(Tempered, "draw", original)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"2"}
    again = fit(tiny_model(), Tempered(), PLAN, tmp_path)
    same(again.model, whole[0].model)
    assert again.own.trained == whole[0].own.trained
    for changed in (dict(objective=Tempered(0.2)), dict(plan=dataclasses.replace(PLAN, seed=1))):
        given = dict(objective=Tempered(), plan=PLAN) | changed
        with pytest.raises(OptionError, match=f"other settings \\({next(iter(changed))} differ"):
            fit(tiny_model(), directory=tmp_path, **given)


def test_an_objective_of_ones_own_learns_from_trajectories(tmp_path):
    """In a recipe of distillation, as those that ship."""

    @dataclasses.dataclass(frozen=True)
    class First(Objective):
        def loss(self, net, params, own, batch, draw):
            x, _ = net.read(params, batch.tokens, net.see(batch.accepted_at >= -1, 8))
            losses = surprise(net.logits(params, x[:, 0]), batch.tokens[:, 0])
            return jnp.mean(losses), (losses, {})

    recipe = dataclasses.replace(RECIPE, objectives=(First(),), steps=4)
    distill.train(tiny_model(), trajectories(), recipe, tmp_path)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    with pytest.raises(OptionError, match=r"Recipe\(objectives=\.\.\.\): expected one of"):
        dataclasses.replace(RECIPE, objectives=(distill.Plain(), First()))


@djax.pytree
@dataclasses.dataclass(frozen=True)
class Next:
    """Shows the trajectory once and again, the copy seeing what is before it and itself."""

    causal: bool = dataclasses.field(default=True, metadata={"static": True})

    def views(self, key, row, progress, mask_id):
        length = len(row.tokens)
        at = jnp.arange(length)
        tokens, positions = jnp.tile(row.tokens, 2), jnp.tile(at, 2)
        copy = jnp.repeat(jnp.array([0, 1]), length, total_repeat_length=2 * length)
        sight = Sight(positions, positions + self.causal * (1 - copy), copy, positions + 1)
        labels = jnp.roll(tokens, -1)
        target = (copy == 1) & (positions < 8)
        return (View(tokens, target, jnp.float32(1), labels, sight, positions),)

    def loss(self, logits, tokens, view):
        loss = jnp.sum(jnp.where(view.target, surprise(logits, tokens), 0))
        return loss, {"next": loss}


def test_a_view_brings_its_sight_labels_and_positions():
    """Twice as long as its trajectory; what stands behind the targets has no part in the loss."""
    model, recipe = tiny_model(), dataclasses.replace(RECIPE, objectives=(Next(),), balance=0.0)
    rows = Examples.of(trajectories(), recipe).batch(0)
    draw = Draw(jax.random.key(0), jax.random.split(jax.random.key(0), 8), jnp.float32(0))

    @jax.jit
    def losses(rows):
        net = Network(model.family, model.config)
        return recipe.objective().loss(net, model.params, Own(), rows, draw)[1][0]

    found = losses(rows)
    at = np.arange(rows.tokens.shape[1])
    behind = rows._replace(tokens=np.where(at > 8, (rows.tokens + 1) % 40, rows.tokens))
    np.testing.assert_allclose(losses(behind), found, rtol=1e-5)
    label = rows._replace(tokens=np.where(at == 8, (rows.tokens + 1) % 40, rows.tokens))
    assert (np.abs(losses(label) - found) > 1e-3).all(), "the last target's label"


RUN_JSON = (
    "Recipe(objectives=(Compression(pairs=Uniform(inside_block=True), beta=0.0, temperature=0.5), "
    "Certainty(beta=2.0, temperature=0.5, masked=0.5)), steps=12, rows=8, accumulate=1, rate=0.003, "
    "muon=None, warmup=3, schedule='cosine', weight_decay=0.01, betas=(0.9, 0.999), clip=1.0, "
    "balance=0.01, lora=None, dtype='float32', remat=False, save_every=3, evaluate_every=6, "
    "log_every=2, seed=0)"
)


def test_a_run_of_before_goes_on_or_is_refused(tmp_path, monkeypatch):
    """Its run.json and its checkpoints are what they were when distillation had its own trainer."""
    whole = distill.train(tiny_model(), trajectories(), RECIPE, tmp_path / "whole")
    original = Examples.batch

    def stop(self, step):
        if step == 7:
            raise InterruptedError
        return original(self, step)

    monkeypatch.setattr(Examples, "batch", stop)
    with pytest.raises(InterruptedError):
        distill.train(tiny_model(), trajectories(), RECIPE, tmp_path / "half")
    monkeypatch.setattr(Examples, "batch", original)
    matrices = lambda params: jax.tree.map(lambda a: a.ndim > 1, params)  # noqa: E731
    adamw = optax.adamw(lambda step: 0.0, 0.9, 0.999, weight_decay=0.01, mask=matrices)
    moves = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    as_before(tmp_path / "half", 6, tiny_model().params, moves)
    assert json.loads((tmp_path / "half" / "run.json").read_text())["recipe"] == RUN_JSON
    same(distill.train(tiny_model(), trajectories(), RECIPE, tmp_path / "half"), whole)

    place = tmp_path / "half" / "checkpoints"
    with orbax.Checkpointer(place.resolve()) as saved:
        saved.save(13, {"weights": jnp.zeros(3)})
    with pytest.raises(OptionError, match=r"13: cannot be read as this run's checkpoint .* choose another directory"):
        distill.train(tiny_model(), trajectories(), RECIPE, tmp_path / "half")


def test_a_rate_is_a_peak_that_one_schedule_scales():
    plan = Plan(steps=10, rows=4, warmup=4, schedule="linear", cooldown=5)
    for peak in (1.0, 0.02):
        rates = [float(make_schedule(plan, peak)(step)) / peak for step in range(10)]
        np.testing.assert_allclose(rates, [0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2], rtol=1e-6)


def test_what_does_not_go_together_is_said(tmp_path):
    class Unprinted(Objective):
        pass

    for objective, said in (
        (Diffusion(), r"batches: expected Batches, got Diffusion\(balance=0.01\)"),
        (distill.Plain(), "objective: expected Objective, got Plain"),
        (Unprinted(), "objective: expected a frozen dataclass, .* above Unprinted"),
    ):
        with pytest.raises(OptionError, match=said):
            fit(tiny_model(), objective, PLAN, tmp_path / "x", batches=None)
    halves = dataclasses.replace(PLAN, accumulate=2)
    with pytest.raises(OptionError, match="Diffusion: needs all rows of an update at once"):
        fit(tiny_model(), Diffusion(), halves, tmp_path / "x", batches=Tempered())
    with pytest.raises(OptionError, match=r"Plan\(rows=4\): expected a multiple of accumulate=3"):
        dataclasses.replace(PLAN, accumulate=3)
    assert not (tmp_path / "x").exists(), "nothing is half-written"


def test_a_loss_that_is_not_finite_names_its_rows(tmp_path):
    class Spoiled(Tempered):
        def loss(self, net, params, own, batch, draw):
            loss, (losses, parts) = super().loss(net, params, own, batch, draw)
            return loss, (losses.at[2].set(jnp.nan), parts)

    with pytest.raises(TrainingError, match=r"update 0: .* at examples \[2\] \(rows \[2\] of its batch\)"):
        fit(tiny_model(), Spoiled(), PLAN, tmp_path)
