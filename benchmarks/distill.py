"""What distillation buys: a model before, and after each objective and the control, by the same decoders on the same problems.

    djax bench distill --work runs/distill --out benchmarks/results --readme README.md

All arms of the first round start from the same model, learn from the same kept trajectories and take the same number of
updates, the control by plain masked diffusion on the kept answers. A second round begins with a first one's model, on its own
decodes. Every point is one JSON line in distill.jsonl; distill.md and distill.png are made from those lines alone. The area
under a curve is d3LLM's AUP (arXiv 2601.07568).
"""

import dataclasses
import hashlib
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import djax
from djax.benchmarks.circumstances import circumstances
from djax.benchmarks.ladder import Rung, hierarchies, import_pyplot, save, thresholds
from djax.benchmarks.report import put, read_lines, write_lines
from djax.configs import tiny_td, tiny_td_again
from djax.distill import Certainty, Compression, Distillation, Plain, Stride, distil, judge
from djax.distill.run import generated
from djax.distill.store import Question, checksum
from djax.errors import OptionError
from djax.plugs import parse
from djax.storage.files import parse_json, read_text, write
from djax.tasks.evaluate import difference
from djax.tasks.problems import held_out, not_held_out

BATCH = 50


def _learn(run: Distillation, *objectives: Any) -> Distillation:
    return dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, objectives=objectives))


# Which model each begins with, and how it goes on. The control learns the same kept answers by plain masked diffusion.
ARMS = {
    "both": ("before", tiny_td.RUN),
    "compression": ("before", _learn(tiny_td.RUN, Compression(Stride(64)))),
    "control": ("before", _learn(tiny_td.RUN, Plain())),
    "certainty": ("before", _learn(tiny_td.RUN, Certainty(masked=0.9))),
    "both, again": ("both", tiny_td_again.RUN),
    "control, again": ("control", _learn(tiny_td_again.RUN, Plain())),
}
# The ladder's, where there is something to gain: from a threshold as it is usually set to one that loses next to nothing.
RUNGS = (
    Rung("threshold", thresholds(0.9, 0.97, 0.99, 0.997)),
    Rung("threshold, block 128", thresholds(0.9, 0.97, 0.99, 0.997), block_length=128),
    Rung("entropy", tuple(f"Entropy({theta})" for theta in (0.45, 0.1, 0.03))),
    Rung("hierarchy, block 128", hierarchies((0.97, 0.9), (0.99, 0.97), (0.997, 0.99)), block_length=128),
    Rung("credit", tuple(f"Credit({t})" for t in thresholds(0.97, 0.99, 0.997))),
    Rung("threshold + dual", thresholds(0.97, 0.99, 0.997), "Dual()"),
)


def _folder(name: str) -> str:
    return name.replace(", ", "-")


def measure(
    models: Mapping[str, Any],
    problems: Sequence[Question],
    file: Path,
    *,
    note: Callable[[str], None],
    verifier: Any = "exact",
    gen_length: int = 128,
    resume: bool = False,
) -> None:
    """Every model by every rung's decoders; a line a point, written as they come. resume: go on with what is missing."""
    from djax.caching import CACHES
    from djax.decoding import DECODERS

    lines = read_lines(file) if resume and file.exists() else []
    asked = hashlib.sha256(json.dumps([dict(p) for p in problems]).encode()).hexdigest()[:16]
    now = circumstances()
    for name, model in models.items():
        of = {"weights": checksum(model)[:16], "asked": asked, "gen_length": gen_length}
        if any(x["model"] == name and {key: x[key] for key in of} != of for x in lines):
            raise OptionError(f"{file}: holds points of another model {name!r} or of other problems; remove it to measure anew")
        there = {(x["rung"], x["decoder"]) for x in lines if x["model"] == name}
        for rung in RUNGS:
            cache = parse(rung.cache, CACHES, "cache")
            if model.block_causal and rung.cache != "none":
                note(f"{name}, {rung.name}: left out, this family's cache is Block()")
                continue
            for text in rung.decoders:
                if (rung.name, text) in there:
                    continue
                decoder = parse(text, DECODERS, "decoder")
                options = dict(gen_length=gen_length, block_length=rung.block_length, decoder=decoder, cache=cache)
                report = judge(model, problems, verifier, max_batch=BATCH, **options)
                lines.append(
                    {"model": name, **of, "rung": rung.name, "decoder": text, "cache": rung.cache}
                    | {"block_length": rung.block_length, "batch": BATCH, "dtype": str(model.dtype)}
                    | dataclasses.asdict(report)
                    | now
                )
                write_lines(file, lines)
                note(f"{name}, {rung.name}, {text}: {report.accuracy:.1%}, {report.tokens_per_forward:.2f} tokens/forward")


