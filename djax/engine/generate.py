"""The public `generate`: have what is asked checked and laid out, compile and run the one program, read the answers."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, overload

import jax
import numpy as np

from djax import text
from djax.engine import stop
from djax.engine.carry import Request, Rows
from djax.engine.loop import decode
from djax.engine.options import make_options, show_options
from djax.engine.request import Asked, does_not_fit, prepare
from djax.engine.trace import Trace
from djax.errors import TripCapError
from djax.models.model import Model, computing
from djax.runtime.compilation import enable_cache
from djax.runtime.process import with_own_settings
from djax.runtime.programs import PROGRAMS, kinds
from djax.runtime.sharding import over_rows


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of the call that made a generation, shared by all rows of its batch. compile is 0 when nothing compiled."""

    compile: float
    decode: float


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """One answer.

    text:      the decoded tokens, up to the first stop string; None if the model has no tokenizer.
    tokens:    int32 `[n]`, generated ids up to, not including, the first EOS (any of the checkpoint's); with a stop string,
               the most of them whose text lies before it. Prompt tokens never count.
    canvas:    int32 `[P + gen_length]`, the sequence as the program left it; after an early stop the rest is EOS, the first
               that the checkpoint names.
    prompt_length: P, where the generated part of the canvas begins.
    forwards:  network forwards this row took part in, window and whole-canvas alike.
    refreshes: how many of them refilled the cache.
    positions: canvas positions those forwards ran, all together (token instances): what a forward costs, where the cost
               grows with its width.
    trace:     what each forward proposed and accepted; None unless asked for.
    stopped_at: the stop string that ended the text; None if none did. Canvas, counts and trace are the whole row's all the
               same.
    """

    text: str | None
    tokens: np.ndarray
    canvas: np.ndarray
    prompt_length: int
    forwards: int
    refreshes: int
    positions: int
    timing: Timing
    trace: Trace | None = None
    stopped_at: str | None = None

    @property
    def tokens_per_forward(self) -> float:
        return len(self.tokens) / self.forwards

    @property
    def finish_reason(self) -> str:
        """ "stop" if the answer ended at an EOS or at a stop string, "length" if it is as long as the canvas allows.

        Says nothing of an answer that still holds masks, which only a `TripCapError` has.
        """
        stopped = self.stopped_at is not None
        return "stop" if stopped or len(self.tokens) < len(self.canvas) - self.prompt_length else "length"


@overload
def generate(model: Model, prompts: str, **options: Any) -> Generation: ...
@overload
def generate(model: Model, prompts: list[str], **options: Any) -> list[Generation]: ...
@overload
def generate(model: Model, prompts: Any, **options: Any) -> Generation | list[Generation]: ...
@with_own_settings
@show_options()
def generate(model: Model, prompts: object, **options: object) -> Generation | list[Generation]:
    """Answer one prompt or many; see `text.encode` for the forms of `prompts`. One prompt gives one `Generation`.

    {options}

    {lists}
    Of decoder, cache and smoothing the numbers may differ, kinds and static fields may not. One list of stop strings holds for
    all prompts; a list whose entries are lists, tuples or None has one entry for each prompt.

    Law: each row gets the canvas, forwards and refreshes it gets alone (float32, ties apart), whatever the batch.
    Raises `OptionError`, `PromptError`, `CanvasError` or `BatchError` before anything compiles, `TripCapError` if a
    decoder breaks its law of progress, `TypeError` for an option that does not exist.
    """
    asked = ask(model, prompts, options, "generate")
    enable_cache()
    groups = zip(asked.asks, asked.stops, strict=True)
    out = [generation for ask, stops in groups for generation in _run(model, asked, ask, stops)]
    return out[0] if asked.single else out


def ask(model: Model, prompts: object, options: Mapping[str, Any], caller: str) -> Asked:
    """What `generate(model, prompts, **options)` would be asked, checked, for functions that take its options.

    Raises `TypeError`, naming the caller, for an option that `generate` does not have, and `generate`'s errors.
    """
    return prepare(model, prompts, make_options(options, caller))


