"""Shared by all tests: strict jax settings, the recorded data, tiny models, one compile cache a session."""

import os
from pathlib import Path

import pytest

GOLDENS = Path(__file__).parent / "goldens"


def pytest_configure(config):
    # One cache for this process and for the commands that tests start, kept between sessions: compiling is what
    # the suite spends its time on.
    cache = Path(config.rootpath) / ".pytest_cache" / "xla"
    # Half of compiling is LLVM's optimisation, and half of the rest XLA's newer way to write fused loops. Neither changes HLO,
    # but how sums are rounded and in which kernel: `XLA_FLAGS= pytest` tests what users get, which takes twice the time, and
    # .ci/run tests some of it so.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")
    os.environ["DJAX_COMPILE_CACHE"] = str(cache)
    import jax

    from djax.errors import OptionError
    from djax.private import default_directory, private_directory

    try:
        private_directory(cache)
    except OptionError:
        # A checkout that others may write to, or somebody else's.
        os.environ["DJAX_COMPILE_CACHE"] = str(default_directory() / "tests")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    config.addinivalue_line("markers", "cpp: needs djax's C++ functions, which need a compiler")


def pytest_runtest_setup(item):
    if item.get_closest_marker("cpp"):
        from djax import native

        if (why_not := native.why_not("float32")) is not None:
            pytest.skip(f"without djax's C++ functions: {why_not}")


@pytest.fixture(autouse=True, scope="module")
def let_go_of_programs():
    """A program of a CPU takes hundreds of memory mappings, and the suite's together are more than a process may have."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture(scope="session")
def moe_a():
    import djax

    return djax.load(GOLDENS / "moe_a")


@pytest.fixture(scope="session")
def moe_b():
    import djax

    return djax.load(GOLDENS / "moe_b")


@pytest.fixture(scope="session")
def dense():
    import djax

    return djax.load(GOLDENS / "dense")


@pytest.fixture(scope="session")
def llada2():
    import djax

    return djax.load(GOLDENS / "llada2")


@pytest.fixture(scope="session")
def small():
    import djax

    return djax.load()
