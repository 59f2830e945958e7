"""Files of one checkpoint that contradict each other are refused, by name; what published checkpoints usually do loads."""

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file
from test_hostile_checkpoints import TEMPLATE, edited

import djax
from djax.checkpoints.source import SHIPPED, opened
from djax.errors import CheckpointError

EOS, MASK = 0, 1


@pytest.fixture
def copy(tmp_path):
    directory = tmp_path / "checkpoint"
    shutil.copytree(SHIPPED, directory)
    for file in directory.iterdir():
        file.chmod(0o600)
    return directory


def load(directory):
    with opened(directory) as source:
        return source


def cut_into_shards(directory):
    """An index, its two shards, and nothing else."""
    tensors = load_file(directory / "model.safetensors")
    where = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({name: tensors[name] for name, of in where.items() if of == file}, directory / file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    edited(directory, "model.safetensors.index.json", metadata={"total_size": total}, weight_map=where)
    (directory / "model.safetensors").unlink()
    return total


def test_a_single_file_next_to_an_index(copy):
    new = (copy / "model.safetensors").read_bytes()
    cut_into_shards(copy)
    load(copy)
    (copy / "model.safetensors").write_bytes(new)
    message = (
        r"does not name model.safetensors. If model.safetensors has .* remove model.safetensors.index.json and the 2 files"
    )
    with pytest.raises(CheckpointError, match=message):
        djax.load(copy)
    for shard in copy.glob("model-*"):
        shard.unlink()
    with pytest.raises(CheckpointError, match=r"does not name model.safetensors"):
        djax.load(copy)
    (copy / "model.safetensors.index.json").unlink()
    load(copy)


def test_an_index_that_names_the_single_file(copy):
    names = load_file(copy / "model.safetensors")
    edited(copy, "model.safetensors.index.json", weight_map=dict.fromkeys(names, "model.safetensors"))
    load(copy)


@pytest.mark.parametrize("total", [0, 7, 1.5])
def test_another_total_in_the_index_is_told(copy, total, capsys):
    right = cut_into_shards(copy)
    edited(copy, "model.safetensors.index.json", metadata={"total_size": float(right), "total_parameters": 5})
    load(copy)
    assert "total_size" not in capsys.readouterr().err
    edited(copy, "model.safetensors.index.json", metadata={"total_size": total})
    load(copy)
    assert f"total_size says {total} bytes, the tensors have {right}" in capsys.readouterr().err


@pytest.mark.parametrize("total", ["much", True])
def test_a_total_that_is_no_number(copy, total):
    cut_into_shards(copy)
    edited(copy, "model.safetensors.index.json", metadata={"total_size": total})
    with pytest.raises(CheckpointError, match=r"total_size"):
        load(copy)


@pytest.mark.parametrize(
    "said",
    [{}, {"eos_token_id": None}, {"eos_token_id": EOS}, {"eos_token_id": [5, EOS]}, {"eos_token_id": EOS, "pad_token_id": 9}],
)
def test_generation_configs_that_are_usual(copy, said):
    edited(copy, "generation_config.json", bos_token_id=7, temperature=0.6, **said)
    load(copy)


@pytest.mark.parametrize(
    ("said", "config", "message"),
    [
        ({"eos_token_id": 5}, {}, "generation_config.json says eos_token_id=5, config.json says 0; correct the wrong one"),
        ({"eos_token_id": [5, 6]}, {}, r"says eos_token_id=\[5, 6\], config.json says 0"),
        ({"mask_token_id": 5}, {}, "the mask token id differs"),
        ({"eos_token_id": "x"}, {}, "eos_token_id: expected one integer or a list of them, got 'x'"),
        ({"eos_token_id": [True]}, {}, "eos_token_id: expected one integer"),
    ],
)
def test_generation_configs_that_contradict(copy, said, config, message):
    edited(copy, "config.json", **config)
    edited(copy, "generation_config.json", **said)
    with pytest.raises(CheckpointError, match=message):
        load(copy)


@pytest.mark.parametrize("content", ["", "[]", "null", "[" * 100_000])
def test_a_generation_config_that_is_none(copy, content):
    (copy / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config.json: expected"):
        load(copy)


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_equal_templates_load(copy, ending):
    template = (copy / "chat_template.jinja").read_text()
    edited(copy, "tokenizer_config.json", chat_template=template + ending)
    assert load(copy).tokenizer.chat_template == template
    edited(copy, "tokenizer_config.json", chat_template=[{"name": "default", "template": template}])
    load(copy)


@pytest.mark.parametrize(
    ("file", "value"),
    [
        ("tokenizer_config.json", TEMPLATE),
        ("tokenizer_config.json", [{"name": "default", "template": TEMPLATE}]),
        ("tokenizer_config.json", {"default": TEMPLATE}),
        ("tokenizer_config.json", 3),
        ("tokenizer_config.json", [3]),
        ("chat_template.json", TEMPLATE),
        ("additional_chat_templates/default.jinja", None),
    ],
)
def test_templates_that_differ(copy, file, value):
    if value is None:
        (copy / file).parent.mkdir()
        (copy / file).write_text(TEMPLATE)
    else:
        edited(copy, file, chat_template=value)
    with pytest.raises(CheckpointError, match=r"have different chat templates; remove|chat_template: expected"):
        load(copy)


def added(token, number):
    return {"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"special_tokens_map.json": {"mask_token": "a"}}, r"mask_token: tokenizer_config.json says '<\|mask\|>', special_"),
        ({"special_tokens_map.json": {"eos_token": {"content": "a"}}}, r"eos_token: tokenizer_config.json says"),
        ({"tokenizer_config.json": {"mask_token": "<nowhere>"}}, "'<nowhere>', which tokenizer.json does not have"),
        ({"tokenizer_config.json": {"eos_token": 5}}, "eos_token: expected a string, got 5"),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"7": added("<|mask|>", 7)}}},
            r"'<\|mask\|>' has the ids .*'7' in",
        ),
        ({"added_tokens.json": {"<|mask|>": 9}}, r"'<\|mask\|>' has the ids .*9 in added_tokens.json"),
    ],
)
def test_special_tokens_that_contradict(copy, changes, message):
    for file, values in changes.items():
        edited(copy, file, **values)
    with pytest.raises(CheckpointError, match=message):
        load(copy)


