"""The public `generate`: check what is asked, lay it out as canvases, run the one program, read the answers."""

import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from djax import text
from djax.caching import CACHES, Uncached
from djax.caching.contract import Policy
from djax.checks import boolean, plug, real_number, whole_number
from djax.compilation import enable_cache
from djax.decoding import DECODERS, Threshold
from djax.decoding.contract import Decoder
from djax.errors import BatchError, CanvasError, OptionError, TripCapError
from djax.model import Model, exact_products
from djax.plugs import spelled
from djax.program import Request, Rows, decode
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
    tokens:    int32 `[n]`, generated ids up to, not including, the first EOS. Prompt tokens never count.
    canvas:    int32 `[P + gen_length]`, the sequence as the program left it; after an early stop the rest is EOS.
    forwards:  network forwards this row took part in, window and whole-canvas alike.
    refreshes: how many of them refilled the cache.
    trace:     what each forward proposed and accepted; None unless asked for.
    """

    text: str | None
    tokens: np.ndarray
    canvas: np.ndarray
    forwards: int
    refreshes: int
    timing: Timing
    trace: Trace | None = None

    @property
    def tokens_per_forward(self) -> float:
        return len(self.tokens) / self.forwards


def generate(
    model: Model,
    prompts: Any,
    *,
    gen_length: int = 128,
    block_length: int = 32,
    decoder: Decoder = Threshold(),  # noqa: B008  (frozen, so one default for all calls is one value)
    cache: Policy | None = None,
    smoothing: Smoothing | None = None,
    temperature: float = 0.0,
    seed: int | Sequence[int] = 0,
    early_stop: bool = True,
    align_blocks: bool = True,
    trace: bool = False,
    max_batch: int | None = None,
) -> Generation | list[Generation]:
    """Answer one prompt or many; see `text.encode` for the forms of `prompts`. One prompt gives one `Generation`.

    gen_length:   tokens of canvas after the prompt; an answer ends at the first EOS.
    block_length: blocks are filled one after another, each of this many positions.
    decoder:      which tokens a forward accepts: `djax.Threshold`, `Fixed`, `Credit`, `Hierarchy`, `Factor`, `Entropy`.
    cache:        what a forward runs: None (the whole canvas), `djax.Prefix`, `Dual` or `Vicinity`.
    smoothing:    None, or `djax.Smoothing`: feed masked positions what the last forward expected there.
    temperature:  0 takes the most likely token; above, Gumbel noise from the seed is added to choose it.
    seed:         one for all prompts, or one a prompt. A row draws the noise it would draw alone, whatever its place in
                  the batch: equal prompts with one seed give equal answers.
    early_stop:   end a row after the first block with an EOS; otherwise fill its whole canvas.
    align_blocks: block borders at multiples of block_length from the canvas' start (dInfer's start_block_align), so the
                  first block may begin inside the prompt; otherwise at the prompt's end.
    trace:        record every forward in `Generation.trace`. Changes neither tokens nor counts.
    max_batch:    at most this many prompts a program; more are decoded in groups. Changes no answer.

    Law: each row gets the canvas, forwards and refreshes it gets alone (float32, ties apart), whatever the batch.
    Raises `OptionError`, `PromptError`, `CanvasError` or `BatchError` before anything compiles, `TripCapError` if a
    decoder breaks its law of progress.
    """
    gen_length = whole_number(gen_length, "gen_length", at_least=1)
    block_length = whole_number(block_length, "block_length", at_least=1)
    temperature = real_number(temperature, "temperature", at_least=0.0)
    early_stop, align_blocks = boolean(early_stop, "early_stop"), boolean(align_blocks, "align_blocks")
    trace = boolean(trace, "trace")
    plug(decoder, "decoder", ("init", "step"), spelled(DECODERS))
    policy = Uncached() if cache is None else cache
    plug(policy, "cache", ("reach", "plan"), spelled(CACHES))
    if smoothing is not None:
        plug(smoothing, "smoothing", ("weight", "least"), "None, djax.Smoothing(...)")
    ids, single = text.encode(model.tokenizer, prompts, model.config.vocab, model.config.mask_id)
    seeds = [seed] * len(ids) if np.ndim(seed) == 0 else list(seed)
    if len(seeds) != len(ids):
        raise OptionError(f"seed: expected one whole number, or one for each of the {len(ids)} prompts, got {len(seeds)}")
    seeds = [whole_number(one, "seed", at_least=0, at_most=2**32 - 1) for one in seeds]
    for i, prompt in enumerate(ids):
        if len(prompt) + gen_length > model.config.max_positions:
            raise CanvasError(
                f"prompt {i}: {len(prompt)} tokens + gen_length {gen_length} = {len(prompt) + gen_length} positions, the "
                f"model has {model.config.max_positions}; gen_length may be "
                f"{max(0, model.config.max_positions - len(prompt))} at most"
            )
    group = len(ids) if max_batch is None else min(len(ids), whole_number(max_batch, "max_batch", at_least=1))
    asks = [
        request(
            ids[i : i + group],
            seeds[i : i + group],
            model.config,
            rows=group,
            gen_length=gen_length,
            block=block_length,
            temperature=temperature,
            early_stop=early_stop,
            align_blocks=align_blocks,
        )
        for i in range(0, len(ids), group)
    ]
    plugs = decoder, policy, smoothing
    for ask in asks:
        _check_memory(model, ask, *plugs, block_length)
    enable_cache()
    out: list[Generation] = []
    for ask in asks:
        out += _run(model, ask, plugs, block_length, trace)
    return out[0] if single else out


def bucket(length: int) -> int:
    """The padded canvas length: multiples of 64 up to 1024, then of 256. What is padded is seen by nobody."""
    step = 64 if length <= 1024 else 256
    return -(-length // step) * step


def request(
    ids: Sequence[np.ndarray],
    seeds: Sequence[int],
    config: Any,
    *,
    rows: int,
    gen_length: int,
    block: int,
    temperature: float = 0.0,
    early_stop: bool = True,
    align_blocks: bool = True,
) -> Request:
    """Lay the prompts out as canvases. Rows beyond the prompts have an empty canvas and never start."""
    prompt = np.array([len(p) for p in ids] + [0] * (rows - len(ids)), np.int32)
    total = np.where(prompt > 0, prompt + gen_length, 0).astype(np.int32)
    tokens = np.full((rows, bucket(int(total.max()))), config.eos_id, np.int32)
    for b, p in enumerate(ids):
        tokens[b, : len(p)] = p
        tokens[b, len(p) : total[b]] = config.mask_id
    return Request(
        tokens=tokens,
        prompt=prompt,
        total=total,
        start=prompt // block * block if align_blocks else prompt,
        seed=np.array([*seeds, *[0] * (rows - len(seeds))], np.uint32),
        temperature=np.float32(temperature),
        early_stop=np.bool_(early_stop),
        # Every turn of an unfinished row accepts a token, so no row takes more turns than it has masks.
        cap=np.int32(gen_length),
    )


def _check_memory(
    model: Model, ask: Request, decoder: Decoder, policy: Policy, smoothing: Smoothing | None, block: int
) -> None:
    """Refuse a batch whose carry and largest activations cannot fit the device; an estimate from below."""
    rows, length = ask.tokens.shape
    c, block = model.config, min(block, length)
    shapes = [jax.eval_shape(lambda: decoder.init(rows, block, c.vocab))]
    if policy.keeps:
        shapes.append(jax.eval_shape(lambda p: model.family.empty_cache(p, c, rows, length), model.params))
    if smoothing is not None:
        shapes.append(jax.eval_shape(lambda p: model.family.embed(p, c, ask.tokens), model.params))
    carried = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(shapes))
    logits = 4 * rows * block * c.vocab if policy.keeps else 4 * block * c.vocab
    need = model.parameter_bytes + carried + logits + 4 * c.heads * length * length
    have = device_memory()
    if need > have:
        raise _does_not_fit(ask, f"at least {need / 2**30:.1f} GiB, the device has {have / 2**30:.1f} GiB")


def _does_not_fit(ask: Request, need: str) -> BatchError:
    rows, length = ask.tokens.shape
    cure = "pass max_batch (it changes no answer)" if rows > 1 else "lower gen_length or block_length"
    return BatchError(f"{rows} prompts on a canvas of {length} need {need}; {cure}")


def device_memory() -> int:
    """Bytes of memory of the default device; on a CPU, of the machine."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


