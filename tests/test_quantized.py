"""Models whose matrices are int8: they compute with what those stand for, on every family, from either layout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS
from flax import traverse_util

import djax
from djax.convert.safetensors_files import TensorFiles, write
from djax.errors import CheckpointError, OptionError
from djax.models.quantized import SCALE, SHARED

PROMPTS = [[3, 1, 4, 1, 5], [2, 7]]


def stood_for(model):
    """The same model with the weights that its int8 values and scales stand for, in its own dtype."""
    flat = traverse_util.flatten_dict(model.params)
    wide = {}
    for path, leaf in flat.items():
        scale = flat.get((*path[:-1], path[-1] + SCALE))
        if not path[-1].endswith(SCALE):
            wide[path] = leaf if scale is None else (leaf * scale).astype(model.dtype)
    return dataclasses.replace(model, params=traverse_util.unflatten_dict(wide))


@pytest.mark.long
@pytest.mark.parametrize("name", ["moe_a", "dense", "llada2"])
def test_int8_computes_with_what_it_stands_for(name):
    model, plain = djax.load(GOLDENS / name, quantize="int8"), djax.load(GOLDENS / name)
    assert (model.quantized, plain.quantized) == ("int8", None)
    assert model.parameter_count == plain.parameter_count
    held = [path[-1].key for path, a in jax.tree_util.tree_leaves_with_path(model.params) if a.dtype == jnp.int8]
    assert set(held) <= set(SHARED) and {"qkv", "o"} < set(held)
    tokens = np.arange(24).reshape(2, 12) % plain.config.vocab
    wide = stood_for(model)
    np.testing.assert_allclose(djax.logits(model, tokens), djax.logits(wide, tokens), atol=3e-4)
    # And not with the weights that came.
    assert float(jnp.max(jnp.abs(djax.logits(model, tokens) - djax.logits(plain, tokens)))) > 1e-3
    options = dict(gen_length=16, block_length=8, cache=djax.Dual() if name != "llada2" else djax.Block())
    for one, other in zip(djax.generate(model, PROMPTS, **options), djax.generate(wide, PROMPTS, **options), strict=True):
        np.testing.assert_array_equal(one.canvas, other.canvas)


def test_from_orbax_as_from_hf_and_not_back(tmp_path):
    model = djax.load(GOLDENS / "moe_a", quantize="int8")
    assert "int8 and float32" in repr(model)
    djax.save(djax.load(GOLDENS / "moe_a"), tmp_path / "orbax")
    jax.tree.map(np.testing.assert_array_equal, djax.load(tmp_path / "orbax", quantize="int8").params, model.params)
    for write_it in (djax.save, djax.export_hf):
        with pytest.raises(OptionError, match="expected one that was not quantised, got one that holds int8"):
            write_it(model, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_bytes_of_a_bfloat16_model():
    wide, held = (djax.load(dtype="bfloat16", quantize=q) for q in (None, "int8"))
    flat = traverse_util.flatten_dict(wide.params)
    matrices = sum(a.nbytes for path, a in flat.items() if path[-1] in SHARED)
    scales = sum(a.nbytes for path, a in traverse_util.flatten_dict(held.params).items() if path[-1].endswith(SCALE))
    assert matrices > 0.9 * wide.parameter_bytes
    assert held.parameter_bytes == wide.parameter_bytes - matrices // 2 + scales


def test_what_cannot_be_quantised(tmp_path):
    with pytest.raises(OptionError, match="quantize: expected None or 'int8', got 'int4'"):
        djax.load(quantize="int4")
    with TensorFiles(GOLDENS / "moe_a") as files:
        tensors = {name: files.read(name) for name in files.found}
    tensors["model.layers.0.self_attn.o_proj.weight"][0, 0] = np.inf
    (tmp_path / "config.json").write_bytes((GOLDENS / "moe_a" / "config.json").read_bytes())
    write(tmp_path, {name: (a.shape, a.dtype) for name, a in tensors.items()}, iter(tensors.items()))
    with pytest.raises(CheckpointError, match=r"layer_0\.o has values that are NaN or infinite: these cannot be quantised"):
        djax.load(tmp_path, quantize="int8")
