"""The expert layer: each token's chosen experts, with several back ends behind one function.

Letters: T tokens, D width, E experts, J experts a token, F expert width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from djax.kernels import dispatch, experts_cpu, experts_gpu, experts_tiles
from djax.kernels.plain import gated
from djax.kernels.weights import Weights, at, product, values
from djax.runtime.sharding import split


class Routing(NamedTuple):
    """Which experts each token goes to, and how much of each.

    weights float32 `[T, J]` and ids int32 `[T, J]`, the best first; gates float32 `[T, E]`, the same weights by expert, 0 for
    those not chosen; probs float32 `[T, E]`, the router's softmax. A back end takes what it needs, the rest is not computed.
    """

    weights: jax.Array
    ids: jax.Array
    gates: jax.Array
    probs: jax.Array


def experts(x: jax.Array, routing: Routing, w_in: Weights, w_out: Weights, valid: jax.Array) -> jax.Array:
    """Weighted sum of the chosen experts' outputs, `[T, D]` in x's dtype.

    x `[T, D]`, w_in `[E, D, 2F]` (gate, then up), w_out `[E, F, D]`, valid bool `[T]`: rows that are padding get an arbitrary
    finite value and, where the back end can, cost nothing. The back end is chosen when the program is lowered
    (`dispatch.TABLE`). Under a mesh the experts are split over its model axis, and their sum is what the caller constrains to
    replicated.
    """
    held = values(w_in)
    forms: dict[str, Callable[..., jax.Array]] = {
        "Pallas": partial(grouped, summed=experts_gpu.summed),
        "dense Pallas": dense_kernel,
        "C++": partial(grouped, summed=experts_cpu.summed),
        "tiles": grouped,
        "dense": dense,
    }
    case = dispatch.Experts(len(x), held.shape, x.dtype, held.dtype)
    return dispatch.run(case, forms, x, routing, w_in, w_out, valid)


def plain(x: jax.Array, routing: Routing, w_in: Weights, w_out: Weights, valid: jax.Array) -> jax.Array:
    """The definition, token by token: the oracle of the other back ends. Gathers J expert matrices a token."""
    del valid
    h = gated(product("td,tjdf->tjf", x, at(w_in, routing.ids)))
    y = product("tjf,tjfd->tjd", h, at(w_out, routing.ids))
    return experts_tiles.combine(y, routing.weights)


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
    run = partial(experts_gpu.hidden, interpret=interpret)
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
    summed: Callable[..., jax.Array] = experts_tiles.summed,
) -> jax.Array:
    """The chosen experts alone, tokens sorted by expert; nothing dropped, any group sizes, differentiable.

    summed: (x, weights, ids, w_in, w_out) -> each token's weighted sum over its experts. Under a mesh each device does so for
    its own experts, and the partial sums are added.
    """
    ids = jnp.where(valid[:, None], routing.ids, w_in.shape[0])
    if not split():
        return summed(x, routing.weights, ids, w_in, w_out)
    dtype, across = x.dtype, _dtype_of_sums(x.dtype)

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


def _dtype_of_sums(dtype: jax.typing.DTypeLike) -> Any:
    """The dtype in which a `shard_map` adds values of this one over devices.

    Float32 on a CPU. XLA's CPU compiler aborts the process on a bfloat16 sum that a `shard_map` with automatic axes makes:
    it promotes such sums, and cannot clone the copy that their region then ends with.
    """
    return jnp.promote_types(dtype, jnp.float32) if jax.default_backend() == "cpu" else dtype
