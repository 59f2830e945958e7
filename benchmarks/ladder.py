"""The ablation ladder: what each part of a decode buys, in accuracy and in tokens per forward, on held-out problems.

    djax bench ladder --out benchmarks/results --readme README.md

A rung is one combination of decoder, cache and smoothing; its decoder's numbers are swept, which compiles once a bucket of
canvas lengths. Every point is one JSON line in ladder.jsonl, with the problems it answered rightly and the circumstances;
ladder.md and ladder.png are made from those lines alone.
"""

import dataclasses
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from djax.benchmarks.circumstances import circumstances
from djax.benchmarks.report import put, read_lines, write_lines
from djax.errors import OptionError
from djax.storage.files import write
from djax.tasks.evaluate import difference

GEN_LENGTH, BATCH = 128, 25


@dataclasses.dataclass(frozen=True)
class Rung:
    """decoders: as on the command line; the first one is the rung's step on the ladder, the others are its sweep.

    oracle: not these decoders but the oracle that knows their answers (`oracle.py`), a ceiling and no way to decode.
    """

    name: str
    decoders: tuple[str, ...]
    cache: str = "none"
    smoothing: str = "none"
    block_length: int = 32
    oracle: bool = False


def thresholds(*taus: float) -> tuple[str, ...]:
    return tuple(f"Threshold({tau})" for tau in taus)


def credit(*taus: float, alpha: float | None = None) -> tuple[str, ...]:
    return tuple(f"Credit({inner}{'' if alpha is None else f', alpha={alpha}'})" for inner in thresholds(*taus))


def hierarchies(*pairs: tuple[float, float]) -> tuple[str, ...]:
    return tuple(f"Hierarchy({high}, {low})" for high, low in pairs)


DUAL, VICINITY, SMOOTHING = "Dual()", "Vicinity(16, 16, warmup=4)", "Smoothing()"
NO_RAMP = "Smoothing(threshold_decay=None)"
PAIRS = ((0.92, 0.62), (0.97, 0.9), (0.99, 0.97), (0.997, 0.99))
RUNGS = (
    Rung("threshold", thresholds(0.9, 0.8, 0.97, 0.99, 0.997)),
    Rung("threshold + prefix", thresholds(0.9, 0.99), "Prefix()"),
    Rung("threshold + dual", thresholds(0.9, 0.97, 0.99), DUAL),
    Rung("threshold + vicinity", thresholds(0.9, 0.97, 0.99), VICINITY),
    Rung("credit", credit(0.9, 0.8, 0.97, 0.99, 0.997)),
    Rung("credit, alpha 2", credit(0.9, 0.99, 0.999, alpha=2.0)),
    Rung("credit + vicinity", credit(0.9, 0.99, 0.997), VICINITY),
    Rung("smoothing", thresholds(0.9, 0.8, 0.97, 0.99), "none", SMOOTHING),
    Rung("smoothing, no ramp", thresholds(0.9, 0.97, 0.99), "none", NO_RAMP),
    Rung("factor + smoothing, no ramp", tuple(f"Factor({f})" for f in (1.0, 0.3, 0.1, 0.03)), "none", NO_RAMP),
    Rung("hierarchy + smoothing, no ramp", hierarchies(*PAIRS[:3]), "none", NO_RAMP),
    Rung("credit over factor", tuple(f"Credit(Factor({f}))" for f in (0.3, 0.1, 0.03))),
    Rung("smoothing + vicinity", thresholds(0.8, 0.9, 0.97), VICINITY, SMOOTHING),
    Rung("credit + smoothing", credit(0.9, 0.97, 0.99), "none", SMOOTHING),
    Rung("hierarchy", hierarchies(*PAIRS)),
    Rung("hierarchy + vicinity", hierarchies(*PAIRS[:3]), VICINITY),
    Rung("hierarchy + smoothing", hierarchies(*PAIRS[:3]), "none", SMOOTHING),
    Rung("hierarchy + smoothing + vicinity", hierarchies(*PAIRS[:2]), VICINITY, SMOOTHING),
    Rung("factor", tuple(f"Factor({f})" for f in (1.0, 0.3, 0.1, 0.03))),
    Rung("entropy", tuple(f"Entropy({theta})" for theta in (0.45, 0.1, 0.03))),
    Rung("fixed", tuple(f"Fixed({n})" for n in (4, 2, 8))),
    Rung("threshold, block 128", thresholds(0.9, 0.97, 0.99, 0.997), block_length=128),
    Rung("credit, block 128", credit(0.9, 0.97, 0.99, 0.997), block_length=128),
    Rung("hierarchy, block 128", hierarchies(*PAIRS), block_length=128),
    Rung("credit over hierarchy, block 128", tuple(f"Credit({h})" for h in hierarchies(*PAIRS)), block_length=128),
    Rung("one token a forward", ("Fixed(1)",)),
    Rung("oracle", ("Fixed(1)",), oracle=True),
    Rung("oracle, smoothing", ("Fixed(1)",), "none", SMOOTHING, oracle=True),
    Rung("oracle, block 128", ("Fixed(1)",), block_length=128, oracle=True),
)
# What is compared with: a threshold as it is usually set, one at which this model loses little, and what loses nothing.
REFERENCES = (("threshold", "Threshold(0.9)"), ("threshold", "Threshold(0.99)"), ("one token a forward", "Fixed(1)"))


