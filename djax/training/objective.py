"""LLaDA's masked-diffusion objective (arXiv 2502.09992, section 2.2) and the router's load-balancing loss (2101.03961)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from djax.kernels.sight import Sight

SMALLEST_RATIO = 1e-3  # keeps 1/t finite, as in LLaDA's own guideline


def corrupt(key: jax.Array, tokens: jax.Array, response: jax.Array, mask_id: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mask each response token with its row's probability t.

    tokens int32 `[B, L]`, response bool `[B, L]`. t is uniform on (0, 1], stratified over the batch: row b draws from
    the b-th of B equal slices, which leaves the law of a single row as it is and quietens the 1/t weights.
    Returns the noisy tokens, bool `[B, L]` (what was masked) and t `[B, 1]`.
    """
    rows = tokens.shape[0]
    key_t, key_mask, key_order = jax.random.split(key, 3)
    slices = jax.random.permutation(key_order, rows)
    t = (slices + 1 - jax.random.uniform(key_t, (rows,))) / rows
    t = ((1 - SMALLEST_RATIO) * t + SMALLEST_RATIO)[:, None]
    masked = response & (jax.random.uniform(key_mask, tokens.shape) < t)
    return jnp.where(masked, mask_id, tokens), masked, t


def diffusion_loss(logits: jax.Array, tokens: jax.Array, masked: jax.Array, response: jax.Array, t: jax.Array) -> jax.Array:
    """Cross entropy on the masked tokens weighted 1/t, over the number of response tokens: a bound on -log p(response)."""
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(masked, nll / t, 0.0)) / jnp.sum(response)


def balance_loss(
    routing: list[tuple[jax.Array, jax.Array]],
    valid: jax.Array | None = None,
    over: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """E * sum over experts of (share of choices) * (mean probability), averaged over layers; 1 when perfectly even.

    valid bool `[T]`: which tokens count, None for all. over: takes a part's sums to the mean over all parts of a batch. The
    mean over parts of this loss, and of its gradient, is then the whole batch's: the shares, which alone stand in a product
    with another part's numbers, have no gradient.
    """

    def layer(probs: jax.Array, ids: jax.Array) -> jax.Array:
        count = probs.shape[-1]
        weight = jnp.ones(len(probs)) if valid is None else valid.astype(jnp.float32)
        choices = jnp.sum(jnp.mean(jax.nn.one_hot(ids, count), axis=1) * weight[:, None], axis=0)
        total = jnp.sum(weight)
        if over is not None:
            choices, total = over(choices), over(total)
        share = jax.lax.stop_gradient(choices / total)
        return count * jnp.sum(share * jnp.sum(probs * weight[:, None], axis=0) / total)

    return sum(layer(probs, ids) for probs, ids in routing) / len(routing)


def loss(
    family: Any, params: Any, config: Any, key: jax.Array, tokens: jax.Array, response: jax.Array, balance: float
) -> tuple:
    """Total loss and its parts for one batch: tokens int32 `[B, L]`, response bool `[B, L]`."""
    noisy, masked, t = corrupt(key, tokens, response, config.mask_id)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x = family.embed(params, config, noisy)
    x, routing = family.trunk_with_routing(params, config, x, positions, Sight(jnp.zeros_like(tokens)))
    diffusion = diffusion_loss(family.unembed(params, config, x), tokens, masked, response, t)
    balanced = balance_loss(routing)
    return diffusion + balance * balanced, {"diffusion": diffusion, "balance": balanced}
