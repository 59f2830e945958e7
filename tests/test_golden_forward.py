"""Logits, keys and values, layers' outputs and routers' choices against what dInfer's own code computed (tests/goldens; random
checkpoints of every family, float32)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS

import djax
from djax.convert.llada2 import order_rotated
from djax.kernels.plain import flat, rotate
from djax.models import moe
from djax.models.layers import Cache, rotary_angles
from djax.models.sight import rank_keys, see
from djax.models.transformer import Layer

DATA = {key: array for name in ("moe", "other") for key, array in np.load(GOLDENS / f"{name}_forward.npz").items()}
# Float32 against float64 of these models differs by up to 6e-5 in a logit; logits reach 22.
TOLERANCE = 3e-4

on_all = pytest.mark.parametrize("model", ["moe_a", "moe_b", "dense", "llada2"], indirect=True)
on_all_with_a_router = pytest.mark.parametrize("model", ["moe_a", "moe_b", "llada2"], indirect=True)


@pytest.fixture(params=["moe_a", "moe_b", "dense"])
def model(request):
    """Those whose positions all see each other."""
    return request.getfixturevalue(request.param)


@partial(jax.jit, static_argnames=("family", "config"))
def window(params, x, at, cache, *, family, config):
    """Logits of the positions `at` against a cache, and their keys and values."""
    x, fresh = family.trunk(params, config, x, at, see(family.visibility, at, jnp.ones(at.shape, bool), 16), cache)
    return family.unembed(params, config, x), fresh


@partial(jax.jit, static_argnames=("family", "config"))
def canvas(params, x, block, *, family, config):
    """A whole canvas: the trunk's output, keys and values, each layer's output, and the routers' probabilities and choices."""
    at = positions(0, x.shape[1])
    sight = see("all" if block is None else family.visibility, at, jnp.ones(x.shape[:2], bool), block)
    (x, kv), collected = family.network(config).apply(
        {"params": params},
        *(x, at, sight, None),
        method="trunk",
        capture_intermediates=lambda module, _: isinstance(module, Layer),
        mutable=["intermediates", "routing"],
    )
    names = [f"layer_{n}" for n in range(config.layers)]
    outputs = [collected["intermediates"][name]["__call__"][0][0] for name in names]
    routing = collected.get("routing", {})
    return x, kv, outputs, [routing[name]["choice"][0] for name in names if name in routing]


def run(function, model, x, *arguments):
    """Either of them on tokens, or on embeddings."""
    x = model.family.embed(model.params, model.config, x) if x.ndim == 2 else x
    return function(model.params, x, *arguments, family=model.family, config=model.config)


def name_of(model):
    name = model.family.name
    return {"llada": "dense", "llada_moe": "moe_a" if model.config.layers == 3 else "moe_b"}.get(name, name)


def golden(model, key):
    return DATA[f"{name_of(model)}/{key}"]


def positions(start, end):
    return jnp.arange(start, end, dtype=jnp.int32)[None]


def recorded_canvas(model):
    """Name and tokens of the recorded canvas, and its block length: LLaDA2's is under its mask."""
    if not model.block_causal:
        return "full", golden(model, "full/tokens"), None
    block = int(golden(model, "masked/block_length"))
    return "masked", golden(model, "masked/tokens"), block


def recorded_kv(model, key):
    """Keys and values `[N, 2, B, G, L, K]` as djax has them: the dense family's keys were recorded before rotary, and those of
    LLaDA2 with the features that rotary leaves alone at the end."""
    c = model.config
    if name_of(model) == "dense":
        kv = golden(model, f"{key}_before_rope").copy()
        angles = rotary_angles(positions(0, 48), c.head_dim, c.rope_theta)
        kv[:, 0] = [rotate(jnp.asarray(keys).swapaxes(1, 2), *angles).swapaxes(1, 2) for keys in kv[:, 0]]
        return kv
    kv = golden(model, key).copy()
    if model.block_causal:
        kv[:, 0] = kv[:, 0][..., order_rotated(c.head_dim, c.rotated)]
    return kv


def cache_of(kv, visible):
    return Cache(
        tuple((flat(jnp.asarray(k)), flat(jnp.asarray(v))) for k, v in kv), rank_keys("all", None, jnp.asarray(visible), 1)
    )


def assert_kv(kv, recorded):
    for layer, expected in zip(kv, recorded, strict=True):
        for fresh, of_dinfer in zip(layer, expected, strict=True):
            np.testing.assert_allclose(fresh.reshape(of_dinfer.shape), of_dinfer, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "case"),
    [("moe_a", "full"), ("moe_a", "batch2"), ("moe_b", "full"), ("moe_b", "batch2"), ("dense", "full")],
    indirect=["model"],
)
def test_full_canvas(model, case):
    logits = djax.logits(model, golden(model, f"{case}/tokens"))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, golden(model, f"{case}/logits"), atol=TOLERANCE)


