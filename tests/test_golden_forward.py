"""Logits, keys and values against what dInfer's own code computed (tests/goldens; both random checkpoints, float32)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS

import djax
from djax.models import llada_moe
from djax.models.layers import Cache, flat

DATA = np.load(GOLDENS / "moe_forward.npz")
# Float32 against float64 of these models differs by up to 6e-5 in a logit; logits reach 22.
TOLERANCE = 3e-4

trunk = jax.jit(llada_moe.trunk, static_argnums=1)
trunk_with_routing = jax.jit(llada_moe.trunk_with_routing, static_argnums=1)


@pytest.fixture(params=["moe_a", "moe_b"])
def model(request):
    return request.getfixturevalue(request.param)


def golden(model, key):
    return DATA[f"{'moe_a' if model.config.layers == 3 else 'moe_b'}/{key}"]


def positions(start, end):
    return jnp.arange(start, end, dtype=jnp.int32)[None]


@pytest.mark.parametrize("case", ["full", "batch2"])
def test_full_canvas(model, case):
    logits = djax.logits(model, golden(model, f"{case}/tokens"))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, golden(model, f"{case}/logits"), atol=TOLERANCE)


def test_keys_and_values(model):
    tokens = golden(model, "full/tokens")
    x = llada_moe.embed(model.params, model.config, tokens)
    np.testing.assert_array_equal(x, golden(model, "full/hidden")[0])
    x, kv = trunk(model.params, model.config, x, positions(0, 48), jnp.ones((1, 48), bool))
    np.testing.assert_allclose(x, golden(model, "full/hidden")[-1], atol=TOLERANCE)
    for layer, expected in zip(kv, golden(model, "full/kv"), strict=True):
        for fresh, recorded in zip(layer, expected, strict=True):
            np.testing.assert_allclose(fresh.reshape(recorded.shape), recorded, atol=1e-4)


def test_router_choices(model):
    tokens = golden(model, "full/tokens")
    x = llada_moe.embed(model.params, model.config, tokens)
    _, routing = trunk_with_routing(model.params, model.config, x, positions(0, 48), jnp.ones((1, 48), bool))
    np.testing.assert_array_equal(np.stack([ids for _, ids in routing]), golden(model, "full/router_topk"))


@pytest.mark.parametrize("case", ["dual", "dual_window", "prefix"])
def test_window_against_cache(model, case):
    """Six tokens changed since the cache was filled; the window's own keys replace the cached ones."""
    start, end = (int(i) for i in golden(model, f"cache/{case}/range"))
    layers = tuple((flat(jnp.asarray(k)), flat(jnp.asarray(v))) for k, v in golden(model, "full/kv"))
    at = np.arange(48)[None]
    cache = Cache(layers, jnp.asarray((at < start) | (at >= end)))
    x = llada_moe.embed(model.params, model.config, golden(model, "cache/tokens")[:, start:end])
    x, _ = trunk(model.params, model.config, x, positions(start, end), jnp.ones((1, end - start), bool), cache)
    expected = golden(model, f"cache/{case}/logits")
    logits = llada_moe.unembed(model.params, model.config, x)
    np.testing.assert_allclose(logits[:, -expected.shape[1] :], expected, atol=TOLERANCE)


def test_window_on_unchanged_tokens_equals_the_full_forward(model):
    tokens = golden(model, "full/tokens")
    x = llada_moe.embed(model.params, model.config, tokens)
    full, kv = trunk(model.params, model.config, x, positions(0, 48), jnp.ones((1, 48), bool))
    at = jnp.arange(48)[None]
    cache = Cache(kv, (at < 20) | (at >= 32))
    window, _ = trunk(model.params, model.config, x[:, 20:32], positions(20, 32), jnp.ones((1, 12), bool), cache)
    np.testing.assert_allclose(window, full[:, 20:32], atol=1e-5)


def test_padding_is_seen_by_nobody(model):
    tokens = golden(model, "full/tokens")
    alone = djax.logits(model, tokens[:, :30])
    padded = djax.logits(model, tokens, lengths=[30])
    np.testing.assert_allclose(padded[:, :30], alone, atol=1e-4)


def test_bfloat16_parameters_stay_close():
    model = djax.load(GOLDENS / "moe_a", dtype="bfloat16")
    assert {a.dtype for a in map(jnp.asarray, model.params["layer_0"].values())} == {jnp.bfloat16.dtype}
    expected = DATA["moe_a/full/logits"]
    logits = np.asarray(djax.logits(model, DATA["moe_a/full/tokens"]))
    # bfloat16 keeps 8 bits: a percent or two of the logits' spread, far from what a wrong forward would give.
    assert np.sqrt(np.mean((logits - expected) ** 2)) < 0.03 * expected.std() + 0.1
