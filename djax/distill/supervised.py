"""Objectives that show the network views of a trajectory, as one objective of the trainer."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from djax.distill.objectives import Row, View
from djax.errors import OptionError
from djax.kernels.sight import HIDDEN_RANK, Sight
from djax.models.contract import Params
from djax.training.contract import Draw, Loss, Network, Objective, Own

# Logits of one view of all its rows at once, in bytes; beyond, a row's are made at a time and made
# again for its gradient.
AT_ONCE = 1 << 30


@dataclasses.dataclass(frozen=True)
class Supervised(Objective):
    """Values with `views` and `loss` (`objectives.py`), their losses added, on `Row`s.

    The loss is the mean over rows of the objectives' losses, and `balance` times the routers'
    load-balancing loss over all that is shown. All views go through the network in one pass.
    """

    objectives: tuple[Any, ...]
    balance: float = 0.01

    def loss(self, net: Network, params: Params, own: Own, batch: Row[jax.Array], draw: Draw) -> Loss:
        rows, shown = batch, self.show(net, batch, draw)
        tokens = jnp.concatenate([view.tokens for _, view in shown])
        positions = None
        if any(view.positions is not None for _, view in shown):
            each = [_or(view.positions, jnp.arange(tokens.shape[1]), view.tokens) for _, view in shown]
            positions = jnp.concatenate(each)
        sight = self.see(net, rows, [view for _, view in shown])
        x, routing = net.read(params, tokens, sight, positions)

        count = len(rows.total)
        at_once = 4 * count * tokens.shape[1] * net.config.vocab <= AT_ONCE
        losses = jnp.zeros(count)
        parts: dict[str, list[jax.Array]] = {}
        for n, (objective, view) in enumerate(shown):

            def row_loss(of: tuple, objective: Any = objective) -> tuple:
                x, tokens, view = of
                return objective.loss(net.logits(params, x), tokens, view)

            labels = rows.tokens if view.labels is None else view.labels
            of = x[n * count : (n + 1) * count], labels, view
            if at_once:
                found, parts_of = jax.vmap(row_loss)(of)
            else:
                found, parts_of = jax.lax.map(jax.checkpoint(row_loss), of)
            losses += found
            for name, value in parts_of.items():
                parts.setdefault(name, []).append(jnp.mean(value))
        logged: dict[str, Any] = {name: sum(values) / len(values) for name, values in parts.items()}
        loss = jnp.mean(losses)
        if routing:
            logged["balance"] = net.balance(routing, sight.valid.reshape(-1))
            loss += self.balance * logged["balance"]
        return loss, (losses, logged)

    def show(self, net: Network, rows: Row[jax.Array], draw: Draw) -> list[tuple[Any, View]]:
        """Each view of all rows, with its objective."""
        shown = []
        for n, objective in enumerate(self.objectives):

            def view(key: jax.Array, row: Row[jax.Array], n: int = n, o: Any = objective) -> tuple[View, ...]:
                return o.views(jax.random.fold_in(key, n), row, draw.progress, net.config.mask_id)

            shown += [(objective, view) for view in jax.vmap(view)(draw.rows, rows)]
        if len({view.tokens.shape for _, view in shown}) > 1:
            lengths = sorted({view.tokens.shape[1] for _, view in shown})
            raise OptionError(f"objectives: expected views of one length, got {lengths}")
        return shown

    def see(self, net: Network, rows: Row[jax.Array], views: list[View]) -> Sight:
        """What all views' positions see: the view's own sight, or else the family's on a canvas."""
        at = jnp.arange(views[0].tokens.shape[1], dtype=jnp.int32)
        if all(view.sight is None for view in views):
            totals = jnp.tile(rows.total, len(views))
            shape = len(totals), len(at)
            valid = jnp.broadcast_to(at, shape) < totals[:, None]
            return net.see(valid, jnp.tile(rows.block, len(views))[:, None])
        sights = []
        for view in views:
            sight = view.sight
            if sight is None:
                valid = jnp.broadcast_to(at, view.tokens.shape) < rows.total[:, None]
                sight = net.see(valid, rows.block[:, None])
            none = sight.rank, *map(jnp.asarray, (HIDDEN_RANK, 0, HIDDEN_RANK))
            fields = zip(sight, none, strict=True)
            sights.append(Sight(*(_or(field, value, sight.rank) for field, value in fields)))
        return jax.tree.map(lambda *fields: jnp.concatenate(fields), *sights)


def _or(field: jax.Array | None, value: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.broadcast_to(value, like.shape).astype(jnp.int32) if field is None else field