def test_llada2s_canvas_with_and_without_the_mask(llada2):
    tokens, block = DATA["llada2/masked/tokens"], int(DATA["llada2/masked/block_length"])
    full, masked = DATA["llada2/full/logits"], DATA["llada2/masked/logits"]
    np.testing.assert_allclose(djax.logits(llada2, tokens), full, atol=TOLERANCE)
    np.testing.assert_allclose(djax.logits(llada2, tokens, block_length=block), masked, atol=TOLERANCE)
    assert np.abs(full - masked).max() > 1, "the comparison would notice no mask"


@on_all
def test_layers_keys_and_values(model):
    case, tokens, block = recorded_canvas(model)
    hidden = golden(model, f"{case}/hidden")  # the embedding, what each layer but the last gave, the last norm's output
    np.testing.assert_array_equal(model.family.embed(model.params, model.config, tokens), hidden[0])
    x, kv, outputs, _ = run(canvas, model, tokens, block)
    np.testing.assert_allclose(outputs[:-1], hidden[1:-1], atol=TOLERANCE)
    np.testing.assert_allclose(x, hidden[-1], atol=TOLERANCE)
    assert_kv(kv, recorded_kv(model, f"{case}/kv"))


@on_all_with_a_router
def test_router_choices(model):
    case, tokens, block = recorded_canvas(model)
    _, _, _, routing = run(canvas, model, tokens, block)
    logits = golden(model, f"{case}/router_logits")
    probs = jax.nn.sigmoid(logits) if model.block_causal else jax.nn.softmax(logits)
    np.testing.assert_allclose([p for p, _ in routing], probs, atol=1e-5)
    np.testing.assert_array_equal([ids for _, ids in routing], golden(model, f"{case}/router_topk"))


def test_llada2s_router_weights(llada2):
    """The recorded logits through the router alone: the identity for its matrix hands them on."""
    c, recorded = llada2.config, (DATA[f"llada2/masked/router_{name}"] for name in ("logits", "topk", "weights"))
    for n, (logits, ids, weights) in enumerate(zip(*recorded, strict=True), c.dense_layers):
        bias = llada2.params[f"layer_{n}"]["router_bias"]
        numbers = (c.top, c.expert_groups, c.top_groups, c.router_scale)
        routing = moe.route_in_groups(jnp.asarray(logits), jnp.eye(c.experts), bias, *numbers)
        np.testing.assert_array_equal(routing.ids, ids)
        np.testing.assert_allclose(routing.weights, weights, atol=1e-5)
        gates = np.zeros_like(logits)
        np.put_along_axis(gates, ids, weights, axis=1)
        np.testing.assert_allclose(routing.gates, gates, atol=1e-5)


@pytest.mark.parametrize("case", ["dual", "dual_window", "prefix"])
def test_window_against_cache(model, case):
    """Six tokens changed since the cache was filled; the window's own keys replace the cached ones."""
    start, end = (int(i) for i in golden(model, f"cache/{case}/range"))
    at = np.arange(48)[None]
    cache = cache_of(recorded_kv(model, "full/kv"), (at < start) | (at >= end))
    logits, fresh = run(window, model, golden(model, "cache/tokens")[:, start:end], positions(start, end), cache)
    expected = golden(model, f"cache/{case}/logits")
    np.testing.assert_allclose(logits[:, -expected.shape[1] :], expected, atol=TOLERANCE)
    if f"{name_of(model)}/cache/{case}/kv" in DATA:
        assert_kv(fresh, golden(model, f"cache/{case}/kv")[..., start:end, :])


def test_llada2s_block_against_the_blocks_before_it(llada2):
    kv = recorded_kv(llada2, "masked/kv")
    cache = cache_of(kv, positions(0, 48) < 32)
    logits, fresh = run(window, llada2, DATA["llada2/masked/tokens"][:, 32:], positions(32, 48), cache)
    np.testing.assert_allclose(logits, DATA["llada2/step/logits"], atol=TOLERANCE)
    assert_kv(fresh, kv[..., 32:, :])


@pytest.mark.parametrize("model", ["moe_a", "moe_b"], indirect=True)
def test_expected_embeddings(model):
    """The recorded logits as embeddings where a mask stands, and the network on these."""
    tokens, logits, soft = (golden(model, key) for key in ("cache/tokens", "full/logits", "soft/embeds"))
    x = model.family.embed(model.params, model.config, tokens)
    expected = model.family.expected_embedding(model.params, model.config, x, logits=jnp.asarray(logits))
    masked = (tokens == model.config.mask_id)[..., None]
    np.testing.assert_allclose(jnp.where(masked, x + golden(model, "soft/weight") * expected, x), soft, atol=1e-5)
    x, *_ = run(canvas, model, jnp.asarray(soft), None)
    np.testing.assert_allclose(
        model.family.unembed(model.params, model.config, x), golden(model, "soft/logits"), atol=TOLERANCE
    )


def test_window_on_unchanged_tokens_equals_the_full_forward(model):
    tokens = golden(model, "full/tokens")
    full, kv, *_ = run(canvas, model, tokens, None)
    at = positions(0, 48)
    logits, _ = run(
        window, model, tokens[:, 20:32], positions(20, 32), Cache(kv, rank_keys("all", at, (at < 20) | (at >= 32), 1))
    )
    np.testing.assert_allclose(logits, model.family.unembed(model.params, model.config, full[:, 20:32]), atol=1e-4)


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
