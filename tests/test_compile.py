"""The GPU program, compiled for H100s that are not there: its facts on two layers, and how they are read from HLO."""

import json
import os
import subprocess
import sys

import pytest

from djax.benchmarks import compile as compiling
from djax.benchmarks import hlo
from djax.errors import OptionError

# Where XLA's GPU compiler lies, apart from the environment: jax would look for a GPU wherever it finds it.
COMPILER = os.environ.get("DJAX_GPU_COMPILER")
# Nothing is allocated, so only the layers cost time.
SHALLOW = compiling.LLADA_MOE_7B | {"num_hidden_layers": 2}
SCRIPT = """
import json, sys
from djax.benchmarks.compile import measure
hf, devices, variant = json.loads(sys.argv[1])
print(json.dumps(measure("h100", devices, hf=hf, **variant)))
"""


@pytest.mark.skipif(COMPILER is None, reason="XLA's GPU compiler: DJAX_GPU_COMPILER names no directory that has it (.ci/run)")
@pytest.mark.parametrize(("devices", "variant"), [(8, {"smoothing": True}), (1, {"quantize": "int8"})])
def test_the_program_for_h100s(devices, variant):
    environment = os.environ | {"PYTHONPATH": COMPILER, "JAX_PLATFORMS": "cpu"}
    arguments = [sys.executable, "-c", SCRIPT, json.dumps([SHALLOW, devices, variant])]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd="/", env=environment)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["executables"], facts["loops_in_entry"], facts["host_transfers"]) == (1, 1, 0)
    assert facts["collectives_per_layer"] == ([2] if devices == 8 else [0])
    assert len(facts["collectives_besides"]) <= (8 if devices == 8 else 0)
    # No keys or values of a layer and no expert's weights: the largest copy is of a canvas of tokens.
    assert facts["largest_copy_in_step"] <= 4 * 1280
    assert facts["bytes_per_step"] > facts["unsplit_bytes_per_step"] > facts["least_bytes"]
    assert max(facts["kernels_per_layer"][1:]) <= 14
    if variant.get("quantize"):
        # int8 is widened where it is read: no layer's weights are written anywhere in two bytes.
        assert facts["bytes_over_least"] < 1.5
    # A refresh's experts are the two kernels, after attention's: no product of all experts with all of the canvas.
    calls = [k for k in facts["kernels_of_a_refreshed_layer"] if "pallas_call" in k]
    assert len(calls) == 3 and not any("64,1280" in k for k in facts["kernels_of_a_refreshed_layer"]), calls


def test_targets():
    with pytest.raises(OptionError, match="--target: unknown 'tpu'; there are: h100"):
        compiling.measure("tpu", 1, smoothing=False)


@pytest.mark.skipif(COMPILER is not None, reason="XLA's GPU compiler may be there")
def test_without_the_compiler():
    with pytest.raises(OptionError, match=r"GPU compiler is not installed; pip install --no-deps jax-cuda12-plugin=="):
        compiling.measure("h100", 1, smoothing=False)


HLO = """
HloModule jit_f, is_scheduled=true

%sliced (p: f32[100,8], i: s32[]) -> f32[1,8] {
  %p = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %taken = f32[1,8]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,8}
}

%moved (q: f32[4,8]) -> f32[8,4] {
  %q = f32[4,8]{1,0} parameter(0)
  ROOT %turned = f32[8,4]{1,0} transpose(%q), dimensions={1,0}
}

%product (a: bf16[4,8], b: bf16[8,2]) -> f32[4,2] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = bf16[8,2]{1,0} parameter(1)
  ROOT %d = f32[4,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="f/layer_3/dot"}
}

%body (s: (s32[], f32[100,8], f32[4,8], bf16[4,8], /*index=4*/bf16[8,2])) -> (s32[], f32[100,8]) {
  %s = (s32[], f32[100,8]{1,0}, f32[4,8]{1,0}, bf16[4,8]{1,0}, /*index=4*/bf16[8,2]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %table = f32[100,8]{1,0} get-tuple-element(%s), index=1
  %x = f32[4,8]{1,0} get-tuple-element(%s), index=2
  %left = bf16[4,8]{1,0} get-tuple-element(%s), index=3
  %right = bf16[8,2]{1,0} get-tuple-element(%s), index=4
  %row = f32[1,8]{1,0} fusion(%table, %n), kind=kLoop, calls=%sliced
  %turn = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%moved
  %y = f32[4,2]{1,0} fusion(%left, %right), kind=kCustom, calls=%product
  %sum = f32[4,2]{1,0} all-reduce-start(%y), to_apply=%add
  %summed = f32[4,2]{1,0} all-reduce-done(%sum)
  ROOT %out = (s32[], f32[100,8]{1,0}) tuple(%n, %table)
}

ENTRY %main (a: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %loop = (s32[], f32[100,8]{1,0}) while(%t), condition=%cond, body=%body
  ROOT %r = s32[] get-tuple-element(%loop), index=0
}
"""


def test_what_is_read_from_hlo():
    program = hlo.Program(HLO)
    assert program.entries == 1
    assert program.loops(program.entry) == ["body"]
    kernels = {k.name: k for k in program.kernels("body")}
    assert set(kernels) == {"row", "turn", "y"}
    # A slice reads what it takes, and its index; a transpose all; a product both sides.
    assert program.bytes("body", kernels["row"]) == 32 + 4 + 32
    assert program.bytes("body", kernels["turn"]) == 2 * 128
    assert program.bytes("body", kernels["y"]) == 64 + 32 + 32
    assert program.flops("body") == 2 * 4 * 8 * 2
    assert [k.name for k in program.copies("body")] == ["turn"]
    assert [c.name for c in program.collectives("body")] == ["sum"]
    assert (program.layer(kernels["y"]), program.layer(kernels["row"])) == (3, None)
    assert program.host_transfers() == []
    assert hlo.Program(HLO.replace("ROOT %r", "%z = () outfeed(%loop)\n  ROOT %r")).host_transfers() == ["z"]
