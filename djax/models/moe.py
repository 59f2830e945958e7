"""Mixture of experts: the router, which chooses the experts of each token; `djax.kernels.experts` computes them.

Letters: T tokens, D width, E experts, J experts a token.
"""

import jax
import jax.numpy as jnp

from djax.kernels.experts import Routing
from djax.models.layers import replicated


def route(x: jax.Array, router: jax.Array, top: int, renormalise: bool) -> Routing:
    """Choose `top` experts a token.

    x `[T, D]`, router `[D, E]`, both widened to float32: dInfer keeps the gate in float32, and near ties between
    experts must not depend on the parameters' dtype. The weights are the softmax over ALL experts at the chosen ones; they
    sum to less than 1 unless `renormalise` (the config's norm_topk_prob). Ties go to the lower id.
    """
    # Whole on every device: split by expert, as the gates' reader is, a softmax would take collectives of its own.
    probs = replicated(jax.nn.softmax(_router_logits(x, router), axis=-1))
    weights, ids = jax.lax.top_k(probs, top)
    gates = jnp.where(_among_best(probs, top), probs, 0.0)
    if renormalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
    return Routing(weights, ids.astype(jnp.int32), replicated(gates), probs)


def route_in_groups(
    x: jax.Array, router: jax.Array, bias: jax.Array, top: int, groups: int, top_groups: int, scale: float
) -> Routing:
    """Choose `top` experts a token from its best groups of experts (LLaDA2's router, of DeepSeek-V3: arXiv 2412.19437, 2.1.2).

    Scores are sigmoids. The bias `[E]` takes part in choosing only: a group counts as the sum of its two best biased scores,
    and the experts are the best biased ones of the `top_groups` best groups. The weights are the chosen experts' own scores,
    divided by their sum, times `scale`. Float32, as in `route`; ties go to the lower id. probs: the scores.
    """
    scores = replicated(jax.nn.sigmoid(_router_logits(x, router)))
    biased = scores + bias.astype(jnp.float32)[None, :]
    tokens, count = biased.shape
    of_group = jnp.sum(jax.lax.top_k(biased.reshape(tokens, groups, count // groups), min(2, count // groups))[0], axis=-1)
    open_groups = jnp.repeat(_among_best(of_group, top_groups), count // groups, axis=1)
    biased = jnp.where(open_groups, biased, -jnp.inf)
    _, ids = jax.lax.top_k(biased, top)
    weights = jnp.take_along_axis(scores, ids, axis=1)
    gates = jnp.where(_among_best(biased, top), scores, 0.0)
    weights, gates = (a / (jnp.sum(a, axis=-1, keepdims=True) + 1e-20) * scale for a in (weights, gates))
    return Routing(weights, ids.astype(jnp.int32), replicated(gates), scores)


def _router_logits(x: jax.Array, router: jax.Array) -> jax.Array:
    logits = jnp.dot(x.astype(jnp.float32), router.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return replicated(logits)


def _among_best(scores: jax.Array, top: int) -> jax.Array:
    """Bool `[T, E]`: the `top` highest of each row, ties to the lower id. Fewer than `top` go before such a one: no sort, and
    one kernel where a sort takes several."""
    one, other = scores[:, :, None], scores[:, None, :]
    at = jnp.arange(scores.shape[1])
    before = (other > one) | ((other == one) & (at[None, :] < at[:, None])[None])
    return jnp.sum(before, axis=-1) < top
