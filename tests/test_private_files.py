"""Files that djax executes later: none of other users, none damaged; and compilers that end."""

import itertools
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import jax
import pytest
from killed import die_at, end, start

import djax
from djax.errors import DjaxError, OptionError, PathError
from djax.kernels import native
from djax.runtime import compilation
from djax.runtime.private import check_contents, default_directory, private_directory, read_private
from djax.storage import files

root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to other users")
STRANGER = 12345
NAMES = " ".join(f'extern "C" void {name}() {{}}' for name in native.FUNCTIONS)


def run(*command, **options):
    options["env"] = os.environ | options.pop("environment", {})
    return subprocess.run(command, capture_output=True, text=True, timeout=200, **options)


def gone(process):
    """Whether a process has ended, reaped or not."""
    for _ in range(100):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


# Directories


@pytest.fixture
def place(tmp_path):
    """a/b/c, all private."""
    place = tmp_path / "a" / "b" / "c"
    private_directory(place)
    return place


def test_directories_are_made_private_whatever_the_umask(tmp_path):
    for umask in (0, 0o022, 0o077):
        before = os.umask(umask)
        try:
            private_directory(tmp_path / f"{umask}" / "b" / "c")
        finally:
            os.umask(before)
        for made in (tmp_path / f"{umask}", tmp_path / f"{umask}" / "b", tmp_path / f"{umask}" / "b" / "c"):
            assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_a_directory_that_others_may_read_is_made_private(place):
    place.chmod(0o755)
    (place / "entry").write_text("x")
    (place / "entry").chmod(0o644)
    private_directory(place)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    (place / "entry").chmod(0o666)
    private_directory(place)  # nobody can reach it
    place.chmod(0o755)
    with pytest.raises(OptionError, match=r"others may write to entry in it; remove .*/c and let djax make it again"):
        private_directory(place)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o720, 0o702])
def test_a_directory_that_was_open_is_to_be_removed(place, mode):
    place.chmod(mode)
    with pytest.raises(OptionError, match=rf"{place}: others may write to it, .*; remove {place} and let djax make it again"):
        private_directory(place)
    place.rmdir()
    private_directory(place)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o775, 0o707])
def test_others_may_not_write_to_what_is_above(place, mode):
    above = place.parent.parent
    above.chmod(mode)
    with pytest.raises(OptionError, match=f"others may write to {above}; run chmod go-w {above}, then remove {place} and let"):
        private_directory(place)
    above.chmod(mode | stat.S_ISVTX)
    private_directory(place)  # as in /tmp, they cannot replace what is not theirs


@root
def test_what_is_another_user_s(place, tmp_path):
    for changed in (place, place.parent, place.parent.parent):
        os.chown(changed, STRANGER, 0)
        with pytest.raises(OptionError, match=f"{changed}.* user {STRANGER}'s"):
            private_directory(place)
        os.chown(changed, 0, 0)
    private_directory(place)
    link = tmp_path / "link"
    link.symlink_to(place)
    os.lchown(link, STRANGER, 0)
    with pytest.raises(OptionError, match=f"{link} is user {STRANGER}'s"):
        private_directory(link)


def test_links_are_followed_and_where_they_lead_is_checked(place, tmp_path):
    links = tmp_path / "links"
    links.mkdir()
    (links / "own").symlink_to("../a/b")
    assert private_directory(links / "own" / "c") == links / "own" / "c"
    assert private_directory(links / "own" / ".." / "b" / "new") and (place.parent / "new").is_dir()
    (links / "away").symlink_to(links / "own")
    place.parent.parent.chmod(0o777)
    with pytest.raises(OptionError, match=f"others may write to {place.parent.parent};"):
        private_directory(links / "away" / "c")
    (links / "round").symlink_to("round")
    (links / "broken").symlink_to("/dev/null/x")
    for name in ("round", "broken"):
        with pytest.raises(OptionError, match="cannot be made or used"):
            private_directory(links / name)


