"""How fast a decode is on this machine: window steps, refreshes, whole answers; against PyTorch, against what one program and
caching replace, against the machine's limits, and as sizes grow.

    djax bench speed --out benchmarks/results --readme README.md

Everything that is compared is measured in turns in one process, and medians are reported.
"""

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import djax
from djax.benchmarks import midsize
from djax.benchmarks.circumstances import circumstances
from djax.benchmarks.report import put, read_lines, write_lines
from djax.errors import OptionError
from djax.kernels.choice import ENVIRONMENT

PROMPT, GENERATED, BLOCK, BEFORE, AFTER = 64, 256, 32, 16, 16
PEERS = tuple(
    (dtype, experts, compiled)
    for dtype in ("float32", "bfloat16")
    for experts, compiled in (("eager", False), ("grouped_mm", False), ("grouped_mm", True))
)
NO_PEER = "PyTorch is not installed, so it is not compared: pip install torch==2.13.0"


def decode(model: Any, prompt: list[int] | list[list[int]], per_step: int, **options: Any) -> Any:
    """One answer in a known number of forwards. It fills its canvas: random weights end no text."""
    defaults = {"gen_length": GENERATED, "block_length": BLOCK, "cache": djax.Vicinity(BEFORE, AFTER, warmup=0)}
    return djax.generate(model, prompt, decoder=djax.Fixed(per_step), early_stop=False, **(defaults | options))


def step_seconds(model: Any, prompt: list[int], **options: Any) -> tuple[float, float]:
    """Seconds of a window step and of a refresh: of a decode that takes a block at once, so few window steps, and of one that
    takes those that everybody else takes."""
    return apart(*(decode(model, prompt, n, **options) for n in (BLOCK, 4)))


def apart(few: Any, many: Any) -> tuple[float, float]:
    """Seconds of a window step and of a refresh, of two decodes with as many refreshes and unlike window steps."""
    windows = [out.forwards - out.refreshes for out in (few, many)]
    window = (many.timing.decode - few.timing.decode) / (windows[1] - windows[0])
    return window, (few.timing.decode - windows[0] * window) / few.refreshes


def without_kernels(run: Callable[[], Any]) -> Any:
    """run(), its programs made of XLA's own operations."""
    with mock.patch.dict(os.environ, {ENVIRONMENT: "xla"}):
        return run()


