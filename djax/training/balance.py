"""The router's load-balancing loss (arXiv 2101.03961), which keeps all experts in use."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


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

    total = sum(layer(probs, ids) for probs, ids in routing)
    assert isinstance(total, jax.Array), "called with at least one layer that has a router"
    return total / len(routing)
