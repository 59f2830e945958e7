"""The expert layer's back ends and their gradients against the plain per-token form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djax.kernels import dispatch, experts, experts_cpu, experts_gpu
from djax.kernels.weights import Int8
from djax.models import moe, quantized

# The widths are the least that the kernel takes.
TOKENS, WIDTH, EXPERTS, EXPERT_WIDTH, TOP = 70, 64, 6, 64, 2
# On a machine with a GPU the kernel itself runs.
INTERPRET = jax.default_backend() == "cpu"
kernel = partial(experts.grouped, summed=partial(experts_gpu.summed, interpret=INTERPRET))
cpu_kernel = pytest.param(partial(experts.grouped, summed=experts_cpu.summed), marks=pytest.mark.cpp)
dense_kernel = partial(experts.dense_kernel, interpret=INTERPRET)


def layer(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    x = jax.random.normal(keys[0], (TOKENS, WIDTH))
    router = jax.random.normal(keys[1], (WIDTH, EXPERTS)) * WIDTH**-0.5
    w_in = jax.random.normal(keys[2], (EXPERTS, WIDTH, 2 * EXPERT_WIDTH)) * WIDTH**-0.5
    w_out = jax.random.normal(keys[3], (EXPERTS, EXPERT_WIDTH, WIDTH)) * EXPERT_WIDTH**-0.5
    return x, router, w_in, w_out


CHOICES = {
    "routed": lambda ids: ids,
    "all to one expert": lambda ids: jnp.stack([jnp.full(TOKENS, 3), jnp.full(TOKENS, 1)], axis=1).astype(jnp.int32),
    "an expert without tokens": lambda ids: jnp.where(ids == 0, 5, ids),
}


def rerouted(routing, choose):
    """The routing with other ids, its gates made again from ids and weights."""
    ids = choose(routing.ids)
    gates = jnp.sum(jax.nn.one_hot(ids, EXPERTS) * routing.weights[..., None], axis=1)
    return routing._replace(ids=ids, gates=gates)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("back_end", [experts.dense, experts.grouped, kernel, dense_kernel, cpu_kernel, experts.experts])
def test_back_ends_equal_the_plain_form_and_its_gradients(back_end, choice):
    x, router, w_in, w_out = layer()
    routing = rerouted(moe.route(x, router, TOP, renormalise=False), CHOICES[choice])
    valid = jnp.arange(TOKENS) < TOKENS - 7

    def value_and_gradients(f):
        def loss(x, weights, w_in, w_out):
            here = rerouted(routing._replace(weights=weights), lambda ids: ids)
            return jnp.sum(jnp.where(valid[:, None], f(x, here, w_in, w_out, valid), 0) ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(x, routing.weights, w_in, w_out)

    for got, expected in zip(
        jax.tree.leaves(value_and_gradients(back_end)), jax.tree.leaves(value_and_gradients(experts.plain)), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=2e-5 * float(jnp.max(jnp.abs(expected))))


@pytest.mark.parametrize("back_end", [experts.grouped, kernel, cpu_kernel])
def test_many_tiles_a_group(back_end):
    """More rows an expert than the widest tile holds."""
    x, router, w_in, w_out = layer()
    x = jnp.tile(x, (20, 1)) + jnp.arange(20 * TOKENS)[:, None] * 1e-3
    routing = moe.route(x, router, TOP, renormalise=False)
    valid = jnp.ones(len(x), bool)
    got = back_end(x, routing, w_in, w_out, valid)
    expected = experts.dense(x, routing, w_in, w_out, valid)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(expected))))


@pytest.mark.parametrize("tokens", [20, 140, 700])
def test_one_loop_over_tiles_for_few_rows_two_for_many(tokens):
    x, router, w_in, w_out = layer()
    x = jnp.resize(x, (tokens, WIDTH))
    arguments = x, moe.route(x, router, TOP, renormalise=False), w_in, w_out, jnp.ones(tokens, bool)
    loops = jax.jit(experts.grouped).lower(*arguments).as_text().count("stablehlo.while")
    assert loops == (1 if tokens * TOP < 256 else 2)
    np.testing.assert_allclose(experts.grouped(*arguments), experts.plain(*arguments), atol=2e-4)


def test_the_kernel_in_bfloat16_rounds_where_the_plain_form_does():
    x, router, w_in, w_out = layer()
    routing = moe.route(x, router, TOP, renormalise=False)
    exact = experts.plain(x, routing, w_in, w_out, None)
    x, w_in, w_out = (a.astype(jnp.bfloat16) for a in (x, w_in, w_out))
    got = kernel(x, routing, w_in, w_out, jnp.ones(TOKENS, bool))
    assert got.dtype == jnp.bfloat16

    def off(y):
        return float(jnp.max(jnp.abs(y.astype(jnp.float32) - exact)))

    assert off(got) <= 1.5 * off(experts.plain(x, routing, w_in, w_out, None))


def as_int8(name, w):
    """A matrix as it is held once quantised, and what it stands for."""
    (_, held), (_, scale) = quantized.quantize((name,), np.asarray(w))
    return Int8(jnp.asarray(held), jnp.asarray(scale)), jnp.asarray(held * scale)


@pytest.mark.parametrize("back_end", [experts.plain, experts.dense, experts.grouped, kernel, dense_kernel, cpu_kernel])
def test_int8_weights_are_what_they_stand_for(back_end):
    x, router, w_in, w_out = layer()
    w_out = w_out * jnp.arange(1, EXPERT_WIDTH + 1)[None, :, None]  # scales that differ
    routing, valid = moe.route(x, router, TOP, renormalise=False), jnp.ones(TOKENS, bool)
    (held_in, wide_in), (held_out, wide_out) = as_int8("w_in", w_in), as_int8("w_out", w_out)
    expected = experts.plain(x, routing, wide_in, wide_out, valid)
    got = back_end(x, routing, held_in, held_out, valid)
    np.testing.assert_allclose(got, expected, atol=2e-5 * float(jnp.max(jnp.abs(expected))))
    # Half a step of the scale, which is a 127th of the channel's largest.
    for w, wide, axis in ((w_in, wide_in, 1), (w_out, wide_out, 2)):
        step = np.max(np.abs(w), axis=axis, keepdims=True) / 127
        assert 0.45 < float(np.max(np.abs(w - wide) / step)) <= 0.5 + 1e-4


@pytest.mark.parametrize("back_end", [experts.dense, kernel, dense_kernel, cpu_kernel])
def test_int8_weights_in_a_bfloat16_model(back_end):
    x, router, w_in, w_out = layer()
    routing, valid = moe.route(x, router, TOP, renormalise=False), jnp.ones(TOKENS, bool)
    (held_in, wide_in), (held_out, wide_out) = as_int8("w_in", w_in), as_int8("w_out", w_out)
    exact = experts.plain(x, routing, wide_in, wide_out, valid)
    got = back_end(x.astype(jnp.bfloat16), routing, held_in, held_out, valid)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=0.02 * float(jnp.max(jnp.abs(exact))))


def test_padding_costs_the_kernel_nothing_and_is_finite():
    x, router, w_in, w_out = layer()
    routing = moe.route(x, router, TOP, renormalise=False)
    nobody = kernel(x, routing, w_in, w_out, jnp.zeros(TOKENS, bool))
    np.testing.assert_array_equal(nobody, 0)


@pytest.mark.cpp
def test_on_a_cpu_a_token_gets_the_same_bits_whatever_is_computed_beside_it():
    x, router, w_in, w_out = layer()
    weights, ids, *_ = moe.route(x, router, TOP, renormalise=False)
    together = experts_cpu.summed(x, weights, ids, w_in, w_out)
    for some in (slice(0, 1), slice(3, 5), slice(10, 40), slice(64, 70)):
        assert np.array_equal(experts_cpu.summed(x[some], weights[some], ids[some], w_in, w_out), together[some])
    many = experts_cpu.summed(*(jnp.tile(a, (40, 1)) for a in (x, weights, ids)), w_in, w_out)
    assert np.array_equal(many.reshape(40, *together.shape), jnp.broadcast_to(together, (40, *together.shape)))
    assert experts_cpu.summed(x[:0], weights[:0], ids[:0], w_in, w_out).shape == (0, WIDTH)
    nobody = experts_cpu.summed(x, weights, jnp.full_like(ids, EXPERTS), w_in, w_out)
    assert np.array_equal(nobody, jnp.zeros_like(nobody))


@pytest.mark.cpp
def test_more_hidden_rows_than_exist_at_a_time():
    """20,000 rows of one expert and a few of the others: 16,384 hidden rows are kept."""
    x, _, w_in, w_out = layer()
    rows = 20_000
    ids = jnp.concatenate([jnp.full((rows, 1), 2), jnp.arange(60)[:, None] % EXPERTS]).astype(jnp.int32)
    x = jnp.resize(x, (len(ids), WIDTH))
    got = experts_cpu.summed(x, jnp.ones(ids.shape), ids, w_in, w_out)
    for some in (slice(0, 70), slice(rows - 40, rows + 60)):
        ones = jnp.ones(ids[some].shape)
        expected = experts.plain(x[some], experts.Routing(ones, ids[some], None, None), w_in, w_out, None)
        np.testing.assert_allclose(got[some], expected, atol=2e-5 * float(jnp.max(jnp.abs(expected))))


@pytest.mark.cpp
def test_which_form_runs():
    def form(platform, tokens, shape):
        case = dispatch.Experts(tokens, shape, jnp.float32, jnp.float32)
        return dispatch.choose(case, platform, dispatch.foresee_site("djax", None)).back_end.name

    real, narrow = (64, 2048, 2048), (8, 48, 64)
    assert [form("cpu", 16, real), form("cpu", 4096, real), form("cpu", 16, narrow)] == ["C++", "C++", "tiles"]
    windows, refreshes = ([form("cuda", tokens, real) for tokens in some] for some in ((96, 256), (257, 4096)))
    assert (windows, refreshes) == (["dense Pallas"] * 2, ["Pallas"] * 2)
    assert form("cuda", 4096, narrow) == form("tpu", 4096, real) == "dense"


def test_router_weights():
    x, router, *_ = layer()
    weights, ids, gates, probs = moe.route(x.astype(jnp.bfloat16), router, TOP, renormalise=False)
    assert (weights.dtype, ids.dtype) == (jnp.float32, jnp.int32)
    np.testing.assert_allclose(probs.sum(axis=-1), 1, atol=1e-6)
    np.testing.assert_array_equal(weights, np.sort(probs, axis=-1)[:, ::-1][:, :TOP])
    assert float(weights.sum(axis=-1).max()) < 1
    renormalised, _, by_expert, _ = moe.route(x, router, TOP, renormalise=True)
    np.testing.assert_allclose(renormalised.sum(axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(by_expert.sum(axis=-1), 1, atol=1e-6)
    np.testing.assert_array_equal(jnp.take_along_axis(gates, ids, axis=1), weights)
    assert np.all((gates > 0).sum(axis=-1) == TOP)


def test_ties_between_experts_go_to_the_lower_id():
    x, *_ = layer()
    _, ids, gates, _ = moe.route(x, jnp.zeros((WIDTH, EXPERTS)), TOP, renormalise=False)
    assert np.all(np.asarray(ids) == np.arange(TOP))
    assert np.array_equal(np.asarray(gates) > 0, np.broadcast_to(np.arange(EXPERTS) < TOP, gates.shape))
