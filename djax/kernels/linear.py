"""Products with a matrix of weights, in two forms behind one function: XLA's, and on a CPU one C++ function of djax's own.

XLA's product there waits for the weights first and computes then; ours asks for the next ones meanwhile. The weights are what a
window step of few rows spends its time on.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from djax.kernels import dispatch, native
from djax.kernels.weights import Int8, Weights, product, values


def linear(spec: str, x: jax.Array, w: Weights, wide: bool = False) -> jax.Array:
    """einsum(spec, x, w) in x's dtype; with `wide` in float32, as it was summed.

    spec sums over x's last axes, which are w's first, and keeps the order of all others: "bwd,dgsk->bwgsk". Law, on a CPU with
    the C++ function: a row of the result is the same, bit for bit, whatever rows are beside it.
    """
    whole = partial(jnp.einsum, spec, preferred_element_type=jnp.float32) if wide else partial(product, spec)
    _, summed, outs = _sizes(spec, x.shape, w.shape)
    case = dispatch.Product(summed, outs, x.dtype, values(w).dtype)
    return dispatch.run(case, {"C++": partial(on_cpu, spec, wide=wide), "XLA": whole}, x, w)


def on_cpu(spec: str, x: jax.Array, w: Weights, wide: bool = False) -> jax.Array:
    """`linear` as one C++ function. Its gradient is the plain form's."""

    @jax.custom_vjp
    def run(x: jax.Array, w: Weights) -> jax.Array:
        return _call(spec, x, w, wide)

    def backward(saved: tuple, dy: jax.Array) -> tuple:
        x, w = saved
        if isinstance(w, Int8):  # only x can move
            nothing = jax.tree.map(
                lambda a: np.zeros(a.shape, jax.dtypes.float0) if a.dtype == jnp.int8 else jnp.zeros_like(a), w
            )
            return *jax.vjp(lambda x: product(spec, x, w), x)[1](dy), nothing
        return jax.vjp(partial(jnp.einsum, spec, preferred_element_type=jnp.float32 if wide else None), x, w)[1](dy)

    run.defvjp(lambda *a: (run(*a), a), backward)
    return run(x, w)


def _call(spec: str, x: jax.Array, w: Weights, wide: bool) -> jax.Array:
    rows, summed, outs = _sizes(spec, x.shape, w.shape)
    kept = w.shape[len(x.shape) - len(rows) :]
    scale = jnp.broadcast_to(w.scale.reshape(w.scale.shape[-len(kept) :]), kept).reshape(outs) if isinstance(w, Int8) else None
    run = jax.ffi.ffi_call(
        native.target("djax_dense", x.dtype, values(w).dtype),
        jax.ShapeDtypeStruct((math.prod(rows), outs), jnp.float32 if wide else x.dtype),
        vmap_method="sequential",
    )
    y = run(x.reshape(-1, summed), values(w).reshape(summed, outs), jnp.zeros(0, jnp.float32) if scale is None else scale)
    return y.reshape(*rows, *kept)


def _sizes(spec: str, x: tuple[int, ...], w: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
    """The shape of x's rows, how much is summed over, and the number of outputs."""
    inputs, out = spec.split("->")
    left, right = inputs.split(",")
    both = sum(letter in right for letter in left)
    rows = len(left) - both
    assert left[rows:] == right[:both] and out == left[:rows] + right[both:], spec
    return x[:rows], math.prod(w[:both]), math.prod(w[both:])
