"""Checkpoints: strict reading, bit-equal export, the layouts, Orbax, and what happens to damaged ones."""

import dataclasses
import json
import re
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS
from flax import traverse_util
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import djax
from djax.checkpoints.checkpoint import inspect
from djax.convert.rules import check
from djax.errors import CheckpointError, OptionError, PathError, UnsupportedModelError
from djax.models import FAMILIES


@pytest.fixture
def copy(tmp_path):
    """A writable copy of a checkpoint and its tensors."""
    directory = tmp_path / "checkpoint"
    shutil.copytree(GOLDENS / "moe_a", directory)
    return directory


def tensors(directory):
    return load_file(directory / "model.safetensors")


def same_params(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_export_in_another_dtype(tmp_path):
    wide = djax.load(GOLDENS / "moe_a")
    djax.export_hf(wide, tmp_path / "wide", dtype="float32")
    assert {t.dtype for t in tensors(tmp_path / "wide").values()} == {np.dtype(np.float32)}
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["torch_dtype"] == "float32"
    narrow = djax.load(tmp_path / "wide", dtype="bfloat16")
    djax.export_hf(narrow, tmp_path / "narrow")
    assert {t.dtype for t in tensors(tmp_path / "narrow").values()} == {jnp.dtype(jnp.bfloat16)}, "never wider than it is"


def test_large_exports_are_cut_into_shards(tmp_path, moe_a, monkeypatch):
    monkeypatch.setattr("djax.convert.safetensors_files.write.__defaults__", (200_000,))
    djax.export_hf(moe_a, tmp_path / "out")
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert max(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")) < 220_000
    same_params(djax.load(tmp_path / "out").params, moe_a.params)


@pytest.mark.parametrize("name", ["moe_a", "moe_b"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_is_bit_equal(name, dtype, tmp_path):
    djax.export_hf(djax.load(GOLDENS / name, dtype=dtype), tmp_path / "out")
    before, after = tensors(GOLDENS / name), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype == jnp.bfloat16
        assert before[key].tobytes() == after[key].tobytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (GOLDENS / name / "config.json").read_text()
    )
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_with_an_index(copy, moe_a):
    all_ = tensors(copy)
    names = sorted(all_)
    shards = {"a.safetensors": names[:40], "b.safetensors": names[40:]}
    for file, part in shards.items():
        save_file({n: all_[n] for n in part}, copy / file)
    index = {"metadata": {}, "weight_map": {n: f for f, part in shards.items() for n in part}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model.safetensors").unlink()
    same_params(djax.load(copy).params, moe_a.params)

    (copy / "b.safetensors").rename(copy / "c.safetensors")
    with pytest.raises(PathError, match=r"b.safetensors: this shard is listed in .*index.json but is not there"):
        djax.load(copy)
    save_file({n: all_[n] for n in names[41:]}, copy / "b.safetensors")
    with pytest.raises(CheckpointError, match=rf"disagrees with .*absent \['{re.escape(names[40])}'\]"):
        djax.load(copy)
    index["weight_map"][names[0]] = "../elsewhere.safetensors"
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="points outside"):
        djax.load(copy)
    (copy / "model.safetensors.index.json").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="expected JSON"):
        djax.load(copy)
    (copy / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="expected JSON with a 'weight_map'"):
        djax.load(copy)


def test_dinfers_fused_layout(copy, moe_a):
    """w1 holds an expert's gate rows, then its up rows; w2 its down projection."""
    all_ = tensors(copy)
    fused = {name: t for name, t in all_.items() if ".experts." not in name}
    for n in range(3):
        experts = f"model.layers.{n}.mlp.experts"
        pairs = [[all_[f"{experts}.{e}.{part}_proj.weight"] for part in ("gate", "up")] for e in range(8)]
        fused[f"model.layers.{n}.mlp.w1"] = np.stack([np.concatenate(pair) for pair in pairs])
        fused[f"model.layers.{n}.mlp.w2"] = np.stack([all_[f"{experts}.{e}.down_proj.weight"] for e in range(8)])
    save_file(fused, copy / "model.safetensors")
    same_params(djax.load(copy).params, moe_a.params)


def shapes(params):
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(params).items()}


def test_every_rule_table_fills_every_element_once(moe_a):
    for table in FAMILIES["llada_moe"].layouts(moe_a.config).values():
        filled = {path: np.zeros(shape, int) for path, shape in shapes(moe_a.params).items()}
        for rule in table:
            filled[rule.target][rule.index] += 1
        assert all(np.all(count == 1) for count in filled.values())


def test_a_gap_in_a_rule_table_is_found(moe_a):
    table = FAMILIES["llada_moe"].layouts(moe_a.config)["hf"]
    found = {rule.source: (rule.shape, "F32") for rule in table}
    check(found, table, shapes(moe_a.params))
    with pytest.raises(CheckpointError, match=r"1 problems.*\n.*parameter extra has 3 elements, rules fill 0"):
        check(found, table, shapes(moe_a.params) | {("extra",): (3,)})


def test_all_problems_are_reported_at_once(copy):
    broken = tensors(copy)
    del broken["model.norm.weight"]
    broken["model.layers.9.mlp.gate.weight"] = np.zeros((2, 2), np.float32)
    broken["lm_head.weight"] = broken["lm_head.weight"][:, :10].copy()
    broken["model.layers.0.mlp.gate.weight"] = np.zeros((8, 64), np.int32)
    save_file(broken, copy / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        djax.load(copy)
    for line in (
        "4 problems",
        "missing: model.norm.weight [64]",
        "unexpected: model.layers.9.mlp.gate.weight [2, 2]",
        "shape: lm_head.weight is [320, 10], the config asks for [320, 64]",
        "dtype: model.layers.0.mlp.gate.weight is I32, expected one of F64, F32, F16, BF16",
    ):
        assert line in str(error.value)


def lacks(prefix):
    return lambda name: name.removeprefix(prefix)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: f"module.{name}", "102 of 102 tensors' names begin with 'module.', which is no part of them"),
        (
            lambda name: f"_orig_mod.{name}",
            "names begin with '_orig_mod.'.*remove '_orig_mod.' from the names, or save the state",
        ),
        (lambda name: f"model.{name}", "102 of 102 tensors' names begin with 'model.'"),
        (lambda name: f"module._orig_mod.{name}", "begin with 'module._orig_mod.'"),
        (lambda name: f"base_model.model.{name}", "begin with 'base_model.model.'"),
        (lambda name: f"module.{name}" if "layers" in name else name, "99 of 102 tensors' names begin with 'module.'"),
        (lacks("model."), "101 of 102 tensors' names lack 'model.' at their beginning .*; put 'model.' before them"),
        (lambda name: name.replace("layers.", "layers._fsdp_wrapped_module."), "have parts that wrappers of torch add"),
    ],
)
def test_a_prefix_is_one_problem(copy, rename, message):
    save_file({rename(name): t for name, t in tensors(copy).items()}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"1 problems with the checkpoint's tensors:\n  names: .*{message}") as error:
        djax.load(copy)
    assert str(error.value).count("\n") == 1


