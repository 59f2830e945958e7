"""`djax convert`: streamed, atomic, bit-equal both ways, with a manifest; and what stops it."""

import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDENS
from killed import end, start
from safetensors.numpy import load_file, save_file
from test_checkpoint import same_params

import djax
from djax.checkpoints import conversion
from djax.checkpoints.checkpoint import inspect
from djax.checkpoints.conversion import convert
from djax.convert import orbax_files
from djax.errors import CheckpointError, OptionError, PathError

# Of each direction. `DJAX_TEST_MOMENTS=50 pytest tests/test_conversion.py` is the slow part.
MOMENTS = int(os.environ.get("DJAX_TEST_MOMENTS", 10))
MODELS = ["moe_a", "moe_b", "dense", "llada2"]


def raw(directory):
    return {name: tensor.tobytes() for name, tensor in load_file(directory / "model.safetensors").items()}


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name, tmp_path):
    report = convert(GOLDENS / name, tmp_path / "orbax", verify=True)
    source = raw(GOLDENS / name)
    assert (report.layout, report.verified, report.rounding, report.spoiled) == ("orbax", True, None, ())
    assert report.bytes == sum(map(len, source.values()))
    same_params(djax.load(tmp_path / "orbax").params, djax.load(GOLDENS / name).params)

    manifest = json.loads((tmp_path / "orbax" / "djax.json").read_text())
    assert manifest["sha256"] == {name: hashlib.sha256(data).hexdigest() for name, data in source.items()}
    assert (manifest["djax"], manifest["family"]) == (djax.__version__, report.family)
    assert manifest["config"]["layers"] == djax.load(GOLDENS / name).config.layers

    report = convert(tmp_path / "orbax", tmp_path / "hf", to="hf", verify=True)
    assert raw(tmp_path / "hf") == source
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "orbax"], "nothing else is left"
    assert not list((tmp_path / "orbax").glob(".*"))


