"""Converting and restoring a checkpoint of LLaDA-MoE-7B's shape, with random weights: memory, and speed beside `cp`.

    djax bench convert --work /somewhere/large --out benchmarks/results --readme README.md

Needs 3 times 14.7 GB of disk. Every step is a process of its own, whose peak memory the kernel tells.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from djax.benchmarks.circumstances import circumstances
from djax.benchmarks.compile import LLADA_MOE_7B
from djax.benchmarks.report import put, write_lines
from djax.convert import safetensors_files
from djax.errors import OptionError
from djax.models import llada_moe
from djax.storage.files import write

HF = LLADA_MOE_7B | {
    "architectures": ["LLaDAMoEModelLM"],
    "torch_dtype": "bfloat16",
    "mask_token_id": 156895,
    "eos_token_id": 156892,
}
CONVERT = "import sys; from djax.checkpoints.conversion import convert; print(convert(*sys.argv[1:3], to=sys.argv[3]).bytes)"
RESTORE = """
import sys, jax, djax
model = djax.load(sys.argv[1])
jax.block_until_ready(model.params)
print(model.parameter_bytes)
"""
COPY = "import shutil, sys; shutil.copytree(*sys.argv[1:3])"


def make(directory: Path, hf: dict[str, Any]) -> int:
    """A HF checkpoint with random bfloat16 weights, all finite, in shards as HF cuts them. Returns its tensors' bytes."""
    config = llada_moe.Config.from_hf(hf, mask_id=hf["mask_token_id"], eos_id=hf["eos_token_id"])
    rules = llada_moe.FAMILY.layouts(config)["hf"]
    bits = np.random.default_rng(0).integers(0, 1 << 16, 1 << 24, np.uint16)
    bits &= 0xBFFF  # below 2: neither infinite nor NaN
    noise, kind = bits.view(ml_dtypes.bfloat16), np.dtype(ml_dtypes.bfloat16)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for n, rule in enumerate(rules):
            size = math.prod(rule.shape)
            yield rule.source, np.resize(noise[n % 1000 :], size).reshape(rule.shape)

    directory.mkdir(parents=True)
    write(directory / "config.json", json.dumps(hf))
    safetensors_files.write(directory, {rule.source: (rule.shape, kind) for rule in rules}, tensors())
    return sum(math.prod(rule.shape) * kind.itemsize for rule in rules)


def measure(work: Path, hf: dict[str, Any], note: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """A line a step: seconds, bytes, and the process' peak memory."""
    source, orbax, back, copy = (work / name for name in ("hf", "orbax", "back", "copy"))
    size = make(source, hf)
    steps = (
        ("cp", COPY, source, copy),
        ("convert to Orbax", CONVERT, source, orbax, "orbax"),
        ("restore", RESTORE, orbax),
        ("convert back to HF", CONVERT, orbax, back, "hf"),
    )
    for name, code, *arguments in steps:
        if name == "convert back to HF":
            shutil.rmtree(copy)
        _drop_caches()
        began = time.monotonic()
        done = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=os.environ)
        _, status, usage = os.wait4(done.pid, 0)
        done.returncode = os.waitstatus_to_exitcode(status)
        if done.returncode:
            raise OptionError(f"djax bench convert: {name} failed, see above")
        seconds = time.monotonic() - began
        note(f"{name}: {seconds:.1f} s, {size / seconds / 1e6:.0f} MB/s, peak {usage.ru_maxrss / 1e6:.2f} GB")
        yield {"of": name, "seconds": seconds, "bytes": size, "peak_bytes": usage.ru_maxrss * 1024}
    equal = all(
        (source / file.name).read_bytes() == file.read_bytes() for file in back.iterdir() if file.name.endswith(".safetensors")
    )
    note(f"the files that came back are {'equal' if equal else 'DIFFERENT'}")
    yield {"of": "round trip", "equal": equal}


def _drop_caches() -> None:
    """So that each step reads from the disk; where that is not allowed, all of them may read from memory."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3", "utf-8")
    except OSError:
        pass


def run(work: Path, out: Path, readme: Path | None, note: Callable[[str], None]) -> str:
    """All steps in an empty directory, which is removed; convert.jsonl, the README's part, and the table."""
    if work.exists():
        raise OptionError(f"--work: {work} already exists; name a directory that does not")
    now = circumstances()
    now["command"] = now["command"].replace(str(work), "DIR")  # whose directory is nobody's business
    try:
        lines = [line | now for line in measure(work, HF, note)]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    write_lines(out / "convert.jsonl", lines)
    text = table(lines)
    put(readme, "convert", text)
    return text


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row a step."""
    *steps, trip = lines
    (copied,) = [x for x in steps if x["of"] == "cp"]
    text = ["| | time | MB/s | of cp's speed | peak memory | of the parameters |", "|---|---|---|---|---|---|"]
    for x in steps:
        text.append(
            f"| {x['of']} | {x['seconds']:.1f} s | {x['bytes'] / x['seconds'] / 1e6:.0f} | "
            f"{copied['seconds'] / x['seconds']:.0%} | {x['peak_bytes'] / 1e9:.2f} GB | {x['peak_bytes'] / x['bytes']:.2f} |"
        )
    x = lines[0]
    text += [
        "",
        f"{x['bytes'] / 1e9:.1f} GB of random bfloat16 in LLaDA-MoE-7B's shape; the files that came back are "
        f"{'equal byte for byte' if trip['equal'] else 'DIFFERENT'}. {x['hardware']}, {x['threads']} threads, "
        f"{x['allocator']} allocator, jax {x['jax']}, commit {x['commit']}; `{x['command']}`.",
    ]
    return "\n".join(text)
