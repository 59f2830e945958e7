"""Checkpoints that were damaged or made to do harm: each loads as its file says, or raises djax's typed error; nothing else.

Over 2,000 mutations from fixed seeds: bits flipped, files cut or joined, headers, indices and configs edited, shards swapped.
The safetensors library is the second opinion on what may be read, and on what is read.
"""

import copy
import json
import random
import shutil
import struct
import tracemalloc

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny import DENSE, tiny_model

import djax
from djax.convert import llada
from djax.convert.safetensors_files import TensorFiles
from djax.errors import CheckpointError, DjaxError, PathError
from djax.source import opened

CASES, SEEDS = 260, range(8)
HF = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "vocab_size": DENSE.vocab,
    "d_model": DENSE.width,
    "n_layers": DENSE.layers,
    "n_heads": DENSE.heads,
    "mlp_hidden_size": DENSE.mlp_width,
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": DENSE.rope_theta,
    "rms_norm_eps": DENSE.eps,
    "max_sequence_length": DENSE.max_positions,
    "weight_tying": False,
    "mask_token_id": DENSE.mask_id,
    "eos_token_id": DENSE.eos_id,
    "torch_dtype": "float32",
}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A small checkpoint in two shards with an index."""
    directory = tmp_path_factory.mktemp("sound")
    model = tiny_model(config=DENSE)
    tensors = {rule.source: rule.extract(leaf(model, rule.target)) for rule in llada.layouts(DENSE)["hf"]}
    names = sorted(tensors)
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    for file, part in zip(SHARDS, parts, strict=True):
        save_file({name: tensors[name] for name in part}, directory / file)
    where = {name: file for file, part in zip(SHARDS, parts, strict=True) for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (directory / "config.json").write_text(json.dumps(HF))
    return directory


def leaf(model, path):
    value = model.params
    for key in path:
        value = value[key]
    return np.asarray(value)


# --- mutations: (random, directory) -> nothing; the directory is a copy ---------------------------------------------------


def any_file(rng, directory):
    return rng.choice(sorted(directory.iterdir()))


def flip_bits(rng, directory):
    file = any_file(rng, directory)
    data = bytearray(file.read_bytes())
    # Half of them in the first bytes, where lengths, names and offsets are.
    reach = len(data) if rng.random() < 0.5 else min(len(data), 600)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        data[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def cut(rng, directory):
    file = any_file(rng, directory)
    data = file.read_bytes()
    file.write_bytes(data[: rng.choice([0, 1, 7, 8, 9, len(data) - 1, rng.randrange(len(data))])])


def extend(rng, directory):
    file = any_file(rng, directory)
    data = file.read_bytes()
    file.write_bytes(data + rng.choice([b"\0", b" ", data[:40], bytes(1000)]))


def set_length(rng, directory):
    file = directory / rng.choice(SHARDS)
    lengths = [0, 1, 2, 2**63, 2**64 - 1, 2**40, 100_000_001, len(file.read_bytes()), rng.randrange(10_000)]
    file.write_bytes(struct.pack("<Q", rng.choice(lengths)) + file.read_bytes()[8:])


STRANGE = [0, -1, 1, 2**31, 2**63, 2**64, 10**30, 1e308, 0.5, True, None, "", "x", [], {}, [[]], [0, 0], "\ud800", "NaN"]


def strange(rng):
    return copy.deepcopy(rng.choice(STRANGE))


def edit_header(rng, directory):
    """One entry of a shard's header, with the values as they were."""
    file = directory / rng.choice(SHARDS)
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    name = rng.choice(sorted(header))
    other = rng.choice(sorted(header))
    entry = header[name]
    match rng.randrange(11):
        case 0:
            entry["dtype"] = rng.choice(["F64", "F16", "BF16", "I32", "F8_E4M3", "F4", "BOOL", "F128", "f32", strange(rng)])
        case 1:
            entry["shape"] = rng.choice(
                [[*entry["shape"], 1], entry["shape"][::-1], [-1, -4], [2**32, 2**32], [0], strange(rng)]
            )
        case 2:
            entry["data_offsets"] = rng.choice([[0, 0], [8, 0], [-8, 8], [0, 2**62], [1, 2, 3], strange(rng)])
        case 3:
            entry["data_offsets"] = header[other]["data_offsets"]
        case 4:
            first, last = entry["data_offsets"]
            entry["data_offsets"] = [first + rng.choice([-4, 4]), last + rng.choice([-4, 0, 4])]
        case 5:
            header[rng.choice(["extra", "../x", "", "a" * 5000])] = entry
        case 6:
            del header[name]
        case 7:
            header[name], header[other] = header[other], header[name]
        case 8:
            header["__metadata__"] = strange(rng)
        case 9:
            entry[rng.choice(["shape", "dtype", "data_offsets", "more"])] = strange(rng)
        case 10:
            header[name] = strange(rng)
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = text[:-1] + b"," + json.dumps({name: entry}).encode()[1:]  # the same name twice
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def edit_json(rng, directory):
    """One value of the config or of the index."""
    file = directory / rng.choice(["config.json", "config.json", "model.safetensors.index.json"])
    content = json.loads(file.read_text())
    where = content["weight_map"] if "weight_map" in content and rng.random() < 0.8 else content
    key = rng.choice(sorted(where))
    match rng.randrange(4):
        case 0:
            del where[key]
        case 1:
            where[key] = rng.choice([1, 2, 3, 7, 10**6, 10**9, 2**31 - 1, 10**400, float("inf"), float("nan"), strange(rng)])
        case 2:
            where[key] = strange(rng)
        case 3:
            where[rng.choice(["rope_scaling", "architectures", "n_layers", "pad", "rope_parameters"])] = strange(rng)
    file.write_text(json.dumps(content))