def test_the_file_is_the_library_s(tmp_path):
    """The written file is byte for byte what the safetensors library writes, with tensors of several widths."""
    wide = load_file(GOLDENS / "llada2" / "model.safetensors")
    for n, name in enumerate(sorted(wide)):
        if n % 3:
            wide[name] = wide[name].astype((np.float32, np.float64)[n % 2])
    shutil.copytree(GOLDENS / "llada2", tmp_path / "mixed")
    (tmp_path / "mixed" / "model.safetensors").chmod(0o600)
    save_file(wide, tmp_path / "mixed" / "model.safetensors", metadata={"format": "pt"})
    model = djax.load(tmp_path / "mixed", dtype="float32")
    djax.export_hf(model, tmp_path / "out")
    # What was float64 is written as wide as the parameters are.
    narrowed = {name: t.astype(np.float32) if t.dtype == np.float64 else t for name, t in wide.items()}
    save_file(narrowed, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_another_dtype(tmp_path):
    djax.export_hf(djax.load(GOLDENS / "moe_a"), tmp_path / "wide", dtype="float32")
    report = convert(tmp_path / "wide", tmp_path / "same", dtype="bfloat16")
    assert report.dtype == "bfloat16" and report.rounding[0] == 0, "these weights were bfloat16 before"
    assert djax.load(tmp_path / "same").dtype == jnp.bfloat16

    tensors = load_file(tmp_path / "wide" / "model.safetensors")
    tensors["lm_head.weight"][3, 4] = 1 + 2**-9
    save_file(tensors, tmp_path / "wide" / "model.safetensors")
    report = convert(tmp_path / "wide", tmp_path / "narrow", dtype="bfloat16", verify=True)
    assert report.rounding == (2**-9, "lm_head.weight")
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["torch_dtype"] == "bfloat16"

    done = subprocess.run(
        [sys.executable, "-m", "djax.cli", "convert", tmp_path / "wide", tmp_path / "cli", "--dtype", "bfloat16", "--verify"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "largest rounding error: 0.00195, in lm_head.weight" in done.stdout
    assert "converted and verified in" in done.stdout and "Traceback" not in done.stderr


def test_hf_to_hf_in_another_layout_and_dtype(tmp_path):
    """What a cast needs is one parameter, too."""
    report = convert(GOLDENS / "moe_a", tmp_path / "wide", to="hf", dtype="float32", verify=True)
    assert report.layout == "hf"
    assert {t.dtype for t in load_file(tmp_path / "wide" / "model.safetensors").values()} == {np.dtype(np.float32)}
    same_params(djax.load(tmp_path / "wide").params, djax.load(GOLDENS / "moe_a").params)


def test_progress_counts_what_is_read(tmp_path):
    told = []
    report = convert(GOLDENS / "llada2", tmp_path / "out", verify=True, progress=lambda *told_: told.append(told_))
    for what in ("converting", "verifying"):
        done = [d for w, d, total in told if w == what]
        assert done == sorted(done) and done[-1] == report.bytes == told[0][2]


@pytest.fixture
def spoiled(tmp_path):
    directory = tmp_path / "spoiled"
    shutil.copytree(GOLDENS / "moe_a", directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][0, 3] = np.nan
    (directory / "model.safetensors").chmod(0o600)
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_weights_that_are_not_finite(spoiled, tmp_path, capsys):
    message = r"tensor model.layers.1.mlp.experts.2.up_proj.weight has values that are NaN or infinite"
    with pytest.raises(CheckpointError, match=message):
        convert(spoiled, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["spoiled"]
    assert convert(spoiled, tmp_path / "out", not_finite="warn").spoiled == ("model.layers.1.mlp.experts.2.up_proj.weight",)
    with pytest.raises(CheckpointError, match=message):
        djax.load(spoiled, not_finite="refuse")
    djax.load(spoiled, not_finite="allow")
    assert capsys.readouterr().err == ""
    djax.load(spoiled)
    assert "1 tensors have values that are NaN or infinite, model.layers.1.mlp" in capsys.readouterr().err
    with pytest.raises(OptionError, match="not_finite: expected one of warn, refuse, allow, got 'maybe'"):
        djax.load(spoiled, not_finite="maybe")


def test_what_is_refused(tmp_path, monkeypatch):
    with pytest.raises(OptionError, match="--to: expected orbax or hf, got 'onnx'"):
        convert(GOLDENS / "moe_a", tmp_path / "out", to="onnx")
    with pytest.raises(OptionError, match=r"dtype: expected one of float32, bfloat16, .* got 'fp8'"):
        convert(GOLDENS / "moe_a", tmp_path / "out", dtype="fp8")
    (tmp_path / "there").mkdir()
    with pytest.raises(OptionError, match="there: already exists; choose another directory or remove it"):
        convert(GOLDENS / "moe_a", tmp_path / "there")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"out: needs 0.0 GB, the disk has 0.0 GB left"):
        convert(GOLDENS / "moe_a", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that Orbax leaves open when it fails
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_disk_that_fills_up(tmp_path, monkeypatch):
    """A file system of 300 kB, which holds a third of the checkpoint."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", small], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(CheckpointError, match=r"needs 0.0 GB, the disk has"):
            convert(GOLDENS / "moe_a", small / "out", dtype="float32")
        monkeypatch.setattr(conversion, "_have_room", lambda out, need: None)
        for to in ("orbax", "hf"):
            with pytest.raises(CheckpointError, match=r"out: the disk is full; nothing was left there"):
                convert(GOLDENS / "moe_a", small / "out", to=to, dtype="float32")
            assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


@contextlib.contextmanager
def files_of_at_most(size):
    """A limit that the system sets on each file, which a write meets as it meets a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that Orbax leaves open when it fails
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("limit", [1000, 100_000])
@pytest.mark.parametrize("write", ["save", "export_hf", "export_program", "to orbax", "to hf"])
def test_whatever_is_written_where_there_is_no_room(tmp_path, write, limit, moe_a):
    """One kind of error for all, and nothing left."""
    out = tmp_path / "out"
    writers = {
        "save": lambda: djax.save(moe_a, out),
        "export_hf": lambda: djax.export_hf(moe_a, out),
        "export_program": lambda: djax.export_program(moe_a, out, prompt_length=4, gen_length=8, block_length=8),
        "to orbax": lambda: convert(GOLDENS / "moe_a", out),
        "to hf": lambda: convert(GOLDENS / "moe_a", out, to="hf"),
    }
    with files_of_at_most(limit), pytest.raises(CheckpointError, match=r"out: .*; nothing was left there"):
        writers[write]()
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path, monkeypatch):
    directory = tmp_path / "source"
    shutil.copytree(GOLDENS / "moe_a", directory)
    file = directory / "model.safetensors"
    file.chmod(0o600)
    verify = conversion._verify_orbax

    def change(*arguments):
        with file.open("r+b") as out:
            out.seek(-1, os.SEEK_END)
            out.write(b"\x11")
        verify(*arguments)

    monkeypatch.setattr(conversion, "_verify_orbax", change)
    with pytest.raises(CheckpointError, match=r"was not written as it was read|the source changed while it was read"):
        convert(directory, tmp_path / "out", verify=True)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """Each layout's source, and how to see that an output is right, bit for bit."""
    orbax = tmp_path_factory.mktemp("there") / "orbax"
    convert(GOLDENS / "moe_b", orbax)
    expected = raw(GOLDENS / "moe_b"), bits(djax.load(GOLDENS / "moe_b"))
    return {
        "orbax": (GOLDENS / "moe_b", lambda out: bits(djax.load(out)) == expected[1]),
        "hf": (orbax, lambda out: raw(out) == expected[0] and bits(djax.load(out)) == expected[1]),
    }


def bits(model):
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype), np.asarray(leaf).tobytes()), model.params)


