"""C++ functions that XLA calls on a CPU, compiled on the machine they run on, once, and kept beside the compiled programs.

They are compiled for the processor and the jaxlib (whose headers come with it) of this machine, so no wheel has to have them;
where that is not possible djax does without (`why_not`). Which programs call them, `djax.kernels.dispatch` says.

A library that is kept is code that later runs execute. It lies in a private directory, ends with its SHA-256,
and is loaded from a copy in memory of the bytes that were checked, never from the file.
"""

import contextlib
import ctypes
import hashlib
import itertools
import os
import platform
import selectors
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib

from djax.errors import OptionError
from djax.runtime.private import default_directory, private_directory, read_private
from djax.storage import files

FUNCTIONS = ("djax_experts", "djax_attention", "djax_dense", "djax_peaks")
COMPILERS = ("c++", "g++", "clang++")
_SOURCE = Path(__file__).with_name("kernels.cpp")
_TYPES = {"float32": "float", "bfloat16": "BFloat16", "int8": "int8_t"}
# -O3 keeps tiles of sums in registers. Nothing that lets a compiler reorder sums.
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-w")
_SECONDS = 120
_ABANDONED = 3600  # seconds after which a scratch directory's process was killed
_LARGEST = 64 << 20  # bytes of a library
_KEPT, _MOST = 64 << 10, 16 << 20  # bytes of a compiler's messages: kept, and read before it is stopped
_DIGEST = hashlib.sha256().digest_size
_lock = threading.Lock()
_loads = itertools.count(1)
_known: dict[tuple[str, str], str | Exception] = {}


class Unavailable(Exception):
    """The functions cannot be had here; the message says why."""


def why_not(dtype: jax.typing.DTypeLike, held: jax.typing.DTypeLike | None = None) -> str | None:
    """Why this machine has no functions for values of this dtype and weights held in that one (None: the same); None if it has.

    The first time they are compiled: a few seconds, once a machine. In one process the answer never changes.
    """
    try:
        _library(*_types(dtype, held))
    except Unavailable as why:
        return str(why)
    return None


def target(name: str, dtype: jax.typing.DTypeLike, held: jax.typing.DTypeLike | None = None) -> str:
    """The name under which XLA knows the function `name` of these dtypes. Only where `why_not` has no reason."""
    return f"{name}_{_library(*_types(dtype, held))}"


def _types(dtype: jax.typing.DTypeLike, held: jax.typing.DTypeLike | None) -> tuple[str, str]:
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
        library = private_directory(default_directory() / "native", "kernels") / library
        functions = _read(library) or _make(defined, library)
    except (OSError, OptionError, ValueError) as error:
        raise Unavailable(f"{library}: {error}") from None
    for name, capsule in functions.items():
        jax.ffi.register_ffi_target(f"{name}_{key}", capsule, platform="cpu")
    return key


def _read(library: Path) -> dict[str, Any] | None:
    """The functions of a kept library; None if there is none, or if it is damaged or does not load."""
    try:
        data = read_private(library, _LARGEST)
        if data is None or data[-_DIGEST:] != _digest(library, data[:-_DIGEST]):
            return None
        return _load(data[:-_DIGEST], library.parent)
    except (OSError, AttributeError):
        # Not readable, or of another machine with the same processor and other system libraries.
        return None


def _make(defined: tuple[str, ...], library: Path) -> dict[str, Any]:
    """The functions, compiled. The library is kept once it has been loaded."""
    made = _compile(defined, library.parent)
    try:
        functions = _load(made, library.parent)
    except (OSError, AttributeError) as error:
        raise Unavailable(f"the compiler's library for {_SOURCE.name} does not load: {_in_a_line(str(error))}") from None
    # Usable although the disk is full: the next process compiles again.
    with contextlib.suppress(OSError):
        if library.is_dir() and not library.is_symlink():
            shutil.rmtree(library)  # a file cannot replace it
        files.write(library, made + _digest(library, made), mode=0o600)
    return functions


def _digest(library: Path, made: bytes) -> bytes:
    """SHA-256 of name and bytes: a library renamed to another's name does not pass either."""
    return hashlib.sha256(library.name.encode() + b"\0" + made).digest()


def _load(made: bytes, directory: Path) -> dict[str, Any]:
    """The functions of a library. directory: a private one, for systems that load from files only.

    Raises `OSError` if it does not load, `AttributeError` if it lacks a function.
    """
    try:
        loaded = _load_from_memory(made)
    except (OSError, AttributeError):  # no memfd_create, no /proc, or neither may be executed
        with tempfile.TemporaryDirectory(prefix=".", dir=directory, ignore_cleanup_errors=True) as scratch:
            copy = Path(scratch) / "library.so"
            copy.write_bytes(made)
            loaded = ctypes.CDLL(str(copy))
    return {name: jax.ffi.pycapsule(getattr(loaded, name)) for name in FUNCTIONS}


