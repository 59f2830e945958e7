"""Pallas kernels of the expert layer, for GPUs: two for many tokens, over tiles of rows of one expert each; and one for few
tokens, the hidden rows of all experts on all of them.

Letters: T tokens, D width, E experts, J experts a token, F expert width.
"""

from typing import Any

import jax
import jax.numpy as jnp

from djax.kernels import experts_tiles
from djax.kernels.plain import gated
from djax.kernels.weights import Int8, Weights, values

# Rows of a tile, columns of its output, and how much of the summed axis is read at a time. Some 160 rows an expert in a
# canvas of LLaDA-MoE: a wider tile would be half empty at the end of most groups.
ROWS, COLUMNS, DEEP = 64, 64, 32
# Rows of a tile where every expert takes every token: all of a window's, if they fit, so that weights are read once.
WINDOW_ROWS = 128


def chosen(x: jax.Array, ids: jax.Array, w_in: Weights, w_out: Weights, interpret: bool = False) -> jax.Array:
    """Each token's chosen experts' outputs, `[T, J, D]`; arguments, result and gradient as `experts_tiles.chosen`'s.

    Sums are float32, rounded to x's dtype between the two products and at the end. interpret: run the kernels' operations one
    by one, on any platform, for tests.
    """

    @jax.custom_vjp
    def run(x: jax.Array, ids: jax.Array, w_in: Weights, w_out: Weights) -> jax.Array:
        return _run(x, ids, w_in, w_out, interpret)

    run.defvjp(lambda *a: (run(*a), a), experts_tiles.backward)
    return run(x, ids, w_in, w_out)


def summed(
    x: jax.Array, weights: jax.Array, ids: jax.Array, w_in: Weights, w_out: Weights, interpret: bool = False
) -> jax.Array:
    """`experts_tiles.summed` by the kernels."""
    return experts_tiles.combine(chosen(x, ids, w_in, w_out, interpret), weights)


