"""One update: what a training remembers, its gradient, and the compiled step."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from djax.models.contract import Params
from djax.runtime.process import make_key
from djax.runtime.sharding import DATA
from djax.training.contract import Draw, Network, Objective, Own, Weights
from djax.training.plan import Plan, make_optimizer


class State(NamedTuple):
    """All that a training remembers, and what a checkpoint holds.

    params:    all of the model that is trained (its parameters, or adapters), float32.
    optimizer: what the optimizer remembers of them.
    step:      int32 scalar, updates done. Batches and noise are functions of it.
    own:       the objective's own trained parameters and what their optimizer remembers; () for an
               objective without. Checkpoints then have no entry for it.
    """

    params: Params
    optimizer: Any
    step: jax.Array
    own: Any = ()


class Frozen(NamedTuple):
    """What an update reads besides: the model's weights that are not trained (None if all are),
    and the frozen parameters of the objective."""

    model: Any = None
    own: Any = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """What an update's program is compiled for; compared by identity, so each training compiles
    its own. places: shardings of the state, None without a mesh."""

    net: Network
    objective: Objective
    plan: Plan
    weights: Weights = Weights()  # noqa: RUF009  (it has no fields)
    mesh: Mesh | None = None
    places: Any = None


def gradient(
    trained: tuple[Any, Any], frozen: Frozen, batch: object, draw: Draw, *, of: Setting
) -> tuple[Any, jax.Array, dict[str, jax.Array]]:
    """The gradient over all rows, each row's loss, and the parts of the loss.

    trained: the model's trained weights, and the objective's own. The gradient is alike.
    """
    plan = of.plan

    def loss(trained: tuple[Any, Any], batch: object, draw: Draw) -> tuple:
        params, own = trained
        # Merged in float32: a narrower model's steps would swallow small changes.
        wide = jax.tree.map(lambda a: a.astype(jnp.float32), frozen.model)
        whole = of.weights.whole(params, wide)
        whole = jax.tree.map(lambda a: a.astype(plan.dtype), whole)
        return of.objective.loss(of.net, whole, Own(own, frozen.own), batch, draw)

    def one(batch: object, draw: Draw) -> tuple:
        (_, (losses, logged)), found = jax.value_and_grad(loss, has_aux=True)(trained, batch, draw)
        return found, losses, logged

    if plan.accumulate == 1:
        found, losses, logged = one(batch, draw)
    else:

        def cut(tree: object) -> Any:
            return jax.tree.map(lambda a: a.reshape(plan.accumulate, -1, *a.shape[1:]), tree)

        def part(batch: object, rows: jax.Array) -> tuple:
            return one(batch, draw._replace(rows=rows))

        parts = cut(batch), cut(draw.rows)
        shapes = jax.eval_shape(part, *jax.tree.map(lambda a: a[0], parts))
        zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (shapes[0], shapes[2]))

        def add(sums: tuple, this: tuple) -> tuple:
            found, losses, logged = part(*this)
            return jax.tree.map(jnp.add, sums, (found, logged)), losses

        sums, losses = jax.lax.scan(add, zero, parts)
        found, logged = jax.tree.map(lambda a: a / plan.accumulate, sums)
        losses = losses.reshape(-1)
    if of.net.parts > 1:
        found, logged = jax.lax.pmean((found, logged), DATA)
    return found, losses, logged


@partial(jax.jit, static_argnames="of", donate_argnums=0)
def update(state: State, frozen: Frozen, batch: object, *, of: Setting) -> tuple[State, jax.Array, dict[str, jax.Array]]:
    """One update on a batch of R rows.

    Returns the state, each row's loss `[R]` (a scalar if the objective is `whole`), and the loss's
    parts with the gradient's norm.
    """
    plan, parts = of.plan, of.net.parts
    numbers = state.step * plan.rows + jnp.arange(plan.rows)
    key = make_key(plan.seed)
    keys = jax.vmap(lambda n: jax.random.fold_in(key, n))(numbers)
    progress = state.step.astype(jnp.float32) / plan.steps
    if plan.accumulate > 1 and parts > 1:
        # A device's rows lie together, its parts one after another in each of the accumulated ones.
        numbered = np.arange(plan.rows).reshape(plan.accumulate, parts, -1)
        order = numbered.transpose(1, 0, 2).reshape(-1)
        batch, keys = jax.tree.map(lambda a: a[order], (batch, keys))
    draw = Draw(jax.random.fold_in(key, state.step), keys, progress)
    run = partial(gradient, of=of)
    if parts > 1:
        of_draw: Any = Draw._make((P(), P(DATA), P()))  # places stand for the arrays
        specs = P(), P(), P(DATA), of_draw
        run = jax.shard_map(
            run,
            mesh=of.mesh,
            in_specs=specs,
            out_specs=(P(), P(DATA), P()),
            axis_names={DATA},
            check_vma=False,
        )
    trained = state.params, state.own[0] if state.own else ()
    (found, own_found), losses, logged = run(trained, frozen, batch, draw)
    if plan.accumulate > 1 and parts > 1:
        losses = losses[np.argsort(order)]
    logged["gradient norm"] = optax.tree.norm(found)
    moved = _move(make_optimizer(plan), found, state.params, state.optimizer)
    own = state.own
    if own:
        own = _move(make_own_optimizer(of.objective, plan), own_found, *own)
    new = State(*moved, state.step + 1, own)
    if of.places is not None:
        new = jax.lax.with_sharding_constraint(new, of.places)
    return new, losses, logged


def _move(moves: Any, found: Any, params: Params, optimizer: Any) -> tuple[Any, Any]:
    change, optimizer = moves.update(found, optimizer, params)
    return optax.apply_updates(params, change), optimizer


def make_own_optimizer(objective: Objective, plan: Plan) -> optax.GradientTransformation:
    """AdamW for the objective's own parameters, clipped apart from the model's."""
    rate = plan.rate if objective.own_rate is None else objective.own_rate
    return make_optimizer(dataclasses.replace(plan, rate=rate, muon=None))