def test_a_prefix_hides_no_other_problem(copy):
    broken = tensors(copy)
    del broken["model.norm.weight"]
    broken["lm_head.weight"] = broken["lm_head.weight"][:, :10].copy()
    save_file({f"module.{name}": t for name, t in broken.items()} | {"more": np.zeros(3)}, copy / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        djax.load(copy)
    lines = str(error.value).split("\n")
    assert [line.split()[0] for line in lines] == ["4", "names:", "missing:", "shape:", "unexpected:"]
    assert "missing: model.norm.weight" in lines[2] and "shape: lm_head.weight" in lines[3]


def test_a_long_list_of_problems_is_cut(copy):
    save_file({f"{n}{'x' * 2000}": np.zeros(1, np.float32) for n in range(200)}, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="302 problems") as error:
        djax.load(copy)
    lines = str(error.value).split("\n")
    assert len(lines) == 12 and lines[-1] == "  and 292 more" and max(map(len, lines)) < 1000
    edit(copy, **{key: None for key in json.loads((copy / "config.json").read_text()) if key != "architectures"})
    with pytest.raises(UnsupportedModelError) as error:
        djax.load(copy)
    assert len(str(error.value)) < 5000


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_safetensors(copy, keep):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a whole safetensors file"):
        djax.load(copy)


def test_paths(tmp_path):
    with pytest.raises(PathError, match=r"nowhere: expected a checkpoint directory, this does not exist"):
        djax.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(PathError, match="this is a file"):
        djax.load(tmp_path / "file")
    with pytest.raises(PathError, match=r"expected a checkpoint with a config.json, there is none"):
        djax.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        djax.load(tmp_path / "nowhere")


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(PathError, match=r"expected model.safetensors or model.safetensors.index.json there, found neither"):
        djax.load(copy)


def edit(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    config.update(changes)
    config = {k: v for k, v in config.items() if v != "absent"}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, UnsupportedModelError, r"unknown model family.*GPT2.*djax knows llada_moe"),
        ({"architectures": "absent"}, UnsupportedModelError, r"architectures=\[\]"),
        ({"rope_scaling": {"type": "yarn"}}, UnsupportedModelError, r"rope_scaling=\{'type': 'yarn'\} \(implemented: None\)"),
        ({"shared_expert_intermediate_size": 32}, UnsupportedModelError, "shared_expert_intermediate_size=32"),
        ({"moe_layer_freq": [0, 1, 1]}, UnsupportedModelError, "every layer is MoE"),
        ({"num_key_value_heads": 3}, UnsupportedModelError, "expected: a divisor of num_attention_heads=4"),
        ({"hidden_size": "64"}, UnsupportedModelError, r"hidden_size='64' \(expected: a positive whole number\)"),
        ({"num_key_value_heads": "4"}, UnsupportedModelError, r"num_key_value_heads='4' \(expected: a positive whole number"),
        ({"head_dim": -2}, UnsupportedModelError, r"head_dim=-2 \(expected: a positive whole number\)"),
        ({"rms_norm_eps": None}, UnsupportedModelError, r"rms_norm_eps=None \(expected: a positive number\)"),
        ({"rope_theta": "absent"}, UnsupportedModelError, "rope_theta=None"),
        ({"rope_parameters": {"rope_theta": 7.0}}, UnsupportedModelError, r"rope_theta=50000 \(rope_parameters says 7.0\)"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 50000}}, UnsupportedModelError, "rope_type='yarn'"),
        ({"norm_topk_prob": "false"}, UnsupportedModelError, "norm_topk_prob='false'"),
        ({"moe_layer_freq": 1}, UnsupportedModelError, "moe_layer_freq=1"),
        ({"num_experts_per_tok": 9}, UnsupportedModelError, "expected: at most num_experts=8"),
        ({"eos_token_id": 320}, CheckpointError, "the eos token id 320 is outside the vocabulary of 320; set eos_token_id"),
        ({"mask_token_id": "absent"}, CheckpointError, "the mask token id 156895 is outside the vocabulary of 320"),
        ({"mask_token_id": "x"}, CheckpointError, "mask_token_id: expected one integer, got 'x'"),
        ({"num_hidden_layers": 2}, CheckpointError, "unexpected: model.layers.2"),
        (
            {"vocab_size": 2**31},
            UnsupportedModelError,
            r"vocab_size=2147483648 \(expected: a positive whole number up to 10737",
        ),
        ({"hidden_size": 2**52}, UnsupportedModelError, r"hidden_size=4503599627370496 \(expected: a positive whole number up"),
        ({"max_position_embeddings": 2**40}, UnsupportedModelError, r"max_position_embeddings=1099511627776 \(expected"),
        (
            {"hidden_size": 2**30, "vocab_size": 2**30},
            UnsupportedModelError,
            r"a parameter of shape \[1073741824, 1073741824\]",
        ),
        ({"num_experts": 10**6, "num_hidden_layers": 1}, CheckpointError, "says 1000000 experts, the tensors have fewer"),
        ({"hidden_size": "x" * 10**6}, UnsupportedModelError, r"hidden_size='xxx.*\.\.\. \(1000002 characters\)"),
    ],
)
def test_configs(copy, changes, kind, message, capsys):
    edit(copy, **changes)
    with pytest.raises(kind, match=message):
        djax.load(copy)
    if changes == {"mask_token_id": "absent"}:
        assert "names no mask token; using the family's default, id 156895" in capsys.readouterr().err


