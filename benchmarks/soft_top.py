"""What the top-k form of smoothing changes: soft embeddings, answers and accuracy against the whole softmax.

djax bench soft-top --out benchmarks/results
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from djax.benchmarks.circumstances import circumstances
from djax.benchmarks.report import write_lines
from djax.models.sight import see

TOPS = (1, 2, 4, 8, 16, 32)


def measure(model: Any, problems: list[Any], out: Path, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """One line a k: the error of the expected embedding where every generated position is masked (relative to its norm,
    mean and worst), and the decode with it beside the decode with the whole softmax. Writes soft_top.jsonl."""
    import djax
    from djax.tasks.evaluate import difference, evaluate

    def report(top: int | None) -> Any:
        smoothing = djax.Smoothing(top=top)
        return evaluate(model, problems, decoder=djax.Threshold(0.9), smoothing=smoothing, gen_length=128, block_length=32)

    now = circumstances()
    x, at = _first_forward(model, problems[:25])
    whole, base = _expected(model, x, None)[at], report(None)
    lines = []
    for top in TOPS:
        error = np.linalg.norm(_expected(model, x, top)[at] - whole, axis=-1) / np.linalg.norm(whole, axis=-1)
        this = report(top)
        gain, low, high = difference(this.correct_bits, base.correct_bits, this.problems)
        lines.append(
            {"top": top, "vocab": model.config.vocab, "error_mean": float(error.mean()), "error_max": float(error.max())}
            | {"accuracy_difference": gain, "difference_low": low, "difference_high": high}
            | {"whole": dataclasses.asdict(base)}
            | dataclasses.asdict(this)
            | now
        )
        note(
            f"top {top}: embeddings differ by {error.mean():.3f} (worst {error.max():.3f}) of their norm; accuracy "
            f"{this.accuracy:.1%} against {base.accuracy:.1%} ({100 * low:+.1f} to {100 * high:+.1f} points), tokens/forward "
            f"{this.tokens_per_forward:.2f} against {base.tokens_per_forward:.2f}"
        )
    write_lines(out / "soft_top.jsonl", lines)
    return lines


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row a k."""
    rows = [
        "| `top` | embeddings differ (mean, worst) | accuracy, against the whole softmax | tokens/forward |",
        "|---|---|---|---|",
    ]
    for x in lines:
        difference = f"{100 * x['difference_low']:+.1f} to {100 * x['difference_high']:+.1f} points"
        rows.append(
            f"| {x['top']} of {x['vocab']} | {x['error_mean']:.1%}, {x['error_max']:.1%} | "
            f"{x['accuracy']:.1%} ({difference}) | {x['tokens_per_forward']:.2f} |"
        )
    x, whole = lines[0], lines[0]["whole"]
    rows += [
        f"| None | 0 | {whole['accuracy']:.1%} | {whole['tokens_per_forward']:.2f} |",
        "",
        f"{x['problems']} held-out problems, `Threshold(0.9)`, no cache, block 32; embeddings at the first forward of 25, "
        f"of their norm; commit {x['commit']}; `{x['command']}`.",
    ]
    return "\n".join(rows)


def _first_forward(model: Any, problems: list[Any]) -> tuple[jax.Array, np.ndarray]:
    """The trunk's output `[B, L, D]` on canvases of prompt and masks, and which positions are masked, bool `[B, L]`."""
    from djax import text

    ids, _ = text.encode(model.tokenizer, [p.question for p in problems], model.config.vocab, model.config.mask_id)
    length = max(map(len, ids)) + 128
    tokens = np.full((len(ids), length), model.config.mask_id, np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(ids):
        tokens[row, : len(prompt)] = prompt
        valid[row, : len(prompt) + 128] = True
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    embedded = model.family.embed(model.params, model.config, jnp.asarray(tokens))
    x, _ = model.family.trunk(model.params, model.config, embedded, positions, see("all", positions, jnp.asarray(valid), 1))
    return x, (tokens == model.config.mask_id) & valid


def _expected(model: Any, x: jax.Array, top: int | None) -> np.ndarray:
    return np.asarray(model.family.expected_embedding(model.params, model.config, x, top))
