"""The compile cache: what a process that is killed leaves is whole, and what is not is compiled again, once."""

import os
import shutil
import warnings

import jax
import killed
import numpy as np
import pytest
from tiny import tiny_model

import djax
from djax.runtime.compilation import compile_cache

OPTIONS = dict(gen_length=16, block_length=8)
PROMPT = [1, 2, 3]


def compile_in(directory, die=None, out=None):
    """Compile a decode, and decode, with a cache; how many programs came from it and how many did not go to `out`.

    Anything jax has to say of a damaged entry is a warning, which is an error here.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    warnings.simplefilter("error")
    counts = {"/jax/compilation_cache/cache_hits": 0, "/jax/compilation_cache/cache_misses": 0}

    def count(event, **_):
        if event in counts:
            counts[event] += 1

    jax.monitoring.register_event_listener(count)
    compile_cache(directory)
    # Every program, however quickly it compiles.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    model = tiny_model()
    if die is not None:
        killed.die_at(die)
    djax.compile(model, prompt_length=len(PROMPT), rows=1, **OPTIONS)
    answer = djax.generate(model, PROMPT, **OPTIONS)
    if out is not None:
        np.savez(out, canvas=answer.canvas, counts=list(counts.values()))


@pytest.fixture(scope="module")
def answer():
    return djax.generate(tiny_model(), PROMPT, **OPTIONS).canvas


@pytest.fixture
def use(tmp_path, answer):
    """Goes on with the cache in a new process, which must answer as without one. Returns hits and misses."""

    def go_on():
        out = tmp_path / "out.npz"
        out.unlink(missing_ok=True)
        assert killed.end(killed.start(compile_in, tmp_path / "cache", None, out))
        with np.load(out) as told:
            np.testing.assert_array_equal(told["canvas"], answer)
            return tuple(told["counts"].tolist())

    return go_on


@pytest.mark.long
def test_a_compilation_that_is_killed_leaves_a_cache_that_serves(use, tmp_path):
    """The next start answers rightly and fills what is missing; the one after it compiles nothing."""
    cache, found = tmp_path / "cache", []

    def begin(die):
        return killed.start(compile_in, cache, die)

    def check():
        found.append(use()[0])
        assert use()[1] == 0, "everything is there now"
        shutil.rmtree(cache)

    def writes():
        return cache.exists() and any(cache.iterdir())

    killed.kill_at_moments(int(killed.MOMENTS or 2), begin, writes, check, "compile")
    print("programs kept by each:", found[2:])


def entries(cache):
    return sorted(p for p in cache.rglob("*") if p.is_file())


def test_a_damaged_entry_is_compiled_again_once(use, tmp_path):
    """Empty, cut short, or with another byte in it; also one that jax's own cache wrote, which has no checksum."""
    _, missed = use()
    spoils = (lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b[:-1], lambda b: b[:200] + b"\xff\xfe" + b[202:])
    spoils += (lambda b: b[:-32],)
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == missed >= len(spoils)
    for n, file in enumerate(files):
        file.write_bytes(spoils[n % len(spoils)](file.read_bytes()))
    assert use() == (0, missed)
    assert use() == (missed, 0)
