"""Programs made ahead of time: compiled for the next process, and exported to run without djax."""

import json
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest
from tiny import tiny_model

import djax
from djax.errors import OptionError

QUESTION = "Ben has 20 coins. He finds 3 boxes with 6 coins each. He loses 9. How many coins does Ben have now?"
# Everything a user without djax has: jax, numpy, safetensors, and the directory.
ALONE = """
import json, sys
sys.modules["djax"] = None
import jax, numpy as np
from jax import export
from safetensors.numpy import load_file
directory = sys.argv[1]
program = export.deserialize(bytearray(open(directory + "/program.jaxexport", "rb").read()))
manifest = json.load(open(directory + "/manifest.json"))
given = json.loads(sys.argv[2])
request = {n: np.array(given[n], f["dtype"]).reshape(f["shape"]) for n, f in manifest["request"].items()}
numbers = [np.asarray(n, np.float32 if isinstance(n, float) else np.int32) for n in manifest["numbers"]]
out = program.call(load_file(directory + "/parameters.safetensors"), request, numbers)
print(json.dumps({n: np.asarray(a).tolist() for n, a in out.items()}))
"""
OPTIONS = dict(decoder=djax.Credit(djax.Threshold(0.9)), cache=djax.Vicinity(16, 16, warmup=2), gen_length=96)


def test_what_was_compiled_ahead_compiles_no_more():
    model = djax.load()
    canvas, seconds = djax.compile(model, prompt_length=40, rows=1, **OPTIONS)
    assert canvas == 192 and seconds > 0
    assert djax.compile(model, prompt_length=90, rows=1, **OPTIONS) == (192, 0.0)
    assert djax.generate(model, QUESTION, **OPTIONS).timing.compile == 0


def test_an_export_runs_without_djax(tmp_path):
    model = djax.load()
    expected = djax.generate(model, QUESTION, **OPTIONS)
    djax.export_program(model, tmp_path / "out", prompt_length=expected.prompt_length, **OPTIONS)
    prompt, canvas = expected.prompt_length, np.full((1, 192), model.config.eos_id)
    total = prompt + OPTIONS["gen_length"]
    canvas[0, :total] = [*expected.canvas[:prompt], *[model.config.mask_id] * OPTIONS["gen_length"]]
    request = dict(tokens=canvas.tolist(), prompt=prompt, total=total, least=prompt, start=prompt // 32 * 32)
    given = json.dumps(request | dict(seed=0, temperature=0, early_stop=True, cap=OPTIONS["gen_length"]))
    done = subprocess.run([sys.executable, "-c", ALONE, str(tmp_path / "out"), given], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert out["tokens"][0][: len(expected.canvas)] == expected.canvas.tolist()
    assert (out["forwards"], out["refreshes"], out["active"]) == ([expected.forwards], [expected.refreshes], [False])


def test_an_export_for_a_gpu_that_is_not_there(tmp_path):
    djax.export_program(djax.load(), tmp_path / "out", platform="cuda", **OPTIONS)
    exported = jax.export.deserialize(bytearray((tmp_path / "out" / "program.jaxexport").read_bytes()))
    assert exported.platforms == ("cuda",)
    assert "xla.gpu.triton" in exported.mlir_module(), "its attention is the kernel"
    fields = json.loads((tmp_path / "out" / "manifest.json").read_text())["request"]
    assert not {"temperature", "seed", "top_p", "top_k"} & set(fields), "what it would ignore it does not take"


def test_an_export_that_draws_takes_what_it_reads(tmp_path):
    for out, more, read in (
        ("hot", dict(temperature=0.5), {"temperature", "seed"}),
        ("cut", dict(temperature=0.5, top_k=4), {"temperature", "seed", "top_p", "top_k"}),
    ):
        djax.export_program(tiny_model(), tmp_path / out, gen_length=8, block_length=8, prompt_length=4, **more)
        fields = json.loads((tmp_path / out / "manifest.json").read_text())["request"]
        assert {"temperature", "seed", "top_p", "top_k"} & set(fields) == read


def test_bad_input(tmp_path):
    model = djax.load()
    with pytest.raises(OptionError, match="platform: expected one of cpu, cuda, rocm, tpu, got 'metal'"):
        djax.export_program(model, tmp_path / "out", platform="metal")
    with pytest.raises(OptionError, match="already exists"):
        djax.export_program(model, tmp_path)
    with pytest.raises(OptionError, match="prompt_length: expected"):
        djax.compile(model, prompt_length=0)
    with pytest.raises(TypeError, match="unexpected options"):
        djax.compile(model, prompt=3)
    with pytest.raises(OptionError, match="max_batch: expected None"):
        djax.compile(model, max_batch=3)
    with pytest.raises(OptionError, match="lies on a mesh"):
        djax.export_program(djax.load(mesh=djax.mesh()), tmp_path / "out")
    assert not (tmp_path / "out").exists()
