"""Mixture of experts: the router and the expert layer, with several back ends behind one function.

Letters: T tokens, D width, E experts, J experts a token, F expert width.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from djax.models import expert_cpu, expert_kernel, expert_tiles
from djax.models.layers import gated, replicated
from djax.models.quantized import Weights, at, product, values
from djax.sharding import dtype_of_sums, split

# Tokens up to which an accelerator computes all experts on all of them.
DENSE = 256


class Routing(NamedTuple):
    """Which experts each token goes to, and how much of each.

    weights float32 `[T, J]` and ids int32 `[T, J]`, the best first; gates float32 `[T, E]`, the same weights by expert, 0 for
    those not chosen; probs float32 `[T, E]`, the router's softmax. A back end takes what it needs, the rest is not computed.
    """

    weights: jax.Array
    ids: jax.Array
    gates: jax.Array
    probs: jax.Array


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


def experts(x: jax.Array, routing: Routing, w_in: Weights, w_out: Weights, valid: jax.Array) -> jax.Array:
    """Weighted sum of the chosen experts' outputs, `[T, D]` in x's dtype.

    x `[T, D]`, w_in `[E, D, 2F]` (gate, then up), w_out `[E, F, D]`, valid bool `[T]`: rows that are padding get an arbitrary
    finite value and, where the back end can, cost nothing. The back end is chosen when the program is lowered, by `form`.
    Under a mesh the experts are split over its model axis, and their sum is what the caller constrains to replicated.
    """
    back_ends = {"dense": dense, "tiles": grouped, "cpu kernel": partial(grouped, summed=expert_cpu.summed)}
    back_ends |= {"dense kernel": dense_kernel, "kernels": partial(grouped, summed=expert_kernel.summed)}
    names = {platform: form(platform, len(x), values(w_in), x.dtype) for platform in ("cpu", "cuda", "default")}
    return jax.lax.platform_dependent(x, routing, w_in, w_out, valid, **{p: back_ends[name] for p, name in names.items()})


def form(platform: str, tokens: int, w_in: jax.Array | jax.ShapeDtypeStruct, dtype: jnp.dtype) -> str:
    """Which back end runs: 'cpu kernel', 'tiles', 'dense', 'dense kernel' or 'kernels'.

    On a CPU only the chosen experts are worth computing, by djax's own function if it can be had here, else in tiles (measured:
    `djax bench speed --parts experts`). An accelerator reads every expert's weights for the tokens of a window step anyway,
    and up to about 300 tokens (its FLOPs a second over its bytes a second) that takes longer than the products of all experts
    with all tokens; beyond, on CUDA, two kernels compute the chosen ones alone. w_in: the experts' first weights, `[E, D, 2F]`,
    or their shape and dtype. dtype: of what they are applied to.
    """
    if platform == "cpu":
        return "cpu kernel" if expert_cpu.why_not(w_in.shape, dtype, w_in.dtype) is None else "tiles"
    if platform != "cuda" or not expert_kernel.suits(w_in.shape):
        return "dense"
    return "kernels" if tokens > DENSE else "dense kernel"


def described(platform: str, w_in: jax.ShapeDtypeStruct, dtype: jnp.dtype) -> str:
    """The form that a platform's programs have, for people to read."""
    name = form("cuda" if platform == "gpu" else platform, DENSE + 1, w_in, dtype)
    if name == "tiles":
        return f"the chosen ones, in tiles; not by djax's own C++, since {expert_cpu.why_not(w_in.shape, dtype, w_in.dtype)}"
    return {
        "cpu kernel": "the chosen ones, by djax's own C++",
        "dense": "all of them on every token",
        "kernels": f"Pallas kernels: of the chosen ones for over {DENSE} tokens at once, else of all of them on every token",
    }[name]


def plain(x: jax.Array, routing: Routing, w_in: Weights, w_out: Weights, valid: jax.Array) -> jax.Array:
    """The definition, token by token: the oracle of the other back ends. Gathers J expert matrices a token."""
    del valid
    h = gated(product("td,tjdf->tjf", x, at(w_in, routing.ids)))
    y = product("tjf,tjfd->tjd", h, at(w_out, routing.ids))
    return expert_tiles.combine(y, routing.weights)


def dense(x: jax.Array, routing: Routing, w_in: Weights, w_out: Weights, valid: jax.Array, chunk: int = 2048) -> jax.Array:
    """Every expert on every token, the unchosen ones weighted 0: one product in, one product out.

    More tokens than `chunk` go in turns: `[E, T, 2F]` is the largest array there is.
    """
    del valid
    # By token in memory, as the router's softmax is. XLA would turn all of the softmax to the order its reader here likes, and
    # then has no one kernel for it.
    routing = routing._replace(gates=with_layout_constraint(routing.gates, Layout((0, 1))))

    def run(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, gates = part
        h = gated(product("td,edf->etf", x, w_in)) * gates.T[:, :, None].astype(x.dtype)
        return product("etf,efd->td", h, w_out)

    tokens = x.shape[0]
    if tokens <= chunk:
        return run((x, routing.gates))
    parts = (jnp.pad(a, ((0, -tokens % chunk), (0, 0))).reshape(-1, chunk, a.shape[1]) for a in (x, routing.gates))
    return jax.lax.map(run, tuple(parts)).reshape(-1, x.shape[1])[:tokens]


def dense_kernel(
    x: jax.Array, routing: Routing, w_in: Weights, w_out: Weights, valid: jax.Array, interpret: bool = False
) -> jax.Array:
    """`dense` with the hidden rows from one Pallas kernel; under a mesh each device runs it for its own experts."""
    del valid
    run = partial(expert_kernel.hidden, interpret=interpret)
    if split():
        specs = (P(), P(None, "model"), P("model"), P("model"))
        run = jax.shard_map(run, in_specs=specs, out_specs=P(None, "model"), axis_names={"model"}, check_vma=False)
    h = run(x, routing.gates, w_in, w_out)
    # By token in memory: what is summed over, experts and features, lies together.
    return jnp.einsum("tef,efd->td", h, values(w_out).astype(x.dtype))


def grouped(
    x: jax.Array,
    routing: Routing,
    w_in: Weights,
    w_out: Weights,
    valid: jax.Array,
    summed: Callable[..., jax.Array] = expert_tiles.summed,
) -> jax.Array:
    """The chosen experts alone, tokens sorted by expert; nothing dropped, any group sizes, differentiable.

    summed: (x, weights, ids, w_in, w_out) -> each token's weighted sum over its experts. Under a mesh each device does so for
    its own experts, and the partial sums are added.
    """
    ids = jnp.where(valid[:, None], routing.ids, w_in.shape[0])
    if not split():
        return summed(x, routing.weights, ids, w_in, w_out)
    dtype, across = x.dtype, dtype_of_sums(x.dtype)

    def own(x: jax.Array, weights: jax.Array, ids: jax.Array, w_in: Weights, w_out: Weights) -> jax.Array:
        count = w_in.shape[0]
        ids = ids - jax.lax.axis_index("model") * count
        mine = (ids >= 0) & (ids < count)
        weights, ids = jnp.where(mine, weights, 0.0), jnp.where(mine, ids, count)
        y = summed(x.astype(dtype), weights, ids, w_in, w_out)
        return jax.lax.psum(y.astype(across), "model")

    specs = (P(), P(), P(), P("model"), P("model"))
    shards = jax.shard_map(own, in_specs=specs, out_specs=P(), axis_names={"model"}, check_vma=False)
    # x crosses the border in that dtype, too: its gradient is such a sum.
    return shards(x.astype(across), routing.weights, ids, w_in, w_out).astype(dtype)