@root
def test_entries_of_another_user_are_not_given_to_jax(place, monkeypatch):
    (place / "folder").mkdir()
    (place / "folder" / "entry").write_text("x")
    check_contents(place)
    os.chown(place / "folder" / "entry", STRANGER, 0)
    kept_in = jax.config.jax_compilation_cache_dir
    with pytest.raises(OptionError, match=f"entry in it is user {STRANGER}'s; remove {place} and let djax make it again"):
        djax.compile_cache(place)
    monkeypatch.setenv("DJAX_COMPILE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    os.renames(place / "folder", place / "djax" / "xla")
    monkeypatch.setattr(compilation, "_decided", False)
    assert jax.config.jax_compilation_cache_dir == kept_in
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        with pytest.warns(UserWarning, match=r"no compile cache, .* entry in it is user"):
            compilation.enable_cache()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", kept_in)


class Raising:
    def __fspath__(self):
        raise RuntimeError("no path")

    __repr__ = __str__ = __fspath__


NO_DIRECTORIES = (
    *("1", "on", "x/y", "./x", "gs://b/x", "s3://b/x", "file:///tmp/x", "~nobody-of-this-name/x", " ", "\0", "/tmp/\0x"),
    *("/proc/none", "/dev/null", "/dev/null/x", "/" + "x" * 300, "/tmp/\ud800", "/", "x" * 9999, "\n", "/tmp/..", "nul", "=/x"),
)


STRANGE = ("", ".", Path("x"), 5, True, 0.5, b"/tmp/x", [], {}, object(), Raising(), ("a",))


@pytest.mark.parametrize("value", [*NO_DIRECTORIES, *STRANGE], ids=lambda value: type(value).__name__)
def test_what_is_no_directory(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept_in = jax.config.jax_compilation_cache_dir
    with pytest.raises(OptionError, match=r"^compile cache") as refused:
        djax.compile_cache(value)
    assert len(str(refused.value)) < 1000
    assert not list(tmp_path.iterdir()) and jax.config.jax_compilation_cache_dir == kept_in


@pytest.mark.parametrize("value", [v for v in NO_DIRECTORIES if "\0" not in v and "\ud800" not in v])
def test_what_is_no_directory_in_the_environment(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DJAX_COMPILE_CACHE", value)
    monkeypatch.setattr(compilation, "_decided", False)
    for _ in range(2):
        with pytest.raises(OptionError, match=r"^DJAX_COMPILE_CACHE"):
            compilation.enable_cache()
    assert not list(tmp_path.iterdir())


def test_the_command_line_says_so_too(tmp_path):
    short = ("generate", "Hi", "--gen-length", "8", "--block-length", "8")
    done = run(sys.executable, "-m", "djax.cli", *short, cwd=tmp_path, environment={"DJAX_COMPILE_CACHE": "gs://b/x"})
    assert done.returncode == 2 and done.stderr.startswith("djax: DJAX_COMPILE_CACHE: expected a directory as an absolute path")
    assert "JAX_COMPILATION_CACHE_DIR" in done.stderr and not list(tmp_path.iterdir())


def test_where_the_default_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/a")
    for value in ("", "relative", "./x", "~/x", "."):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert default_directory() == Path("/home/a/.cache/djax"), "the XDG specification has relative paths ignored"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_directory() == Path("/x/djax")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "relative")
    with pytest.raises(OptionError, match="no home directory: expected HOME to be an absolute path, got 'relative'"):
        default_directory()


HOMELESS = """
import os, warnings
os.environ.pop("HOME", None)
os.environ.pop("XDG_CACHE_HOME", None)
os.setreuid(54321, 0)  # who has no entry in the password database
import djax
model = djax.load()
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    print(djax.generate(model, "Hi", gen_length=8, block_length=8).forwards > 0)
print([str(w.message) for w in told if "no compile cache" in str(w.message)])
from djax.kernels import native
print(native.why_not("float32"))
try:
    djax.load("org/name")
except djax.PathError as error:
    print(error)
"""


@root
def test_no_home_and_nobody_in_the_password_database(tmp_path):
    done = run(sys.executable, "-c", HOMELESS, cwd=tmp_path, environment={"DJAX_COMPILE_CACHE": "", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    answered, told, why_not, hub = done.stdout.splitlines()
    assert answered == "True" and "no home directory: " in told and "set HOME" in told
    assert "no home directory: " in why_not and "set HF_HOME" in hub
    assert not list(tmp_path.iterdir())


def test_homes_of_nobody(small):
    for call in (djax.load, partial(djax.save, small), partial(djax.export_hf, small)):
        with pytest.raises(DjaxError, match=r"~nobody-of-this-name.* is no"):
            call("~nobody-of-this-name/x")
    with pytest.raises(PathError):
        djax.load("~nobody-of-this-name")


# Platforms

PLATFORMS = """
import tempfile, pathlib, jax, djax
from djax.training import train
from djax.checkpoints.checkpoint import inspect
from djax.checkpoints.conversion import convert
begin = lambda: train.train(None, pathlib.Path("run"))
calls = (djax.load, djax.mesh, inspect, begin, lambda: convert(djax.checkpoints.source.SHIPPED, "out"))
for wish in ("cuda", "tpu", "rocm", "nowhere", ",", "CUDA"):
    jax.config.update("jax_platforms", wish)
    for call in calls:
        try:
            call()
        except djax.OptionError as error:
            print(error)
jax.config.update("jax_platforms", "cuda,cpu")
print(djax.load().dtype)
"""


def test_platforms_that_are_not_there(tmp_path):
    done = run(sys.executable, "-c", PLATFORMS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *told, loaded = done.stdout.splitlines()
    assert len(told) == 6 * 5 and loaded == "float32"
    assert all("expected platforms that jax finds" in line and "JAX_PLATFORMS=cpu" in line for line in told)
    assert told[0].startswith("JAX_PLATFORMS=cuda: ") and "install djax[cuda12]" in told[0] and "nvidia-smi" in told[0]
    assert not list(tmp_path.iterdir())
    done = run(sys.executable, "-m", "djax.cli", "generate", "Hi", environment={"JAX_PLATFORMS": "cuda"})
    assert done.returncode == 2 and done.stderr.startswith("djax: JAX_PLATFORMS=cuda: ") and done.stderr.count("\n") == 1


# Libraries


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    return tmp_path_factory.mktemp("workshop")


def library(workshop, name, code):
    source, made = workshop / f"{name}.cpp", workshop / f"{name}.so"
    source.write_text(code)
    done = run(*native._compiler(), "-shared", "-fPIC", "-o", str(made), str(source))
    assert not done.returncode, done.stderr
    return made.read_bytes()


@pytest.fixture(scope="session")
def good(workshop):
    """A library that has the functions."""
    return library(workshop, "good", NAMES)


@pytest.fixture(scope="session")
def lacking(workshop):
    return library(workshop, "lacking", 'extern "C" int djax_other() { return 1; }')


@pytest.fixture
def evil(workshop, tmp_path):
    """One that leaves a mark if it is ever loaded, and its mark."""
    mark = tmp_path / "mark"
    code = f'#include <cstdio>\n__attribute__((constructor)) static void f() {{ fclose(fopen("{mark}", "w")); }}\n{NAMES}'
    return library(tmp_path, "evil", code), mark


@pytest.fixture
def kept(tmp_path):
    """Where a library would be kept."""
    return private_directory(tmp_path / "native") / "0123.so"


def whole(kept, data):
    return data + native._digest(kept, data)


def compiler(folder, commands):
    script = folder / "compiler"
    script.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nout="$2"\n{commands}\n')
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def copying(workshop, good, tmp_path, monkeypatch):
    """A compiler that takes no time; returns how often it ran."""
    log = tmp_path / "log"
    monkeypatch.setenv("CXX", compiler(tmp_path, f"cp {workshop}/good.so $out; echo x >> {log}"))
    return lambda: len(log.read_text().split()) if log.exists() else 0


needs_compiler = pytest.mark.cpp


@needs_compiler
def test_the_evil_one_would_be_seen(evil, kept):
    data, mark = evil
    assert native._load(data, kept.parent) and mark.exists()


def plant(kept, data, how):
    sound, elsewhere = whole(kept, data), kept.parent.parent / "elsewhere"
    kept.write_bytes(sound)
    kept.chmod(0o600)
    match how:
        case "link":
            kept.rename(elsewhere)
            kept.symlink_to(elsewhere)
        case "another user's":
            os.chown(kept, STRANGER, 0)
        case "of all":
            kept.chmod(0o666)
        case "of the group":
            kept.chmod(0o660)
        case "no checksum":
            kept.write_bytes(data)
        case "another checksum":
            kept.write_bytes(data + bytes(native._DIGEST))
        case "of another name":
            kept.write_bytes(whole(kept.with_name("4567.so"), data))
        case "pipe":
            kept.unlink()
            os.mkfifo(kept, 0o600)
        case "empty":
            kept.write_bytes(b"")
        case "too large":
            os.truncate(kept, native._LARGEST + 1)


PLANTED = ("link", "of all", "of the group", "no checksum", "another checksum", "of another name", "pipe", "empty", "too large")


@needs_compiler
@pytest.mark.parametrize("how", [*PLANTED, pytest.param("another user's", marks=root)])
def test_a_planted_library_is_not_loaded_but_made_anew(how, evil, kept, copying):
    data, mark = evil
    plant(kept, data, how)
    assert native._read(kept) is None and native._make((), kept)
    assert not mark.exists()
    info = kept.lstat()
    assert stat.S_ISREG(info.st_mode) and stat.S_IMODE(info.st_mode) == 0o600 and info.st_uid == os.geteuid()
    assert native._read(kept) and copying() == 1 and not mark.exists()


@needs_compiler
def test_a_directory_in_its_place_is_not_in_the_way(kept, copying):
    (kept / "folder").mkdir(parents=True)
    assert native._read(kept) is None and native._make((), kept) and native._read(kept)


@needs_compiler
def test_a_checksum_is_of_what_is_loaded(evil, good, kept):
    """Also while the file is being replaced, between the check and the load."""
    data, mark = evil
    (kept.parent / "a").write_bytes(whole(kept, good))
    (kept.parent / "b").write_bytes(data)
    stop = threading.Event()

    def swap():
        for name in itertools.cycle("ab"):
            if stop.is_set():
                return
            os.link(kept.parent / name, kept.parent / "c")
            os.replace(kept.parent / "c", kept)

    swapping, found, until = threading.Thread(target=swap), [], time.monotonic() + 30
    swapping.start()
    try:
        while len(found) < 200 or (len(set(found)) < 2 and time.monotonic() < until):
            found.append(native._read(kept) is not None)
    finally:
        stop.set()
        swapping.join()
    assert set(found) == {True, False} and not mark.exists()


@needs_compiler
def test_damage_is_noticed(good, kept, copying):
    data, draw = whole(kept, good), random.Random(0)
    for _ in range(300):
        damaged = bytearray(data)
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        kept.write_bytes(damaged)
        assert native._read(kept) is None
        kept.write_bytes(data[: draw.randrange(len(data))])
        assert native._read(kept) is None
    assert native._make((), kept) and native._read(kept) and copying() == 1


@needs_compiler
def test_one_that_lacks_its_functions_is_made_anew(lacking, kept, copying):
    for data in (lacking, b"\x7fELF and then nothing", b""):
        files.write(kept, whole(kept, data), mode=0o600)
        assert native._read(kept) is None
        assert native._make((), kept) and native._read(kept)
    assert copying() == 3


@needs_compiler
def test_without_memory_files_a_private_copy_is_loaded(evil, good, lacking, kept, monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    assert native._load(good, kept.parent)
    with pytest.raises(AttributeError):
        native._load(lacking, kept.parent)
    with pytest.raises(OSError):
        native._load(b"nothing", kept.parent)
    assert not list(kept.parent.iterdir())


@needs_compiler
def test_two_libraries_are_two(workshop):
    """Although both are loaded through the same file descriptor's number."""
    for number in range(3):
        code = f'extern "C" int number() {{ return {number}; }}'
        assert native._load_from_memory(library(workshop, f"number{number}", code)).number() == number


@needs_compiler
def test_what_cannot_be_kept_is_used(kept, copying, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert native._make((), kept) and not list(kept.parent.iterdir())


def make(kept, cxx, operation=None):
    os.environ["CXX"] = cxx
    if operation is not None:
        die_at(operation)
    if native._read(kept) is None:
        native._make((), kept)


@needs_compiler
def test_killed_at_every_operation_on_files(good, kept, copying):
    for operation in itertools.count():
        kept.unlink(missing_ok=True)
        if end(start(make, kept, os.environ["CXX"], operation)):
            break
        assert not kept.exists() or native._read(kept)
        assert kept.exists() or native._make((), kept)
    assert operation > 10
    left = [path for path in kept.parent.iterdir() if path != kept]
    assert left and all(path.name.startswith(".") for path in left)
    for path in left:
        os.utime(path, (0, 0))
    assert native._make((), kept) and list(kept.parent.iterdir()) == [kept]


@needs_compiler
def test_many_at_once(kept, copying):
    makers = [start(make, kept, os.environ["CXX"]) for _ in range(6)]
    found = []
    threads = [threading.Thread(target=lambda: found.append(native._read(kept) or native._make((), kept))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(end(maker) for maker in makers)
    assert len(found) == 6 and all(found) and native._read(kept)
    assert list(kept.parent.iterdir()) == [kept]


@needs_compiler
def test_whole_processes_with_a_planted_library(evil, tmp_path, monkeypatch):
    """Several that ask for the real library at once, from a compiler that copies it."""
    data, mark = evil
    place = private_directory(tmp_path / "cache" / "djax" / "native")
    key = native._library("float", "float")
    (tmp_path / "real").write_bytes((default_directory() / "native" / f"{key}.so").read_bytes()[: -native._DIGEST])
    cxx = compiler(tmp_path, f"cp {tmp_path}/real $out")
    (place / "planted").write_bytes(data)
    (place / f"{key}.so").symlink_to(place / "planted")
    code = "from djax.kernels import native; print(native.why_not('float32'))"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": cxx}
    command, options = [sys.executable, "-c", code], dict(env=environment, stdout=subprocess.PIPE, text=True, cwd="/")
    asked = [subprocess.Popen(command, **options) for _ in range(3)]
    assert [process.communicate(timeout=300)[0] for process in asked] == ["None\n"] * 3
    assert not mark.exists() and native._read(place / f"{key}.so")
    assert sorted(path.name for path in place.iterdir()) == sorted(["planted", f"{key}.so"])


# Compilers


def refused(kept):
    with pytest.raises(native.Unavailable) as why:
        native._make((), kept)
    assert not list(kept.parent.iterdir())
    assert len(str(why.value)) < 1000 and str(why.value).isprintable()
    return str(why.value)


@pytest.mark.parametrize(
    ("commands", "said"),
    [
        ("exit 0", "reports no error and wrote no library"),
        (": > $out", "reports no error and wrote no library"),
        ("mkdir $out", "reports no error and wrote no library"),
        ("mkfifo $out", "reports no error and wrote no library"),
        ("ln -s /etc/passwd $out", "reports no error and wrote no library"),
        ("truncate -s 1G $out", "reports no error and wrote no library"),
        ("head -c 50000 /dev/urandom > $out", "does not load"),
        ("echo text > $out", "does not load"),
        ("exit 3", "does not compile kernels.cpp: exit status 3"),
        ("kill -9 $$", "does not compile kernels.cpp: died of signal 9"),
        (r"printf 'x\033[2J\007 error' >&2; exit 1", "does not compile kernels.cpp: x [2J  error"),
        (r"head -c 900000 /dev/zero | tr '\0' 'e' >&2; exit 1", "does not compile kernels.cpp: eee"),
        ("head -c 3000 /dev/urandom >&2; exit 1", "does not compile kernels.cpp: "),
        ("yes error >&2", "writes messages without end"),
        ("yes error >&2 & exit 0", "writes messages without end"),
    ],
)
def test_compilers_that_fail(commands, said, kept, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler(tmp_path, commands))
    assert said in refused(kept)


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ("/", "is a directory, or not executable"),
        ("/etc/passwd", "is a directory, or not executable"),
        ("g++ '", "No closing quotation"),
        ('g++ "a', "No closing quotation"),
        ("g++ \\", "No escaped character"),
        ("''", "CXX= is not there"),
        ("/nowhere\033[2J", "is not there"),
        ("x" * 9999, "is not there"),
    ],
)
def test_settings_that_name_no_compiler(wish, said, kept, monkeypatch):
    monkeypatch.setenv("CXX", wish)
    assert said in refused(kept)


def test_a_compiler_s_children_do_not_survive_it(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "_SECONDS", 1)
    child = tmp_path / "child"
    nested = f"sh -c 'sleep 1000 & echo $! > {child}; wait' & wait"
    monkeypatch.setenv("CXX", compiler(tmp_path, f"trap '' TERM INT HUP; {nested}"))
    began = time.monotonic()
    assert "took more than 1 seconds" in refused(kept)
    assert time.monotonic() - began < 20 and gone(int(child.read_text()))
    # Silent ones: one with stderr open, one that closed it.
    for commands in ("sleep 1000", "exec 2>&-; sleep 1000"):
        monkeypatch.setenv("CXX", compiler(tmp_path, commands))
        assert "took more than 1 seconds" in refused(kept)


@needs_compiler
def test_a_child_that_holds_the_pipe_is_not_waited_for(kept, workshop, good, tmp_path, monkeypatch):
    child = tmp_path / "child"
    commands = f"sleep 1000 & echo $! > {child}; cp {workshop}/good.so $out"
    monkeypatch.setenv("CXX", compiler(tmp_path, commands))
    began = time.monotonic()
    assert native._make((), kept)
    assert time.monotonic() - began < 20 and gone(int(child.read_text()))


@needs_compiler
def test_a_compiler_reads_no_question(kept, workshop, good, tmp_path):
    """djax's standard input stays djax's."""
    cxx = compiler(tmp_path, f"cat > {tmp_path}/read; cp {workshop}/good.so $out")
    code = f"from pathlib import Path; from djax.kernels import native; native._make((), Path({str(kept)!r})); print(input())"
    done = run(sys.executable, "-c", code, input="a question\n", environment={"CXX": cxx})
    assert (done.stdout, (tmp_path / "read").read_text()) == ("a question\n", "")


@needs_compiler
def test_a_compiler_works_in_a_private_place(kept, workshop, good, tmp_path, monkeypatch):
    """CPATH=: has it look for headers where it works, and what it leaves in TMPDIR is removed."""
    commands = f"pwd > {tmp_path}/where; echo $TMPDIR >> {tmp_path}/where; echo x > $TMPDIR/left; cp {workshop}/good.so $out"
    monkeypatch.setenv("CXX", compiler(tmp_path, commands))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "./compiler")
    assert native._make((), kept)
    where = {Path(line) for line in (tmp_path / "where").read_text().splitlines()}
    assert len(where) == 1 and where.pop().parent == kept.parent
    assert list(kept.parent.iterdir()) == [kept]


def test_an_interrupted_compiler_is_ended(kept, tmp_path, monkeypatch):
    child = tmp_path / "child"
    monkeypatch.setenv("CXX", compiler(tmp_path, f"echo $$ > {child}; sleep 1000"))

    def interrupt():
        while not child.exists() or not child.read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        native._make((), kept)
    thread.join()
    assert gone(int(child.read_text())) and not list(kept.parent.iterdir())


def test_read_private(kept):
    kept.write_bytes(b"abc")
    kept.chmod(0o644)
    assert read_private(kept, 3) == b"abc" and read_private(kept, 2) is None
    assert read_private(kept.with_name("nothing"), 3) is None
    with warnings.catch_warnings(), pytest.raises(OSError):
        read_private(kept / "below", 3)


def test_files_written_privately_and_with_long_names(tmp_path):
    files.write(tmp_path / "a", "x", mode=0o600)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    long = tmp_path / ("\N{CJK UNIFIED IDEOGRAPH-4E00}" * 85)
    files.write(long, "x")
    assert long.read_text() == "x" and len(list(tmp_path.iterdir())) == 2