def compiled(model: Model, asked: Asked, ask: Request[np.ndarray]) -> tuple[Any, float]:
    """The compiled decode of one request, and the seconds it took to get it: 0 if this process had it already."""
    spec = asked.spec(model, ask)
    key = kinds((model.params, ask)), spec

    def compile_program() -> Any:
        # A function of its own, so that jax's caches let go of it with the program.
        program: Callable[..., Rows[jax.Array]] = partial(decode, spec=spec)
        if model.mesh is not None:
            program = over_rows(program, model.mesh, ask)
        with computing(model, spec.kernels):
            return jax.jit(program).lower(model.params, ask).compile()

    return PROGRAMS.get(key, compile_program)


def _run(model: Model, asked: Asked, ask: Request[np.ndarray], stops: Sequence[tuple[str, ...]]) -> list[Generation]:
    try:
        program, compiling = compiled(model, asked, ask)
        began = time.perf_counter()
        rows: Rows[np.ndarray] = jax.device_get(program(model.params, ask))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise does_not_fit(ask, "more memory than the device has left") from error
        raise
    timing = Timing(compile=compiling, decode=time.perf_counter() - began)
    if rows.active.any() and not asked.traced:
        # The same tokens once more, so that the error can show how they came.
        return _run(model, dataclasses.replace(asked, traced=True), ask, stops)
    places = {b: (ask, b) for b in range(len(ask.prompt)) if ask.total[b]}
    generations = {b: read_row(model, rows, b, *place, timing, stops[b]) for b, place in places.items()}
    if rows.active.any():
        raise unfinished(np.flatnonzero(rows.active).tolist(), generations, int(ask.cap[rows.active].max()), asked)
    return list(generations.values())


def unfinished(rows: list[int], generations: Mapping[int, Generation], turns: int, asked: Asked) -> TripCapError:
    """The error for rows that spent their cap; `generations` are rows as far as they came, by their place."""
    return TripCapError(
        f"rows {rows} still hold masks after {turns} turns: either the model's "
        f"logits are not finite (look at djax.logits), or the decoder {type(asked.plugs[0]).__name__} accepted nothing in "
        "some turn, against its contract (djax/decoding/contract.py); the error's `generations` have the trace so far",
        list(generations.values()),
    )


def _decode(model: Model, tokens: np.ndarray) -> str:
    said = text.decode(model.tokenizer, tokens)
    assert said is not None, "stop strings are refused without a tokenizer"
    return said


def read_row(
    model: Model,
    rows: Rows[np.ndarray],
    b: int,
    ask: Request[np.ndarray],
    asked_at: int,
    timing: Timing,
    stops: Sequence[str],
) -> Generation:
    """The answer in row b of the rows (on the host), whose request is row `asked_at` of `ask`, up to the first of `stops`."""
    prompt, total = int(ask.prompt[asked_at]), int(ask.total[asked_at])
    canvas = rows.tokens[b, :total]
    answer = canvas[prompt:]
    ends = np.flatnonzero(np.isin(answer, (*model.config.eos_ids, model.config.mask_id)))
    answer = answer[: ends[0]] if ends.size else answer
    said = None if rows.active[b] else text.decode(model.tokenizer, answer)
    found = None if said is None else stop.find(said, stops)
    if said is not None and found is not None:
        said = said[: found[0]]
        answer = answer[: stop.count_before(partial(_decode, model), answer, said)]
    return Generation(
        text=said,
        tokens=answer,
        canvas=canvas,
        prompt_length=prompt,
        forwards=int(rows.forwards[b]),
        refreshes=int(rows.refreshes[b]),
        positions=int(rows.positions[b]),
        timing=timing,
        trace=rows.trace.row(b, total, rows.forwards[b]) if rows.trace else None,
        stopped_at=None if found is None else found[1],
    )
