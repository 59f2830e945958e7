"""LLaDA's masked-diffusion loss (arXiv 2502.09992, section 2.2), as from-scratch training uses it.

`hide` and `sum_surprise` are that loss's two halves: `distill.Plain` is made of them, too, with a
level of masking drawn for each row alone.
"""

import dataclasses
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from djax.models.contract import Params
from djax.training.balance import balance_loss as balance_loss
from djax.training.contract import Draw, Loss, Network, Objective, Own

# An array, on a device or on the host.
A = TypeVar("A", bound=jax.Array | np.ndarray)
SMALLEST_RATIO = 1e-3  # keeps 1/t finite, as in LLaDA's own guideline


class Batch(NamedTuple, Generic[A]):
    """tokens int32 `[B, L]`, response bool `[B, L]`: the positions that are learned."""

    tokens: A
    response: A


@dataclasses.dataclass(frozen=True)
class Diffusion(Objective):
    """Masked diffusion on `Batch`es whose rows fill the canvas; balance: weight of the router's loss.

    Needs all rows at once: they draw their levels of masking from different slices (`corrupt`).
    """

    balance: float = 0.01
    whole = True

    def loss(self, net: Network, params: Params, own: Own, batch: Batch[jax.Array], draw: Draw) -> Loss:
        """Over the whole batch; its parts are "diffusion" and "balance"."""
        tokens, response = batch
        noisy, masked, t = corrupt(draw.key, tokens, response, net.config.mask_id)
        x, routing = net.read(params, noisy, net.see_all(tokens))
        diffusion = diffusion_loss(net.logits(params, x), tokens, masked, response, t)
        parts = {"diffusion": diffusion}
        loss = diffusion
        if routing:
            parts["balance"] = net.balance(routing)
            loss += self.balance * parts["balance"]
        return loss, (diffusion, parts)


def surprise(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """-log p of each token, `[..., L]`, from logits `[..., L, V]`."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def sum_surprise(logits: jax.Array, tokens: jax.Array, target: jax.Array, t: jax.Array | None = None) -> jax.Array:
    """The sum of -log p of the tokens at the targets, bool `[..., L]`, each over its level t."""
    nll = surprise(logits, tokens)
    return jnp.sum(jnp.where(target, nll if t is None else nll / t, 0.0))


def hide(key: jax.Array, tokens: jax.Array, response: jax.Array, t: jax.Array, mask_id: int) -> tuple[jax.Array, jax.Array]:
    """Mask each response token with probability t: the noisy tokens, and bool, which are masked."""
    masked = response & (jax.random.uniform(key, tokens.shape) < t)
    return jnp.where(masked, mask_id, tokens), masked


def corrupt(key: jax.Array, tokens: jax.Array, response: jax.Array, mask_id: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mask each response token with its row's probability t.

    tokens int32 `[B, L]`, response bool `[B, L]`. t is uniform on (0, 1], stratified over the
    batch: row b draws from the b-th of B equal slices, which leaves the distribution of a single
    row as it is and reduces the variance of the 1/t weights.
    Returns the noisy tokens, bool `[B, L]` (what was masked) and t `[B, 1]`.
    """
    rows = tokens.shape[0]
    key_t, key_mask, key_order = jax.random.split(key, 3)
    slices = jax.random.permutation(key_order, rows)
    t = (slices + 1 - jax.random.uniform(key_t, (rows,))) / rows
    t = ((1 - SMALLEST_RATIO) * t + SMALLEST_RATIO)[:, None]
    return *hide(key_mask, tokens, response, t, mask_id), t


def diffusion_loss(logits: jax.Array, tokens: jax.Array, masked: jax.Array, response: jax.Array, t: jax.Array) -> jax.Array:
    """Cross entropy on the masked tokens weighted 1/t, over the number of response tokens: a bound
    on -log p(response)."""
    return sum_surprise(logits, tokens, masked, t) / jnp.sum(response)
