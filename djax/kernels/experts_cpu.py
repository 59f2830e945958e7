"""The chosen experts of each token by a C++ function of djax's own: the form for a CPU where it can be compiled.

XLA has no product of groups of unlike sizes there: tile by tile it copies weights, and wakes its threads for little.
Letters: T tokens, D width, E experts, J experts a token, F expert width.
"""

from typing import Any

import jax
import jax.numpy as jnp

from djax.kernels import experts_tiles, native
from djax.kernels.weights import Int8, Weights, values


def summed(x: jax.Array, weights: jax.Array, ids: jax.Array, w_in: Weights, w_out: Weights) -> jax.Array:
    """Each token's sum over its chosen experts, `[T, D]`; arguments, result and gradient as `experts_tiles.summed`'s.

    Everything between x and the result is float32, in narrower models, too; where a gradient is asked for the choices' outputs
    are rounded. Law: a token's result is the same, bit for bit, whichever tokens are computed with it and however many threads
    there are.
    """

    @jax.custom_vjp
    def run(x: jax.Array, weights: jax.Array, ids: jax.Array, w_in: Weights, w_out: Weights) -> jax.Array:
        return _call(x, ids, w_in, w_out, weights)

    def forward(x: jax.Array, weights: jax.Array, *rest: Any) -> tuple:
        # The weights' gradient wants the outputs themselves.
        y = _call(x, *rest)
        return experts_tiles.combine(y, weights), (y, weights, (x, *rest))

    def backward(saved: tuple, dy: jax.Array) -> tuple:
        y, weights, arguments = saved
        dy, dweights = jax.vjp(experts_tiles.combine, y, weights)[1](dy)
        dx, *rest = experts_tiles.backward(arguments, dy)
        return dx, dweights, *rest

    run.defvjp(forward, backward)
    return run(x, weights, ids, w_in, w_out)


def _call(x: jax.Array, ids: jax.Array, w_in: Weights, w_out: Weights, gates: jax.Array | None = None) -> jax.Array:
    """The sums; without gates the outputs of each choice, `[T, J, D]`."""
    _, width, both = w_in.shape
    none = jnp.zeros((0, 1, both), jnp.float32), jnp.zeros((0, both // 2, 1), jnp.float32)
    scales = none
    if isinstance(w_in, Int8) and isinstance(w_out, Int8):
        scales = w_in.scale, w_out.scale
    rows = ids.shape if gates is None else ids.shape[:1]
    gates = jnp.zeros((0, ids.shape[1]), jnp.float32) if gates is None else gates
    call = jax.ffi.ffi_call(
        native.target("djax_experts", x.dtype, values(w_in).dtype),
        jax.ShapeDtypeStruct((*rows, width), x.dtype),
        vmap_method="sequential",
    )
    return call(x, ids, gates, values(w_in), values(w_out), *scales)
