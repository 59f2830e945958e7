"""What a decode would do, before anything compiles: what is legal, which forwards of which size, what stays in memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from djax.checks import show, type_name
from djax.decoding.contract import Tick
from djax.engine.carry import Request
from djax.engine.frame import frame_windows
from djax.engine.generate import ask
from djax.engine.options import show_options
from djax.engine.request import Asked, carried_bytes, refuse_lists
from djax.errors import OptionError
from djax.kernels.dispatch import foresee_site
from djax.models.model import Model
from djax.runtime.process import with_own_settings


@dataclasses.dataclass(frozen=True)
class Forward:
    """One forward of one row. whole: it runs the whole canvas, or what there is of it for a block-causal family, not a window.
    refresh: its keys and values are kept. append: it runs the block before, too, and that one's are appended."""

    whole: bool
    refresh: bool
    positions: int
    append: bool = False


@dataclasses.dataclass(frozen=True)
class Block:
    """Canvas positions [start, end), how many of them are masks, and the forwards at the two ends of any decoder."""

    start: int
    end: int
    masks: int
    slowest: tuple[Forward, ...]
    fastest: tuple[Forward, ...]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The decode of one prompt. facts: name and value, in the order they are printed. str() is the printed page.

    Law: with `early_stop=False` the program runs exactly a block's `slowest` forwards where each accepts one token, and its
    `fastest` where each accepts everything. A decoder that edits replaces a token at every post-step of the slowest, and at
    none of the fastest, whose last forward only finds that nothing changes. A decoder with drafts takes no more forwards than
    the slowest, and a forward runs as many times the positions as it reads drafts.
    """

    facts: dict[str, str]
    blocks: tuple[Block, ...]

    def __str__(self) -> str:
        width = max(map(len, self.facts))
        lines = [f"{name:{width}}  {value}" for name, value in self.facts.items()]
        rows = [("block", "positions", "masks", "one token a forward", "everything at once")]
        rows += [
            (str(i), f"[{b.start}, {b.end})", str(b.masks), _counted(b.slowest), _counted(b.fastest))
            for i, b in enumerate(self.blocks)
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, "", *table])


@with_own_settings
@show_options()
def explain(model: Model, prompts: object, **options: object) -> Explanation | list[Explanation]:
    """What `djax.generate(model, prompts, **options)` would do, one `Explanation` a prompt. Compiles and runs no model.

    Takes the same options and raises the same errors.
    """
    refuse_lists(options, "one for all prompts; explain one prompt at a time")
    asked = ask(model, prompts, options, "explain")
    out = [
        Explanation(_facts(model, asked, group, b), _blocks(model, asked, group, b))
        for group in asked.asks
        for b in range(len(group.prompt))
        if group.total[b]
    ]
    return out[0] if asked.single else out


def _facts(model: Model, asked: Asked, ask: Request[np.ndarray], b: int) -> dict[str, str]:
    decoder, policy, smoothing = asked.plugs
    rows, length = ask.tokens.shape
    frame = frame_windows(policy, model.family, asked.block(ask), length)
    after = min(policy.reach()[1], length)
    behind = "all that follows" if after == length else f"{after} positions"
    window = f"{frame.left} + {asked.block(ask)} + {behind}"
    carried = carried_bytes(model, ask, asked.plugs, asked.block(ask))
    prompt, total = int(ask.prompt[b]), int(ask.total[b])
    has = {True: "yes", False: "no"}
    return {
        "model": repr(model),
        "legal": f"cache: {has[model.family.caches]}; smoothing: "
        f"{has[model.family.smooths]}; gen_length: up to {model.config.max_positions - prompt} after "
        f"this prompt; before and after of a cache's window: up to {total}",
        "decoder": show(decoder)
        + (" (draws from the seed)" if decoder.draws else "")
        + (f" (reads up to {decoder.drafts} drafts a forward, each as wide as is listed)" if decoder.drafts else "")
        + (f" (edits: up to {decoder.post_steps} more forwards a block)" if decoder.edits else ""),
        "cache": f"{show(policy)}, windows of {window}" if policy.keeps else "None",
        "smoothing": show(smoothing),
        "canvas": f"{prompt} of the prompt + {total - prompt} = {total} positions, in a program for {rows} rows of {length}",
        "free to change": f"prompts and lengths up to {length} positions together, seeds, early_stop, {_leaves(asked)}",
        "compiles anew": "what is not listed above: another number of rows, block_length, kind of plug or static number",
        **_back_ends(model, asked),
        "memory": f"parameters {_size(model.parameter_bytes)}, " + ", ".join(f"{n} {_size(s)}" for n, s in carried.items()),
    }


def _back_ends(model: Model, asked: Asked) -> dict[str, str]:
    site, held = foresee_site(asked.kernels, model.mesh), jnp.dtype(model.quantized or model.dtype)
    forms = model.family.back_ends(model.config, site, model.dtype, held)
    return {layer: f"{form} (on {site.host})" for layer, form in forms.items()}


def _leaves(asked: Asked) -> str:
    """The numbers of the plugs that are traced."""
    paths, _ = jax.tree_util.tree_flatten_with_path(dict(zip(("decoder", "cache", "smoothing"), asked.plugs, strict=True)))
    named = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    return ", ".join(named) or "and no number of the plugs"


def _blocks(model: Model, asked: Asked, ask: Request[np.ndarray], b: int) -> tuple[Block, ...]:
    slowest, fastest = (_schedule(model, asked, ask, b, pace) for pace in (1, asked.block_length))
    prompt, total, start, block = int(ask.prompt[b]), int(ask.total[b]), int(ask.start[b]), asked.block(ask)
    starts = range(start, total, block)
    ends = [min(s + block, total) for s in starts]
    return tuple(
        Block(s, e, e - max(s, prompt), tuple(slow), tuple(fast))
        for s, e, slow, fast in zip(starts, ends, slowest, fastest, strict=True)
    )


def _schedule(model: Model, asked: Asked, ask: Request[np.ndarray], b: int, pace: int) -> list[list[Forward]]:
    """The forwards of each block if each accepts `pace` tokens: the turns of the program, for one row, without a model."""
    decoder, policy, smoothing = asked.plugs
    most = decoder.post_steps if pace == 1 else min(1, decoder.post_steps)
    prompt, total, start, block = int(ask.prompt[b]), int(ask.total[b]), int(ask.start[b]), asked.block(ask)
    frame = frame_windows(policy, model.family, block, ask.tokens.shape[1])
    sees_all = model.family.visibility == "all"
    turns = forwards = index = final = 0
    cached = -1
    out = []
    for index, s in enumerate(range(start, total, block)):
        end = min(s + block, total)
        masks, post = end - max(s, prompt), 0
        mine: list[Forward] = []
        while masks > 0 or post < most:
            plan = policy.plan(_tick(turns if smoothing is None else forwards, forwards, index, len(mine)), jnp.int32(cached))
            full, refresh, window, append = map(bool, plan)
            if not (full or window or append):
                where = f"turn {turns}, block {index}"
                raise OptionError(f"cache: expected a forward in every turn, {type_name(policy)} asks for none in {where}")
            if full:
                mine.append(Forward(True, refresh, total if sees_all else end - frame.unread))
                final = end - masks
            if append:
                mine.append(Forward(False, False, end - (s - block), append=True))
            if window:
                left = final if policy.commits else s - frame.left
                right = left + frame.width if sees_all else end - frame.unread
                mine.append(Forward(False, False, min(right, total) - max(left, 0)))
                final = min(right, end - max(masks - (pace if full else 0), 0))
            cached = index if refresh or append else cached
            for _ in range(full + window + append):
                masks, post = masks - pace, post + (masks <= 0)
            forwards, turns = forwards + full + window + append, turns + 1
        out.append(mine)
    return out


def _tick(iteration: int, forward: int, block: int, call: int) -> Tick:
    return Tick(*map(jnp.int32, (iteration, forward, block, call)))


def _counted(forwards: tuple[Forward, ...]) -> str:
    """`1 refresh of 198, 31 windows of 64`."""
    kinds: dict[tuple[str, int], int] = {}
    for f in forwards:
        kind = "refresh" if f.refresh else "whole canvas" if f.whole else "append" if f.append else "window"
        kinds[kind, f.positions] = kinds.get((kind, f.positions), 0) + 1
    many = {"refresh": "refreshes", "window": "windows", "whole canvas": "whole canvases", "append": "appends"}
    return ", ".join(f"{n} {many[kind] if n > 1 else kind} of {positions}" for (kind, positions), n in kinds.items())


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"
