"""Which model a run or a store of trajectories began with, as one number."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from djax.models.contract import Params
from djax.models.hf import list_settings
from djax.models.model import Model


def checksum(model: Model) -> str:
    """SHA-256 of the model's config and of a sum over its parameters' bits, as bfloat16, each weighted by its place.

    The same for a checkpoint in whatever layout, on whatever devices, in float32 or bfloat16. It tells models apart; it is no
    proof against somebody who wants to be taken for another.
    """
    sums = jax.device_get(_sums(model.params))
    leaves = [(jax.tree_util.keystr(path), np.shape(a), int(s)) for (path, a), s in _pairs(model.params, sums)]
    described = [model.family.name, list_settings(model.config), sorted(leaves)]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _pairs(params: Params, sums: object) -> Iterator[tuple[Any, Any]]:
    return zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(sums), strict=True)


@jax.jit
def _sums(params: Params) -> Params:
    def one(a: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(a.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
        # A place's weight from its indices, so that the array keeps its layout over devices. Whole numbers wrap: exact.
        weight = jnp.ones((), jnp.uint32)
        for axis in range(a.ndim):
            shape = [1] * a.ndim
            shape[axis] = -1
            weight = weight * (2 * jnp.arange(a.shape[axis], dtype=jnp.uint32) + np.uint32(2654435761)).reshape(shape)
        return jnp.sum(bits * weight, dtype=jnp.uint32)

    return jax.tree.map(one, params)
