"""The GPU program of LLaDA-MoE-7B's decode, compiled without a GPU: what it is, and what its bytes allow.

    pip install --no-deps jax-cuda12-plugin==VERSION jax-cuda12-pjrt==VERSION     # VERSION: that of jaxlib
    djax bench compile --target h100 --devices 8

XLA's whole GPU pipeline runs, partitioning, fusion, scheduling and buffer assignment, for a described device. What only a GPU
can show is not here: run time, autotuning, CUDA graphs. The roofline is the time its bytes or FLOPs need at the device's peak.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from djax.benchmarks import hlo
from djax.benchmarks.circumstances import circumstances
from djax.benchmarks.report import put, write_lines
from djax.errors import OptionError
from djax.kernels.choice import read_choice, restrict_to_portable

# LLaDA-MoE-7B-A1B: the values of its config.json.
LLADA_MOE_7B = {
    "vocab_size": 157184,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "expert_intermediate_size": 1024,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "rope_theta": 50000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A device that can be compiled for: XLA's description of it, and its peaks."""

    description: str
    bytes_per_second: float
    flops_per_second: float


TARGETS = {"h100": Target("h100.txtpb", 3.35e12, 989e12)}
# dInfer on 8 H800 (arXiv 2510.08666): tokens per forward, tokens per second.
DINFER = ((3.87, 681), (5.67, 847))


def measure(
    target: str,
    devices: int,
    *,
    smoothing: bool = False,
    quantize: str | None = None,
    hf: dict[str, Any] | None = None,
    canvas: int = 1280,
    block: int = 64,
) -> dict[str, Any]:
    """Compile the decode (batch 1, bf16, credit over a threshold, vicinity 16/16) and say what the program is.

    Raises `OptionError` for an unknown target, for devices the model does not divide among, and where XLA's GPU compiler is
    not installed.
    """
    import djax
    from djax.models import llada_moe

    if target not in TARGETS:
        raise OptionError(f"--target: unknown {target!r}; there are: {', '.join(TARGETS)}")
    config = llada_moe.Config.from_hf(
        hf or LLADA_MOE_7B, mask_id=156895 if hf is None else 1, eos_id=156892 if hf is None else 0
    )
    mesh = djax.mesh(model=devices, devices=_devices(target, devices))
    smooth = djax.Smoothing() if smoothing else None
    plugs = djax.Credit(djax.Threshold(0.8)), djax.Vicinity(16, 16), smooth
    began = time.perf_counter()
    lowered = _lower(llada_moe.FAMILY, config, mesh, plugs, quantize, canvas, block)
    made = lowered.compile()
    seconds = time.perf_counter() - began
    program, memory = hlo.Program(made.as_text()), made.memory_analysis()
    (decode,) = program.loops(program.entry)
    refresh, window = program.loops(decode)
    unsplit = _unsplit(lowered)
    kernels, collectives = program.kernels(window), program.collectives(window)
    by_layer = [sum(program.layer(k) == n for k in kernels) for n in range(config.layers)]
    all_reduces = [sum(program.layer(c) == n for c in collectives) for n in range(config.layers)]
    moved, flops = sum(program.bytes(window, k) for k in kernels), program.flops(window)
    least = _least(config, devices, canvas, block, smoothing, quantize)

    def largest(*loops: str) -> int:
        return max((hlo.size(k.shape) for loop in loops for k in program.copies(loop)), default=0)

    def listed(kernels: list[hlo.Instruction]) -> list[str]:
        last = [k for k in kernels if program.layer(k) == config.layers - 1]
        return [f"{k.op} {_brief(k.shape)} {_tail(k.source)}" for k in last]

    seconds_per_step = max(moved / TARGETS[target].bytes_per_second, flops / TARGETS[target].flops_per_second)
    return {
        "target": target,
        "devices": devices,
        "smoothing": smoothing,
        "quantize": quantize,
        "model": f"{config.layers} layers, width {config.width}, {config.experts} experts, vocabulary {config.vocab}",
        "canvas": canvas,
        "block": block,
        "jaxlib": jax.lib.__version__,
        "compile_seconds": round(seconds, 1),
        "executables": program.entries,
        "loops_in_entry": len(program.loops(program.entry)),
        "host_transfers": len(program.host_transfers()),
        "collectives_per_layer": sorted(set(all_reduces)),
        "collectives_besides": [
            f"{c.op.removesuffix('-start')} {_brief(c.shape)}" for c in collectives if program.layer(c) is None
        ],
        "collective_bytes": sum(hlo.size(c.shape) for c in collectives),
        "kernels_per_layer": by_layer,
        "kernels_per_step": len(kernels),
        "kernels_of_a_layer": listed(kernels),
        "kernels_of_a_refreshed_layer": listed(program.kernels(refresh)),
        "bytes_per_step": moved,
        "least_bytes": least,
        "bytes_over_least": round(moved / least, 3),
        "unsplit_kernels_per_step": len(unsplit),
        "unsplit_bytes_per_step": sum(unsplit),
        "unsplit_bytes_over_least": round(sum(unsplit) / least, 3),
        "flops_per_step": flops,
        "largest_copy_in_step": largest(decode, *program.within(window)),
        "largest_copy_in_refresh": largest(*program.within(refresh)),
        "peak_bytes": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        "roofline_ms_per_step": round(1e3 * seconds_per_step, 3),
        "roofline_tokens_per_second": {str(tpf): round(tpf / seconds_per_step) for tpf, _ in DINFER},
    }


