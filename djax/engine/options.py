"""The options of a decode as one value: the only place where their names, types, defaults and meanings are written."""

import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin

from djax.caching.contract import Policy
from djax.decoding import Threshold
from djax.decoding.contract import Decoder
from djax.decoding.smoothing import Smoothing

F = TypeVar("F", bound=Callable[..., Any])


def _option(default: object, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"text": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What `djax.generate` takes besides the model and the prompts, unchecked; `help(djax.generate)` has the meanings.

    `djax.generate(model, prompts, **vars(options))` decodes by it. An option whose type has a `Sequence` may also be a list
    with one value for each prompt.
    """

    gen_length: int | Sequence[int] = _option(
        128, "tokens of canvas after the prompt: no answer is longer. It ends at the first EOS."
    )
    min_gen_length: int | Sequence[int] = _option(0, "no answer is shorter: EOS is not proposed before.")
    block_length: int = _option(32, "blocks are filled one after another, each of this many positions.")
    decoder: Decoder | Sequence[Decoder] = _option(  # noqa: RUF009  (makes a field)
        Threshold(),
        "which tokens a forward accepts: Threshold(tau) takes all whose confidence reaches tau (above 1: one token a "
        "forward), Fixed(per_step) the surest few, Fixed(steps=8) a block in that many forwards, Hierarchy(high, low) the "
        "surest of each stretch of masks, Factor(f) as many as are jointly sure, Entropy(theta) the sharpest; "
        "Credit(Threshold(0.8)) trusts tokens proposed before, Edit(Threshold(0.95), tau=0.9) also replaces accepted ones, "
        "FreeDave(Fixed(1), drafts=4) verifies several of its next states in one forward.",
    )
    cache: Policy | Sequence[Policy] | None = _option(  # noqa: RUF009  (makes a field)
        None,
        "what a forward runs: None (the whole canvas), Prefix(every=None) (from the block on), Dual(every=None) (the block) "
        "or Vicinity(before=16, after=16, warmup=4, every=None) (the block and its neighbours); Block() for LLaDA2.",
    )
    smoothing: Smoothing | Sequence[Smoothing] | None = _option(  # noqa: RUF009  (makes a field)
        None,
        "None, or Smoothing(first, growth, last, threshold_decay): feed masked positions what the last forward expected there.",
    )
    temperature: float | Sequence[float] = _option(
        0.0, "0 takes the most likely token; above, Gumbel noise from the seed is added to choose it."
    )
    top_p: float | Sequence[float] = _option(
        1.0,
        "above temperature 0, draw from the smallest set of likeliest tokens whose probabilities (at this temperature, after "
        "top_k, without the mask id) sum to at least this; above 0 and at most 1, which keeps all.",
    )
    top_k: int | Sequence[int] = _option(
        0, "above temperature 0, draw from this many of the likeliest tokens and any that tie with the last; 0 keeps all."
    )
    seed: int | Sequence[int] = _option(
        0,
        "the noise comes from it. A row draws the noise it would draw alone, whatever its place in the batch: equal prompts "
        "with one seed give equal answers.",
    )
    early_stop: bool | Sequence[bool] = _option(
        True, "end a row after the first block with an EOS; otherwise fill its whole canvas."
    )
    stop: str | Sequence[str] | Sequence[Sequence[str] | None] | None = _option(
        None,
        "up to 16 strings: the answer's text and tokens end before the first one that occurs in it. The whole row is "
        "decoded all the same, because a decode in any order cannot know the text early: canvas and counts cover all of it.",
    )
    align_blocks: bool = _option(
        True,
        "block borders at multiples of the block length from the canvas' start (dInfer's start_block_align), so the first "
        "block may begin inside the prompt; otherwise at the prompt's end.",
    )
    trace: bool = _option(False, "record every forward in `Generation.trace`. Changes neither tokens nor counts.")
    max_batch: int | None = _option(None, "at most this many prompts a program; more are decoded in groups. Changes no answer.")


FIELDS: Mapping[str, dataclasses.Field] = {field.name: field for field in dataclasses.fields(Options)}


def make_options(options: Mapping[str, Any], caller: str) -> Options:
    """The options of a call. Raises `TypeError`, naming the caller, for names that are none."""
    if unknown := set(options) - set(FIELDS):
        raise TypeError(f"{caller}() got unexpected options {sorted(unknown)}; those of djax.generate are {sorted(FIELDS)}")
    return Options(**options)


def describe(name: str) -> str:
    """The documentation of an option."""
    return FIELDS[name].metadata["text"]


def list_types(name: str) -> tuple[Any, ...]:
    """The types that the value of one prompt may have."""
    return tuple(kind for kind in _kinds(name) if get_origin(kind) is not Sequence)


def is_repeated(name: str) -> bool:
    """Whether one prompt may have several strings."""
    return Sequence[str] in _kinds(name)


def show_options(*, without: Collection[str] = ()) -> Callable[[F], F]:
    """Show the options that a function takes as `**options` in its signature, less those it has itself or goes `without`, and
    list them in its docstring, where a line says {options}, and those that may be lists where one says {lists}."""

    def show(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        fields = [f for name, f in FIELDS.items() if name not in (*without, *(p.name for p in own))]
        more = [inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type) for f in fields]
        vars(function)["__signature__"] = signature.replace(parameters=[*own, *more])
        doc = function.__doc__
        if doc is not None and "{options}" in doc:  # python -OO leaves none
            fill = functools.partial(textwrap.fill, width=100)
            listed = "\n".join(fill(f"{f.name}: {describe(f.name)}", subsequent_indent=" " * 4) for f in fields)
            several = ", ".join(f.name for f in fields if len(list_types(f.name)) < len(_kinds(f.name)))
            lists = fill(f"May also be lists with one for each prompt: {several}.")
            text = inspect.cleandoc(doc)
            function.__doc__ = text.replace("{options}", listed).replace("{lists}", lists)
        return function

    return show


def _kinds(name: str) -> tuple[Any, ...]:
    return get_args(FIELDS[name].type) or (FIELDS[name].type,)
