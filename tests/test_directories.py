"""New directories: whole or not there, and nothing left, wherever the processes that write them are killed."""

import contextlib
import errno
import itertools
import os
import random
import shutil
import signal
import sys
import threading

import pytest
from killed import die_at, end, interrupt_at, start

from djax.errors import CheckpointError, OptionError
from djax.storage import directories
from djax.storage.directories import new_directory, uninterrupted

FILES = {"a": "one", "folder/b": "two"}


def write(out, operation=None):
    if operation is not None:
        die_at(operation)
    with new_directory(out) as partial:
        for name, text in FILES.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_text(text)


def check(out):
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    found = {str(path.relative_to(out)): path.read_text() for path in out.rglob("*") if path.is_file()}
    # One that was killed in its very last step leaves its lock, which nobody minds.
    assert {name: text for name, text in found.items() if name != ".being-written"} == FILES


def test_killed_at_every_operation_on_files(tmp_path):
    """And so is the next one, at each while it removes what the first has left; the third succeeds."""
    cases = whole = 0
    for first in itertools.count():
        left = tmp_path / str(first)
        left.mkdir()
        if end(start(write, left / "out", first)):
            check(left / "out")
            break
        remains = [path.name for path in left.iterdir()]
        for second in itertools.count():
            out = tmp_path / "again" / "out"
            shutil.copytree(left, out.parent)
            if not out.exists():
                assert not end(start(write, out, second))
            removed = not any((out.parent / name).exists() for name in remains)
            if out.exists():
                whole += 1
                check(out)
                with pytest.raises(OptionError, match="already exists"):
                    write(out)
            else:
                write(out)
                check(out)
                assert not (out / ".being-written").exists()
            cases += 1
            shutil.rmtree(out.parent)
            if removed or "out" in remains:
                break
    assert first > 10 and cases > 50 and whole, "deaths of the first, of both, with the directory there"


def test_somebody_else_was_faster(tmp_path):
    with pytest.raises(OptionError, match="out: already exists"), new_directory(tmp_path / "out"):
        write(tmp_path / "out")
    check(tmp_path / "out")


@pytest.mark.parametrize("name", ["a[b]", "a*", "a.b"])
def test_only_what_is_its_own_is_removed(tmp_path, name):
    others = [f".{name}.backup", f".{name}.abcdefgh.partial", ".other.abcdefgh.partial"]
    for other in others:
        (tmp_path / other / "folder").mkdir(parents=True)
    (tmp_path / others[2] / ".being-written").touch()
    abandoned = tmp_path / f".{name}.ijklmnop.partial"
    abandoned.mkdir()
    (abandoned / ".being-written").touch()
    (abandoned / "x").touch()
    write(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, name])


def write_interrupted(out, *operations):
    interrupt_at(*operations)
    with contextlib.suppress(KeyboardInterrupt):
        write(out)


@pytest.mark.long
def test_interrupted_at_every_operation_on_files(tmp_path):
    """Once, and again a little later, while what is there is removed. Nothing stays but a whole directory."""
    rng, states = random.Random(0), {True: 0, False: 0}
    for first in itertools.count():
        for more in ((), (first + rng.randrange(1, 12),)):
            left = tmp_path / f"{first}-{len(more)}"
            left.mkdir()
            end(start(write_interrupted, left / "out", first, *more))
            whole = (left / "out").exists()
            states[whole] += 1
            if whole:
                check(left / "out")
            else:
                assert list(left.iterdir()) == [], (first, more)
        if first > 60:
            break
    assert min(states.values()) > 10, states


def test_interrupted_at_any_instruction(tmp_path):
    """Between any two instructions of djax's own code, in a share of them."""
    code = directories.__file__
    states = {True: 0, False: 0}
    step = 1 if os.environ.get("DJAX_TEST_FUZZ") else 13
    for moment in itertools.count(0, step):
        left = tmp_path / str(moment)
        left.mkdir()
        passed = 0

        def trace(frame, event, argument, moment=moment):
            nonlocal passed
            if frame.f_code.co_filename != code:
                return None
            frame.f_trace_opcodes = True
            passed += 1
            if passed == moment:
                signal.raise_signal(signal.SIGINT)
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            write(left / "out")
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        whole = (left / "out").exists()
        states[whole] += 1
        if whole:
            check(left / "out")
        else:
            assert list(left.iterdir()) == [], moment
        if passed < moment:
            break
    assert min(states.values()) > 3, states


def test_an_interruption_is_held_back():
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append(1)
        signal.raise_signal(signal.SIGINT)
        done.append(2)
    assert done == [1, 2] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyError), uninterrupted():
        raise KeyError
    thread = threading.Thread(target=lambda: uninterrupted().__enter__())
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_threads_that_write_on_after_an_error(tmp_path):
    """As a library's do: what they make anew is removed, too."""
    stop = threading.Event()

    def go_on(partial):
        for n in range(20):
            with contextlib.suppress(OSError):
                (partial / "late").mkdir(parents=True, exist_ok=True)
                (partial / "late" / str(n)).write_text("x")
            stop.wait(0.005)

    with pytest.raises(KeyError), new_directory(tmp_path / "out") as partial:
        thread = threading.Thread(target=go_on, args=(partial,))
        thread.start()
        raise KeyError
    thread.join()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "no room"), "out: the disk is full; nothing was left there"),
        (OSError(errno.EDQUOT, "no room"), "out: the disk quota is used up; nothing was left there"),
        (OSError(errno.EFBIG, "no room"), "out: the system allows no file of this size"),
        (ValueError("RESOURCE_EXHAUSTED: [ENOSPC] writing"), "the disk is full"),
        (ExceptionGroup("several", [KeyError("x"), OSError(errno.ENOSPC, "no room")]), "the disk is full"),
    ],
)
def test_a_disk_without_room_is_one_kind_of_error(tmp_path, error, message):
    with pytest.raises(CheckpointError, match=message), new_directory(tmp_path / "out"):
        raise RuntimeError("what a library makes of it") from error
    with pytest.raises(KeyError), new_directory(tmp_path / "out"):
        raise KeyError("another error")
    assert list(tmp_path.iterdir()) == []
