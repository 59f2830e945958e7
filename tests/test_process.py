"""What the process around a call does: settings of jax change nothing, forks are refused, threads share programs safely."""

import dataclasses
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from functools import partial

import jax
import numpy as np
import pytest
from conftest import GOLDENS
from tiny import CONFIG, DENSE, LLADA2, tiny_model
from toy import toy_model

import djax
from djax.errors import ForkError, OptionError
from djax.runtime import process
from djax.runtime.programs import Programs

# Every setting of jax that may change what a computation gives, whether it runs, or what kind of error it raises.
SETTINGS = [
    ("jax_default_prng_impl", "rbg"),
    ("jax_default_prng_impl", "unsafe_rbg"),
    ("jax_threefry_partitionable", False),
    ("jax_random_seed_offset", 7),
    ("jax_high_dynamic_range_gumbel", True),
    ("jax_enable_custom_prng", True),
    ("jax_legacy_prng_key", "error"),
    ("jax_enable_x64", True),
    ("jax_numpy_dtype_promotion", "strict"),
    ("jax_numpy_rank_promotion", "raise"),
    ("jax_disable_jit", True),
    ("jax_no_tracing", True),
    ("jax_debug_nans", True),
    ("jax_debug_infs", True),
    ("jax_debug_key_reuse", True),
    ("jax_transfer_guard", "disallow"),
    ("jax_transfer_guard_host_to_device", "disallow_explicit"),
    ("jax_transfer_guard_device_to_host", "disallow_explicit"),
    ("jax_default_matmul_precision", "bfloat16"),
    ("jax_default_matmul_precision", "highest"),
    ("jax_softmax_custom_jvp", True),
    ("jax_optimization_level", "O3"),
]


@pytest.fixture
def setting():
    """Set a setting of jax; afterwards it is as it was."""
    before = {}

    def change(name, value):
        before.setdefault(name, getattr(jax.config, name))
        jax.config.update(name, value)

    yield change
    for name, value in before.items():
        # None does not take back what the runtime was told.
        jax.config.update(name, "allow" if "guard" in name else value)


def answers(model):
    """A drawn batch with a cache and smoothing, then a row alone."""
    options = dict(gen_length=12, block_length=4, temperature=0.7, decoder=djax.Credit(djax.Threshold(0.5)))
    options |= dict(cache=djax.Dual(), smoothing=djax.Smoothing())
    batch = djax.generate(model, [[1, 2, 3], [4, 5]], seed=[3, 4], **options)
    alone = djax.generate(model, [4, 5], seed=4, **options)
    return [(out.canvas.tolist(), out.forwards, out.refreshes) for out in (*batch, alone)]


@pytest.fixture(scope="module")
def base():
    model = tiny_model()
    found = answers(model)
    assert found[1] == found[2], "the batch law"
    return model, found, np.asarray(djax.logits(model, [[1, 2, 3, 4]]))


@pytest.mark.long
@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_no_setting_of_jax_changes_an_answer(base, setting, tmp_path, name, value):
    model, found, logits = base
    setting(name, value)
    # Programs made before the change serve after it, and those made under it are the same.
    assert answers(model) == found
    djax.runtime.programs.PROGRAMS.clear()
    assert answers(model) == found
    again = djax.logits(model, [[1, 2, 3, 4]])
    assert again.dtype == np.float32
    with process.own_settings():
        again = np.asarray(again)
    np.testing.assert_array_equal(again, logits)
    assert djax.explain(model, [1, 2, 3]).blocks


@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_no_setting_of_jax_changes_a_model_that_is_loaded_or_saved(moe_a, setting, tmp_path, name, value):
    setting(name, value)
    if value == "disallow_explicit":
        # Orbax moves values in threads of its own, which keep the process's guard.
        djax.load(GOLDENS / "moe_a")
        if name.endswith("host_to_device"):
            djax.save(moe_a, tmp_path / "saved")
            with pytest.raises(OptionError, match="the setting jax_transfer_guard_host_to_device forbids"):
                djax.load(tmp_path / "saved")
        return
    djax.save(moe_a, tmp_path / "saved")
    again = djax.load(tmp_path / "saved")
    with process.own_settings():
        for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(moe_a.params), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("setting_and_value", SETTINGS[:4])
def test_keys_do_not_depend_on_the_prng_of_the_process(setting, setting_and_value):
    """What masks of a training and weights of a new model are drawn from."""
    wanted = np.asarray(jax.random.uniform(jax.random.key(5), (4,)))
    setting(*setting_and_value)
    with process.own_settings():
        np.testing.assert_array_equal(jax.random.uniform(process.make_key(5), (4,)), wanted)


def test_a_user_s_own_transformation_sees_the_logits():
    """Parameters may be tracers: what a caller differentiates is the plain forward."""
    model = tiny_model(config=DENSE)

    def total(params):
        return djax.logits(dataclasses.replace(model, params=params), [[1, 2, 3]]).sum()

    found = jax.grad(total)(model.params)
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(found)) > 0


# --- the bound on programs -----------------------------------------------------------------------------------------------


