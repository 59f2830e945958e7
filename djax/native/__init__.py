"""C++ functions that XLA calls on a CPU, compiled on the machine they run on, once, and kept beside the compiled programs.

They are made for this very processor and this very jaxlib, whose headers come with it, so no wheel has to have them; where
they cannot be made djax does without (`why_not`).
"""

import contextlib
import contextvars
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib

from djax.compilation import default_directory, private_directory
from djax.errors import OptionError
from djax.sharding import MODEL

ENVIRONMENT = "DJAX_KERNELS"
FUNCTIONS = ("djax_experts", "djax_attention", "djax_dense", "djax_peaks")
COMPILERS = ("c++", "g++", "clang++")
_SOURCE = Path(__file__).with_name("kernels.cpp")
_TYPES = {"float32": "float", "bfloat16": "BFloat16", "int8": "int8_t"}
# -O3 keeps tiles of sums in registers. Nothing that lets a compiler reorder sums.
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-w")
_SECONDS = 120
_lock = threading.Lock()
_known: dict[tuple[str, str], str | Exception] = {}
_portable = contextvars.ContextVar("portable", default=False)


class Unavailable(Exception):
    """The functions cannot be had here; the message says why."""


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """What is traced inside has no such functions: it is to run where djax is not."""
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


def kernels_wanted() -> bool:
    """Whether programs may have djax's own kernels: Pallas on a GPU, C++ on a CPU. DJAX_KERNELS=xla asks for XLA's operations
    alone: to compare, or in doubt."""
    form = os.environ.get(ENVIRONMENT, "djax")
    if form not in ("djax", "xla"):
        raise OptionError(f"{ENVIRONMENT}: expected 'djax' or 'xla', got {form!r}")
    return form == "djax"


def why_not(dtype: Any, held: Any = None) -> str | None:
    """Why there are no functions for values of this dtype and weights held in that one (None: the same) in a program that is
    traced now; None if there are. The first time they are compiled: a few seconds, once a machine."""
    if not kernels_wanted():
        return f"{ENVIRONMENT}=xla"
    if jax.default_backend() != "cpu":
        return "this process computes elsewhere"
    if _portable.get():
        return "the program is to run without djax"
    mesh = jax.sharding.get_abstract_mesh()
    others = set(mesh.axis_names) - set(mesh.manual_axes) - {MODEL}
    if any(mesh.shape[axis] > 1 for axis in others):
        return "a mesh's axis that XLA splits by itself would have every device compute all"
    try:
        _library(*_types(dtype, held))
    except Unavailable as why:
        return str(why)
    return None


def target(name: str, dtype: Any, held: Any = None) -> str:
    """The name under which XLA knows the function `name` of these dtypes. Only where `why_not` has no reason."""
    return f"{name}_{_library(*_types(dtype, held))}"


def _types(dtype: Any, held: Any) -> tuple[str, str]:
    dtype, held = jnp.dtype(dtype).name, jnp.dtype(dtype if held is None else held).name
    if dtype not in ("float32", "bfloat16") or held not in (dtype, "int8"):
        raise Unavailable(f"they are not made for {dtype} values and {held} weights")
    return _TYPES[dtype], _TYPES[held]


def _library(values: str, weights: str) -> str:
    """The library's key, its functions registered. What goes wrong is told again at every call of a process."""
    with _lock:
        if (values, weights) not in _known:
            try:
                _known[values, weights] = _registered(values, weights)
            except Unavailable as why:
                _known[values, weights] = why
    if isinstance(found := _known[values, weights], Exception):
        raise Unavailable(str(found))
    return found


def _registered(values: str, weights: str) -> str:
    defined = (f"-DDJAX_X={values}", f"-DDJAX_W={weights}")
    sources = sorted(p for p in _SOURCE.parent.iterdir() if p.suffix in (".h", ".cpp"))
    made_of = (*(p.read_bytes() for p in sources), repr((_FLAGS, defined, jaxlib.__version__, _processor())).encode())
    key = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:24]
    library = Path(f"{key}.so")
    try:
        library = private_directory(default_directory().parent / "native") / library
        if not library.is_file():
            _compile(defined, library)
        try:
            loaded = ctypes.CDLL(str(library))
        except OSError:
            # Damaged, or of another machine with the same processor and other system libraries.
            _compile(defined, library)
            loaded = ctypes.CDLL(str(library))
        capsules = {name: jax.ffi.pycapsule(getattr(loaded, name)) for name in FUNCTIONS}
    except (OSError, AttributeError, OptionError, RuntimeError, ValueError) as error:
        raise Unavailable(f"{library}: {error}") from None
    for name, capsule in capsules.items():
        jax.ffi.register_ffi_target(f"{name}_{key}", capsule, platform="cpu")
    return key


def _compile(defined: tuple[str, ...], library: Path) -> None:
    compiler = _compiler()
    own = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    with tempfile.TemporaryDirectory(prefix=".", dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        command = [*compiler, *_FLAGS, own, *defined, f"-I{jax.ffi.include_dir()}", str(_SOURCE), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=_SECONDS, errors="replace")
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{compiler[0]} took more than {_SECONDS} seconds for {_SOURCE.name}") from None
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no message"]
            first = next((line for line in said if "error" in line), said[0])
            raise Unavailable(f"{compiler[0]} does not compile {_SOURCE.name}: {first}")
        made.replace(library)


def _compiler() -> list[str]:
    """CXX, or the first compiler there is."""
    wish = shlex.split(os.environ.get("CXX", ""))
    for command in [wish] if wish else [[name] for name in COMPILERS]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    raise Unavailable(f"CXX={wish[0]} is not there" if wish else f"no C++ compiler ({', '.join(COMPILERS)} or CXX) was found")


def _processor() -> str:
    """What the compiled code may rely on: a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").split("\n\n", 1)[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    named = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    return platform.machine() + "\n".join(line for line in lines if line.startswith(named))
