"""Shared by all tests: strict jax settings, the recorded data, tiny models, one compile cache a session."""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

GOLDENS = Path(__file__).parent / "goldens"
# Half of compiling is LLVM's optimisation, and half of the rest XLA's newer way to write fused loops. Neither changes HLO, but
# how sums are rounded and in which kernel: `XLA_FLAGS= pytest` tests what users get, which takes twice the time, and .ci/run
# tests some of it so.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
# Of each test, where nothing else is asked for.
CASES = 3
PROBE = """
import sys, jax
for name in sys.argv[1:]:
    try:
        jax.jit(lambda x: x).lower(0).compile({name: 0 if name.endswith("level") else False})
        print(name)
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
"""


def known_flags():
    """Those flags that the installed XLA knows: it aborts a process that sets any other."""
    probe = subprocess.run([sys.executable, "-c", PROBE, *QUICK], capture_output=True, text=True, check=True)
    known = probe.stdout.split()
    return " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items() if name in known)


def pytest_configure(config):
    # One cache for this process and for the commands that tests start, kept between sessions: compiling is what
    # the suite spends its time on.
    cache = Path(config.rootpath) / ".pytest_cache" / "xla"
    # Workers inherit what the process that starts them has found.
    if "XLA_FLAGS" not in os.environ:
        os.environ["XLA_FLAGS"] = known_flags()
    os.environ["DJAX_COMPILE_CACHE"] = str(cache)
    import jax

    from djax.errors import OptionError
    from djax.runtime.private import default_directory, private_directory

    try:
        private_directory(cache)
    except OptionError:
        # A checkout that others may write to, or somebody else's.
        os.environ["DJAX_COMPILE_CACHE"] = str(default_directory() / "tests")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    config.addinivalue_line("markers", "cpp: needs djax's C++ functions, which need a compiler")


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is marked
def pytest_collection_modifyitems(config, items):
    """Mark all but a few cases of each test as long, spread over its list, so that every test runs and the suite is quick. A
    test that is asked for by its name runs whole."""
    if any("::" in argument for argument in config.args):
        config.option.markexpr = ""
        return
    cases = defaultdict(list)
    for item in items:
        if not any(item.get_closest_marker(name) for name in ("long", "every")):
            cases[item.path, item.originalname].append(item)
    for listed in cases.values():
        kept = {round(n * (len(listed) - 1) / (CASES - 1)) for n in range(CASES)}
        for n, item in enumerate(listed):
            if len(listed) > CASES and n not in kept:
                item.add_marker(pytest.mark.long)


def pytest_runtest_setup(item):
    if item.get_closest_marker("cpp"):
        from djax.kernels import dispatch
        from djax.kernels.choice import read_choice

        choice = dispatch.choose(dispatch.Attention(32, "float32"), "cpu", dispatch.foresee_site(read_choice(), None))
        if choice.refused:
            pytest.skip(f"without djax's C++ functions: {choice.refused[0][1]}")


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