def test_programs_are_compiled_once_and_bounded_whatever_threads_ask():
    kept, most, made, lock = Programs(most=3), 0, [], threading.Lock()
    start = threading.Barrier(8)

    def compile_key(key):
        with lock:
            made.append(key)
        time.sleep(0.005)
        return f"program {key}"

    def ask(seed):
        nonlocal most
        rng = np.random.default_rng(seed)
        start.wait()
        for key in rng.integers(0, 3, 60).tolist():
            assert kept.get(key, partial(compile_key, key))[0] == f"program {key}"
            most = max(most, len(kept))
        for key in rng.integers(0, 11, 60).tolist():
            assert kept.get(key, partial(compile_key, key))[0] == f"program {key}"
            most = max(most, len(kept))

    errors = []

    def guarded(seed):
        try:
            ask(seed)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert most == 3 == len(kept)


def test_eight_threads_compile_three_programs_three_times():
    kept, made, start = Programs(most=3), [], threading.Barrier(8)

    def compile_key(key):
        made.append(key)
        time.sleep(0.02)

    def ask():
        start.wait()
        for key in (0, 1, 2):
            kept.get(key, partial(compile_key, key))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [0, 1, 2]


def test_a_compile_that_fails_fails_where_it_ran_and_is_tried_again_elsewhere():
    kept, started, raised = Programs(most=3), threading.Event(), []

    def fail():
        started.set()
        time.sleep(0.05)
        raise KeyboardInterrupt

    def first():
        try:
            kept.get(1, fail)
        except KeyboardInterrupt:
            raised.append(True)

    thread = threading.Thread(target=first)
    thread.start()
    started.wait()
    program, seconds = kept.get(1, lambda: "good")
    thread.join()
    assert (program, raised) == ("good", [True])
    assert seconds > 0
    assert kept.get(1, fail) == ("good", 0.0)


def test_threads_generate_at_once():
    """Three shapes of canvas, eight threads: each answer is the one the shape gives alone."""
    model = toy_model()
    wanted = {n: djax.generate(model, [1, 2], gen_length=n, block_length=8).canvas.tolist() for n in (8, 70, 130)}
    djax.runtime.programs.PROGRAMS.clear()
    wrong, start = [], threading.Barrier(8)

    def run(seed):
        start.wait()
        try:
            for n in np.random.default_rng(seed).permutation([8, 70, 130]).tolist():
                if djax.generate(model, [1, 2], gen_length=n, block_length=8).canvas.tolist() != wanted[n]:
                    wrong.append(n)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- pickles and forks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, DENSE, LLADA2])
def test_a_model_survives_a_pickle(config):
    model = tiny_model(config=config)
    again = pickle.loads(pickle.dumps(model))
    assert (again.family, again.config, again.mesh) == (model.family, model.config, None)
    options = dict(gen_length=8, block_length=8)
    one, other = (djax.generate(m, [1, 2, 3], **options).canvas for m in (model, again))
    np.testing.assert_array_equal(one, other)


def test_a_model_with_a_tokenizer_or_on_a_mesh_survives_a_pickle(small):
    again = pickle.loads(pickle.dumps(small))
    assert again.tokenizer.get_vocab() == small.tokenizer.get_vocab()
    assert again.tokenizer.chat_template == small.tokenizer.chat_template
    assert repr(again) == repr(small)
    on_mesh = djax.load(GOLDENS / "moe_a", mesh=djax.mesh())
    again = pickle.loads(pickle.dumps(on_mesh))
    assert again.mesh == on_mesh.mesh
    places = [[a.sharding for a in jax.tree.leaves(m.params)] for m in (again, on_mesh)]
    assert places[0] == places[1]


FORKS = """
import os, sys
import jax, djax
from djax.errors import ForkError
how = sys.argv[1]
if how == "load":
    model = djax.load()
elif how == "jax":
    jax.numpy.ones(3).sum()
child = os.fork()
if not child:
    try:
        djax.mesh() if how == "mesh" else djax.load()
        code = 10
    except ForkError as error:
        assert "multiprocessing.get_context('spawn')" in str(error)
        code = 20
    except BaseException:
        code = 30
    os._exit(code)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize(("how", "code"), [("load", 20), ("jax", 20), ("nothing", 10), ("mesh", 10)])
def test_a_fork_after_jax_began_is_refused_and_one_before_it_works(how, code):
    command = [sys.executable, "-c", FORKS, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=os.environ)
    assert (done.stdout.strip(), done.returncode) == (str(code), 0), done.stderr


def test_a_spawned_process_answers_with_a_model_it_was_given():
    model = tiny_model()
    wanted = djax.generate(model, [1, 2, 3], gen_length=8, block_length=8).canvas
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(answer, (model,))
    np.testing.assert_array_equal(found, wanted)


def answer(model):
    return djax.generate(model, [1, 2, 3], gen_length=8, block_length=8).canvas


def test_a_forked_flag_refuses_every_door(monkeypatch):
    monkeypatch.setattr(process, "_forked", True)
    model = toy_model()
    for call in (
        lambda: djax.generate(model, [1]),
        lambda: djax.logits(model, [[1]]),
        lambda: djax.explain(model, [1]),
        lambda: djax.compile(model),
        lambda: djax.load(),
        djax.mesh,
    ):
        with pytest.raises(ForkError, match="this process was forked"):
            call()
