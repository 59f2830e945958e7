"""How well, and in how few forwards, a model answers problems it never saw."""

import dataclasses
import math
from typing import Any

from djax.generate import generate
from djax.model import Model
from djax.training.problems import Problem, stated_result


@dataclasses.dataclass(frozen=True)
class Report:
    """One evaluation. A token counts up to the first EOS; the prompt never counts.

    accuracy: share of problems whose stated result is right, with its 95% Wilson interval.
    tokens_per_forward: mean over problems of tokens / forwards (dInfer's TPF).
    forwards: mean a problem. decode_seconds: all problems, compile apart.
    """

    problems: int
    correct: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    tokens: int
    tokens_per_forward: float
    forwards: float
    refreshes: float
    tokens_per_second: float
    compile_seconds: float
    decode_seconds: float


def wilson(correct: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927): sound near 0 and 1, where the normal approximation is not."""
    p = correct / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return centre - half, centre + half


def evaluate(model: Model, problems: list[Problem], *, max_batch: int = 25, progress: Any = None, **options: Any) -> Report:
    """Answer every problem with `djax.generate(**options)` and count. `progress` is called with the number done so far."""
    answers = []
    compiling = decoding = 0.0
    for i in range(0, len(problems), max_batch):
        part = generate(model, [p.question for p in problems[i : i + max_batch]], **options)
        compiling, decoding = compiling + part[0].timing.compile, decoding + part[0].timing.decode
        answers += part
        if progress is not None:
            progress(len(answers))
    correct = sum(stated_result(a.text) == p.result for a, p in zip(answers, problems, strict=True))
    count, tokens = len(problems), sum(len(a.tokens) for a in answers)
    low, high = wilson(correct, count)
    return Report(
        problems=count,
        correct=correct,
        accuracy=correct / count,
        accuracy_low=round(low, 4),
        accuracy_high=round(high, 4),
        tokens=tokens,
        tokens_per_forward=round(sum(a.tokens_per_forward for a in answers) / count, 3),
        forwards=round(sum(a.forwards for a in answers) / count, 2),
        refreshes=round(sum(a.refreshes for a in answers) / count, 2),
        tokens_per_second=round(tokens / decoding, 1),
        compile_seconds=round(compiling, 2),
        decode_seconds=round(decoding, 2),
    )