def measure(
    model: Any, problems: list[Any], out: Path, *, resume: bool, note: Callable[[str], None], rungs: Iterable[Rung] = RUNGS
) -> None:
    """Answer the problems at every point of every rung, writing each line as it is measured (a kill loses one point).

    resume: keep the lines that are there, if they are of the same number of problems. Raises `OptionError` if there are
    lines and `resume` is off, so that nothing measured is lost by accident.
    """
    from djax.benchmarks import oracle
    from djax.caching import CACHES
    from djax.decoding import DECODERS
    from djax.decoding.smoothing import SMOOTHINGS
    from djax.engine.generate import generate
    from djax.plugs import parse
    from djax.tasks.evaluate import evaluate

    out.mkdir(parents=True, exist_ok=True)
    file = out / "ladder.jsonl"
    if file.exists() and not resume:
        raise OptionError(f"--out: {file} exists; give --resume to go on with it, or remove it")
    lines = read_lines(file) if file.exists() else []
    this = {"problems": len(problems), "gen_length": GEN_LENGTH, "batch": BATCH, "model": repr(model)}
    for line in lines:
        for name, value in this.items():
            if line[name] != value:
                raise OptionError(f"--resume: {file} has {name} {line[name]}, this run {value}; choose another --out")
    done = {(line["rung"], line["decoder"]) for line in lines}
    now = circumstances()  # of the code that runs, whatever is committed meanwhile
    for rung in rungs:
        for decoder in rung.decoders:
            if (rung.name, decoder) in done:
                continue
            report = evaluate(
                *(model, problems),
                answer=oracle.answer if rung.oracle else generate,
                max_batch=BATCH,
                gen_length=GEN_LENGTH,
                block_length=rung.block_length,
                decoder=parse(decoder, DECODERS, "decoder"),
                cache=parse(rung.cache, CACHES, "cache"),
                smoothing=parse(rung.smoothing, SMOOTHINGS, "smoothing"),
            )
            lines.append(
                {"rung": rung.name, "decoder": decoder, "cache": rung.cache, "smoothing": rung.smoothing}
                | {"oracle": rung.oracle}
                | {"gen_length": GEN_LENGTH, "block_length": rung.block_length, "batch": BATCH, "dtype": str(model.dtype)}
                | {"model": repr(model)}
                | dataclasses.asdict(report)
                | now
            )
            write_lines(file, lines)
            note(
                f"{rung.name}, {decoder}: {report.accuracy:.1%}, {report.tokens_per_forward:.2f} tokens/forward "
                f"({report.decode_seconds:.0f} s)"
            )