def _load_from_memory(made: bytes) -> ctypes.CDLL:
    handle = os.memfd_create("djax", os.MFD_CLOEXEC)
    with os.fdopen(handle, "wb") as memory:
        memory.write(made)
        memory.flush()
        # The slashes make each path a new one: descriptor numbers are reused, and for a path that
        # glibc has seen it returns the library it loaded from there.
        return ctypes.CDLL(f"/proc/self/fd{'/' * next(_loads)}{handle}")


def _compile(defined: tuple[str, ...], directory: Path) -> bytes:
    """The library's bytes. Raises `Unavailable` if the compiler makes none."""
    compiler = _compiler()
    _remove_abandoned(directory)
    own = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    with tempfile.TemporaryDirectory(prefix=".", dir=directory, ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / "library.so"
        command = [*compiler, *_FLAGS, own, *defined, f"-I{jax.ffi.include_dir()}", str(_SOURCE), "-o", str(made)]
        status, said = _run(command, scratch)
        if status:
            lines = said.strip().splitlines() or [f"exit status {status}" if status > 0 else f"died of signal {-status}"]
            first = next((line for line in lines if "error" in line), lines[0])
            raise Unavailable(f"{compiler[0]} does not compile {_SOURCE.name}: {_in_a_line(first)}")
        try:
            info = made.lstat()
        except FileNotFoundError:
            info = None
        if info is None or not stat.S_ISREG(info.st_mode) or not 0 < info.st_size <= _LARGEST - _DIGEST:
            raise Unavailable(f"{compiler[0]} reports no error and wrote no library for {_SOURCE.name}")
        return made.read_bytes()


def _run(command: list[str], scratch: str) -> tuple[int, str]:
    """Exit status and the first messages of a compiler, which works in a scratch directory.

    It may neither read what was meant for djax, nor take more than `_SECONDS`, nor leave processes behind.
    """
    # An empty entry of CPATH or LIBRARY_PATH means the current directory, where others may write.
    with subprocess.Popen(
        command,
        bufsize=0,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=scratch,
        env=os.environ | {"TMPDIR": scratch},
        start_new_session=True,
    ) as process:
        try:
            said = _listen(process, command[0], time.monotonic() + _SECONDS)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{command[0]} took more than {_SECONDS} seconds for {_SOURCE.name}") from None
        finally:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said.decode(errors="replace")


def _listen(process: subprocess.Popen[bytes], name: str, deadline: float) -> bytes:
    """The first `_KEPT` bytes that a process writes to stderr until it ends.

    Raises `TimeoutExpired` after the deadline, `Unavailable` after `_MOST` bytes.
    """
    said, count, pipe = b"", 0, process.stderr
    assert pipe is not None, "opened with a pipe"
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if selector.select(min(left, 0.1)):
                chunk = os.read(pipe.fileno(), _KEPT)
                if not chunk:
                    break
                said, count = said + chunk[: _KEPT - len(said)], count + len(chunk)
                if count > _MOST:
                    raise Unavailable(f"{name} writes messages without end for {_SOURCE.name}")
            elif process.poll() is not None:
                break  # its children still hold the pipe
    process.wait(max(0, deadline - time.monotonic()))
    return said


def _remove_abandoned(directory: Path) -> None:
    """Remove what killed processes left: all old files here whose names begin with a dot."""
    for left in directory.glob(".*"):
        with contextlib.suppress(OSError):
            if time.time() - left.lstat().st_mtime > _ABANDONED:
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def _in_a_line(text: str) -> str:
    """A compiler's message on one line, shortened, without control characters."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _compiler() -> list[str]:
    """CXX, or the first compiler there is."""
    try:
        wish = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise Unavailable(f"CXX={_in_a_line(os.environ['CXX'])}: {error}; expected a command as a shell reads it") from None
    for command in [wish] if wish else [[name] for name in COMPILERS]:
        if found := shutil.which(command[0]):
            return [os.path.abspath(found), *command[1:]]
    if not wish:
        raise Unavailable(f"no C++ compiler ({', '.join(COMPILERS)} or CXX) was found")
    shown = _in_a_line(wish[0])
    if os.path.exists(wish[0]):
        raise Unavailable(f"CXX={shown} is a directory, or not executable")
    raise Unavailable(f"CXX={shown} is not there")


def _processor() -> str:
    """What the compiled code may rely on: a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").split("\n\n", 1)[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    named = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    return platform.machine() + "\n".join(line for line in lines if line.startswith(named))