def in_turns(contenders: Mapping[str, Callable[[], Any]], repeats: int, note: Callable[[str], None]) -> dict[str, list[Any]]:
    """Each contender's results, measured one after another `repeats` times; a first round, which compiles, is thrown away."""
    out: dict[str, list[Any]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            began = time.perf_counter()
            result = run()
            note(f"{name}: {'first' if not turn else f'{turn} of {repeats}'}, {time.perf_counter() - began:.1f} s")
            if turn:
                out[name].append(result)
    return out


def peers(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """The PyTorch contenders by name; none where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        return {}
    from djax.benchmarks.peer import Peer

    def name(dtype: str, experts: str, compiled: bool) -> str:
        return f"PyTorch {dtype}, {'torch.compile' if compiled else 'eager'}, {experts} experts"

    return {name(*form): Peer(midsize.HF, tensors, midsize.MASK, *form) for form in PEERS}


def windows(repeats: int, note: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Window step and refresh: djax, PyTorch, and djax's own functions driven from Python."""
    model = midsize.model()
    prompt = [int(t) for t in np.random.default_rng(0).integers(0, 31000, PROMPT)]
    canvas = np.array(prompt + [midsize.MASK] * GENERATED)
    narrow = midsize.model("bfloat16")
    contenders: dict[str, Callable[[], Any]] = {
        "djax float32": partial(step_seconds, model, prompt),
        "djax bfloat16": partial(step_seconds, narrow, prompt),
        "djax float32, smoothing": partial(step_seconds, model, prompt, smoothing=djax.Smoothing()),
        "djax float32, Python loop": partial(python_loop, model, canvas),
        "djax float32, XLA's operations alone": partial(without_kernels, partial(step_seconds, model, prompt)),
    }
    there = peers(midsize.tensors(model))
    if not there:
        note(NO_PEER)
    expected = decode(model, prompt, 4).canvas

    def run(peer: Any) -> tuple[float, float]:
        out = peer.decode(canvas, PROMPT, BLOCK, BEFORE, AFTER, 4)
        same[peer] = float(np.mean(out.tokens[PROMPT:] == expected[PROMPT:]))
        # Means, since a step of one program is known as a part of the whole's time alone: what is slow now and then counts for
        # both sides.
        return statistics.fmean(out.windows), statistics.fmean(out.refreshes)

    same: dict[Any, float] = {}
    contenders |= {name: partial(run, peer) for name, peer in there.items()}
    # Measured in turns, too, and the best taken: of a machine that others share a single look may say anything.
    all_times = in_turns({"the machine": machine} | contenders, repeats, note)
    reached = all_times.pop("the machine")
    limits = {name: max(r[name] for r in reached) for name in reached[0]}
    for name, times in all_times.items():
        window, refresh = (statistics.median(t[i] for t in times) for i in range(2))
        line = {"of": "window", "name": name, "window": window, "refresh": refresh, "repeats": repeats}
        if name in there:
            line["tokens_equal"] = same[there[name]]
        if name == "djax float32":
            flops, moved = work(PROMPT + GENERATED)
            least = max(flops / limits["flops_per_second"], moved / limits["bytes_per_second"])
            line |= limits | {"flops": flops, "bytes": moved, "least_seconds": least, "of_roofline": least / window}
        yield line


def python_loop(model: Any, canvas: np.ndarray) -> tuple[float, float, np.ndarray]:
    """The same network and decoder, jitted a step at a time and driven by a Python loop that looks at the tokens after each."""
    tokens = jnp.asarray(canvas, jnp.int32)[None]
    times: tuple[list[float], list[float]] = ([], [])
    end = tokens.shape[1]
    cache: Any = None
    for start in range(PROMPT, end, BLOCK):
        fresh = True
        while bool((tokens[0, start : start + BLOCK] == midsize.MASK).any()):
            began = time.perf_counter()
            left = 0 if fresh else start - BEFORE
            width = end if fresh else BEFORE + BLOCK + AFTER
            seen = None if fresh else cache
            tokens, kept = _step(model.params, tokens, seen, left, start, width=width, model=_Static(model))
            jax.block_until_ready(tokens)
            cache = kept if fresh else cache
            times[fresh].append(time.perf_counter() - began)
            fresh = False
    return statistics.fmean(times[False]), statistics.fmean(times[True]), np.asarray(tokens[0])


class _Static:
    """A model's family and config as a static argument."""

    def __init__(self, model: Any) -> None:
        self.family, self.config = model.family, model.config

    def __hash__(self) -> int:
        return hash(self.config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.config == other.config


@partial(jax.jit, static_argnames=("width", "model"))
def _step(
    params: Any, tokens: jax.Array, kept: Any, left: jax.Array, start: jax.Array, *, width: int, model: _Static
) -> tuple[jax.Array, Any]:
    from djax.decoding.contract import Look, Tick
    from djax.models.layers import Cache
    from djax.models.sight import rank_keys, see

    family, config = model.family, model.config
    length = tokens.shape[1]
    everywhere, zero = jnp.arange(length)[None], jnp.int32(0)
    at = left + jnp.arange(width)[None]
    here = jnp.take_along_axis(tokens, jnp.clip(at, 0, length - 1), axis=1)
    cache = kept and Cache(kept, rank_keys("all", everywhere, (everywhere < left) | (everywhere >= left + width), BLOCK))
    x, fresh = family.trunk(params, config, family.embed(params, config, here), at, see("all", at, at < length, BLOCK), cache)
    x = jax.lax.dynamic_slice_in_dim(x, start - left, BLOCK, axis=1)
    block = jax.lax.dynamic_slice_in_dim(tokens, start, BLOCK, axis=1)
    tick = Tick(zero, zero, zero, zero)
    logits = family.unembed(params, config, x)
    none, open_ = jnp.float32(-jnp.inf), jnp.ones(BLOCK, bool)
    look = Look(logits[0], block[0], open_, left + jnp.arange(BLOCK), tick, jnp.int32(config.mask_id), none, none, None)
    _, verdict = djax.Fixed(4).step((), look)
    return jax.lax.dynamic_update_slice_in_dim(tokens, verdict.tokens[None], start, axis=1), fresh


def machine() -> dict[str, float]:
    """What this machine reaches: float32 FLOP/s of a 2048 x 2048 product, and bytes/s of a copy, read and written."""

    def best(f: Callable[..., jax.Array], *a: jax.Array) -> float:
        f, times = jax.jit(f), []
        for _ in range(8):
            began = time.perf_counter()
            jax.block_until_ready(f(*a))
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    square, long = jnp.ones((2048, 2048)), jnp.ones(50_000_000)
    product = best(lambda a, b: jnp.dot(a, b, precision="highest"), square, square)
    copy = best(lambda a: a + 1, long)
    return {"flops_per_second": 2 * 2048**3 / product, "bytes_per_second": 2 * long.nbytes / copy}


def work(canvas: int) -> tuple[float, float]:
    """FLOPs and bytes a window step of the mid-size model cannot do without: its products over the chosen experts, and all
    weights, the cache and the logits once."""
    hf, window = midsize.HF, BEFORE + BLOCK + AFTER
    width, layers, vocab = hf["hidden_size"], hf["num_hidden_layers"], hf["vocab_size"]
    expert = 3 * width * hf["expert_intermediate_size"]
    a_token = 4 * width * width + hf["num_experts_per_tok"] * expert + width * hf["num_experts"]
    attend = 2 * (canvas) * width
    flops = 2 * (layers * window * (a_token + attend) + BLOCK * width * vocab)
    weights = layers * (4 * width * width + hf["num_experts"] * (expert + width)) + width * vocab
    return flops, 4 * (weights + layers * 2 * canvas * width + BLOCK * vocab)


def answers(repeats: int, note: Callable[[str], None], each: int = 2) -> Iterator[dict[str, Any]]:
    """Tokens a second, end to end on real prompts at equal forwards: djax with and without its cache, and PyTorch."""
    model, ids = midsize.model(), midsize.prompts()
    there = peers(midsize.tensors(model))
    if not there:
        note(NO_PEER)
    for source, all_prompts in ids.items():
        some = [p for p in all_prompts if len(p) < 200][:each]

        def ours(some: list[list[int]] = some, **options: Any) -> tuple[float, int]:
            outs = [decode(model, p, 4, gen_length=128, align_blocks=True, **options) for p in some]
            return sum(o.timing.decode for o in outs), sum(o.forwards for o in outs)

        def theirs(peer: Any, some: list[list[int]] = some) -> tuple[float, int]:
            runs = [peer.decode(np.array(p + [midsize.MASK] * 128), len(p), BLOCK, BEFORE, AFTER, 4) for p in some]
            return sum(r.seconds for r in runs), sum(len(r.windows) + len(r.refreshes) for r in runs)

        contenders: dict[str, Callable[[], Any]] = {"djax float32": ours}
        contenders["djax float32, no cache: the whole canvas at every forward"] = partial(ours, cache=None)
        contenders |= {name: partial(theirs, peer) for name, peer in there.items()}
        for name, got in in_turns(contenders, repeats, note).items():
            seconds = statistics.median(g[0] for g in got)
            line = {"of": "answers", "name": name, "prompts": source, "count": len(some), "tokens": 128 * len(some)}
            yield line | {"forwards": got[0][1], "tokens_per_second": line["tokens"] / seconds, "repeats": repeats}


def growth(repeats: int, note: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """A window step, and one forward of the whole canvas, as canvas, batch and block grow."""
    model = midsize.model()

    def measure(canvas: int, batch: int, block: int) -> tuple[float, float]:
        prompt: list[int] = [int(t) for t in np.random.default_rng(0).integers(0, 31000, canvas - 2 * block)]
        paces = block, max(1, block // 32)  # a block at once, and in up to 32 forwards
        window, refresh = apart(
            *(decode(model, [prompt] * batch, n, gen_length=2 * block, block_length=block)[0] for n in paces)
        )
        return window, refresh / batch

    axes = {
        "canvas": [(n, 1, 32) for n in (256, 512, 1024, 2048, 4096)],
        "batch": [(256, n, 32) for n in (1, 4, 16)],
        "block": [(512, 1, n) for n in (16, 32, 64, 128)],
    }
    for axis, sizes in axes.items():
        contenders = {f"{axis}: canvas {c}, batch {b}, block {s}": partial(measure, c, b, s) for c, b, s in sizes}
        for (c, b, s), (_, times) in zip(sizes, in_turns(contenders, repeats, note).items(), strict=True):
            window, refresh = (statistics.median(t[i] for t in times) for i in range(2))
            line = {"of": "growth", "axis": axis, "canvas": c, "batch": b, "block": s}
            yield line | {"window": window, "refresh_of_a_row": refresh, "repeats": repeats}


def experts(repeats: int, note: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """One expert layer of the mid-size model by back end and tokens, even routing and lopsided, beside products that are
    grouped perfectly: as many rows an expert as the mean, already in place, in one product of XLA's for all of them."""
    from djax.kernels import dispatch, experts_cpu
    from djax.kernels import experts as back_ends
    from djax.kernels.plain import gated
    from djax.models import moe

    width, count, top = midsize.HF["hidden_size"], midsize.HF["num_experts"], midsize.HF["num_experts_per_tok"]
    keys = jax.random.split(jax.random.key(0), 4)
    w_in = jax.random.normal(keys[0], (count, width, 2 * midsize.HF["expert_intermediate_size"])) * width**-0.5
    w_out = jax.random.normal(keys[1], (count, midsize.HF["expert_intermediate_size"], width)) * width**-0.5

    def layer(form: Callable[..., Any], x: jax.Array, routing: Any) -> Callable[[], float]:
        program = jax.jit(form).lower(x, routing, w_in, w_out, jnp.ones(len(x), bool)).compile()
        return lambda: timed(lambda: program(x, routing, w_in, w_out, jnp.ones(len(x), bool)))

    def timed(run: Callable[[], Any]) -> float:
        began = time.perf_counter()
        for _ in range(5):
            jax.block_until_ready(run())
        return (time.perf_counter() - began) / 5

    def perfectly(x: jax.Array) -> Callable[[], float]:
        rows = jnp.broadcast_to(x[: len(x) * top // count], (count, len(x) * top // count, width))
        program = jax.jit(
            lambda rows, w_in, w_out: jnp.einsum("ecf,efd->ecd", gated(jnp.einsum("ecd,edf->ecf", rows, w_in)), w_out)
        )
        return lambda: timed(lambda: program(rows, w_in, w_out))

    for tokens in (16, 64, 320, 1024):
        x = jax.random.normal(keys[2], (tokens, width))
        even = jax.random.normal(keys[3], (width, count)) * width**-0.5
        alike = x.at[: tokens * 7 // 8].set(x[0])  # most masks of a canvas are alike, and go to the same experts
        routed, routed_alike = (moe.route(some, even, top, renormalise=False) for some in (x, alike))
        contenders = {"tiles": layer(back_ends.grouped, x, routed), "dense": layer(back_ends.dense, x, routed)}
        contenders["tiles, 7 of 8 tokens alike"] = layer(back_ends.grouped, alike, routed_alike)
        case = dispatch.Experts(tokens, w_in.shape, x.dtype, w_in.dtype)
        choice = dispatch.choose(case, "cpu", dispatch.foresee_site("djax", None))
        if choice.back_end.name == "C++":
            cpu = partial(back_ends.grouped, summed=experts_cpu.summed)
            contenders["C++"], contenders["C++, 7 of 8 tokens alike"] = layer(cpu, x, routed), layer(cpu, alike, routed_alike)
        else:
            note(f"djax's own C++ is not compared: {choice.refused[0][1]}")
        contenders["perfectly grouped"] = perfectly(x)
        for name, times in in_turns(contenders, repeats, lambda _: None).items():
            note(f"experts, {tokens} tokens, {name}: {1e3 * statistics.median(times):.2f} ms")
            yield {"of": "experts", "tokens": tokens, "name": name, "seconds": statistics.median(times), "repeats": repeats}


def start(repeats: int, note: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Seconds of `import djax`, and of `djax generate` on the small model with an empty compile cache and with a filled one."""
    question = "Ben has 20 coins. He finds 3 boxes with 6 coins each. He loses 9. How many coins does Ben have now?"

    def timed(*command: str, cache: str) -> float:
        began = time.perf_counter()
        done = subprocess.run([sys.executable, *command], env=os.environ | {"DJAX_COMPILE_CACHE": cache}, capture_output=True)
        if done.returncode:
            raise RuntimeError(done.stderr.decode())
        return time.perf_counter() - began

    generate = ("-m", "djax.cli", "generate", question)
    times: dict[str, list[float]] = {
        "import djax": [],
        "first answer, compiled": [],
        "first answer, from the compile cache": [],
    }
    for turn in range(repeats + 1):
        with tempfile.TemporaryDirectory() as cache:
            commands = (("-c", "import djax"), generate, generate)
            for (name, so_far), command in zip(times.items(), commands, strict=True):
                so_far.append(timed(*command, cache=cache))
                note(f"{name}: {so_far[-1]:.2f} s")
        if not turn:
            times = {name: [] for name in times}
    for name, so_far in times.items():
        yield {"of": "start", "name": name, "seconds": statistics.median(so_far), "repeats": repeats}


PARTS = {"windows": windows, "answers": answers, "growth": growth, "experts": experts, "start": start}


def run(parts: list[str], repeats: int, out: Path, readme: Path | None, note: Callable[[str], None]) -> str:
    """Measure the parts; speed.jsonl (the lines of other parts stay), the README's part, and the table."""
    unknown = [p for p in parts if p not in PARTS]
    if unknown:
        raise OptionError(f"--parts: unknown {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    file, now = out / "speed.jsonl", circumstances()
    for part in parts:
        lines = [line | now for line in PARTS[part](repeats, note)]
        kept = [x for x in read_lines(file) if x["of"] != lines[0]["of"]] if file.is_file() else []
        write_lines(file, kept + lines)
    text = table(read_lines(file))
    put(readme, "speed", text)
    return text


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown, a table a part."""
    text: list[str] = []
    for name, make in (
        ("window", _window_table),
        ("answers", _answers_table),
        ("growth", _growth_table),
        ("experts", _experts_table),
        ("start", _start_table),
    ):
        some = [x for x in lines if x["of"] == name]
        if some:
            x = some[0]
            said = f"{x['hardware']}, {x['threads']} threads, {x['allocator']} allocator, jax {x['jax']}, commit {x['commit']}"
            text += [*make(some), "", f"Medians of {x['repeats']}; {said}; `{x['command']}`.", ""]
    return "\n".join(text).strip()


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def _window_table(lines: list[dict[str, Any]]) -> list[str]:
    base = next(x for x in lines if x["name"] == "djax float32")
    text = ["| | window step | refresh | window step, of djax float32 |", "|---|---|---|---|"]
    for x in lines:
        ratio = f"{x['window'] / base['window']:.2f}"
        text.append(f"| {x['name']} | {_ms(x['window'])} | {_ms(x['refresh'])} | {ratio} |")
    equal = [x["tokens_equal"] for x in lines if "float32" in x["name"] and "tokens_equal" in x]
    said = f" PyTorch's float32 tokens equal djax's: {100 * min(equal):.1f}%." if equal else ""
    return [
        *text,
        "",
        f"Roofline: {base['flops'] / 1e9:.2f} GFLOP of a window step take {_ms(base['flops'] / base['flops_per_second'])} at "
        f"the {base['flops_per_second'] / 1e9:.0f} GFLOP/s of a large product, and {base['bytes'] / 1e6:.0f} MB "
        f"{_ms(base['bytes'] / base['bytes_per_second'])} at the {base['bytes_per_second'] / 1e9:.0f} GB/s of a copy: djax "
        f"is at {100 * base['of_roofline']:.0f}% of it.{said}",
    ]


def _answers_table(lines: list[dict[str, Any]]) -> list[str]:
    sources = list(dict.fromkeys(x["prompts"] for x in lines))
    text = [f"| tokens/s | {' | '.join(sources)} |", "|---|" + "---|" * len(sources)]
    for name in dict.fromkeys(x["name"] for x in lines):
        by = {x["prompts"]: f"{x['tokens_per_second']:.1f}" for x in lines if x["name"] == name}
        text.append(f"| {name} | {' | '.join(by[s] for s in sources)} |")
    return text


def _growth_table(lines: list[dict[str, Any]]) -> list[str]:
    text = ["| canvas | batch | block | window step | refresh of a row |", "|---|---|---|---|---|"]
    for x in lines:
        text.append(f"| {x['canvas']} | {x['batch']} | {x['block']} | {_ms(x['window'])} | {_ms(x['refresh_of_a_row'])} |")
    return text


def _experts_table(lines: list[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(x["name"] for x in lines))
    text = [f"| expert layer, tokens | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for tokens in dict.fromkeys(x["tokens"] for x in lines):
        by = {x["name"]: x["seconds"] for x in lines if x["tokens"] == tokens}
        text.append(f"| {tokens} | {' | '.join(f'{1e3 * by[name]:.2f} ms' for name in names)} |")
    return text


def _start_table(lines: list[dict[str, Any]]) -> list[str]:
    return ["| a new process | wall time |", "|---|---|", *(f"| {x['name']} | {x['seconds']:.2f} s |" for x in lines)]