STRANGE = [0, -1, 2**31, 2**52, 10**400, 0.5, 1e308, float("nan"), float("inf"), True, False, "", "4", [], [0], {}, {"a": 1}]


@pytest.mark.parametrize("name", ["moe_a", "dense", "llada2"])
def test_every_number_of_a_config(name):
    """Of every kind that JSON has, in place of each: a config of numbers, or the error that names it."""
    hf = json.loads((GOLDENS / name / "config.json").read_text())
    family = djax.load(GOLDENS / name).family
    for key in [*hf, "rope_parameters", "n_kv_heads", "mlp_ratio", "partial_rotary_factor", "n_group", "topk_group"]:
        for value in STRANGE:
            try:
                config = family.config_type.from_hf(hf | {key: value}, mask_id=1, eos_id=0)
            except UnsupportedModelError as error:
                assert len(str(error)) < 2000
            else:
                numbers = [n for n in dataclasses.astuple(config) if not isinstance(n, bool | tuple)]
                assert all(isinstance(n, int | float) and 0 <= n < 2**53 for n in numbers), (key, value)


def test_rotary_settings_in_a_table_of_their_own(copy, moe_a):
    edit(copy, rope_theta="absent", rope_parameters={"rope_theta": 50000.0, "rope_type": "default"})
    assert djax.load(copy).config == moe_a.config