def front(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The Pareto front: points that no other beats in accuracy and in tokens per forward at once, slowest first. Oracles are no
    way to decode, so they are not on it."""
    best: list[dict[str, Any]] = []
    for line in sorted((x for x in lines if not x["oracle"]), key=lambda x: (-x["tokens_per_forward"], -x["accuracy"])):
        if not best or line["accuracy"] > best[-1]["accuracy"]:
            best.append(line)
    return best[::-1]


def fastest(lines: list[dict[str, Any]], reference: dict[str, Any], points: float = 0.01) -> dict[str, Any] | None:
    """Of some lines the one with most tokens per forward whose accuracy is at most `points` below the reference's."""
    kept = [x for x in lines if x["correct"] >= reference["correct"] - points * reference["problems"] - 1e-9]
    return max(kept, key=lambda x: x["tokens_per_forward"], default=None)


def markdown(lines: list[dict[str, Any]]) -> str:
    """ladder.md: each rung's step, its fastest point that loses at most one point, the Pareto front, and all points."""
    by_rung = _by_rung(lines)
    text = ["# The ladder", "", _table([points[0] for points in by_rung.values()]), "", *_circumstances(lines)]
    for rung, decoder in REFERENCES:
        reference = next((p for p in by_rung.get(rung, []) if p["decoder"] == decoder), None)
        if reference is not None:
            text += ["", *_against(by_rung, reference)]
    text += ["", *_findings(lines)]
    text += ["", "## The Pareto front, from the surest to the fastest", "", _table(front(lines))]
    text += ["", "## Every point", "", _table(lines)]
    return "\n".join(text) + "\n"


def summary(lines: list[dict[str, Any]]) -> str:
    """The README's part: each rung's step, shortly, and what follows from all points."""
    rows = ["| | decoder | cache | smoothing | accuracy | tokens/forward | forwards |", "|---|---|---|---|---|---|---|"]
    for points in _by_rung(lines).values():
        x = points[0]
        rows.append(
            f"| {x['rung']} | {_setting(x)} | {x['accuracy']:.1%} (±{50 * (x['accuracy_high'] - x['accuracy_low']):.1f}) | "
            f"{x['tokens_per_forward']:.2f} (±{(x['tokens_per_forward_high'] - x['tokens_per_forward_low']) / 2:.2f}) | "
            f"{x['forwards']:.1f} |"
        )
    return "\n".join([*rows, "", *_findings(lines), "", *_circumstances(lines)])


def _findings(lines: list[dict[str, Any]]) -> list[str]:
    """Sentences, a line each: the fastest way at each level of accuracy, and the ceilings."""
    points = {(x["rung"], x["decoder"]): x for x in lines}
    real = [x for x in lines if not x["oracle"]]
    found = []
    for y in (points[r] for r in REFERENCES if r in points):
        x = fastest(real, y)
        assert x is not None, "the reference itself loses nothing"
        times = x["tokens_per_forward"] / y["tokens_per_forward"]
        found.append(
            f"- At most one point below {_point(y)}, the fastest is {_point(x)}: {times:.2f} times the tokens per forward."
        )
    usual = points.get(REFERENCES[0])
    for x in lines:
        if x["oracle"] and usual is not None:
            times = x["tokens_per_forward"] / usual["tokens_per_forward"]
            found.append(
                f"- {x['rung'].capitalize()}: who knows the answer and takes each of its tokens once the model proposes it "
                f"reaches {x['tokens_per_forward']:.2f} tokens/forward, {times:.2f} times `{usual['decoder']}` at block 32."
            )
    return found


def _point(x: dict[str, Any]) -> str:
    return f"{x['rung']}, `{x['decoder']}` ({x['accuracy']:.1%} at {x['tokens_per_forward']:.2f})"


def _by_rung(lines: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    by_rung: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_rung.setdefault(line["rung"], []).append(line)
    return by_rung


def _circumstances(lines: list[dict[str, Any]]) -> list[str]:
    x = lines[0]
    return [
        f"{x['problems']} held-out problems, gen_length {x['gen_length']}, block_length 32 where nothing else is said, "
        f"{x['dtype']}, {x['batch']} problems a batch. 95% intervals (Wilson for the accuracy, normal for the mean of "
        "tokens/forward). Forwards (NFE), refreshes and positions (token instances) are means a problem. Tokens/s, where "
        "given, come from one pass over all problems, compile time apart. "
        f"{x['hardware']}, {x['threads']} threads, {x['allocator']} allocator, jax {x['jax']}, "
        f"commit {', '.join(sorted({str(line['commit']) for line in lines}))}; `{x['command']}`."
    ]


def _setting(x: dict[str, Any]) -> str:
    return f"{'oracle of ' if x['oracle'] else ''}`{x['decoder']}` | {_plug(x['cache'])} | {_plug(x['smoothing'])}"


def _plug(text: str) -> str:
    return "" if text == "none" else f"`{text}`"


def _table(lines: list[dict[str, Any]]) -> str:
    rows = [
        "| rung | decoder | cache | smoothing | accuracy | tokens/forward | forwards | refreshes | positions | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for x in lines:
        rows.append(
            f"| {x['rung']} | {_setting(x)} | {x['accuracy']:.1%} ({x['accuracy_low']:.1%} to {x['accuracy_high']:.1%}) | "
            f"{x['tokens_per_forward']:.2f} ({x['tokens_per_forward_low']:.2f} to {x['tokens_per_forward_high']:.2f}) | "
            f"{x['forwards']:.1f} | {x['refreshes']:.1f} | {x['positions']:,.0f} | {x['tokens_per_second']:.0f} |"
        )
    return "\n".join(rows)


def _against(by_rung: dict[str, list[dict[str, Any]]], reference: dict[str, Any]) -> list[str]:
    name = f"{reference['rung']}, `{reference['decoder']}`"
    text = [
        f"## Against {name} ({reference['accuracy']:.1%}, {reference['tokens_per_forward']:.2f} tokens/forward)",
        "",
        "The fastest point of each rung whose accuracy is at most one point below; differences paired by problem.",
        "",
        "| rung | decoder | cache | smoothing | accuracy against it | tokens/forward against it |",
        "|---|---|---|---|---|---|",
    ]
    for rung, points in by_rung.items():
        x = fastest(points, reference)
        if x is None:
            text.append(f"| {rung} | none of {len(points)} | | | | |")
            continue
        gain, low, high = difference(x["correct_bits"], reference["correct_bits"], x["problems"])
        ratio = x["tokens_per_forward"] / reference["tokens_per_forward"]
        text.append(
            f"| {rung} | {_setting(x)} | {100 * gain:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}) | {ratio:.2f} times |"
        )
    return text


def import_pyplot(command: str) -> Any:
    """matplotlib without a window."""
    try:
        import matplotlib
    except ImportError as error:
        raise OptionError(f"{command}: the picture needs matplotlib; pip install 'djax[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, file: Path) -> None:
    """As a PNG, whole or not at all."""
    from matplotlib import pyplot

    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    pyplot.close(figure)
    write(file, picture.getvalue())


def draw(lines: list[dict[str, Any]], file: Path) -> None:
    """Accuracy against tokens per forward: a line a rung, its 95% intervals, and the Pareto front behind them."""
    pyplot = import_pyplot("djax bench ladder")
    figure, axes = pyplot.subplots(figsize=(12, 6.5), layout="constrained")
    best = front(lines)
    axes.step(
        *zip(*((x["tokens_per_forward"], 100 * x["accuracy"]) for x in best), strict=True),
        where="pre",
        color="0.8",
        linewidth=6,
        zorder=0,
        label="Pareto front",
    )
    names = list(dict.fromkeys(x["rung"] for x in lines))
    colours = pyplot.get_cmap("tab20").colors
    for i, name in enumerate(names):
        points = sorted((x for x in lines if x["rung"] == name), key=lambda x: x["tokens_per_forward"])
        at, accuracy = [x["tokens_per_forward"] for x in points], [100 * x["accuracy"] for x in points]
        below = [100 * (x["accuracy"] - x["accuracy_low"]) for x in points]
        above = [100 * (x["accuracy_high"] - x["accuracy"]) for x in points]
        axes.errorbar(
            *(at, accuracy),
            yerr=(below, above),
            marker="osD^v<>P"[i % 8],
            markersize=5,
            linewidth=1.2,
            elinewidth=0.5,
            color=colours[i % len(colours)],
            label=name,
        )
    x = lines[0]
    axes.set_xlabel("tokens per forward (mean over problems, up to EOS)")
    axes.set_ylabel("accuracy, % (bars: 95% Wilson intervals)")
    axes.set_title(f"{x['problems']} held-out problems, gen_length {x['gen_length']}, block_length 32 if not named")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save(figure, file)


def finish(out: Path, readme: Path | None) -> str:
    """ladder.md, ladder.png and the README's tables from ladder.jsonl, rung by rung. Returns the Markdown."""
    order = [(rung.name, decoder) for rung in RUNGS for decoder in rung.decoders]
    lines = read_lines(out / "ladder.jsonl")
    lines.sort(key=lambda x: order.index(point) if (point := (x["rung"], x["decoder"])) in order else len(order))
    text = markdown(lines)
    write(out / "ladder.md", text)
    draw(lines, out / "ladder.png")
    put(readme, "ladder", summary(lines))
    return text