def replace_json(rng, directory):
    file = directory / rng.choice(["config.json", "model.safetensors.index.json"])
    bodies = ["", "null", "[]", "3", "[" * 100_000, '{"a":' * 50_000, "{} {}", '"\\ud800"', '{"architectures": "LLaDAModelLM"}']
    bodies += ['{"weight_map": {}}', '{"weight_map": {"x": "../config.json"}}', '{"weight_map": {"x": "/dev/zero"}}']
    bodies += [
        '{"weight_map": {"x": "config.json"}}',
        '{"weight_map": {"x": "."}}',
        '{"weight_map": {"x": "a\\u0000b"}}',
        "1" * 5000,
    ]
    file.write_text(rng.choice(bodies))


def swap(rng, directory):
    one, two = (directory / name for name in rng.sample([*SHARDS, "config.json", "model.safetensors.index.json"], 2))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first if rng.random() < 0.7 else second)


def relink(rng, directory):
    """A file that is a link, out of the directory or within it, or is no file."""
    file = any_file(rng, directory)
    if file.is_symlink():
        return
    content = file.read_bytes()
    file.unlink()
    match rng.randrange(5):
        case 0:
            outside = directory.parent / "outside"
            outside.write_bytes(content)
            file.symlink_to(outside)
        case 1:
            file.symlink_to("/dev/zero")
        case 2:
            (directory / "within").write_bytes(content)
            file.symlink_to("within")
        case 3:
            file.mkdir()
        case 4:
            file.symlink_to(file)


MUTATIONS = [
    flip_bits,
    flip_bits,
    flip_bits,
    cut,
    extend,
    set_length,
    edit_header,
    edit_header,
    edit_json,
    edit_json,
    replace_json,
]
MUTATIONS += [swap, relink]


def by_the_library(directory):
    """Every tensor that the safetensors library reads from the shards that are there."""
    out = {}
    for file in SHARDS:
        with safe_open(directory / file, "np") as shard:
            out |= {name: shard.get_tensor(name) for name in shard.keys()}
    return out