def aup(points: Sequence[tuple[float, float]], best: float, alpha: float = 3.0, lost: float = 5.0) -> float:
    """Accuracy under parallelism: the area under accuracy (%) over tokens per forward, each accuracy y weighted by
    min(exp(-alpha (1 - y / best)), 1); points more than `lost` points below the slowest one's are left out.

    points: (tokens per forward, accuracy in %). best: the highest accuracy of all that is compared.
    """
    if best <= 0:
        return 0.0
    points = sorted(points)
    points = [(rho, y) for rho, y in points if y >= points[0][1] - lost]
    weighted = [(rho, y * min(math.exp(-alpha * (1 - y / best)), 1.0)) for rho, y in points]
    area = points[0][0] * points[0][1]
    return area + sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(weighted))


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Each setting a row, each model a column: accuracy and tokens per forward, against before. Then the areas."""
    names = list(dict.fromkeys(x["model"] for x in lines))
    by = {(x["model"], x["rung"], x["decoder"]): x for x in lines}
    rows = [f"| | decoder | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for rung, decoder in dict.fromkeys((x["rung"], x["decoder"]) for x in lines):
        before = by.get((names[0], rung, decoder))
        cells = []
        for name in names:
            x = by.get((name, rung, decoder))
            cell = "" if x is None else f"{x['accuracy']:.1%} at {x['tokens_per_forward']:.2f}"
            if x is not None and before is not None and x is not before:
                cell += f" ({x['tokens_per_forward'] / before['tokens_per_forward']:.2f} times)"
            cells.append(cell)
        rows.append(f"| {rung} | `{decoder}` | {' | '.join(cells)} |")
    best = 100 * max(x["accuracy"] for x in lines)
    for rung in dict.fromkeys(x["rung"] for x in lines):
        cells = []
        for name in names:
            points = [(x["tokens_per_forward"], 100 * x["accuracy"]) for x in lines if (x["model"], x["rung"]) == (name, rung)]
            cells.append(f"{aup(points, best):.0f}" if points else "")
        rows.append(f"| {rung} | AUP | {' | '.join(cells)} |")
    return "\n".join(rows)


def findings(lines: Sequence[dict[str, Any]], points: float = 0.01) -> list[str]:
    """For each trained model the setting where tokens per forward rise most at no more than a point of accuracy lost."""
    names = list(dict.fromkeys(x["model"] for x in lines))
    before = {(x["rung"], x["decoder"]): x for x in lines if x["model"] == names[0]}
    found = []
    for name in names[1:]:
        pairs = [
            (x, before[x["rung"], x["decoder"]]) for x in lines if x["model"] == name and (x["rung"], x["decoder"]) in before
        ]
        kept = [(x, y) for x, y in pairs if x["correct"] >= y["correct"] - points * y["problems"] - 1e-9]
        if not kept:
            found.append(f"- {name}: no setting at which at most one point of accuracy is lost, of {len(pairs)}.")
            continue
        ratios = [x["tokens_per_forward"] / y["tokens_per_forward"] for x, y in kept]
        x, y = kept[ratios.index(max(ratios))]
        gain, low, high = difference(x["correct_bits"], y["correct_bits"], x["problems"])
        found.append(
            f"- {name}: at most one point of accuracy is lost in {len(kept)} of {len(pairs)} settings, there "
            f"{min(ratios):.2f} to {max(ratios):.2f} times the tokens per forward; most with {x['rung']}, `{x['decoder']}`: "
            f"{y['tokens_per_forward']:.2f} to {x['tokens_per_forward']:.2f}, "
            f"{100 * gain:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})."
        )
    return found


def draw(lines: Sequence[dict[str, Any]], file: Path) -> None:
    """Accuracy against tokens per forward: a panel a rung, a line a model."""
    pyplot = import_pyplot("djax bench distill")
    rungs, names = (list(dict.fromkeys(x[key] for x in lines)) for key in ("rung", "model"))
    across = min(3, len(rungs))
    down = -(-len(rungs) // across)
    figure, panels = pyplot.subplots(down, across, figsize=(4.6 * across, 3.8 * down), layout="constrained", squeeze=False)
    for panel, rung in zip(panels.flat, rungs, strict=False):
        for i, name in enumerate(names):
            points = sorted(
                (x for x in lines if (x["rung"], x["model"]) == (rung, name)), key=lambda x: x["tokens_per_forward"]
            )
            accuracy = [100 * x["accuracy"] for x in points]
            below = [100 * (x["accuracy"] - x["accuracy_low"]) for x in points]
            above = [100 * (x["accuracy_high"] - x["accuracy"]) for x in points]
            at = [x["tokens_per_forward"] for x in points]
            panel.errorbar(at, accuracy, yerr=(below, above), marker="osD^v<>P"[i % 8], elinewidth=0.5, label=name)
        panel.set_title(rung, fontsize=10)
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(rungs) :]:
        panel.set_axis_off()
    figure.supxlabel("tokens per forward (mean over problems, up to EOS)")
    figure.supylabel("accuracy, % (bars: 95% Wilson intervals)")
    panels.flat[0].legend(fontsize=8)
    save(figure, file)


def cost(model: Any, problems: Sequence[Question], decoder: Any, repeats: int = 25) -> dict[str, Any]:
    """Seconds per forward of decodes with a trace and without, turn by turn; medians and their ratio."""
    asked = [p["prompt"] for p in problems[:BATCH]]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for n in range(repeats + 1):
        for trace in (False, True) if n % 2 else (True, False):
            answers = djax.generate(model, asked, decoder=decoder, trace=trace)
            if n:
                seconds[trace].append(answers[0].timing.decode / sum(a.forwards for a in answers))
    without, traced = (statistics.median(seconds[trace]) for trace in (False, True))
    return {"seconds_per_forward": without, "seconds_per_forward_traced": traced, "ratio": round(traced / without, 4)}


def compare(
    models: Mapping[str, Any],
    out: Path,
    *,
    problems: Sequence[Question] | None,
    count: int,
    verifier: Any,
    gen_length: int,
    note: Callable[[str], None],
) -> str:
    """A model before and after, on `problems` or so many held-out word problems: ladder.jsonl, .md and .png in `out`."""
    asked = generated(held_out(count)) if problems is None else problems
    file = out / "ladder.jsonl"
    measure(models, asked, file, note=note, verifier=verifier, gen_length=gen_length, resume=True)
    lines = read_lines(file)
    text = "\n".join([table(lines), "", *findings(lines), "", _about(lines)])
    write(out / "ladder.md", text + "\n")
    draw(lines, out / "ladder.png")
    return text


def run(
    work: Path, out: Path, readme: Path | None, *, model: Any, problems: int, console: Any, note: Callable[[str], None]
) -> str:
    """Train every arm (those that are finished in `work` stay), measure all, write the tables. Returns the Markdown."""
    models, facts = {"before": model}, []
    for name, (start, arm) in ARMS.items():
        place = work / _folder(name)
        if (place / "model").exists():
            models[name] = djax.load(place / "model", dtype=str(model.dtype))
        else:
            options = dict(traces=work / "traces" / _folder(start), console=console, note=note)
            models[name] = distil(models[start], arm, place, **options)
        facts.append({"arm": name, "start": start, "steps": arm.recipe.steps, "objectives": repr(arm.recipe.objectives)})
        facts[-1] |= _read_facts(place / "facts.json")
        note(f"{name}: {facts[-1]}")
    asked = generated(held_out(problems))
    began = time.perf_counter()
    measure(models, asked, out / "distill.jsonl", note=note, resume=True)
    facts.append({"arm": "measuring", "measure_seconds": round(time.perf_counter() - began, 1)})
    facts.append({"arm": "recording", **cost(model, generated(not_held_out(BATCH)), tiny_td.RUN.recordings[0].decoder)})
    write_lines(out / "distill_facts.jsonl", [x | circumstances() for x in facts])
    return finish(out, readme)


def _read_facts(file: Path) -> dict[str, Any]:
    try:
        facts = parse_json(read_text(file))
        if not isinstance(facts, dict):
            raise ValueError(f"expected an object, got {facts!r:.60}")
    except (OSError, ValueError) as error:
        raise OptionError(f"{file}: cannot be read: {error}; remove {file.parent / 'model'} to write both again") from error
    return facts


def finish(out: Path, readme: Path | None) -> str:
    """distill.md, distill.png and the README's part from the lines."""
    lines, facts = read_lines(out / "distill.jsonl"), read_lines(out / "distill_facts.jsonl")
    text = "\n".join([table(lines), "", *findings(lines), *_told(facts), "", _about(lines)])
    write(out / "distill.md", f"# What distillation buys\n\n{text}\n")
    draw(lines, out / "distill.png")
    put(readme, "distill", text)
    return text


