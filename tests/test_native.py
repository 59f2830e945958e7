"""Functions compiled on the spot: made once, kept privately, never in the way where they cannot be made."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import djax
from djax.kernels import native

pytestmark = pytest.mark.cpp
ASK = "import jax.numpy as jnp; from djax.kernels import native; print(native.why_not(jnp.float32))"


def asked(code=ASK, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, cwd="/", timeout=200
    )
    assert not done.returncode, done.stderr
    return done.stdout.strip()


@pytest.fixture
def home(tmp_path):
    """A cache with nothing in it. The key of a library does not depend on where it lies."""
    return {"XDG_CACHE_HOME": str(tmp_path / "cache")}


def kept(home):
    return sorted(Path(home["XDG_CACHE_HOME"]).glob("djax/native/*"))


def test_it_is_compiled_once_and_private(home):
    assert asked(**home) == "None"
    (library,) = kept(home)
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    made = library.stat().st_mtime_ns
    assert asked(**home, CXX="/nowhere/c++") == "None", "no compiler is needed any more"
    assert library.stat().st_mtime_ns == made


def test_without_a_compiler_there_is_a_reason(home):
    assert asked(**home, CXX="/nowhere/c++") == "CXX=/nowhere/c++ is not there"
    assert asked(**home, PATH="/nowhere").startswith("no C++ compiler (c++, g++, clang++ or CXX) was found")
    assert not kept(home)


def test_settings_that_make_no_sense_are_a_reason(home):
    assert "No closing quotation" in asked(**home, CXX="g++ '")
    assert not kept(home)


def test_a_compiler_that_fails_leaves_nothing(home, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'this is no compiler' >&2\nexit 1\n")
    broken.chmod(0o755)
    twice = f"{ASK}; print(native.why_not(jnp.float32))"
    said = asked(twice, **home, CXX=str(broken)).splitlines()
    assert said[0] == said[1] and said[0].endswith("does not compile kernels.cpp: this is no compiler")
    assert not kept(home)


def test_a_place_that_others_may_write_to_is_not_used(home):
    place = Path(home["XDG_CACHE_HOME"]) / "djax" / "native"
    place.mkdir(parents=True)
    place.chmod(0o777)
    assert "others may write to it" in asked(**home)


@pytest.mark.long
def test_a_library_that_is_damaged_is_made_anew_or_a_reason(home):
    asked(**home)
    (library,) = kept(home)
    library.write_bytes(b"\x7fELF and then nothing")
    assert asked(**home, CXX="/nowhere/c++") == "CXX=/nowhere/c++ is not there"
    assert asked(**home) == "None"
    assert kept(home) == [library] and library.stat().st_size > 10_000


def test_an_answer_without_it_is_the_same(small, home):
    question = "Ben has 20 coins. He finds 3 boxes with 6 coins each. He loses 9. How many coins does Ben have now?"
    code = f"import djax; out = djax.generate(djax.load(), {question!r}); print(out.canvas.tolist(), out.forwards)"
    here = djax.generate(small, question)
    for environment in ({"CXX": "/nowhere/c++"} | home, {"DJAX_KERNELS": "xla"}):
        assert asked(code, **environment) == f"{here.canvas.tolist()} {here.forwards}"


def test_explain_says_which_form_and_why(small, monkeypatch):
    assert djax.explain(small, "x").facts["experts"] == "the chosen ones, by djax's own C++ (on cpu)"
    assert djax.explain(small, "x").facts["attention"] == "djax's own C++ (on cpu)"
    monkeypatch.setenv("DJAX_KERNELS", "xla")
    facts = djax.explain(small, "x").facts
    assert facts["experts"] == "the chosen ones, in tiles; not by djax's own C++, since DJAX_KERNELS=xla (on cpu)"
    assert facts["attention"] == "XLA's products; not djax's own C++, since DJAX_KERNELS=xla (on cpu)"


def test_dtypes_it_is_not_made_for():
    assert native.why_not(jnp.float16) == "they are not made for float16 values and float16 weights"
    assert native.why_not(jnp.bfloat16, jnp.float32) == "they are not made for bfloat16 values and float32 weights"
    assert native.why_not(jnp.bfloat16, jnp.int8) is None


def experts(*shape):
    return jax.ffi.ffi_call(native.target("djax_experts", jnp.float32), jax.ShapeDtypeStruct(shape, jnp.float32))


def test_wrong_shapes_are_an_error_and_no_crash():
    x, ids, w_in, w_out = jnp.ones((4, 64)), jnp.zeros((4, 2), jnp.int32), jnp.ones((3, 64, 64)), jnp.ones((3, 32, 64))
    none, gates = (jnp.zeros((0, 1, 64)), jnp.zeros((0, 32, 1))), jnp.ones((4, 2))
    assert np.isfinite(experts(4, 64)(x, ids, gates, w_in, w_out, *none)).all()
    assert np.isfinite(experts(4, 2, 64)(x, ids, gates[:0], w_in, w_out, *none)).all()
    wrong = (
        (x, ids, gates, w_in[:2], w_out),
        (x, ids[:3], gates, w_in, w_out),
        (x, ids, gates[:3], w_in, w_out),
        (x[:, :32], ids, gates, w_in, w_out),
        (x, ids, gates, w_in, w_in),
    )
    for arguments in wrong:
        with pytest.raises(Exception, match="expected other shapes or types"):
            experts(4, 64)(*arguments, *none)


def test_ids_that_are_no_expert_s_are_none():
    none = jnp.zeros((0, 1, 64)), jnp.zeros((0, 32, 1))
    ids = jnp.array([[-1, 2], [2**31 - 1, 3]], jnp.int32)
    w_in, w_out, gates = jnp.ones((3, 64, 64)), jnp.ones((3, 32, 64)), jnp.full((2, 2), 0.5)
    y = experts(2, 2, 64)(jnp.ones((2, 64)), ids, gates[:0], w_in, w_out, *none)
    assert np.array_equal(np.asarray(y).any(axis=-1), [[False, True], [False, False]])
    summed = experts(2, 64)(jnp.ones((2, 64)), ids, gates, w_in, w_out, *none)
    np.testing.assert_allclose(summed, [0.5 * y[0, 1], np.zeros(64)])