def test_illada_is_llada_with_another_mask(tmp_path, dense):
    """iLLaDA-8B runs LLaDA's code with mask id 5. So does LLaDA with the two ids' rows exchanged, and answers the same."""
    directory = tmp_path / "illada"
    shutil.copytree(GOLDENS / "dense", directory)
    hf = json.loads((directory / "config.json").read_text())
    mask, order = hf["mask_token_id"], np.arange(hf["vocab_size"])
    order[[5, mask]] = mask, 5
    (directory / "config.json").write_text(json.dumps(hf | {"mask_token_id": 5}))
    exchanged = {
        n: t[order] if n.endswith(("wte.weight", "ff_out.weight")) and "blocks" not in n else t
        for n, t in tensors(directory).items()
    }
    save_file(exchanged, directory / "model.safetensors")
    illada = djax.load(directory)
    assert (illada.config.mask_id, dense.config.mask_id) == (5, mask)
    options = dict(gen_length=16, block_length=8, early_stop=False)
    wanted, found = (djax.generate(model, [1, 2, 3], **options) for model in (dense, illada))
    assert found.forwards == wanted.forwards
    np.testing.assert_array_equal(found.canvas, order[wanted.canvas])
    assert 5 not in found.canvas


def test_config_that_is_not_json(copy):
    for text in ("{", "[]"):
        (copy / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config.json: expected (a )?JSON"):
            djax.load(copy)


def test_dtype(copy):
    with pytest.raises(
        OptionError, match="dtype: expected one of float32, bfloat16, or None for the checkpoint's own, got 'int8'"
    ):
        djax.load(copy, dtype="int8")
    edit(copy, torch_dtype="bfloat16")
    assert djax.load(copy).params["head"].dtype == jnp.bfloat16
    edit(copy, torch_dtype="absent")
    assert djax.load(copy).params["head"].dtype == jnp.bfloat16, "without a declared dtype, the stored one"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_orbax_and_back(tmp_path, dtype):
    model = djax.load(GOLDENS / "moe_b", dtype=dtype)
    djax.save(model, tmp_path / "orbax")
    back = djax.load(tmp_path / "orbax")
    assert back.config == model.config
    same_params(back.params, model.params)
    djax.export_hf(back, tmp_path / "hf")
    before, after = tensors(GOLDENS / "moe_b"), tensors(tmp_path / "hf")
    assert all(before[k].tobytes() == after[k].tobytes() for k in before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "orbax"], "no partial directory is left"

    (tmp_path / "orbax" / "djax.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"djax.json: not a manifest that djax wrote"):
        djax.load(tmp_path / "orbax")


def test_damaged_orbax(tmp_path, moe_a):
    djax.save(moe_a, tmp_path / "orbax")
    shutil.rmtree(tmp_path / "orbax" / "params")
    with pytest.raises(CheckpointError, match="the Orbax checkpoint cannot be restored"):
        djax.load(tmp_path / "orbax")


@pytest.mark.parametrize("write", [djax.save, djax.export_hf])
def test_writing_is_all_or_nothing(tmp_path, moe_a, write, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(OptionError, match="there: already exists; choose another directory or remove it"):
        write(moe_a, tmp_path / "there")

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("djax.checkpoints.checkpoint.write_description", fail)
    with pytest.raises(KeyboardInterrupt):
        write(moe_a, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_inspect_reads_no_weights(moe_a):
    facts = inspect(GOLDENS / "moe_a")
    assert facts["parameters"] == moe_a.parameter_count
    assert facts["bytes"] == moe_a.parameter_bytes
    assert (facts["family"], facts["mask_id"], facts["eos_id"]) == ("llada_moe", 318, 317)


def test_every_parameter_has_logical_axes(moe_a):
    """One axis name a dimension; experts, heads and vocabulary are what a mesh splits."""
    boxed = moe_a.family.abstract(moe_a.config, jnp.float32)
    axes = traverse_util.flatten_dict(nn.get_partition_spec(boxed))
    sizes = shapes(moe_a.params)
    assert axes.keys() == sizes.keys()
    assert all(len(axes[path]) == len(sizes[path]) for path in axes)
    assert axes[("layer_0", "w_in")][0] == "expert"
    assert axes[("layer_0", "qkv")][1] == "heads"
    assert axes[("head",)][1] == "vocab"
