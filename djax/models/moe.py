"""Mixture of experts: the router and the expert layer, with several back ends behind one function.

Letters: T tokens, D width, E experts, J experts a token, F expert width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from djax.models.layers import replicated


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
    logits = jnp.dot(x.astype(jnp.float32), router.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    # Whole on every device: split by expert, as the gates' reader is, a softmax would take collectives of its own.
    probs = replicated(jax.nn.softmax(replicated(logits), axis=-1))
    weights, ids = jax.lax.top_k(probs, top)
    # An expert is chosen if fewer than `top` go before it: no sort, and one kernel where a sort takes several.
    one, other = probs[:, :, None], probs[:, None, :]
    at = jnp.arange(probs.shape[1])
    before = (other > one) | ((other == one) & (at[None, :] < at[:, None])[None])
    gates = jnp.where(jnp.sum(before, axis=-1) < top, probs, 0.0)
    if renormalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
    return Routing(weights, ids.astype(jnp.int32), replicated(gates), probs)


def gated(h: jax.Array) -> jax.Array:
    """SwiGLU on `[..., 2F]`, gate half first."""
    gate, up = jnp.split(h, 2, axis=-1)
    return jax.nn.silu(gate) * up


def experts(x: jax.Array, routing: Routing, w_in: jax.Array, w_out: jax.Array, valid: jax.Array) -> jax.Array:
    """Weighted sum of the chosen experts' outputs, `[T, D]` in x's dtype.

    x `[T, D]`, w_in `[E, D, 2F]` (gate, then up), w_out `[E, F, D]`, valid bool `[T]`: rows that are padding get an arbitrary
    finite value and, where the back end can, cost nothing. The back end is chosen when the program is lowered, from the
    platform: on an accelerator every weight is read anyway by the few hundred tokens of a window step, so dense products
    are at the memory roofline and their surplus FLOPs are free; on a CPU only the chosen experts are worth computing. Under
    a mesh the experts are split over its model axis, and their sum is what the caller constrains to replicated.
    """
    return jax.lax.platform_dependent(x, routing, w_in, w_out, valid, cpu=grouped, default=dense)


def plain(x: jax.Array, routing: Routing, w_in: jax.Array, w_out: jax.Array, valid: jax.Array) -> jax.Array:
    """The definition, token by token: the oracle of the other back ends. Gathers J expert matrices a token."""
    del valid
    h = gated(jnp.einsum("td,tjdf->tjf", x, w_in[routing.ids]))
    y = jnp.einsum("tjf,tjfd->tjd", h, w_out[routing.ids])
    return combine(y, routing.weights)


def dense(x: jax.Array, routing: Routing, w_in: jax.Array, w_out: jax.Array, valid: jax.Array, chunk: int = 2048) -> jax.Array:
    """Every expert on every token, the unchosen ones weighted 0: one product in, one product out.

    More tokens than `chunk` go in turns: `[E, T, 2F]` is the largest array there is.
    """
    del valid
    # By token in memory, as the router's softmax is. XLA would turn all of the softmax to the order its reader here likes, and
    # then has no one kernel for it.
    routing = routing._replace(gates=with_layout_constraint(routing.gates, Layout((0, 1))))

    def run(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, gates = part
        h = gated(jnp.einsum("td,edf->etf", x, w_in)) * gates.T[:, :, None].astype(x.dtype)
        return jnp.einsum("etf,efd->td", h, w_out)

    tokens = x.shape[0]
    if tokens <= chunk:
        return run((x, routing.gates))
    parts = (jnp.pad(a, ((0, -tokens % chunk), (0, 0))).reshape(-1, chunk, a.shape[1]) for a in (x, routing.gates))
    return jax.lax.map(run, tuple(parts)).reshape(-1, x.shape[1])[:tokens]


def grouped(x: jax.Array, routing: Routing, w_in: jax.Array, w_out: jax.Array, valid: jax.Array) -> jax.Array:
    """Tokens sorted by expert and run in tiles of one expert each; nothing dropped, any group sizes, differentiable.

    Under a mesh each device runs the tiles of its own experts, and the partial sums are added.
    """
    ids = jnp.where(valid[:, None], routing.ids, w_in.shape[0])
    if jax.sharding.get_abstract_mesh().shape.get("model", 1) == 1:
        return combine(sorted_tiles(x, ids, w_in, w_out), routing.weights)

    def own(x: jax.Array, weights: jax.Array, ids: jax.Array, w_in: jax.Array, w_out: jax.Array) -> jax.Array:
        count = w_in.shape[0]
        ids = ids - jax.lax.axis_index("model") * count
        mine = (ids >= 0) & (ids < count)
        y = combine(sorted_tiles(x, jnp.where(mine, ids, count), w_in, w_out), jnp.where(mine, weights, 0.0))
        return jax.lax.psum(y, "model")

    specs = (P(), P(), P(), P("model"), P("model"))
    shards = jax.shard_map(own, in_specs=specs, out_specs=P(), axis_names={"model"}, check_vma=False)
    return shards(x, routing.weights, ids, w_in, w_out)


def combine(y: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum `[T, J, D]` over the chosen experts with float32 weights `[T, J]`, rounded to y's dtype once."""
    return jnp.sum(y.astype(jnp.float32) * weights[..., None], axis=1).astype(y.dtype)


