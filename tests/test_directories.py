"""New directories: whole or not there, and nothing left, wherever the processes that write them are killed."""

import itertools
import shutil

import pytest
from killed import die_at, end, start

from djax.directories import new_directory
from djax.errors import OptionError

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
