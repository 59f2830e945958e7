"""Products with weights: the C++ form on a CPU against XLA's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djax.kernels import dispatch, linear
from djax.kernels.weights import Int8, product
from djax.models import quantized

pytestmark = pytest.mark.cpp
SPECS = {
    "bwd,dgsk->bwgsk": ((2, 13, 48), (48, 2, 3, 32)),
    "bwhk,hkd->bwd": ((2, 13, 3, 16), (3, 16, 128)),
    "wd,dv->wv": ((5, 64), (64, 320)),
}


def arrays(spec, dtype=jnp.float32):
    x, w = SPECS[spec]
    keys = jax.random.split(jax.random.key(0), 2)
    return jax.random.normal(keys[0], x).astype(dtype), (jax.random.normal(keys[1], w) * 0.1).astype(dtype)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("spec", SPECS)
def test_it_equals_xla_s_product(spec, dtype, wide):
    x, w = arrays(spec, dtype)
    assert "@djax_dense" in jax.jit(partial(linear.linear, spec)).lower(x, w).as_text()
    got = linear.on_cpu(spec, x, w, wide)
    expected = jnp.einsum(spec, x, w, preferred_element_type=jnp.float32 if wide else None)
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape) and (got.dtype == jnp.float32 or not wide)
    close = 1e-5 if wide or dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(got.astype(jnp.float32), expected.astype(jnp.float32), atol=close, rtol=close)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("name", "spec"), [("qkv", "bwd,dgsk->bwgsk"), ("o", "bwhk,hkd->bwd")])
def test_int8_weights_are_what_they_stand_for(name, spec, dtype):
    x, w = arrays(spec)
    w = np.asarray(w) * np.arange(1, w.shape[-1] + 1, dtype=np.float32)  # scales that differ
    (_, held), (_, scale) = quantized.quantize((name,), w)
    got = linear.on_cpu(spec, x.astype(dtype), Int8(jnp.asarray(held), jnp.asarray(scale)))
    expected = jnp.einsum(spec, x.astype(dtype).astype(jnp.float32), held * scale)
    assert got.dtype == dtype
    close = (1e-5 if dtype == jnp.float32 else 1e-2) * float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=close)


@pytest.mark.parametrize("wide", [False, True])
def test_the_gradient_is_the_plain_form_s(wide):
    spec = "bwhk,hkd->bwd"
    x, w = arrays(spec)
    got, expected = (
        jax.grad(lambda x, w, f=f: jnp.sum(jnp.sin(f(x, w))), argnums=(0, 1))(x, w)
        for f in (lambda x, w: linear.on_cpu(spec, x, w, wide), lambda x, w: jnp.einsum(spec, x, w))
    )
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_gradient_through_int8_weights():
    spec = "bwhk,hkd->bwd"
    x, w = arrays(spec)
    (_, held), (_, scale) = quantized.quantize(("o",), np.asarray(w))
    held = Int8(jnp.asarray(held), jnp.asarray(scale))
    got, expected = (jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(spec, x, held))))(x) for f in (linear.on_cpu, product))
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_row_has_the_same_bits_whatever_is_beside_it():
    """Up to more rows than one thread takes at a time, and more panels or fewer than threads."""
    x, w = arrays("wd,dv->wv")
    many = jax.random.normal(jax.random.key(1), (1201, x.shape[1]))
    for weights in (w, w[:, :64]):
        together = linear.on_cpu("wd,dv->wv", many, weights)
        for some in (slice(0, 1), slice(7, 20), slice(1000, 1201)):
            assert np.array_equal(linear.on_cpu("wd,dv->wv", many[some], weights), together[some])


def test_sizes_it_does_not_take_go_the_plain_way():
    x, w = jnp.ones((3, 24)), jnp.ones((24, 64))
    case = dispatch.Product(24, 64, x.dtype, w.dtype)
    choice = dispatch.choose(case, "cpu", dispatch.foresee_site("djax", None))
    assert choice.back_end.name == "XLA"
    assert choice.refused[0][1] == "sums over 24 and 64 outputs are no whole multiples of 16 and 64"
    np.testing.assert_array_equal(linear.linear("wd,dv->wv", x, w), jnp.full((3, 64), 24.0))
    with pytest.raises(AssertionError, match="dw,dv->wv"):
        linear.linear("dw,dv->wv", jnp.ones((24, 3)), w)
    empty = jnp.ones((0, 64)), jnp.ones((64, 128))
    assert linear.on_cpu("wd,dv->wv", *empty).shape == (0, 128)