def test_special_tokens_that_agree(copy):
    """Also pad and bos that are the EOS, and an EOS that ends a turn where config.json says which ends a text."""
    edited(copy, "special_tokens_map.json", mask_token="<|mask|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    edited(copy, "tokenizer_config.json", bos_token="<|endoftext|>")
    assert load(copy).config.mask_id == MASK
    word = load(copy).tokenizer.convert_ids_to_tokens(40)
    edited(copy, "special_tokens_map.json", eos_token=word)
    edited(copy, "tokenizer_config.json", eos_token=word)
    assert load(copy).config.eos_id == EOS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bfloat16"}, "torch_dtype='float32', dtype='bfloat16'; correct the wrong one"),
        ({"dtype": 3}, "dtype: expected a string, got 3"),
        ({"torch_dtype": ["float32"]}, "torch_dtype: expected a string"),
        ({"architectures": ["LLaDAMoEModelLM", "LLaDAModelLM"]}, "are of llada_moe and llada; correct the wrong one"),
        ({"rope_parameters": {"type": "yarn", "rope_theta": 10000.0}}, "rope_parameters.type='yarn'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0}}, "partial_rotary_factor"),
    ],
)
def test_configs_that_contradict_themselves(copy, changes, message):
    edited(copy, "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        load(copy)


def test_one_dtype_under_both_names(copy):
    edited(copy, "config.json", dtype="torch.float32")
    load(copy)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "orbax"
    djax.save(djax.load(), directory)
    return directory


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"rope_theta": 20000.0}, "djax.json says rope_theta=10000.0, config.json and the tokenizer 20000.0"),
        ("config.json", {"num_hidden_layers": 5}, "djax.json says layers=4"),
        ("djax.json", {"family": "llada"}, "djax.json says family 'llada', config.json 'llada_moe'"),
        ("djax.json", {"config": ["x"]}, "config: expected an object"),
        ("djax.json", {"dtype": "bfloat16"}, "there is float32 .*ask for bfloat16"),
        ("djax.json", {"dtype": ["float32"]}, "not a manifest that djax wrote"),
        ("djax.json", {"stored": {"a": ["F32"]}}, "not a manifest that djax wrote"),
        ("djax.json", {"sha256": {"a": 3}}, "not a manifest that djax wrote"),
        ("model.safetensors", None, "djax.json, of an Orbax checkpoint, and model.safetensors are both there"),
        ("model.safetensors.index.json", None, "and model.safetensors.index.json are both there"),
    ],
)
def test_orbax_directories(saved, tmp_path, file, changes, message):
    directory = tmp_path / "orbax"
    shutil.copytree(saved, directory)
    if changes is None:
        shutil.copy(SHIPPED / "model.safetensors", directory / file)
    else:
        edited(directory, file, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(directory)


def test_orbax_arrays_of_another_shape(saved, tmp_path):
    """Orbax itself hands out whatever shape is there. Both descriptions are wrong in the same way."""
    directory = tmp_path / "orbax"
    shutil.copytree(saved, directory)
    edited(directory, "config.json", expert_intermediate_size=48)
    known = json.loads((directory / "djax.json").read_text())
    edited(directory, "djax.json", config=known["config"] | {"expert_width": 48})
    with pytest.raises(
        CheckpointError, match=r"8 problems with the parameters:\n  layer_0.w_in: there is float32 \[16, 128, 192\]"
    ):
        load(directory)