def _devices(target: str, count: int) -> list[Any]:
    from jax.experimental import topologies

    description = (Path(__file__).parent / "targets" / TARGETS[target].description).read_text("utf-8")
    try:
        return list(topologies.get_topology_desc("", "cuda", target_config=description, topology=f"1x1x{count}").devices)
    except Exception as error:  # a plugin that is not there raises whatever it likes
        raise OptionError(
            "djax bench compile: XLA's GPU compiler is not installed; pip install --no-deps "
            f"jax-cuda12-plugin=={jax.lib.__version__} jax-cuda12-pjrt=={jax.lib.__version__} ({error})"
        ) from error


def _lower(family: Any, config: Any, mesh: Any, plugs: tuple, quantize: str | None, canvas: int, block: int) -> Any:
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from djax.checkpoints.checkpoint import abstract
    from djax.engine.carry import Request, Spec
    from djax.engine.loop import decode
    from djax.pytree import classes

    everywhere = NamedSharding(mesh, P())

    def value(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    kinds = dict.fromkeys(Request._fields, jnp.int32)
    kinds |= dict(seed=jnp.uint32, temperature=jnp.float32, top_p=jnp.float32, early_stop=jnp.bool_)
    fields: dict[str, Any] = {name: value((1,), kind) for name, kind in kinds.items()}
    fields["tokens"] = value((1, canvas), jnp.int32)
    fields["numbers"] = tuple(value((1,), np.int32 if isinstance(x, int) else np.float32) for x in jax.tree.leaves(plugs))
    ask = Request(**fields)
    spec = Spec(family, config, block, False, False, jax.tree.structure(plugs), tuple(map(classes, plugs)))
    # As a process with GPUs traces it, which has no functions for a CPU to choose from.
    spec = dataclasses.replace(spec, kernels=restrict_to_portable(read_choice()))
    program = partial(decode, spec=spec)
    params = abstract(family, config, jnp.bfloat16, mesh, quantize)
    with jax.set_mesh(mesh):
        return jax.jit(program).lower(params, ask)


def _unsplit(lowered: Any) -> list[int]:
    """The bytes of each kernel of a window step if no product's sum is split into parts that are written and added after.

    XLA splits those with few outputs so that all of a GPU has work; how far it would learn by trying, but here there is no GPU
    to try on, and it guesses.
    """
    program = hlo.Program(lowered.compile({"xla_gpu_experimental_force_split_k": "1"}).as_text())
    (decode,) = program.loops(program.entry)
    _, window = program.loops(decode)
    return [program.bytes(window, kernel) for kernel in program.kernels(window)]


def _least(config: Any, devices: int, canvas: int, block: int, smoothing: bool, quantize: str | None) -> int:
    """Bytes one device cannot do without in a window step: its weights, its part of the cache, and the logits, once each."""
    c, width = config, 2
    attention = c.width * c.head_dim * (2 * c.heads + 2 * c.groups)
    experts = 3 * c.experts * c.width * c.expert_width
    matrices = c.layers * (attention + experts) // devices
    vocabulary = c.width * c.vocab * (2 if smoothing else 1) // devices
    whole = c.layers * (c.width * c.experts + 2 * c.width + 2 * c.head_dim) + c.width
    cache = c.layers * 2 * canvas * c.groups * c.head_dim
    held = matrices if quantize else width * matrices
    return held + width * (vocabulary + whole + cache // devices) + 4 * block * c.vocab // devices


def _brief(shape: str) -> str:
    return shape.split("{")[0].replace("((", "(")


def _tail(source: str) -> str:
    return "/".join(source.split("/")[-2:])


def run(target: str, devices: list[int], out: Path, readme: Path | None, note: Callable[[str], None]) -> str:
    """Compile for each number of devices, plain, with smoothing, and int8; compile.jsonl, the README's part, and the table."""
    now, lines = circumstances(), []
    for count in devices:
        for variant in ({}, {"smoothing": True}, {"quantize": "int8"}):
            line = measure(target, count, **variant)
            lines.append(line | now)
            note(
                f"{_head(line)}: {line['kernels_per_step']} kernels, {line['bytes_over_least']} times the least bytes, "
                f"compiled in {line['compile_seconds']} s"
            )
    write_lines(out / "compile.jsonl", lines)
    text = table(lines)
    put(readme, "compile", text)
    return text


def _head(x: dict[str, Any]) -> str:
    return f"{x['devices']} x {x['target']}{', smoothing' if x['smoothing'] else ''}{', int8' if x['quantize'] else ''}"


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a column a program."""
    heads = [_head(x) for x in lines]
    rows: dict[str, Callable[[dict[str, Any]], object]] = {
        "executables, loops in the entry, host transfers": lambda x: (
            f"{x['executables']}, {x['loops_in_entry']}, {x['host_transfers']}"
        ),
        "collectives a layer": lambda x: ", ".join(map(str, x["collectives_per_layer"])),
        "collectives a step besides": lambda x: len(x["collectives_besides"]),
        "bytes of collectives a step": lambda x: f"{x['collective_bytes'] / 1e6:.2f} MB",
        "kernels a layer (in the first also what all share), a step": lambda x: (
            f"{min(x['kernels_per_layer'])} to {max(x['kernels_per_layer'][1:])} ({x['kernels_per_layer'][0]}), "
            f"{x['kernels_per_step']}"
        ),
        "bytes a step and GPU": lambda x: f"{x['bytes_per_step'] / 1e9:.3f} GB",
        "of which cannot be less": lambda x: f"{x['least_bytes'] / 1e9:.3f} GB ({x['bytes_over_least']} times)",
        "the same, no sum split: kernels, bytes": lambda x: (
            f"{x['unsplit_kernels_per_step']}, {x['unsplit_bytes_per_step'] / 1e9:.3f} GB "
            f"({x['unsplit_bytes_over_least']} times)"
        ),
        "FLOPs of XLA's own products a step and GPU": lambda x: f"{x['flops_per_step'] / 1e12:.3f} TFLOP",
        "largest copy in a step, in a refresh": lambda x: (
            f"{x['largest_copy_in_step'] / 1e6:.3f} MB, {x['largest_copy_in_refresh'] / 1e6:.2f} MB"
        ),
        "peak memory a GPU": lambda x: f"{x['peak_bytes'] / 1e9:.2f} GB",
        "roofline of a window step": lambda x: f"{x['roofline_ms_per_step']} ms",
        **{
            f"roofline tokens/s at {tpf} tokens/forward (dInfer measured {rate} on 8 H800)": partial(
                lambda x, tpf: x["roofline_tokens_per_second"][tpf], tpf=str(tpf)
            )
            for tpf, rate in DINFER
        },
        "compile": lambda x: f"{x['compile_seconds']} s",
    }
    text = [f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(lines)]
    text += [f"| {name} | {' | '.join(str(value(x)) for x in lines)} |" for name, value in rows.items()]
    x = lines[0]
    text += [
        "",
        f"LLaDA-MoE-7B's shape ({x['model']}), canvas {x['canvas']}, block {x['block']}, vicinity 16/16, credit, bf16 "
        f"(int8: matrices of attention and experts), batch 1; XLA of jaxlib {x['jaxlib']}, djax commit {x['commit']}; "
        f"`{x['command']}`.",
    ]
    return "\n".join(text)