class _Tiles:
    """Which rows and which expert each tile covers. Rows are the (token, choice) pairs sorted by expert.

    As many wide tiles of an expert as it can fill, whose products are fast; what is left of it in narrow ones, so that a
    small group wastes little. The widths were measured on a CPU, over even and over lopsided groups; where there are few rows
    no expert is likely to fill a wide tile, and a second loop would only be more to compile.
    """

    def __init__(self, ids: jax.Array, count: int) -> None:
        rows = ids.size
        self.widths = (16,) if rows < 256 else (64, 16) if rows < 128 * count else (128, 16)
        flat = ids.reshape(rows)
        self.order = jnp.argsort(flat, stable=True)
        self.inverse = jnp.argsort(self.order)
        sizes = jnp.sum(flat[:, None] == jnp.arange(count, dtype=flat.dtype)[None, :], axis=0)
        self.ends = jnp.cumsum(sizes)
        self.starts = self.ends - sizes

    def sort(self, pairs: jax.Array) -> jax.Array:
        """`[T, D]`, or `[T * J, D]` a pair, -> `[T * J + pad, D]`, padded so that the last tile may reach past the end."""
        choices = self.order.size // len(pairs)
        return jnp.pad(pairs[self.order // choices], ((0, max(self.widths)), (0, 0)))

    def fold(self, run: Callable[..., Any], carry: Any) -> Any:
        """carry = run(width, expert, row, own, carry) for every tile: its expert, its first row, and bool `[width, 1]`,
        the rows that are the expert's own. Wide tiles come first."""
        first = self.starts
        for width in self.widths:
            rows = self.ends - first
            tiles = -(-rows // width) if width == self.widths[-1] else rows // width
            tile_ends = jnp.cumsum(tiles)

            def turn(j: jax.Array, carry: Any, width: int = width, at: tuple = (first, tile_ends - tiles, tile_ends)) -> Any:
                first, tile_starts, tile_ends = at
                expert = jnp.sum(tile_ends <= j)
                row = first[expert] + (j - tile_starts[expert]) * width
                own = (row + jnp.arange(width) < self.ends[expert])[:, None]
                return run(width, expert, row, own, carry)

            carry = jax.lax.fori_loop(0, tile_ends[-1], turn, carry)
            first = first + tiles * width
        return carry


@jax.custom_vjp
def sorted_tiles(x: jax.Array, ids: jax.Array, w_in: jax.Array, w_out: jax.Array) -> jax.Array:
    """Each token's chosen experts' outputs, `[T, J, D]`; id E means none (an arbitrary finite value comes back).

    Loops with traced trip counts run one tile of one expert a time. A narrow tile that reaches past its group keeps what
    a wide one has written there.
    """
    (tokens, choices), count = ids.shape, w_in.shape[0]
    tiles = _Tiles(ids, count)
    rows = tiles.sort(x)

    def run(width: int, expert: jax.Array, row: jax.Array, own: jax.Array, out: jax.Array) -> jax.Array:
        tile = jax.lax.dynamic_slice_in_dim(rows, row, width)
        tile = gated(tile @ w_in[expert]) @ w_out[expert]
        there = jax.lax.dynamic_slice_in_dim(out, row, width)
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(own, tile, there), row, axis=0)

    out = tiles.fold(run, jnp.zeros_like(rows))
    return out[tiles.inverse].reshape(tokens, choices, x.shape[-1])


def _sorted_tiles_forward(x: jax.Array, ids: jax.Array, w_in: jax.Array, w_out: jax.Array) -> tuple:
    return sorted_tiles(x, ids, w_in, w_out), (x, ids, w_in, w_out)


def _sorted_tiles_backward(saved: tuple, dy: jax.Array) -> tuple:
    """The same tiles again: recompute the hidden rows, then the two products' gradients, weights summed in place."""
    x, ids, w_in, w_out = saved
    (tokens, choices), count = ids.shape, w_in.shape[0]
    tiles = _Tiles(ids, count)
    rows = tiles.sort(x)
    dys = tiles.sort(dy.reshape(tokens * choices, -1))

    def run(width: int, expert: jax.Array, row: jax.Array, own: jax.Array, carry: tuple) -> tuple:
        dx, dw_in, dw_out = carry
        slice_rows = partial(jax.lax.dynamic_slice_in_dim, start_index=row, slice_size=width)
        tile, d = slice_rows(rows), jnp.where(own, slice_rows(dys), 0)
        h, gated_vjp = jax.vjp(gated, tile @ w_in[expert])
        (dh,) = gated_vjp(d @ w_out[expert].T)
        dw_in = dw_in.at[expert].add(tile.T @ dh)
        dw_out = dw_out.at[expert].add(h.T @ d)
        dtile = jnp.where(own, dh @ w_in[expert].T, slice_rows(dx))
        return jax.lax.dynamic_update_slice_in_dim(dx, dtile, row, axis=0), dw_in, dw_out

    dx, dw_in, dw_out = tiles.fold(run, (jnp.zeros_like(rows), jnp.zeros_like(w_in), jnp.zeros_like(w_out)))
    return dx[tiles.inverse].reshape(tokens, choices, -1).sum(axis=1), np.zeros(ids.shape, jax.dtypes.float0), dw_in, dw_out


sorted_tiles.defvjp(_sorted_tiles_forward, _sorted_tiles_backward)