def _run(x: jax.Array, ids: jax.Array, w_in: Weights, w_out: Weights, interpret: bool) -> jax.Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    (tokens, choices), (count, width, both) = ids.shape, w_in.shape
    groups = experts_tiles.by_expert(ids, count)
    # Each group begins at a tile of its own. How many tiles there are is known only when the program runs, so all that could
    # be are started, and those of no expert (`count`) return at once.
    tiles = pl.cdiv(ids.size, ROWS) + min(count, ids.size)
    tile_ends = jnp.cumsum(-(-(groups.ends - groups.starts) // ROWS)).astype(jnp.int32)
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), tile_ends])
    expert = jnp.searchsorted(tile_ends, jnp.arange(tiles), side="right", method="compare_all").astype(jnp.int32)
    there = jnp.minimum(expert, count - 1)
    place = groups.starts[there] + (jnp.arange(tiles) - first[there]) * ROWS
    place = place[:, None] + jnp.arange(ROWS)[None, :]
    # The token of each row of each tile. Where a group has ended, another's, whose output nobody reads.
    token = (groups.order[jnp.minimum(place, ids.size - 1)] // choices).astype(jnp.int32).reshape(-1)

    def call(kernel: Any, out_width: int, name: str, **inputs: jax.Array) -> jax.Array:
        def run(*refs: jax.Ref) -> None:
            kernel(refs[-1], count=count, **dict(zip(inputs, refs, strict=False)))

        return pl.pallas_call(
            run,
            # Tiles first: those of one expert run side by side, and read the same part of its weights.
            grid=(tiles, out_width // COLUMNS),
            out_shape=jax.ShapeDtypeStruct((tiles * ROWS, out_width), x.dtype),
            compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
            interpret=interpret,
            name=name,
        )(*inputs.values())

    # The second matrices' scales belong to the hidden features, so they, too, are for the first kernel.
    scales = {}
    if isinstance(w_in, Int8) and isinstance(w_out, Int8):
        scales = {"in_scale": w_in.scale, "out_scale": w_out.scale}
    h = call(_into, both // 2, "experts_in", expert=expert, token=token, x=x, w_in=values(w_in), **scales)
    y = call(_out_of, width, "experts_out", expert=expert, h=h, w_out=values(w_out))
    flat = ids.reshape(-1)
    own = jnp.minimum(flat, count - 1)
    row = first[own] * ROWS + groups.inverse - groups.starts[own]
    # A pair of no expert has no row, and what lies where it would be may be nothing at all.
    return jnp.where((flat < count)[:, None], y[row], 0).reshape(tokens, choices, width)


def _into(
    h: jax.Ref,
    *,
    expert: jax.Ref,
    token: jax.Ref,
    x: jax.Ref,
    w_in: jax.Ref,
    in_scale: jax.Ref | None = None,
    out_scale: jax.Ref | None = None,
    count: int,
) -> None:
    """COLUMNS of gated(rows @ w_in) of one tile; the rows are read where the tokens lie."""
    from jax.experimental import pallas as pl

    t, n = pl.program_id(0), pl.program_id(1)
    e = expert[t]
    mine, columns = pl.ds(t * ROWS, ROWS), pl.ds(n * COLUMNS, COLUMNS)

    @pl.when(e < count)
    def _() -> None:
        at = token[mine]

        def turn(k: jax.Array, sums: tuple) -> tuple:
            deep = pl.ds(k * DEEP, DEEP)
            rows = x[at, deep]
            gate = w_in[e, deep, columns]
            up = w_in[e, deep, pl.ds(h.shape[1] + n * COLUMNS, COLUMNS)]
            return sums[0] + _product(rows, gate), sums[1] + _product(rows, up)

        zero = jnp.zeros((ROWS, COLUMNS), jnp.float32)
        gate, up = jax.lax.fori_loop(0, x.shape[1] // DEEP, turn, (zero, zero))
        if in_scale is not None and out_scale is not None:
            others = pl.ds(h.shape[1] + n * COLUMNS, COLUMNS)
            gate = gate * in_scale[e, 0, columns][None, :]
            up = up * (in_scale[e, 0, others] * out_scale[e, columns, 0])[None, :]
        h[mine, columns] = (jax.nn.silu(gate) * up).astype(h.dtype)


def _out_of(y: jax.Ref, *, expert: jax.Ref, h: jax.Ref, w_out: jax.Ref, count: int) -> None:
    """COLUMNS of h @ w_out of one tile."""
    from jax.experimental import pallas as pl

    t, n = pl.program_id(0), pl.program_id(1)
    e = expert[t]
    mine, columns = pl.ds(t * ROWS, ROWS), pl.ds(n * COLUMNS, COLUMNS)

    @pl.when(e < count)
    def _() -> None:
        def turn(k: jax.Array, sums: jax.Array) -> jax.Array:
            deep = pl.ds(k * DEEP, DEEP)
            return sums + _product(h[mine, deep], w_out[e, deep, columns])

        sums = jax.lax.fori_loop(0, h.shape[1] // DEEP, turn, jnp.zeros((ROWS, COLUMNS), jnp.float32))
        y[mine, columns] = sums.astype(y.dtype)


def hidden(x: jax.Array, gates: jax.Array, w_in: Weights, w_out: Weights, interpret: bool = False) -> jax.Array:
    """Every expert's hidden row of every token, weighted: gated(x @ w_in[e]) * gates[:, e], `[T, E, F]` in x's dtype.

    x `[T, D]`, gates float32 `[T, E]`. Float32 until the end. Where w_out is int8, its scales, which belong to the hidden
    features, are in the result. Gate, up and what joins them are one kernel: nothing of twice the result's size is written.
    interpret: run the kernel's operations one by one, on any platform, for tests.
    """

    @jax.custom_vjp
    def run(x: jax.Array, gates: jax.Array, w_in: Weights, w_out: Weights) -> jax.Array:
        return _run_hidden(x, gates, w_in, w_out, interpret)

    run.defvjp(lambda *a: (run(*a), a), lambda a, d: jax.vjp(plain_hidden, *a)[1](d))
    return run(x, gates, w_in, w_out)


def plain_hidden(x: jax.Array, gates: jax.Array, w_in: Weights, w_out: Weights) -> jax.Array:
    """`hidden` in XLA's own operations, for weights that are not int8: the oracle of its gradient."""
    del w_out
    return gated(jnp.einsum("td,edf->tef", x, w_in)) * gates[..., None].astype(x.dtype)


def _run_hidden(x: jax.Array, gates: jax.Array, w_in: Weights, w_out: Weights, interpret: bool) -> jax.Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    (tokens, _), (count, _, both) = x.shape, w_in.shape
    rows = min(WINDOW_ROWS, max(16, pl.next_power_of_2(tokens)))
    inputs = {"x": x, "gates": gates, "w_in": values(w_in)}
    if isinstance(w_in, Int8) and isinstance(w_out, Int8):
        inputs |= {"in_scale": w_in.scale, "out_scale": w_out.scale}

    def kernel(*refs: jax.Ref) -> None:
        _hidden(refs[-1], rows=rows, **dict(zip(inputs, refs, strict=False)))

    return pl.pallas_call(
        kernel,
        grid=(count, both // 2 // COLUMNS, pl.cdiv(tokens, rows)),
        out_shape=jax.ShapeDtypeStruct((tokens, count, both // 2), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="experts_hidden",
    )(*inputs.values())


def _hidden(
    h: jax.Ref,
    *,
    x: jax.Ref,
    gates: jax.Ref,
    w_in: jax.Ref,
    in_scale: jax.Ref | None = None,
    out_scale: jax.Ref | None = None,
    rows: int,
) -> None:
    """COLUMNS of one expert's hidden rows."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    e, n, t = (pl.program_id(axis) for axis in range(3))
    inner = h.shape[2]
    mine, columns, others = pl.ds(t * rows, rows), pl.ds(n * COLUMNS, COLUMNS), pl.ds(inner + n * COLUMNS, COLUMNS)
    there = t * rows + jnp.arange(rows) < x.shape[0]

    def turn(k: jax.Array, sums: tuple) -> tuple:
        deep = pl.ds(k * DEEP, DEEP)
        tile = plgpu.load(x.at[mine, deep], mask=there[:, None], other=0)
        return sums[0] + _product(tile, w_in[e, deep, columns]), sums[1] + _product(tile, w_in[e, deep, others])

    zero = jnp.zeros((rows, COLUMNS), jnp.float32)
    gate, up = jax.lax.fori_loop(0, x.shape[1] // DEEP, turn, (zero, zero))
    weight = plgpu.load(gates.at[mine, e], mask=there, other=0)[:, None]
    if in_scale is not None and out_scale is not None:
        gate = gate * in_scale[e, 0, columns][None, :]
        up = up * (in_scale[e, 0, others] * out_scale[e, columns, 0])[None, :]
    plgpu.store(h.at[mine, e, columns], (jax.nn.silu(gate) * up * weight).astype(h.dtype), mask=there[:, None])


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    precision = "highest" if a.dtype == jnp.float32 else None
    return jnp.dot(a, b.astype(a.dtype), preferred_element_type=jnp.float32, precision=precision)
