"""One model over one to eight devices: the same tokens on each mesh, what a device holds, and what the devices exchange.

    djax bench devices --out benchmarks/results --readme README.md

The devices are simulated where there are no others, by one CPU, so time says nothing here and is not measured.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import djax
from djax.benchmarks import hlo
from djax.benchmarks.circumstances import circumstances
from djax.benchmarks.report import put, write_lines
from djax.checkpoints.checkpoint import abstract
from djax.engine.generate import ask, compiled
from djax.models import FAMILIES, llada_moe
from djax.runtime import sharding

# What eight devices can divide, and little else: each combination is a program to compile for each mesh.
CONFIG = llada_moe.Config(
    vocab=48,
    width=16,
    layers=2,
    heads=8,
    groups=8,
    head_dim=8,
    expert_width=8,
    experts=8,
    top=2,
    renormalise=False,
    rope_theta=10000.0,
    eps=1e-5,
    max_positions=256,
    mask_id=47,
    eos_id=46,
)
MESHES = (dict(model=2), dict(model=4), dict(model=8), dict(model=2, data=4), dict(data=8))
DECODERS = (
    djax.Threshold(0.5),
    djax.Fixed(2),
    djax.Fixed(2, order="random"),
    djax.Credit(djax.Threshold(0.5)),
    djax.Hierarchy(0.6, 0.2),
    djax.Factor(2.0),
    djax.Entropy(1.0),
    djax.Edit(djax.Threshold(0.5), tau=0.4),
)
POLICIES = (None, djax.Prefix(), djax.Dual(every=3), djax.Vicinity(3, 5, warmup=2))
Combination = tuple[Any, Any, Any]
COMBINATIONS = [(d, c, s) for d in DECODERS for c in POLICIES for s in (None, djax.Smoothing())]


def tiny(config: Any = CONFIG) -> djax.Model:
    """Random weights, the head scaled up so that confidences are anywhere between 0 and 1. config: of any family."""
    family = next(family for family in FAMILIES.values() if isinstance(config, family.config_type))
    params = family.init(config, jax.random.key(0))
    return djax.Model(family, config, params | {"head": 4 * params["head"]}, None, {}, {})


def spread(model: djax.Model, mesh: jax.sharding.Mesh) -> djax.Model:
    """The model with its parameters where the mesh has them."""
    places = jax.tree.map(lambda a: a.sharding, abstract(model.family, model.config, np.float32, mesh))
    return dataclasses.replace(model, params=jax.device_put(model.params, places), mesh=mesh)


def measure(
    meshes: Sequence[dict[str, int]],
    combinations: Sequence[Combination],
    note: Callable[[str], None],
    config: Any = CONFIG,
) -> Iterator[dict[str, Any]]:
    """Decode five prompts by every combination of decoder, cache and smoothing, on one device and on each mesh.

    A line a mesh: how many combinations give every row the tokens, forwards and refreshes of one device, the names of those
    that do not, the parameters' bytes a device, and the collectives of a window step.
    """
    one = tiny(config)
    watched = djax.Credit(djax.Threshold(0.5)), djax.Block() if one.block_causal else djax.Vicinity(3, 5), None
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, config.eos_id, n).tolist() for n in (3, 17, 30, 9, 12)]

    def options(combination: Combination) -> dict[str, Any]:
        decoder, cache, smoothing = combination
        return dict(gen_length=24, block_length=8, decoder=decoder, cache=cache, smoothing=smoothing)

    def facts(model: djax.Model, combination: Combination) -> list[tuple]:
        answers = djax.generate(model, prompts, **options(combination))
        return [(out.canvas.tolist(), out.forwards, out.refreshes) for out in answers]

    expected = [facts(one, combination) for combination in combinations]
    for axes in meshes:
        many = spread(one, sharding.mesh(axes.get("model", 1), axes.get("data", 1)))
        parted = [c for c, e in zip(combinations, expected, strict=True) if facts(many, c) != e]
        line = {
            "data": axes.get("data", 1),
            "model": axes.get("model", 1),
            "combinations": len(combinations),
            "equal": len(combinations) - len(parted),
            "different": [repr(c) for c in parted],
            "bytes_per_device": many.bytes_per_device,
            "bytes": one.parameter_bytes,
            **_exchanged(many, prompts, options(watched)),
        }
        note(f"{axes}: equal in {line['equal']} of {line['combinations']} combinations")
        yield line


def _exchanged(model: djax.Model, prompts: list[list[int]], options: dict[str, Any]) -> dict[str, Any]:
    """The collectives of a window step, of each layer and besides."""
    asked = ask(model, prompts, options, "generate")
    program = hlo.Program(compiled(model, asked, asked.asks[0])[0].as_text())
    (decode,) = program.loops(program.entry)
    *_, window = program.loops(decode)
    layers = [program.layer(c) for c in program.collectives(window)]
    return {
        "collectives_per_layer": sorted({layers.count(n) for n in range(model.config.layers)}),
        "collectives_besides": layers.count(None),
    }


def run(out: Path, readme: Path | None, note: Callable[[str], None]) -> str:
    """Every combination on every mesh; devices.jsonl, the README's part, and the table."""
    now = circumstances()
    lines = [line | now for line in measure(MESHES, COMBINATIONS, note)]
    write_lines(out / "devices.jsonl", lines)
    text = table(lines)
    put(readme, "devices", text)
    return text


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row a mesh."""
    heads = (
        "devices",
        "mesh",
        "combinations equal to one device",
        "parameters a device",
        "collectives a layer",
        "collectives a step besides",
    )
    text = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for x in lines:
        cells = (
            x["data"] * x["model"],
            f"data={x['data']}, model={x['model']}",
            f"{x['equal']} of {x['combinations']}",
            f"{x['bytes_per_device'] / x['bytes']:.0%}",
            ", ".join(map(str, x["collectives_per_layer"])),
            x["collectives_besides"],
        )
        text.append(f"| {' | '.join(map(str, cells))} |")
    x = lines[0]
    text += [
        "",
        f"Simulated devices; every decoder x cache x smoothing, five prompts of 3 to 30 tokens; a model of {CONFIG.layers} "
        f"layers with random weights; jax {x['jax']}, commit {x['commit']}; `{x['command']}`.",
    ]
    return "\n".join(text)
