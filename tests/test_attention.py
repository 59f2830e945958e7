"""Attention's kernels, the GPU's interpreted on a CPU, against the plain form: values, gradients, and what is hidden."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djax.models import attention_cpu
from djax.models.attention import fused, on_cpu, plain, suits
from djax.models.layers import rotary_angles

# On a machine with a GPU the kernel itself runs.
INTERPRET = jax.default_backend() == "cpu"
BATCH, WINDOW, GROUPS, HEAD_DIM, CANVAS = 2, 39, 2, 32, 100
EPS = 1e-5
forms = pytest.mark.parametrize(
    "form",
    [
        pytest.param(partial(fused, eps=EPS, interpret=INTERPRET), id="Pallas"),
        pytest.param(partial(on_cpu, eps=EPS), id="C++", marks=pytest.mark.cpp),
    ],
)


def inputs(per_group, dtype, cache, seed=0, norm=True, blocks=None):
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    normal = lambda *shape: jax.random.normal(next(keys), shape).astype(dtype)  # noqa: E731
    start = jnp.array([[-3], [61]])
    at = start + jnp.arange(WINDOW)[None, :]
    qkv = normal(BATCH, WINDOW, GROUPS, per_group + 2, HEAD_DIM)
    norms = (1 + 0.3 * normal(HEAD_DIM), 1 + 0.3 * normal(HEAD_DIM)) if norm else None
    angles = tuple(a.astype(dtype if norm else jnp.float32) for a in rotary_angles(at, HEAD_DIM, 1e4, None if norm else 16))
    until = None if blocks is None else jnp.broadcast_to((jnp.arange(WINDOW) // blocks + 1) * blocks, (BATCH, WINDOW))
    valid = (at >= 0) & (at < 97)
    if not cache:
        return qkv, norms, angles, valid, None, None, until
    there = jnp.arange(CANVAS)[None, :]
    visible = (there < 97) & ((there < start) | (there >= start + WINDOW))
    kv = (BATCH, GROUPS, CANVAS * HEAD_DIM)
    return qkv, norms, angles, valid, (normal(*kv), normal(*kv)), visible, until


@forms
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("per_group", [1, 2])
@pytest.mark.parametrize(("dtype", "close"), [(jnp.float32, 2e-5), (jnp.bfloat16, 3e-2)])
def test_the_kernel_equals_the_plain_form(form, cache, per_group, dtype, close):
    arguments = inputs(per_group, dtype, cache)
    valid = np.asarray(arguments[3])
    got, k, v = form(*arguments)
    expected, plain_k, plain_v = plain(*arguments, eps=EPS)
    assert got.dtype == k.dtype == v.dtype == dtype
    np.testing.assert_allclose(np.asarray(got, np.float32)[valid], np.asarray(expected, np.float32)[valid], atol=close)
    np.testing.assert_allclose(np.asarray(k, np.float32), np.asarray(plain_k, np.float32), atol=close, rtol=close / 3)
    assert np.array_equal(v, plain_v)


@forms
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize(("dtype", "close"), [(jnp.float32, 2e-5), (jnp.bfloat16, 3e-2)])
def test_no_norms_half_rotary_and_blocks_that_see_what_is_before_them(form, cache, dtype, close):
    arguments = inputs(1, dtype, cache, norm=False, blocks=8)
    valid = np.asarray(arguments[3])
    got, k, _ = form(*arguments)
    expected, plain_k, _ = plain(*arguments, eps=EPS)
    assert got.dtype == k.dtype == dtype
    np.testing.assert_allclose(np.asarray(got, np.float32)[valid], np.asarray(expected, np.float32)[valid], atol=close)
    np.testing.assert_allclose(np.asarray(k, np.float32), np.asarray(plain_k, np.float32), atol=close, rtol=close / 3)
    everything, _, _ = plain(*arguments[:-1], None, eps=EPS)
    assert np.abs(np.asarray(everything, np.float32) - np.asarray(expected, np.float32))[valid].max() > 10 * close


@forms
def test_hidden_keys_weigh_nothing(form):
    qkv, norms, angles, valid, (k, v), visible, _ = inputs(1, jnp.float32, True)
    hidden = jnp.repeat(~visible, HEAD_DIM, axis=1)[:, None, :]
    spoiled = jnp.where(hidden, 1e6, k), jnp.where(hidden, -1e6, v)
    one = form(qkv, norms, angles, valid, (k, v), visible, None)[0]
    two = form(qkv, norms, angles, valid, spoiled, visible, None)[0]
    assert np.array_equal(np.asarray(one)[valid], np.asarray(two)[valid])


@forms
def test_the_gradient_is_the_plain_form_s(form):
    arguments = inputs(2, jnp.float32, False)

    def loss(f, qkv):
        out, k, v = f(qkv)
        return jnp.sum(jnp.where(arguments[3][..., None, None], out, 0) ** 2) + jnp.sum(k * v)

    got = jax.grad(lambda x: loss(lambda x: form(x, *arguments[1:]), x))(arguments[0])
    expected = jax.grad(lambda x: loss(lambda x: plain(x, *arguments[1:], eps=EPS), x))(arguments[0])
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.cpp
def test_on_a_cpu_a_query_gets_the_same_bits_whatever_is_hidden_from_it():
    """Without the other row, on a canvas that is longer by hidden positions, and beside fewer queries, nothing changes."""
    qkv, norms, angles, valid, cached, visible, _ = inputs(2, jnp.float32, True)
    few = 25
    valid = valid.at[1, few:].set(False)
    out, k, _ = on_cpu(qkv, norms, angles, valid, cached, visible, None, eps=EPS)
    part = tuple(a[1:, :few] for a in (qkv, *angles, valid))
    longer = tuple(jnp.pad(a[1:], ((0, 0), (0, 0), (0, 50 * HEAD_DIM)), constant_values=9.0) for a in cached)
    seen = jnp.pad(visible[1:], ((0, 0), (0, 50)))
    alone, own_k, _ = on_cpu(part[0], norms, part[1:3], part[3], longer, seen, None, eps=EPS)
    assert np.array_equal(alone[0], out[1, :few])
    assert np.array_equal(own_k[0], k[1, :, : few * HEAD_DIM])


@pytest.mark.cpp
def test_a_query_that_sees_nothing_gets_a_number():
    qkv, norms, angles, valid, cached, visible, _ = inputs(1, jnp.float32, True)
    out, _, _ = on_cpu(qkv, norms, angles, valid & False, cached, visible & False, None, eps=EPS)
    assert np.array_equal(out, np.zeros_like(out))


@forms
def test_what_is_not_finite_stays_so(form):
    """A model that is not finite ends in an error, not in an answer."""
    qkv, *rest = inputs(1, jnp.float32, True)
    spoiled = qkv.at[1, 4, 0, 0, 3].set(jnp.nan)
    out = np.asarray(form(spoiled, *rest)[0])
    assert np.isnan(out[1, 4, 0]).all() and np.isfinite(out[1, 4, 1]).all() and np.isfinite(out[1, 5]).all()


@pytest.mark.cpp
def test_widths_they_do_not_take_go_the_plain_way():
    assert suits(128) and suits(64) and not suits(80) and not suits(16)
    assert attention_cpu.why_not(96, jnp.float32) is None
    assert attention_cpu.why_not(80, jnp.float32) == "heads of width 80 are no whole multiple of 32"


@pytest.mark.cpp
def test_the_plain_form_can_be_chosen():
    """For whoever mistrusts the kernels."""
    code = (
        "import jax; from djax.models import attention, moe; w = jax.ShapeDtypeStruct((8, 64, 128), 'float32')\n"
        "print(attention.suits(128), *(moe.form(p, 999, w, w.dtype) for p in ('cuda', 'cpu')))"
    )
    for form, expected in (("djax", "True kernels cpu kernel"), ("xla", "False dense tiles")):
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"DJAX_KERNELS": form}, capture_output=True, text=True, cwd="/"
        )
        assert done.stdout.strip() == expected
    done = subprocess.run(
        [sys.executable, "-m", "djax.cli", "generate", "x"],
        env=os.environ | {"DJAX_KERNELS": "fast"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "DJAX_KERNELS: expected 'djax' or 'xla', got 'fast'" in done.stderr
    assert "Traceback" not in done.stderr
