"""Files: text is UTF-8 in every locale, JSON of any depth is an error that has a type, and what is written is written whole."""

import ast
import json
import os
import resource
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from killed import end, start

from djax.benchmarks import distill as benchmark
from djax.benchmarks import report
from djax.distill.run import _before, read_problems
from djax.distill.store import MANIFEST, Store
from djax.errors import OptionError, TraceError
from djax.storage import files
from djax.training import run_directory

ROOT = Path(__file__).parent.parent
DEEP = "[" * 100_000
TOO_DEEP = [DEEP, '{"prompt":' * 100_000, DEEP + "]" * 100_000, "[" * 101 + "]" * 101]
PROBLEM = {"prompt": "Größe\u2028?", "result": 3}


@contextmanager
def full_disk(room=10):
    """Inside, this process can write no file of more than `room` bytes."""
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, ignored)


def opens_by_locale(call):
    """Whether a call reads or writes text without naming its encoding."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    words = {k.arg for k in call.keywords}
    if name in ("read_text", "write_text"):
        return (
            isinstance(call.func, ast.Attribute)
            and "encoding" not in words
            and len(call.args) < (1 if name == "read_text" else 2)
        )
    if name in ("open", "fdopen", "NamedTemporaryFile") and not ast.unparse(call.func).startswith("os.open"):
        binary = any(isinstance(a, ast.Constant) and isinstance(a.value, str) and "b" in a.value for a in call.args)
        return not binary and "encoding" not in words
    if name not in ("run", "Popen", "check_output"):
        return False
    return {"text", "universal_newlines"} & words and "encoding" not in words


def test_no_text_is_read_or_written_by_the_locale():
    found = []
    for folder in ("djax", "convert", "configs", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Call) and opens_by_locale(node):
                    found.append(f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)[:80]}")
    assert not found, "\n".join(found)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    text = json.dumps(PROBLEM, ensure_ascii=False) + "\r\n\n" + json.dumps(PROBLEM) + "\n"
    (tmp_path / "f").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_problems(tmp_path / "f", "--prompts") == [PROBLEM, PROBLEM]
    assert report.read_lines(tmp_path / "f") == [PROBLEM, PROBLEM]
    (tmp_path / "f").write_bytes(text.encode("utf-16"))
    with pytest.raises(OptionError, match=r"--prompts: .* cannot be read: 'utf-8' codec"):
        read_problems(tmp_path / "f", "--prompts")
    with pytest.raises(OptionError, match="cannot be read: 'utf-8' codec"):
        report.read_lines(tmp_path / "f")


@pytest.mark.parametrize("nested", TOO_DEEP, ids=range(4))
def test_json_nested_too_deep_has_a_type_wherever_it_is_read(tmp_path, nested):
    file = tmp_path / "f"
    file.write_text(nested)
    with pytest.raises(ValueError, match="nested too deep"):
        files.parse_json(nested)
    assert files.parse_json("[" * 100 + "]" * 100) and files.parse_json("3") == 3
    with pytest.raises(OptionError, match=r"--held-out: .* line 1 is no JSON: nested too deep"):
        read_problems(file, "--held-out")
    with pytest.raises(OptionError, match="line 1: nested too deep; remove the line"):
        report.read_lines(file)
    with pytest.raises(OptionError, match="cannot be read: nested too deep; remove"):
        benchmark._read_facts(file)
    with pytest.raises(TraceError, match="cannot be read: nested too deep; remove it"):
        _before(file, "", None)
    (tmp_path / MANIFEST).write_text(nested)
    with pytest.raises(TraceError, match="cannot be read: nested too deep"):
        Store(tmp_path)
    store = object.__new__(Store)
    store.directory = tmp_path
    store._scores(0, "exact").write_text(nested)
    assert store.scores(0, "exact") is None, "they are made again"
    (tmp_path / "run.json").write_text(nested)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(OptionError, match=r"run.json: is damaged \(nested too deep\)"):
        run_directory.begin(tmp_path, {})
    (tmp_path / "log.jsonl").write_text(f'{{"step": 1}}\n{nested}\n{{"step": 2}}\n{{"step": 3}}\n')
    run_directory.forget_after(tmp_path / "log.jsonl", 2)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("line", [b"null", b"[]", b'{"step": "2"}', b"{}", b'{"step"', b"\xff", b""])
def test_a_line_of_a_log_that_is_none_is_taken_back(tmp_path, line):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}')
    run_directory.forget_after(tmp_path / "log.jsonl", 2)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_full_disk_leaves_the_old_file_alone(tmp_path):
    files.write(tmp_path / "f", "before")
    with full_disk(), pytest.raises(OSError, match="File too large"):
        files.write(tmp_path / "f", "x" * 100)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("f", "before")]
    files.write(tmp_path / "f", "é\r\n\u2028")
    assert (tmp_path / "f").read_bytes() == "é\r\n\u2028".encode()
    umask = os.umask(0o027)
    try:
        files.write(tmp_path / "g", b"\xff")
    finally:
        os.umask(umask)
    assert (tmp_path / "g").stat().st_mode & 0o777 == 0o640


def write_until_killed(file, operation):
    sys.setswitchinterval(1e-6)
    from killed import die_at

    die_at(operation)
    files.write(file, "after")


def test_killed_at_any_operation_the_file_is_the_old_one_or_the_new_one(tmp_path):
    seen = []
    for operation in range(20):
        files.write(tmp_path / "f", "before")
        done = end(start(write_until_killed, tmp_path / "f", operation))
        seen.append((tmp_path / "f").read_text())
        if done:
            break
    assert seen[0] == "before" and seen[-1] == "after" and done
    assert set(seen) == {"before", "after"}
