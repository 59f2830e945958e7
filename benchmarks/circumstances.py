"""What stands beside every figure: hardware, threads, allocator, versions, commit, command."""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

import djax
from djax.runtime.sharding import find_devices


def circumstances() -> dict[str, Any]:
    """JSON-ready facts about this process. commit is None where djax runs outside its repository."""
    commit = _git("rev-parse", "--short", "HEAD")
    if commit and _git("status", "--porcelain", "--", "djax", "convert", "benchmarks/*.py"):
        commit += "+changes"
    return {
        "hardware": f"{_processor()}, {find_devices()[0].platform}",
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "allocator": "tcmalloc" if "tcmalloc" in os.environ.get("LD_PRELOAD", "") else "default",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "djax": djax.__version__,
        "commit": commit,
        "command": shlex.join(["djax", *sys.argv[1:]]),
    }


def _git(*arguments: str) -> str | None:
    """git's answer about the repository that holds this file, if it is djax's own."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None
    done = subprocess.run(["git", *arguments], capture_output=True, encoding="utf-8", errors="replace", cwd=here.parent)
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