@pytest.mark.long
@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_killed_at_random_moments(there, tmp_path, to):
    """Half of them from the start of the process to its end, half from where it begins to write."""
    source, right = there[to]
    out, rng = tmp_path / "out", random.Random(0)

    def wait_until_it_writes(process):
        while process.is_alive() and not any(tmp_path.iterdir()):
            time.sleep(0.001)

    def clear():
        for path in tmp_path.iterdir():
            shutil.rmtree(path)

    for _ in range(2):  # the first starts the process that the others are forked from
        clear()
        began = time.monotonic()
        process = start(convert, source, out, to=to)
        wait_until_it_writes(process)
        before = time.monotonic() - began
        assert end(process)
        seconds = time.monotonic() - began
    clear()

    states = Counter()
    # More than asked for where the machine has become faster than it was measured: then most moments come too late.
    while states.total() < MOMENTS or (states["partly written"] <= MOMENTS // 5 and states.total() < 5 * MOMENTS):
        process = start(convert, source, out, to=to)
        if rng.random() < 0.5:
            time.sleep(rng.uniform(0, seconds))
        else:
            wait_until_it_writes(process)
            time.sleep(rng.uniform(0, seconds - before))
        process.kill()
        end(process)

        remains = list(tmp_path.iterdir())
        if out.exists():
            states["whole"] += 1
            seconds = before + 0.9 * (seconds - before)
            with pytest.raises(OptionError, match="already exists"):
                convert(source, out, to=to)
        else:
            states["partly written" if remains else "nothing written"] += 1
            with pytest.raises(PathError, match="does not exist"):
                djax.load(out)
            for path in remains:  # not even the hidden one loads wrong
                with contextlib.suppress(CheckpointError):
                    djax.load(path)
                    assert right(path)
            convert(source, out, to=to)
        assert right(out)
        assert list(tmp_path.iterdir()) == [out]
        clear()
    print(f"{to}, killed while there was", dict(states))
    assert states["partly written"] > MOMENTS // 5, states


def convert_interrupted(*arguments, **options):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        convert(*arguments, **options)


@pytest.mark.long
@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_interrupted_at_random_moments(there, tmp_path, to):
    """Ctrl-C, and a second one soon after: at once, nothing is left, hidden or not."""
    source, right = there[to]
    out, rng, states = tmp_path / "out", random.Random(1), Counter()
    while states.total() < MOMENTS:
        process = start(convert_interrupted, source, out, to=to)
        while process.is_alive() and not any(tmp_path.iterdir()):
            time.sleep(0.001)
        for wait in (rng.uniform(0, 0.3), rng.uniform(0, 0.02)):
            time.sleep(wait)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode is not None, "it ends"
        whole = out.exists()
        states[whole] += 1
        if whole:
            assert right(out) and list(tmp_path.iterdir()) == [out]
            shutil.rmtree(out)
        assert list(tmp_path.iterdir()) == []
    assert states[False] > MOMENTS // 5, states


def damage(directory):
    """Flip a bit of a value: the largest file has nothing else in its middle."""
    file = max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.long
@pytest.mark.parametrize("by", ["convert", "save", "an older convert", "narrowed"])
def test_damaged_values_are_found_by_their_sums(tmp_path, by, moe_b):
    out = tmp_path / "out"
    if by == "save":
        djax.save(moe_b, out)
    else:
        convert(GOLDENS / "moe_b", out, dtype="bfloat16" if by == "narrowed" else None)
    file = out / "djax.json"
    if by == "an older convert":  # which noted the sums of HF's tensors alone
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "parameters"}))
    assert bits(djax.load(out, verify=True)) == bits(djax.load(out))
    for options in ({"dtype": "float32"}, {"quantize": "int8"}, {"mesh": djax.mesh()}):
        djax.load(out, verify=True, **options)
    assert inspect(out, verify=True)["verified"] == "all 21 parameters, against their SHA-256 sums"
    damage(out)
    djax.load(out)  # it cannot know
    message = r"out: .* is damaged: its SHA-256 is [0-9a-f]{64}, djax.json says [0-9a-f]{64}; copy or convert it again"
    for read in (lambda: djax.load(out, verify=True), lambda: inspect(out, verify=True)):
        with pytest.raises(CheckpointError, match=message):
            read()
    done = subprocess.run([sys.executable, "-m", "djax.cli", "info", out, "--verify"], capture_output=True, text=True)
    assert done.returncode == 2 and "is damaged" in done.stderr and "Traceback" not in done.stderr


