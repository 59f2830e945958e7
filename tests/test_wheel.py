"""What `pip install .` installs: the package with its model, and no other top-level module."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_wheel(tmp_path):
    source = tmp_path / "source"
    # A clean copy, so that no earlier build of this checkout leaks in.
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"djax"}
    for needed in (
        "djax/convert/llada_moe.py",
        "djax/configs/small.py",
        "djax/kernels/native/kernels.cpp",
        "djax/kernels/native/tile.h",
        "djax/small/model.safetensors",
        "djax/tiny_td/model.safetensors",
    ):
        assert needed in names
    assert wheel.stat().st_size < 16_000_000

    # Imported from the wheel alone, in another folder: the installed package must not lean on the checkout.
    target = tmp_path / "target"
    done = subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = f"""import sys; sys.path.insert(0, {str(target)!r})
import djax.convert, djax.configs.small
print(djax.convert.__file__)
print(djax.load(), djax.load("tiny-td"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(target) in done.stdout.splitlines()[0]
