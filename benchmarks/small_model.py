"""Accuracy and tokens per forward of the shipped model on 500 held-out problems: the table in the README.

    python benchmarks/small_model.py             # measure, append nothing, rewrite results/small_model.jsonl, print the table
    python benchmarks/small_model.py --table     # only rewrite the README's table from the last results

One JSON line a setting, with hardware, threads, dtype, allocator, commit and command beside the figures. Problems are
decoded 25 at a time; batches change no answer. Compile time is apart.
"""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RESULTS, README = HERE / "results" / "small_model.jsonl", HERE.parent / "README.md"
BEGIN, END = "<!-- benchmarks/small_model.py writes this table -->", "<!-- end of table -->"
SETTINGS = [
    ("one token a forward", "Fixed(1)", "none"),
    ("threshold", "Threshold(0.9)", "none"),
    ("threshold, dual cache", "Threshold(0.9)", "Dual()"),
    ("threshold, vicinity cache", "Threshold(0.9)", "Vicinity(16, 16, warmup=4)"),
]


def circumstances() -> dict:
    """What stands beside every figure."""
    import jax

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=HERE.parent).stdout.strip()

    commit, dirty = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "--", "djax", "convert")
    cpu = next((x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), "?")
    return {
        "hardware": f"{cpu}, {jax.devices()[0].platform}",
        "threads": os.cpu_count(),
        "allocator": "tcmalloc" if "tcmalloc" in os.environ.get("LD_PRELOAD", "") else "default",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "commit": commit + ("+changes" if dirty else ""),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def measure(count: int) -> None:
    import djax
    from djax.caching import CACHES
    from djax.decoding import DECODERS
    from djax.plugs import parse
    from djax.training.evaluate import evaluate
    from djax.training.problems import held_out

    model, problems = djax.load(), held_out(count)
    lines = []
    for name, decoder, cache in SETTINGS:
        plugs = {"decoder": parse(decoder, DECODERS, "decoder"), "cache": parse(cache, CACHES, "cache")}
        report = evaluate(model, problems, gen_length=128, block_length=32, **plugs)
        lines.append(
            {"setting": name, "decoder": decoder, "cache": cache, "gen_length": 128, "block_length": 32}
            | {"dtype": str(model.params["embedding"].dtype), "model": repr(model)}
            | dataclasses.asdict(report)
            | circumstances()
        )
        print(json.dumps(lines[-1]), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))


def table() -> str:
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    rows = [
        "| setting | decoder | cache | accuracy (95% interval) | tokens/forward | forwards | refreshes | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for x in lines:
        rows.append(
            f"| {x['setting']} | `{x['decoder']}` | `{x['cache']}` | {x['accuracy']:.1%} ({x['accuracy_low']:.1%} to "
            f"{x['accuracy_high']:.1%}) | {x['tokens_per_forward']:.2f} | {x['forwards']:.1f} | {x['refreshes']:.1f} | "
            f"{x['tokens_per_second']:.0f} |"
        )
    x = lines[0]
    rows += [
        "",
        f"{x['problems']} held-out problems, gen_length {x['gen_length']}, block_length {x['block_length']}, {x['dtype']}, "
        f"25 problems a batch, compile time apart; {x['hardware']}, {x['threads']} threads, {x['allocator']} allocator, "
        f"jax {x['jax']}, commit {x['commit']}.",
    ]
    return "\n".join(rows)


def with_table(readme: str) -> str:
    """The README with its table made anew from the results."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--table", action="store_true", help="only rewrite the README's table")
    arguments = parser.parse_args()
    if not arguments.table:
        measure(arguments.problems)
    README.write_text(with_table(README.read_text()))
    print(table())