Plugs = tuple[Decoder, Policy, Smoothing | None]
_programs: dict[Any, Any] = {}
_MOST_PROGRAMS = 64


def compiled(model: Model, ask: Request, plugs: Plugs, block: int, traced: bool = False) -> tuple[Any, float]:
    """The compiled decode for these shapes and plugs, and the seconds it took to get it: 0 if this process had it already."""
    # A block, however long, is never more than the canvas.
    block = min(block, ask.tokens.shape[1])
    statics = dict(family=model.family, config=model.config, block=block, sampled=bool(ask.temperature > 0), traced=traced)
    leaves, tree = jax.tree.flatten((model.params, ask, plugs))
    kinds = tuple((np.shape(a), getattr(a, "dtype", type(a)), getattr(a, "sharding", None)) for a in leaves)
    key = (tree, kinds, *statics.values())
    if key in _programs:
        return _programs[key], 0.0
    began = time.perf_counter()
    with exact_products(model.dtype):
        made = decode.lower(model.params, ask, *plugs, **statics).compile()
    if len(_programs) == _MOST_PROGRAMS:
        del _programs[next(iter(_programs))]
    _programs[key] = made
    return made, time.perf_counter() - began


def _run(model: Model, ask: Request, plugs: Plugs, block: int, traced: bool) -> list[Generation]:
    try:
        program, compiling = compiled(model, ask, plugs, block, traced)
        began = time.perf_counter()
        last = program(model.params, ask, *plugs)
        rows = jax.device_get(last.rows._replace(decoder=(), soft=()))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise _does_not_fit(ask, "more memory than the device has left") from error
        raise
    timing = Timing(compile=compiling, decode=time.perf_counter() - began)
    if rows.active.any():
        raise TripCapError(
            f"rows {np.flatnonzero(rows.active).tolist()} still hold masks after {int(ask.cap)} turns: either the model's "
            f"logits are not finite (look at djax.logits), or the decoder {type(plugs[0]).__name__} accepted nothing in some "
            "turn, against its contract (djax/decoding/contract.py)"
        )
    return [_generation(model, rows, ask, b, timing) for b in range(len(ask.prompt)) if ask.total[b]]


def _generation(model: Model, rows: Rows, ask: Request, b: int, timing: Timing) -> Generation:
    canvas = rows.tokens[b, : ask.total[b]]
    answer = canvas[ask.prompt[b] :]
    ends = np.flatnonzero(answer == model.config.eos_id)
    answer = answer[: ends[0]] if ends.size else answer
    return Generation(
        text=text.decode(model.tokenizer, answer),
        tokens=answer,
        canvas=canvas,
        forwards=int(rows.forwards[b]),
        refreshes=int(rows.refreshes[b]),
        timing=timing,
        trace=rows.trace.row(b, ask.total[b], rows.forwards[b]) if rows.trace else None,
    )
