"""What a training is made of: an objective, a source of batches, and which weights are trained.

All three are frozen values. Extend the base classes: what they leave out has a default here, and
the trainer (`trainer.py`) asks for nothing else.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from djax.kernels.sight import Sight
from djax.models.contract import Config, Params
from djax.models.family import Family
from djax.models.model import Model
from djax.models.sight import see
from djax.runtime.sharding import DATA
from djax.training.balance import balance_loss

Parts = dict[str, jax.Array]
Routing = list[tuple[jax.Array, jax.Array]]
Loss = tuple[jax.Array, tuple[jax.Array, Parts]]


class Own(NamedTuple):
    """Parameters an objective brings besides the model's: pytrees of arrays, () for none.

    trained: moved by their gradient (a discriminator, a head) with the model's, by an optimizer of
             their own; float32, and part of every checkpoint.
    frozen:  constant (a reference model). Made again by `init` when a run goes on, not stored.
    """

    trained: Any = ()
    frozen: Any = ()


class Draw(NamedTuple):
    """What an update's loss depends on besides parameters and batch.

    key:      of the update, the same for all its rows.
    rows:     a key for each row, `[R]`: a function of the seed and the example's number alone, so
              that neither the number of devices nor a restart changes it.
    progress: float32 scalar, the share of the updates that are done, 0 to 1.
    """

    key: jax.Array
    rows: jax.Array
    progress: jax.Array


@dataclasses.dataclass(frozen=True)
class Network:
    """A family's network as objectives call it, with any parameters of its shape.

    remat: compute a layer's activations again for its gradient instead of keeping them.
    parts: how many devices share an update's rows; above 1 the loss runs inside `shard_map`.
    """

    family: Family
    config: Config
    remat: bool = False
    parts: int = 1

    def see_all(self, tokens: jax.Array) -> Sight:
        """The sight of a canvas int32 `[R, L]` without padding, in which every position sees all."""
        return Sight(jnp.zeros_like(tokens))

    def see(self, valid: jax.Array, block: jax.Array | int) -> Sight:
        """What the family's positions see of a canvas: valid bool `[R, L]`; block: positions a
        block, int or int32 `[R, 1]`."""
        at = jnp.broadcast_to(jnp.arange(valid.shape[1], dtype=jnp.int32), valid.shape)
        return see(self.family.visibility, at, valid, block)

    def read(
        self, params: Params, tokens: jax.Array, sight: Sight, positions: jax.Array | None = None
    ) -> tuple[jax.Array, Routing]:
        """The trunk's output `[R, L, D]` for tokens int32 `[R, L]`, and the routers' choices.

        positions: int32 `[R, L]`, for rotary; by default 0 to L - 1.
        """
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
            positions = jnp.broadcast_to(positions, tokens.shape)
        x = self.family.embed(params, self.config, tokens)
        family, config = self.family, self.config
        return family.trunk_with_routing(params, config, x, positions, sight, remat=self.remat)

    def logits(self, params: Params, x: jax.Array) -> jax.Array:
        """`[..., L, D]` -> float32 logits `[..., L, V]`."""
        return self.family.unembed(params, self.config, x)

    def balance(self, routing: Routing, valid: jax.Array | None = None) -> jax.Array:
        """The routers' load-balancing loss over the rows of all devices; valid bool `[T]`."""
        over = (lambda a: jax.lax.pmean(a, DATA)) if self.parts > 1 else None
        return balance_loss(routing, valid, over)


class Objective:
    """What is learned.

    own_rate:   peak learning rate of the trained parameters of its own; None: the plan's `rate`.
    whole: whether an update's loss needs all of its rows at once (a rank among them, a group that
           devices would split). Then neither accumulation nor data parallelism is accepted.
    """

    own_rate: float | None = None
    whole: bool = False

    def init(self, model: Model, key: jax.Array) -> Own:
        """Parameters of its own. A function of the model and the key alone: it is called again
        when a run goes on."""
        del model, key
        return Own()

    def loss(self, net: Network, params: Params, own: Own, batch: Any, draw: Draw) -> Loss:
        """The loss of a batch, whose arrays have R rows, and what is logged of it.

        params: all of the model's, in the dtype that the network computes in.
        Returns the scalar that is differentiated by `params` and `own.trained` (a part that must
        not move one of them stops its gradient), and the loss of each row `[R]` (a scalar if
        `whole`) with scalars to log. The scalar is a mean over rows, so that parts of a batch
        average to it.
        """
        raise NotImplementedError


class Batches:
    """Where an update's examples come from.

    Invariant: a batch is a function of the update's number, and of the model's parameters before
    that update. Nothing else is remembered, so a run can go on at any update.
    """

    def batch(self, step: int) -> Any:
        """Arrays with R rows each, for update `step` counted from 0."""
        raise NotImplementedError

    def draw(self, step: int, policy: Callable[[], Model]) -> Any:
        """The same for batches that the model in training makes (on-policy), which override this.

        policy: () gives the model as it is before this update. Its arrays are only good until the
        batch is returned.
        """
        del policy
        return self.batch(step)

    def count(self, batch: Any) -> int:
        """Tokens of a batch, for the log's tokens/s."""
        return int(jax.tree.leaves(batch)[0].size)

    def name(self, step: int, rows: np.ndarray) -> str:
        """What to call some rows of an update, int64 `[N]`, in an error."""
        del step
        return f"rows {rows.tolist()} of its batch"


class Weights:
    """Which weights are trained: here all of the model's. Others extend this (`distill.lora`)."""

    def begin(self, model: Model, key: jax.Array) -> tuple[Any, Any]:
        """What is trained, float32, and what is not, None for nothing."""
        del key
        # Copies: the model stays as it is while its parameters are trained.
        return jax.tree.map(lambda a: jnp.array(a, jnp.float32, copy=True), model.params), None

    def whole(self, trained: Any, frozen: Any) -> Params:
        """The model's parameters from both, in frozen's dtypes."""
        del frozen
        return trained
