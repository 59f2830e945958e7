"""The public `generate`: have what is asked checked and laid out, compile and run the one program, read the answers."""

import dataclasses
import inspect
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from djax import text
from djax.caching.contract import Policy
from djax.compilation import enable_cache
from djax.decoding import Threshold
from djax.decoding.contract import Decoder
from djax.errors import TripCapError
from djax.model import Model, computing
from djax.native import kernels_wanted
from djax.process import with_own_settings
from djax.program import Request, Rows, decode
from djax.programs import PROGRAMS, kinds
from djax.request import Asked, does_not_fit, prepare
from djax.sharding import over_rows
from djax.smoothing import Smoothing
from djax.trace import Trace


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of the call that made a generation, shared by all rows of its batch. compile is 0 when nothing compiled."""

    compile: float
    decode: float


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """One answer.

    text:      the decoded tokens; None if the model has no tokenizer.
    tokens:    int32 `[n]`, generated ids up to, not including, the first EOS (any of the checkpoint's). Prompt tokens never
               count.
    canvas:    int32 `[P + gen_length]`, the sequence as the program left it; after an early stop the rest is EOS, the first
               that the checkpoint names.
    prompt_length: P, where the generated part of the canvas begins.
    forwards:  network forwards this row took part in, window and whole-canvas alike.
    refreshes: how many of them refilled the cache.
    positions: canvas positions those forwards ran, all together (token instances): what a forward costs, where the cost
               grows with its width.
    trace:     what each forward proposed and accepted; None unless asked for.
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

    @property
    def tokens_per_forward(self) -> float:
        return len(self.tokens) / self.forwards

    @property
    def finish_reason(self) -> str:
        """ "stop" if the answer ended at an EOS, "length" if it is as long as the canvas allows.

        Says nothing of an answer that still holds masks, which only a `TripCapError` has.
        """
        return "stop" if len(self.tokens) < len(self.canvas) - self.prompt_length else "length"


@with_own_settings
def generate(
    model: Model,
    prompts: Any,
    *,
    gen_length: int | Sequence[int] = 128,
    min_gen_length: int | Sequence[int] = 0,
    block_length: int = 32,
    decoder: Decoder | Sequence[Decoder] = Threshold(),  # noqa: B008  (frozen, so one default for all calls is one value)
    cache: Policy | Sequence[Policy] | None = None,
    smoothing: Smoothing | Sequence[Smoothing] | None = None,
    temperature: float | Sequence[float] = 0.0,
    seed: int | Sequence[int] = 0,
    early_stop: bool | Sequence[bool] = True,
    align_blocks: bool = True,
    trace: bool = False,
    max_batch: int | None = None,
) -> Generation | list[Generation]:
    """Answer one prompt or many; see `text.encode` for the forms of `prompts`. One prompt gives one `Generation`.

    gen_length:   tokens of canvas after the prompt, one number or one a prompt: no answer is longer. It ends at the
                  first EOS.
    min_gen_length: no answer is shorter: EOS is not proposed before. One number or one a prompt.
    block_length: blocks are filled one after another, each of this many positions.
    decoder:      which tokens a forward accepts: `djax.Threshold`, `Fixed`, `Credit`, `Hierarchy`, `Factor`, `Entropy`;
                  `Edit` also replaces them.
    cache:        what a forward runs: None (the whole canvas), `djax.Prefix`, `Dual` or `Vicinity`; `Block` for LLaDA2.
    smoothing:    None, or `djax.Smoothing`: feed masked positions what the last forward expected there.
    temperature:  0 takes the most likely token; above, Gumbel noise from the seed is added to choose it.
    seed:         one for all prompts, or one a prompt. A row draws the noise it would draw alone, whatever its place in
                  the batch: equal prompts with one seed give equal answers.
    early_stop:   end a row after the first block with an EOS; otherwise fill its whole canvas.
    align_blocks: block borders at multiples of block_length from the canvas' start (dInfer's start_block_align), so the
                  first block may begin inside the prompt; otherwise at the prompt's end.
    trace:        record every forward in `Generation.trace`. Changes neither tokens nor counts.
    max_batch:    at most this many prompts a program; more are decoded in groups. Changes no answer.

    decoder, cache, smoothing, temperature and early_stop may also be lists with one for each prompt: numbers may differ, kinds
    and static fields may not.

    Law: each row gets the canvas, forwards and refreshes it gets alone (float32, ties apart), whatever the batch.
    Raises `OptionError`, `PromptError`, `CanvasError` or `BatchError` before anything compiles, `TripCapError` if a
    decoder breaks its law of progress.
    """
    asked = prepare(
        *(model, prompts),
        gen_length=gen_length,
        min_gen_length=min_gen_length,
        block_length=block_length,
        decoder=decoder,
        cache=cache,
        smoothing=smoothing,
        temperature=temperature,
        seed=seed,
        early_stop=early_stop,
        align_blocks=align_blocks,
        trace=trace,
        max_batch=max_batch,
    )
    enable_cache()
    out = [generation for ask in asked.asks for generation in _run(model, asked, ask)]
    return out[0] if asked.single else out


def ask(model: Model, prompts: Any, options: dict[str, Any], caller: str) -> Asked:
    """What `generate(model, prompts, **options)` would be asked, checked, for functions that take its options.

    Raises `TypeError`, naming the caller, for an option that `generate` does not have, and `generate`'s errors.
    """
    known = {p.name: p.default for p in inspect.signature(generate).parameters.values() if p.kind is p.KEYWORD_ONLY}
    if unknown := set(options) - set(known):
        raise TypeError(f"{caller}() got unexpected options {sorted(unknown)}; those of djax.generate are {sorted(known)}")
    return prepare(model, prompts, **(known | options))


def compiled(model: Model, asked: Asked, ask: Request) -> tuple[Any, float]:
    """The compiled decode of one request, and the seconds it took to get it: 0 if this process had it already."""
    spec = asked.spec(model, ask)
    key = kinds((model.params, ask)), spec, kernels_wanted()

    def compile_program() -> Any:
        # A function of its own, so that jax's caches let go of it with the program.
        program = partial(decode, spec=spec)
        if model.mesh is not None:
            program = over_rows(program, model.mesh, ask)
        with computing(model):
            return jax.jit(program).lower(model.params, ask).compile()

    return PROGRAMS.get(key, compile_program)


def _run(model: Model, asked: Asked, ask: Request) -> list[Generation]:
    try:
        program, compiling = compiled(model, asked, ask)
        began = time.perf_counter()
        rows = jax.device_get(program(model.params, ask))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise does_not_fit(ask, "more memory than the device has left") from error
        raise
    timing = Timing(compile=compiling, decode=time.perf_counter() - began)
    if rows.active.any() and not asked.traced:
        # The same tokens once more, so that the error can show how they came.
        return _run(model, dataclasses.replace(asked, traced=True), ask)
    places = {b: (ask, b) for b in range(len(ask.prompt)) if ask.total[b]}
    generations = {b: read_row(model, rows, b, *place, timing) for b, place in places.items()}
    if rows.active.any():
        raise unfinished(np.flatnonzero(rows.active).tolist(), generations, ask.cap[rows.active].max(), asked)
    return list(generations.values())


def unfinished(rows: list[int], generations: Mapping[int, Generation], turns: int, asked: Asked) -> TripCapError:
    """The error for rows that spent their cap; `generations` are rows as far as they came, by their place."""
    return TripCapError(
        f"rows {rows} still hold masks after {turns} turns: either the model's "
        f"logits are not finite (look at djax.logits), or the decoder {type(asked.plugs[0]).__name__} accepted nothing in "
        "some turn, against its contract (djax/decoding/contract.py); the error's `generations` have the trace so far",
        list(generations.values()),
    )


def read_row(model: Model, rows: Rows, b: int, ask: Request, asked_at: int, timing: Timing) -> Generation:
    """The answer in row b of the rows (on the host), whose request is row `asked_at` of `ask`."""
    prompt, total = int(ask.prompt[asked_at]), int(ask.total[asked_at])
    canvas = rows.tokens[b, :total]
    answer = canvas[prompt:]
    ends = np.flatnonzero(np.isin(answer, (*model.config.eos_ids, model.config.mask_id)))
    answer = answer[: ends[0]] if ends.size else answer
    return Generation(
        text=None if rows.active[b] else text.decode(model.tokenizer, answer),
        tokens=answer,
        canvas=canvas,
        prompt_length=prompt,
        forwards=int(rows.forwards[b]),
        refreshes=int(rows.refreshes[b]),
        positions=int(rows.positions[b]),
        timing=timing,
        trace=rows.trace.row(b, total, rows.forwards[b]) if rows.trace else None,
    )
