"""Meshes: the same tokens on one device and on many, parameters where they belong, and meshes that do not fit."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import GOLDENS
from jax.sharding import Mesh

import djax
from djax.errors import OptionError
from djax.runtime import sharding

HERE = Path(__file__).parent


def run_on_eight_devices(file):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-W", "error", HERE / file], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.long
def test_tokens_are_equal_on_eight_devices():
    done = run_on_eight_devices("on_eight_devices.py")
    # LLaDA-MoE, narrow and wide, on two meshes, LLaDA on one, LLaDA2 on two.
    assert re.findall(r"equal in (\d of \d)", done.stdout) == [f"{n} of {n}" for n in (5, 5, 2, 2, 1, 1, 1)]


@pytest.mark.long
def test_bfloat16_int8_and_training_on_two_and_eight_devices():
    done = run_on_eight_devices("dtypes_on_devices.py")
    found = re.findall(r"(\w+) (\w+): (?:close|trained)", done.stdout)
    kinds = ["bfloat16", "int8"]
    families = ["llada_moe", "llada", "llada2"]
    assert found == [(name, kind) for name in families for kind in kinds] + [("llada2", "bfloat16")]


def test_a_mesh_of_one_is_one_device(moe_a):
    model = djax.load(GOLDENS / "moe_a", mesh=djax.mesh())
    assert model.bytes_per_device == model.parameter_bytes == moe_a.parameter_bytes
    options = dict(gen_length=16, block_length=16, cache=djax.Dual())
    np.testing.assert_array_equal(
        djax.generate(model, [1, 2], **options).canvas, djax.generate(moe_a, [1, 2], **options).canvas
    )


def test_meshes_that_do_not_fit():
    with pytest.raises(OptionError, match=r"mesh: data=1 times model=2 takes 2 devices, there are 1 \(cpu\); on a CPU, XLA_FL"):
        djax.mesh(model=2)
    with pytest.raises(OptionError, match="model: expected a whole number, at least 1"):
        djax.mesh(model=0)
    with pytest.raises(OptionError, match=r"mesh: expected djax.mesh\(model=..., data=...\), or a jax Mesh with the axes"):
        djax.load(GOLDENS / "moe_a", mesh=Mesh(np.array(jax.devices()), ("x",)))
    with pytest.raises(OptionError, match=r"mesh: expected djax.mesh\("):
        djax.load(GOLDENS / "moe_a", mesh=8)
    three = jax.sharding.AbstractMesh((1, 3), sharding.AXES)
    sizes = {("qkv",): (64, 4, 3, 16), ("w_in",): (8, 64, 32), ("head",): (64, 320), ("norm",): (64,)}
    axes = {("qkv",): ("embed", "heads", None, "head_dim"), ("w_in",): ("expert", "embed", None), ("head",): ("embed", "vocab")}
    with pytest.raises(
        OptionError, match=r"model=3 does not divide heads 4 \(qkv\), expert 8 \(w_in\), vocab 320 \(head\); use a"
    ):
        sharding.place(three, axes | {("norm",): ("embed",)}, sizes)
