"""A matrix of weights as a product reads it: an array, or int8 values with a float32 scale for each channel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Int8(NamedTuple):
    """values int8; scale float32, of the same rank, of size 1 along the axes that share one. The weights are values * scale."""

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


Weights = jax.Array | Int8


def values(w: Weights) -> jax.Array:
    """What holds a matrix' shape."""
    return w.values if isinstance(w, Int8) else w


def at(w: Weights, index: object) -> Weights:
    """w[index] along the first axes."""
    return Int8(w.values[index], w.scale[index]) if isinstance(w, Int8) else w[index]


def product(spec: str, x: jax.Array, w: Weights) -> jax.Array:
    """einsum(spec, x, w) in x's dtype. Of int8 weights the products are exact and their sums float32; the scale comes after
    them, or where it belongs to what is summed over before them."""
    if not isinstance(w, Int8):
        return jnp.einsum(spec, x, w)
    inputs, out = spec.split("->")
    left, right = inputs.split(",")
    scaled = {letter for letter, size in zip(right, w.scale.shape, strict=True) if size > 1}

    def scale(letters: str) -> jax.Array:
        sizes = dict(zip(right, w.scale.shape, strict=True))
        return w.scale.reshape([sizes[letter] if letter in scaled else 1 for letter in letters])

    weights = w.values.astype(x.dtype)
    if scaled <= set(left):
        return jnp.einsum(spec, (x * scale(left)).astype(x.dtype), weights)
    return (jnp.einsum(spec, x, weights, preferred_element_type=jnp.float32) * scale(out)).astype(x.dtype)