def test_damage_that_the_dtype_of_the_sums_cannot_hold(tmp_path, monkeypatch):
    """Older sums are of the bfloat16 tensor; the lowest bit of a float32 made from it is lost on the way back."""
    convert(GOLDENS / "moe_b", tmp_path / "out")
    file = tmp_path / "out" / "djax.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "parameters"}))
    read = orbax_files.read

    def read_damaged(*arguments):
        leaf = np.array(read(*arguments))
        leaf.reshape(-1).view(np.uint32)[7] ^= 1
        return leaf

    monkeypatch.setattr(orbax_files, "read", read_damaged)
    with pytest.raises(CheckpointError, match=r" is damaged: its SHA-256 is "):
        djax.load(tmp_path / "out", verify=True)


def test_sums_that_are_not_there(tmp_path, moe_b):
    with pytest.raises(OptionError, match=r"verify: expected a directory that .* is in HF's layout, which has none"):
        djax.load(GOLDENS / "moe_b", verify=True)
    with pytest.raises(OptionError, match=r"verify: expected"):
        djax.load(GOLDENS / "moe_b", verify="yes")
    djax.save(moe_b, tmp_path / "out")
    file = tmp_path / "out" / "djax.json"
    known = json.loads(file.read_text())
    file.write_text(json.dumps(known | {"parameters": {"embedding": known["parameters"]["embedding"]}}))
    with pytest.raises(CheckpointError, match=r"has no SHA-256 sum for .*head.*; convert it again"):
        djax.load(tmp_path / "out", verify=True)
    file.write_text(json.dumps(known | {"parameters": {}}))
    with pytest.raises(CheckpointError, match=r"holds no SHA-256 sums of these parameters, so nothing can be verified"):
        djax.load(tmp_path / "out", verify=True)
    djax.export_hf(djax.load(GOLDENS / "moe_b"), tmp_path / "wide", dtype="float32")
    convert(tmp_path / "wide", tmp_path / "narrow", dtype="bfloat16")
    file = tmp_path / "narrow" / "djax.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"parameters": {}}))
    with pytest.raises(CheckpointError, match=r"sums of HF's tensors alone, and .* was narrowed"):
        djax.load(tmp_path / "narrow", verify=True)


def test_a_conversion_that_is_running_is_left_alone(tmp_path):
    from djax.storage.directories import new_directory

    with new_directory(tmp_path / "out") as one:
        (one / "something").write_text("here")
        convert(GOLDENS / "moe_a", tmp_path / "out")
        assert (one / "something").exists()
        shutil.rmtree(tmp_path / "out")
    assert (tmp_path / "out" / "something").exists()


def test_restored_onto_a_mesh_of_one(tmp_path):
    convert(GOLDENS / "llada2", tmp_path / "out")
    model = djax.load(tmp_path / "out", mesh=djax.mesh())
    assert isinstance(jax.tree.leaves(model.params)[0].sharding, jax.sharding.NamedSharding)
    same_params(model.params, djax.load(GOLDENS / "llada2").params)
