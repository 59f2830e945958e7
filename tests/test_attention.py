"""Attention's kernels, the GPU's interpreted on a CPU, against the plain form: values, gradients, and what is hidden."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djax.kernels import dispatch
from djax.kernels.attention import fused, on_cpu, plain
from djax.kernels.sight import HIDDEN_RANK, Sight
from djax.models.layers import rotary_angles
from djax.models.sight import rank_keys, see_in_order

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
    order = jnp.zeros_like(at) if blocks is None else jnp.broadcast_to(4 + jnp.arange(WINDOW) // blocks, at.shape)
    sight = see_in_order((at >= 0) & (at < 97), order)
    if blocks is None:
        sight = Sight(sight.rank)
    if not cache:
        return qkv, norms, angles, sight, None, None
    there = jnp.arange(CANVAS)[None, :]
    visible = (there < 97) & ((there < start) | (there >= start + WINDOW))
    kv = (BATCH, GROUPS, CANVAS * HEAD_DIM)
    return qkv, norms, angles, sight, (normal(*kv), normal(*kv)), rank_keys("all", None, visible, 1)


@forms
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("per_group", [1, 2])
@pytest.mark.parametrize(("dtype", "close"), [(jnp.float32, 2e-5), (jnp.bfloat16, 3e-2)])
def test_the_kernel_equals_the_plain_form(form, cache, per_group, dtype, close):
    arguments = inputs(per_group, dtype, cache)
    valid = np.asarray(arguments[3].valid)
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
    valid = np.asarray(arguments[3].valid)
    got, k, _ = form(*arguments)
    expected, plain_k, _ = plain(*arguments, eps=EPS)
    assert got.dtype == k.dtype == dtype
    np.testing.assert_allclose(np.asarray(got, np.float32)[valid], np.asarray(expected, np.float32)[valid], atol=close)
    np.testing.assert_allclose(np.asarray(k, np.float32), np.asarray(plain_k, np.float32), atol=close, rtol=close / 3)
    everything, _, _ = plain(*arguments[:3], Sight(arguments[3].rank), *arguments[4:], eps=EPS)
    assert np.abs(np.asarray(everything, np.float32) - np.asarray(expected, np.float32))[valid].max() > 10 * close


def layouts():
    """What decoding and training need: for each layout the sight of its N positions and the mask N x N, written out."""
    n, size = 24, 4
    p, b = np.arange(n), np.arange(n) // size
    yield "all", Sight(0 * p), np.ones((n, n), bool)
    yield "blocks", Sight(b, b + 1), b[None] <= b[:, None]
    yield "past", Sight(p, p + 1), p[None] <= p[:, None]
    order = np.random.default_rng(0).permutation(n)
    yield "a window in another order", Sight(order, order + 1), order[None] <= order[:, None]
    half = n // 2
    p, clean = p % half, p >= half
    b, q, k = p // size, np.s_[:, None], np.s_[None]
    same, noisy_too = b[q] == b[k], clean[q] == clean[k]
    # The noisy canvas, then the clean one: a noisy block sees itself and the clean blocks before it.
    mask = (same & noisy_too) | (clean[k] & (b[k] < b[q])) | (clean[q] & clean[k] & same)
    yield "noisy and clean", Sight(b, np.where(clean, b + 1, b), np.where(clean, 0, 1 + b), b + 1), mask
    # The same, causal inside the blocks.
    mask = np.where(clean[q], clean[k] & (p[k] <= p[q]), clean[k] & (b[k] < b[q]) | ~clean[k] & same & (p[k] <= p[q]))
    yield "packed blocks", Sight(p, np.where(clean, p + 1, b * size), np.where(clean, 0, 1 + b), p + 1), mask
    draft = np.arange(n) // 8
    zero = np.zeros(n, int)
    yield "drafts of a window", Sight(zero, zero + 1, draft + 1, zero + 1), draft[q] == draft[k]
    context = draft == 0
    yield "drafts and the window", Sight(zero, zero + 1, draft, zero + 1), context[k] | (draft[q] == draft[k])


@pytest.mark.parametrize("form", ["plain", "Pallas", pytest.param("C++", marks=pytest.mark.cpp)])
def test_sight_against_masks_written_out(form):
    """Every layout, with some positions hidden and with a cache that queries see up to their limit."""
    run = {"plain": partial(plain, eps=EPS), "Pallas": partial(fused, eps=EPS, interpret=INTERPRET)}.get(form)
    run = jax.jit(run or partial(on_cpu, eps=EPS))
    rng = np.random.default_rng(1)
    for name, sight, mask in layouts():
        n = len(mask)
        hidden = rng.random(n) < 0.2
        rank = np.where(hidden, HIDDEN_RANK, sight.rank)
        full = (rank, sight.context, sight.copy, sight.own)
        sight = Sight(*(None if a is None else jnp.asarray(np.stack([a, a]), jnp.int32) for a in full))
        mask = np.stack([mask & ~hidden[None]] * 2)
        cached_rank = rng.integers(0, 26, (2, 40))
        cached_rank[rng.random((2, 40)) < 0.2] = HIDDEN_RANK
        limit = np.full((2, n), HIDDEN_RANK) if sight.context is None else np.asarray(sight.context)
        there = cached_rank[:, None, :] < limit[:, :, None]
        assert np.array_equal(np.broadcast_to(sight.sees_fresh(), mask.shape), mask), name
        assert np.array_equal(np.broadcast_to(sight.sees_cached(cached_rank), there.shape), there), name
        qkv = rng.standard_normal((2, n, GROUPS, 4, HEAD_DIM)).astype(np.float32)
        cached = tuple(rng.standard_normal((2, GROUPS, 40 * HEAD_DIM)).astype(np.float32) for _ in range(2))
        angles = np.ones((2, n, HEAD_DIM // 2), np.float32), np.zeros((2, n, HEAD_DIM // 2), np.float32)
        out = np.asarray(run(qkv, None, angles, sight, cached, jnp.asarray(cached_rank, jnp.int32))[0])
        keys = [
            np.concatenate([c.reshape(2, GROUPS, 40, HEAD_DIM), qkv[:, :, :, s].swapaxes(1, 2)], 2)
            for c, s in zip(cached, (2, 3), strict=True)
        ]
        scores = np.einsum("bwgrk,bglk->bwgrl", qkv[:, :, :, :2], keys[0]) / HEAD_DIM**0.5
        seen = np.concatenate([there, mask], 2)
        weights = np.exp(scores) * seen[:, :, None, None, :]
        wanted = np.einsum("bwgrl,bglk->bwgrk", weights / weights.sum(-1, keepdims=True), keys[1])
        sees = seen.any(-1)
        np.testing.assert_allclose(out[sees], wanted.reshape(out.shape)[sees], atol=2e-5, err_msg=name)
        assert np.isfinite(out).all()


@forms
def test_hidden_keys_weigh_nothing(form):
    qkv, norms, angles, sight, (k, v), ranks = inputs(1, jnp.float32, True)
    hidden = jnp.repeat(ranks == HIDDEN_RANK, HEAD_DIM, axis=1)[:, None, :]
    spoiled = jnp.where(hidden, 1e6, k), jnp.where(hidden, -1e6, v)
    one = form(qkv, norms, angles, sight, (k, v), ranks)[0]
    two = form(qkv, norms, angles, sight, spoiled, ranks)[0]
    assert np.array_equal(np.asarray(one)[sight.valid], np.asarray(two)[sight.valid])


@forms
def test_the_gradient_is_the_plain_form_s(form):
    arguments = inputs(2, jnp.float32, False)

    def loss(f, qkv):
        out, k, v = f(qkv)
        return jnp.sum(jnp.where(arguments[3].valid[..., None, None], out, 0) ** 2) + jnp.sum(k * v)

    got = jax.grad(lambda x: loss(lambda x: form(x, *arguments[1:]), x))(arguments[0])
    expected = jax.grad(lambda x: loss(lambda x: plain(x, *arguments[1:], eps=EPS), x))(arguments[0])
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.cpp
def test_on_a_cpu_a_query_gets_the_same_bits_whatever_is_hidden_from_it():
    """Without the other row, on a canvas that is longer by hidden positions, and beside fewer queries, nothing changes."""
    qkv, norms, angles, sight, cached, ranks = inputs(2, jnp.float32, True)
    few = 25
    sight = Sight(sight.rank.at[1, few:].set(HIDDEN_RANK))
    out, k, _ = on_cpu(qkv, norms, angles, sight, cached, ranks, eps=EPS)
    part = tuple(a[1:, :few] for a in (qkv, *angles, sight.rank))
    longer = tuple(jnp.pad(a[1:], ((0, 0), (0, 0), (0, 50 * HEAD_DIM)), constant_values=9.0) for a in cached)
    seen = jnp.pad(ranks[1:], ((0, 0), (0, 50)), constant_values=HIDDEN_RANK)
    alone, own_k, _ = on_cpu(part[0], norms, part[1:3], Sight(part[3]), longer, seen, eps=EPS)
    assert np.array_equal(alone[0], out[1, :few])
    assert np.array_equal(own_k[0], k[1, :, : few * HEAD_DIM])


@pytest.mark.cpp
def test_a_query_that_sees_nothing_gets_a_number():
    qkv, norms, angles, sight, cached, ranks = inputs(1, jnp.float32, True)
    nobody = Sight(jnp.full_like(sight.rank, HIDDEN_RANK))
    out, _, _ = on_cpu(qkv, norms, angles, nobody, cached, jnp.full_like(ranks, HIDDEN_RANK), eps=EPS)
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
    def choose(head_dim, platform):
        case = dispatch.Attention(head_dim, jnp.float32)
        return dispatch.choose(case, platform, dispatch.foresee_site("djax", None))

    on_gpu = [choose(head_dim, "cuda").back_end.name for head_dim in (128, 64, 80, 16)]
    assert on_gpu == ["Pallas", "Pallas", "XLA", "XLA"]
    assert choose(96, "cpu").back_end.name == "C++"
    assert choose(80, "cpu").refused[0][1] == "heads of width 80 are no whole multiple of 32"


@pytest.mark.cpp
def test_the_plain_form_can_be_chosen():
    """For whoever mistrusts the kernels."""
    code = (
        "import jax.numpy as jnp; from djax.kernels import dispatch, choice; f32 = jnp.float32\n"
        "site = dispatch.foresee_site(choice.read_choice(), None)\n"
        "cases = dispatch.Attention(128, f32), dispatch.Experts(999, (8, 64, 128), f32, f32)\n"
        "asked = (cases[0], 'cuda'), (cases[1], 'cuda'), (cases[1], 'cpu')\n"
        "print(*(dispatch.choose(case, platform, site).back_end.name for case, platform in asked))"
    )
    for form, expected in (("djax", "Pallas Pallas C++"), ("xla", "XLA dense tiles")):
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
