"""The chosen experts of each token, as loops over tiles of rows of one expert: the form for a CPU, and its gradient.

Letters: T tokens, D width, E experts, J experts a token, F expert width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from djax.kernels.plain import gated
from djax.kernels.weights import Weights, at, product


class Groups(NamedTuple):
    """The rows, (token, choice) pairs, sorted by expert: order and inverse int32 `[T * J]`, the row at each place and each
    row's place; starts and ends int32 `[E]`, the places of each expert's rows. Those of no expert come last."""

    order: jax.Array
    inverse: jax.Array
    starts: jax.Array
    ends: jax.Array


def by_expert(ids: jax.Array, count: int) -> Groups:
    """Sort the rows of ids `[T, J]` by expert, `count` of them; id `count` means none."""
    flat = ids.reshape(ids.size)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.sum(flat[:, None] == jnp.arange(count, dtype=flat.dtype)[None, :], axis=0)
    ends = jnp.cumsum(sizes)
    return Groups(order, jnp.argsort(order), ends - sizes, ends)


class _Tiles:
    """Which rows and which expert each tile covers. Rows are the (token, choice) pairs sorted by expert.

    As many wide tiles of an expert as it can fill, whose products are fast; what is left of it in narrow ones, so that a
    small group wastes little. The widths were measured on a CPU, over even and over lopsided groups; where there are few rows
    no expert is likely to fill a wide tile, and a second loop would only be more to compile.
    """

    def __init__(self, ids: jax.Array, count: int) -> None:
        rows = ids.size
        self.widths = (16,) if rows < 256 else (64, 16) if rows < 128 * count else (128, 16)
        self.order, self.inverse, self.starts, self.ends = by_expert(ids, count)

    def sort(self, pairs: jax.Array) -> jax.Array:
        """`[T, D]`, or `[T * J, D]` a pair, -> `[T * J + pad, D]`, padded so that the last tile may reach past the end."""
        choices = self.order.size // len(pairs)
        return jnp.pad(pairs[self.order // choices], ((0, max(self.widths)), (0, 0)))

    def fold(self, run: Callable[..., Any], carry: object) -> Any:
        """carry = run(width, expert, row, own, carry) for every tile: its expert, its first row, and bool `[width, 1]`,
        the rows that are the expert's own. Wide tiles come first."""
        first = self.starts
        for width in self.widths:
            rows = self.ends - first
            tiles = -(-rows // width) if width == self.widths[-1] else rows // width
            tile_ends = jnp.cumsum(tiles)

            def turn(j: jax.Array, carry: object, width: int = width, at: tuple = (first, tile_ends - tiles, tile_ends)) -> Any:
                first, tile_starts, tile_ends = at
                expert = jnp.sum(tile_ends <= j)
                row = first[expert] + (j - tile_starts[expert]) * width
                own = (row + jnp.arange(width) < self.ends[expert])[:, None]
                return run(width, expert, row, own, carry)

            carry = jax.lax.fori_loop(0, tile_ends[-1], turn, carry)
            first = first + tiles * width
        return carry


@jax.custom_vjp
def chosen(x: jax.Array, ids: jax.Array, w_in: Weights, w_out: Weights) -> jax.Array:
    """Each token's chosen experts' outputs, `[T, J, D]`; id E means none (an arbitrary finite value comes back).

    Loops with traced trip counts run one tile of one expert a time. A narrow tile that reaches past its group keeps what
    a wide one has written there.
    """
    (tokens, choices), count = ids.shape, w_in.shape[0]
    tiles = _Tiles(ids, count)
    rows = tiles.sort(x)

    def run(width: int, expert: jax.Array, row: jax.Array, own: jax.Array, out: jax.Array) -> jax.Array:
        tile = jax.lax.dynamic_slice_in_dim(rows, row, width)
        tile = product("td,df->tf", gated(product("td,df->tf", tile, at(w_in, expert))), at(w_out, expert))
        there = jax.lax.dynamic_slice_in_dim(out, row, width)
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(own, tile, there), row, axis=0)

    out = tiles.fold(run, jnp.zeros_like(rows))
    return out[tiles.inverse].reshape(tokens, choices, x.shape[-1])


def _forward(x: jax.Array, ids: jax.Array, w_in: Weights, w_out: Weights) -> tuple:
    return chosen(x, ids, w_in, w_out), (x, ids, w_in, w_out)


def backward(saved: tuple, dy: jax.Array) -> tuple:
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


chosen.defvjp(_forward, backward)


def summed(x: jax.Array, weights: jax.Array, ids: jax.Array, w_in: Weights, w_out: Weights) -> jax.Array:
    """Each token's sum over its chosen experts, `[T, D]`, with float32 weights `[T, J]`."""
    return combine(chosen(x, ids, w_in, w_out), weights)


def combine(y: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum `[T, J, D]` over the chosen experts with float32 weights `[T, J]`, rounded to y's dtype once."""
    return jnp.sum(y.astype(jnp.float32) * weights[..., None], axis=1).astype(y.dtype)
