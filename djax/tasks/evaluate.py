"""How well, and in how few forwards, a model answers problems it never saw."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from djax.engine.generate import Generation, generate
from djax.engine.options import show_options
from djax.models.model import Model
from djax.runtime.process import with_own_settings
from djax.tasks.problems import Problem, stated_result


@dataclasses.dataclass(frozen=True)
class Report:
    """One evaluation. A token counts up to the first EOS; the prompt never counts.

    accuracy: share of problems whose stated result is right, with its 95% Wilson interval; correct_bits has which, as the
              hexadecimal digits of a number whose bit i is problem i, so that two reports can be compared problem by problem.
    tokens_per_forward: mean over problems of tokens / forwards (dInfer's TPF), with its 95% interval (normal, of the mean).
    forwards, refreshes, positions: means a problem; positions are all those run, over all forwards (token instances).
    programs: how many had to be compiled. decode_seconds: all problems, compile apart.
    """

    problems: int
    correct: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    correct_bits: str
    tokens: int
    tokens_per_forward: float
    tokens_per_forward_low: float
    tokens_per_forward_high: float
    forwards: float
    refreshes: float
    positions: float
    tokens_per_second: float
    programs: int
    compile_seconds: float
    decode_seconds: float


def wilson(correct: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927): sound near 0 and 1, where the normal approximation is not."""
    p = correct / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return centre - half, centre + half


def difference(bits: str, other: str, count: int, z: float = 1.96) -> tuple[float, float, float]:
    """Accuracy of one report minus another's on the same problems, and its 95% interval (paired, normal)."""
    one, two = int(bits, 16), int(other, 16)
    won, lost = (one & ~two).bit_count() / count, (two & ~one).bit_count() / count
    half = z * math.sqrt(max(won + lost - (won - lost) ** 2, 0) / count)
    return won - lost, won - lost - half, won - lost + half


@with_own_settings
@show_options()
def evaluate(
    model: Model,
    problems: list[Problem],
    *,
    max_batch: int = 25,
    progress: Callable[[int], None] | None = None,
    answer: Callable[..., list[Generation]] = generate,
    **options: object,
) -> Report:
    """Answer every problem and count: `answer(model, questions, **options)`, by default `djax.generate`. `progress` is called
    with the number done so far."""
    ask = partial(answer, model, **options)
    prompts, results = [p.question for p in problems], [p.result for p in problems]

    def is_right(n: int, answer: Generation) -> bool:
        assert answer.text is not None, "questions are text, which needs a tokenizer"
        return stated_result(answer.text) == results[n]

    return measure(ask, prompts, is_right, max_batch, progress)


def measure(
    answer: Callable[[list[Any]], list[Generation]],
    prompts: Sequence[Any],
    is_right: Callable[[int, Generation], bool],
    max_batch: int,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Run `answer` over the prompts in batches of `max_batch`, and count.

    is_right: (the prompt's number, its answer), asked when all are answered. `progress` is called
    with the number answered so far.
    """
    answers: list[Generation] = []
    for i in range(0, len(prompts), max_batch):
        answers += answer(list(prompts[i : i + max_batch]))
        if progress is not None:
            progress(len(answers))
    return report(answers, [is_right(n, a) for n, a in enumerate(answers)])


def report(answers: list[Generation], right: list[bool]) -> Report:
    """Count answers, and which are right. Answers that were decoded together share their `timing`."""
    timings = list({id(a.timing): a.timing for a in answers}.values())
    count, tokens = len(answers), sum(len(a.tokens) for a in answers)
    decoding = sum(t.decode for t in timings)
    low, high = wilson(sum(right), count)
    rates = [a.tokens_per_forward for a in answers]
    rate, half = statistics.fmean(rates), 1.96 * statistics.pstdev(rates) / math.sqrt(count)
    return Report(
        problems=count,
        correct=sum(right),
        accuracy=sum(right) / count,
        accuracy_low=round(low, 4),
        accuracy_high=round(high, 4),
        correct_bits=f"{sum(r << i for i, r in enumerate(right)):x}",
        tokens=tokens,
        tokens_per_forward=round(rate, 3),
        tokens_per_forward_low=round(rate - half, 3),
        tokens_per_forward_high=round(rate + half, 3),
        forwards=round(statistics.fmean(a.forwards for a in answers), 2),
        refreshes=round(statistics.fmean(a.refreshes for a in answers), 2),
        positions=round(statistics.fmean(a.positions for a in answers), 1),
        tokens_per_second=round(tokens / decoding, 1),
        programs=sum(t.compile > 0 for t in timings),
        compile_seconds=round(sum(t.compile for t in timings), 2),
        decode_seconds=round(decoding, 2),
    )