def _about(lines: Sequence[dict[str, Any]]) -> str:
    x = lines[0]
    return (
        f"{x['problems']} held-out problems, gen_length {x['gen_length']}, {x['dtype']}, block_length 32 where nothing else is "
        "said. "
        f"{x['hardware']}, {x['threads']} threads, {x['allocator']} allocator, jax {x['jax']}, commit "
        f"{', '.join(sorted({str(line['commit']) for line in lines}))}; `{x['command']}`."
    )


def _told(facts: Sequence[dict[str, Any]]) -> list[str]:
    """The facts in sentences, a line each."""
    told = []
    for x in facts:
        if "kept" in x:
            told.append(
                f"- {x['arm']}, {x['steps']} updates, begins with {x['start']}: "
                f"`{x['objectives']}`; {x['kept']} of "
                f"{x['trajectories']} trajectories kept ({x['bytes'] / x['trajectories']:.0f} bytes each); "
                f"record {x['record_seconds']:.0f} s, filter {x['filter_seconds']:.0f} s, train {x['train_seconds']:.0f} s."
            )
        elif "ratio" in x:
            told.append(
                f"- Recording: {1e6 * x['seconds_per_forward_traced']:.0f} against {1e6 * x['seconds_per_forward']:.0f} "
                f"microseconds a row's forward, {x['ratio']:.3f} times."
            )
    return told
