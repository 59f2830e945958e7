"""Rows that join and leave: a decode as a value that goes on, for servers and for whoever wants to look in between."""

import dataclasses
import threading
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from djax.checks import boolean, show, whole_number, word
from djax.engine.carry import Request, join, start
from djax.engine.generate import Generation, Timing, ask, read_row, unfinished
from djax.engine.loop import BLOCK_FINISHED, NO_EVENT, ROW_ENDED, run
from djax.engine.options import show_options
from djax.engine.request import Asked, check_memory
from djax.errors import BatchError, CanvasError, OptionError
from djax.models.model import Model, computing, known_model
from djax.runtime.compilation import enable_cache
from djax.runtime.process import with_own_settings
from djax.runtime.programs import PROGRAMS, kinds

_NO_TIME = Timing(0.0, 0.0)  # of a row alone there is none: all share the device
EVENTS = {"end": NO_EVENT, "row": ROW_ENDED, "block": BLOCK_FINISHED}


class Engine:
    """Slots for `rows` prompts on canvases of up to `canvas` positions, all decoded by one compiled loop.

    model, options: as for `djax.generate`; the options are the defaults of `join`. What is static (block_length, the kinds of
    decoder, cache and smoothing and their static fields, trace) holds for every row, all numbers may differ by row.
    draws: whether rows may have a temperature above 0; without, no noise is made for those at 0. truncates: whether they may
    have top_p and top_k; without, nothing is sorted for those that cut nothing.

    Invariant: a row gets the canvas, forwards and refreshes that `djax.generate` gives it alone (float32, ties apart), whenever
    it joins and whoever else is there. Joining, running and leaving compile nothing after the first time. Methods may be called
    from any thread; one runs at a time.
    """

    @with_own_settings
    @show_options()
    def __init__(
        self,
        model: Model,
        *,
        rows: int = 4,
        canvas: int = 256,
        draws: bool = True,
        truncates: bool = False,
        **options: object,
    ) -> None:
        known_model(model)
        if model.mesh is not None:
            raise OptionError("Engine: expected a model on one device, this one lies on a mesh; load it without one")
        if options.get("max_batch") is not None:
            raise OptionError(f"max_batch: expected None, the rows of an engine are `rows`; got {show(options['max_batch'])}")
        rows, canvas = whole_number(rows, "rows", at_least=1), whole_number(canvas, "canvas", at_least=2)
        if canvas > model.config.max_positions:
            raise CanvasError(f"canvas: expected at most the model's {model.config.max_positions} positions, got {canvas}")
        token = int(model.config.mask_id == 0)
        # A request of this width, for its static parts.
        wide = options | {"gen_length": canvas - 1, "min_gen_length": 0}
        asked = ask(model, np.full((1, 1), token), wide, "Engine")
        sampled = boolean(draws, "draws") or asked.sampled
        truncated = boolean(truncates, "truncates") or asked.truncated
        asked = dataclasses.replace(asked, sampled=sampled, truncated=truncated)
        self._model, self._options, self._asked = model, options, asked
        self._spec, self._length = asked.spec(model, asked.asks[0]), asked.asks[0].tokens.shape[1]
        # Nobody is there yet: an empty canvas in every slot, under the numbers of the defaults.
        # However many there are, they take no memory before they are found to fit.
        empty = jax.tree.map(lambda a: np.broadcast_to(a.dtype.type(0), (rows, *a.shape[1:])), asked.asks[0])
        numbers = jax.tree.map(lambda a: np.broadcast_to(a[0], (rows, *a.shape[1:])), asked.asks[0].numbers)
        empty = empty._replace(numbers=numbers)
        check_memory(model, empty, asked.plugs, self._spec.block)
        self._lock, self._broken = threading.RLock(), False
        self._waiting: dict[int, tuple[Request[np.ndarray], tuple[str, ...]]] = {}
        self._rows = rows
        enable_cache()
        self._carry = self._call("start", start, empty)

    @property
    def free(self) -> list[int]:
        """The slots that a prompt may join."""
        with self._lock:
            return [b for b in range(self._rows) if b not in self._waiting]

    @with_own_settings
    @show_options()
    def join(self, prompt: object, **options: object) -> int:
        """Put one prompt into a free slot, whose number is returned. Takes the options of `djax.generate`.

        Raises `BatchError` if no slot is free, `CanvasError` for a request wider than the canvas, `OptionError` for one whose
        static parts are not the engine's, and `generate`'s errors, all before anything runs.
        """
        asked = ask(self._model, prompt, self._options | options, "join")
        if len(asked.asks) != 1 or np.count_nonzero(asked.asks[0].total) != 1:
            raise OptionError("prompt: expected one prompt; join several one after another")
        request = asked.asks[0]
        self._check(asked, request)
        tokens = np.full((1, self._length), self._model.config.eos_id, np.int32)
        width = min(request.tokens.shape[1], self._length)
        tokens[:, :width] = request.tokens[:, :width]
        request = request._replace(tokens=tokens)
        with self._lock:
            if not self.free:
                raise BatchError(f"Engine: all {self._rows} slots are taken; run until a row ends, or make more rows")
            b = self.free[0]
            self._carry = self._call("join", join, self._carry, request, jnp.int32(b), donate=True)
            self._waiting[b] = request, asked.stops[0][0]
        return b

    def _check(self, asked: Asked, request: Request[np.ndarray]) -> None:
        total, ours, spec = int(request.total[0]), self._spec, asked.spec(self._model, request)
        if total > self._length:
            raise CanvasError(f"prompt and gen_length: {total} positions, the engine's canvas has {self._length}")
        if asked.sampled and not ours.sampled:
            raise OptionError("temperature: expected 0 in an engine that was made with draws=False")
        if asked.truncated and not self._asked.truncated:
            raise OptionError("top_p, top_k: expected 1.0 and 0 in an engine that was made with truncates=False")
        shapes = [[(n.shape[1:], n.dtype) for n in numbers] for numbers in (request.numbers, self._asked.asks[0].numbers)]
        for name, one, other in (
            ("block_length", asked.block_length, self._asked.block_length),
            ("decoder, cache or smoothing", (spec.plugs, spec.kinds, shapes[0]), (ours.plugs, ours.kinds, shapes[1])),
            ("trace", spec.traced, ours.traced),
        ):
            if one != other:
                raise OptionError(f"{name}: expected what the engine was made with, since its program is compiled for that")

    @with_own_settings
    def run(self, turns: int | None = None, until: str = "end") -> dict[int, Generation]:
        """Go on, and return the rows that have ended, by slot; their slots are free then.

        turns: of the loop, at most; None for no bound. until: "end" of all rows, a "row" that ends, or a "block" that some row
        finishes. Raises `TripCapError` for rows whose decoder breaks its invariant of progress: they leave, and the next call
        returns the others.
        """
        turns = 2**31 - 1 if turns is None else whole_number(turns, "turns", at_least=1)
        until = word(until, "until", tuple(EVENTS))
        with self._lock:
            if not self._waiting:
                return {}
            self._carry = self._call("run", run, self._carry, jnp.int32(turns), jnp.int32(EVENTS[until]), donate=True)
            rows = self._carry.rows
            active, spent = (np.asarray(a) for a in (rows.active, rows.iteration >= self._carry.asks.cap))
            ended = {b: waiting for b, waiting in self._waiting.items() if not active[b] or spent[b]}
            if not ended:
                return {}
            host = jax.device_get(rows._replace(decoder=(), soft=()))
            stuck = [b for b in ended if active[b]]
            leaving = {b: ended[b] for b in stuck} if stuck else ended
            try:
                found = {
                    b: read_row(self._model, host, b, request, 0, _NO_TIME, stops) for b, (request, stops) in leaving.items()
                }
            finally:
                for b in leaving:
                    del self._waiting[b]
        if stuck:
            raise unfinished(stuck, found, max(int(request.cap[0]) for request, _ in leaving.values()), self._asked)
        return found

    @with_own_settings
    def look(self, b: int) -> np.ndarray:
        """The canvas of a slot's row as it stands, int32 `[L]`; the mask id where nothing is decided yet."""
        with self._lock:
            if b not in self._waiting:
                raise OptionError(f"b: expected a slot that a prompt has joined, {sorted(self._waiting)}, got {show(b)}")
            return np.asarray(self._carry.rows.tokens)[b, : int(self._waiting[b][0].total[0])]

    def _call(self, name: str, function: Any, *arguments: Any, donate: bool = False) -> Any:
        """Run one of the three programs, compiled once for the shapes of its arguments."""
        if self._broken:
            raise BatchError("Engine: an earlier call failed on the device, and its rows with it; make a new engine")
        arguments = (self._model.params, *arguments)
        program = partial(function, spec=self._spec)
        key = name, kinds(arguments), self._spec

        def compile_program() -> Any:
            with computing(self._model, self._spec.kernels):
                return jax.jit(program, donate_argnums=(1,) if donate else ()).lower(*arguments).compile()

        compiled = PROGRAMS.get(key, compile_program)[0]
        try:
            return jax.block_until_ready(compiled(*arguments))
        except BaseException as error:
            # What was donated is gone.
            self._broken = donate
            if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
                raise BatchError(f"Engine: {self._rows} rows need more memory than the device has left") from error
            raise