@pytest.mark.parametrize("seed", SEEDS)
def test_mutations(sound, tmp_path, seed):
    rng = random.Random(seed)
    size = sum(file.stat().st_size for file in sound.iterdir())
    loaded = refused = 0
    for case in range(CASES):
        directory = tmp_path / "case" / str(case)
        shutil.copytree(sound, directory)
        # Links last: to change what is behind one is not a mutation of the checkpoint, and of /dev/zero it never ends.
        mutations = sorted(rng.choices(MUTATIONS, k=rng.choice([1, 1, 1, 2, 3])), key=lambda m: m is relink)
        try:
            for mutate in mutations:
                mutate(rng, directory)
        except (OSError, ValueError, KeyError, IndexError, AttributeError, TypeError, RecursionError, struct.error):
            pass  # one mutation left nothing for the next to do; what there is is tried
        told = f"seed {seed} case {case}: {[m.__name__ for m in mutations]}"
        tracemalloc.start()
        try:
            with opened(directory) as source:
                params = {path: source.get(path) for path in source.order}
        except DjaxError as error:
            assert isinstance(error, CheckpointError | PathError), told
            refused += 1
        except BaseException as error:
            raise AssertionError(told) from error
        else:
            expected = by_the_library(directory)
            for rule in llada.layouts(source.config)["hf"]:
                read = rule.extract(params[rule.target])
                np.testing.assert_array_equal(read, expected[rule.source].astype(read.dtype), err_msg=told)
            loaded += 1
        finally:
            # Twice the file, and what Python and jax need for a tree of parameters of any size.
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < 2 * size + 8_000_000, told
        shutil.rmtree(directory)
    assert loaded > 5 and refused > CASES // 3, "both happen"


def test_there_are_enough():
    assert CASES * len(SEEDS) >= 2000


def test_the_sound_one_loads(sound):
    model = djax.load(sound)
    assert jax.tree.map(np.shape, model.params) == jax.tree.map(np.shape, tiny_model(config=DENSE).params)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, "the tensors end at"),
        ({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, "takes other than its 8 bytes"),
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            },
            "begins at",
        ),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, "begins at .*, where the one before it ends is"),
        ({"a": {"dtype": "F8_E4M3", "shape": [12], "data_offsets": [0, 12]}}, None),
        ({"a": {"dtype": "Q3", "shape": [12], "data_offsets": [0, 12]}}, "unknown dtype 'Q3'"),
        ({"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, r"is empty, of shape \[0\]"),
        ({"a": {"dtype": "F32", "shape": [True, 3], "data_offsets": [0, 12]}}, r"has shape \[True, 3\]"),
        ([], "the header is no JSON object"),
        ({"__metadata__": {"a": 1}}, "__metadata__ is no object of strings"),
    ],
)
def test_headers(tmp_path, header, message):
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(12))
    if message is None:  # well formed; the rule table then says that it is not read
        assert TensorFiles(tmp_path).found == {"a": ((12,), "F8_E4M3")}
        return
    with pytest.raises(CheckpointError, match=message):
        TensorFiles(tmp_path)


def test_a_name_that_is_there_twice(tmp_path):
    text = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(CheckpointError, match="'a' is there twice"):
        TensorFiles(tmp_path)


def test_links_as_the_hub_s_cache_makes_them(sound, tmp_path):
    """snapshots/REVISION/file -> ../../blobs/DIGEST is allowed; anywhere else is not."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for n, file in enumerate(sound.iterdir()):
        shutil.copy(file, blobs / str(n))
        (snapshot / file.name).symlink_to(f"../../blobs/{n}")
    djax.load(snapshot)
    (tmp_path / "elsewhere").write_bytes((sound / SHARDS[0]).read_bytes())
    (snapshot / SHARDS[0]).unlink()
    (snapshot / SHARDS[0]).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="a link that points outside the checkpoint's directory"):
        djax.load(snapshot)


def test_layers_that_the_files_do_not_have(sound, tmp_path):
    """Refused before a table of a billion layers is made."""
    shutil.copytree(sound, tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text(json.dumps(HF | {"n_layers": 900_000}))
    with pytest.raises(CheckpointError, match=r"config.json says 900000 layers, there are 21 tensors"):
        djax.load(tmp_path / "a")
