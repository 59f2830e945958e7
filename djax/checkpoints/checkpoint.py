"""Checkpoints in and out: HF directories read directly, Orbax directories saved and restored, HF written back."""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, Sharding

from djax import checks
from djax.checkpoints.source import DTYPES, MANIFEST, ORBAX, Source, kinds, opened, shapes, sum_bytes, written
from djax.checks import boolean
from djax.convert import orbax_files, rules, safetensors_files
from djax.errors import CheckpointError, OptionError, PathError, shorten
from djax.models import quantized
from djax.models.contract import Config, DType, Params
from djax.models.family import Family
from djax.models.hf import list_settings
from djax.models.model import Model, known_model
from djax.runtime import sharding
from djax.runtime.process import refuse_transfer_guard, with_own_settings
from djax.storage.directories import new_directory
from djax.version import __version__

NOT_FINITE = ("warn", "refuse", "allow")


@with_own_settings
def load(
    path: str | os.PathLike | None = None,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    quantize: str | None = None,
    not_finite: str = "warn",
    verify: bool = False,
) -> Model:
    """Load a model.

    path:  None for the small model that ships with djax, "tiny-td" for the same one distilled to need fewer forwards; a HF
           directory (config.json, safetensors in one file or in shards, tokenizer.json); a directory that `save` or `djax
           convert` wrote; or the name of a model on the Hugging Face hub (`inclusionAI/LLaDA-MoE-7B-A1B-Instruct`), whose files
           then lie in the hub's own cache.
    dtype: "float32" or "bfloat16" for the parameters; None takes what the config says (torch_dtype), float16 and
           float64 as float32.
    mesh:  None for one device; `djax.mesh(model=8)` splits heads, experts and vocabulary over eight, each of which reads only
           its part. `djax.generate` is the same.
    quantize: "int8" holds the matrices of attention, experts and MLPs as int8 with float32 scales (`models/quantized.py`): half
           the bytes of bfloat16, for answers that may differ. No device holds the wider ones meanwhile. Such a model decodes,
           but is neither saved nor trained.
    not_finite: what to do about weights that are NaN or infinite: "warn" on standard error, "refuse" with an error, or
           "allow" them without looking. Of an Orbax directory none are looked at: `djax convert` did.
    verify: compare each parameter with the SHA-256 sum that `djax convert` and `djax.save` note, and refuse one that was
           damaged since. HF directories hold no sums and are refused.

    Only safetensors and JSON are read: no pickle, no code. Tensors are read one at a time and without torch. Every tensor must
    be used exactly once and every parameter filled exactly once. Raises `OptionError` (for a mesh that does not fit the
    model, too), `PathError`, `CheckpointError` (with all that is wrong) or `UnsupportedModelError`.
    """
    path = None if path is None else checks.path_text(path, "path", PathError)
    known_dtype(dtype)
    if quantize is not None and checks.plain_text(quantize) != "int8":
        raise OptionError(f"quantize: expected None or 'int8', got {checks.show(quantize)}")
    if mesh is not None:
        sharding.check(mesh)
    spoiled: list[str] = []
    examine = None if known_not_finite(not_finite) == "allow" else finite(spoiled, not_finite)
    with opened(path, dtype, examine, boolean(verify, "verify")) as source:
        if source.layout == "Orbax" and quantize is None and not verify:
            params = _restore(source, mesh)
        else:
            params = _read(source, mesh, quantize)
        warn_of(spoiled, source.directory)
        return Model(source.family, source.config, params, source.tokenizer, source.hf_config, source.stored, mesh)


def finite(spoiled: list[str], not_finite: str) -> Callable[[str, np.ndarray], None]:
    """Examines tensors: adds the names of those with values that are not finite, or refuses them."""

    def examine(name: str, tensor: np.ndarray) -> None:
        if not _all_finite(tensor):
            if not_finite == "refuse":
                raise CheckpointError(f"tensor {name} has values that are NaN or infinite (not_finite='refuse')")
            spoiled.append(name)

    return examine


def _all_finite(tensor: np.ndarray, some: int = 1 << 16) -> bool:
    """A part at a time, so that what is compared stays in a processor's cache. Of bfloat16 by its bits: NaN and infinity are
    what has all bits of the exponent set, and numpy's own test takes seven times as long."""
    flat = tensor.reshape(-1)
    parts = (flat[at : at + some] for at in range(0, flat.size, some))
    if tensor.dtype == jnp.bfloat16:
        return all(np.max(part.view(np.uint16) & 0x7FFF) < 0x7F80 for part in parts)
    return all(np.isfinite(part).all() for part in parts)


def warn_of(spoiled: list[str], directory: Path) -> None:
    if spoiled:
        print(
            f"djax: {directory}: {len(spoiled)} tensors have values that are NaN or infinite, {spoiled[0]} the first",
            file=sys.stderr,
        )


def inspect(path: str | os.PathLike | None = None, *, verify: bool = False) -> dict[str, Any]:
    """What a checkpoint is, without reading weights: family, sizes, ids. HF tensors are checked against the config.

    verify: read all parameters and compare them with the SHA-256 sums, as `load` does; raises what it raises.
    """
    with opened(path, verify=verify) as source:
        tokenizer, leaves = source.tokenizer, source.shapes.values()
        facts = {
            "path": str(source.directory),
            "layout": source.layout,
            "family": source.family.name,
            "parameters": sum(math.prod(a.shape) for a in leaves),
            "bytes": sum(math.prod(a.shape) * a.dtype.itemsize for a in leaves),
            "dtype": str(np.dtype(source.dtype)),
            "tokenizer": f"{len(tokenizer)} tokens" if tokenizer is not None else "none",
            "chat template": "yes" if tokenizer is not None and tokenizer.chat_template else "no",
        }
        if verify:
            for leaf in source.order:
                source.get(leaf)
            facts["verified"] = f"all {len(source.order)} parameters, against their SHA-256 sums"
        return facts | list_settings(source.config)


def _places(family: Family, config: Config, mesh: Mesh | None, quantize: str | None = None) -> dict[tuple, Sharding]:
    """Where each parameter goes."""
    boxed = family.abstract(config, jnp.float32)
    axes = {path: tuple(spec) for path, spec in traverse_util.flatten_dict(nn.get_partition_spec(boxed)).items()}
    leaves = traverse_util.flatten_dict(nn.meta.unbox(boxed))
    if quantize is not None:
        axes, leaves = quantized.logical_axes(axes), quantized.abstract(leaves)
    if mesh is None:
        return dict.fromkeys(axes, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    return sharding.place(sharding.check(mesh), axes, {path: a.shape for path, a in leaves.items()})


def abstract(family: Family, config: Config, dtype: DType, mesh: Mesh | None, quantize: str | None = None) -> Params:
    """The parameters' tree without values, each leaf a `ShapeDtypeStruct` that knows where it goes."""
    places = _places(family, config, mesh, quantize)
    leaves = shapes(family, config, dtype)
    leaves = leaves if quantize is None else quantized.abstract(leaves)
    flat = {path: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=places[path]) for path, a in leaves.items()}
    return traverse_util.unflatten_dict(flat)


def hf_names(family: Family, config: Config) -> list[str]:
    """The tensors an export writes."""
    return list(dict.fromkeys(rule.source for rule in written(family, config)))


@with_own_settings
def save(model: Model, directory: str | os.PathLike) -> None:
    """Write an Orbax checkpoint that `load` restores: parameters, config, tokenizer and a manifest.

    The manifest holds each parameter's SHA-256 sum (`load(verify=True)`), unless other processes hold parts of it. The
    directory must not exist; it appears whole or not at all. Raises `OptionError` if it exists, and for a quantised model,
    and `CheckpointError` where the disk is full.
    """
    known_model(model)
    _as_it_came(model)
    flat, sums = traverse_util.flatten_dict(model.params), {}
    if all(leaf.is_fully_addressable for leaf in flat.values()):
        sums = {".".join(path): sum_bytes(np.asarray(leaf)) for path, leaf in flat.items()}
    with new_directory(directory) as partial:
        orbax_files.write(partial / ORBAX, iter(flat.items()))
        write_description(model, partial)
        write_manifest(partial, model.family, model.config, model.dtype, model.stored, parameters=sums)


def write_manifest(
    directory: Path, family: Family, config: Config, dtype: DType, stored: Mapping[str, str], **more: Any
) -> None:
    """What `source.read_manifest` reads, and what a person may want to know of where the parameters came from."""
    facts = {"family": family.name, "config": list_settings(config), "dtype": str(np.dtype(dtype))}
    facts |= {"djax": __version__, **more, "stored": dict(stored)}
    (directory / MANIFEST).write_text(json.dumps(facts, indent=1) + "\n", "utf-8")


def _read(source: Source, mesh: Mesh | None, quantize: str | None) -> Params:
    """Parameter by parameter, each as it will be held before it goes to its devices."""
    places = _places(source.family, source.config, mesh, quantize)
    flat: dict[rules.Path, jax.Array] = {}
    for path in source.order:
        leaf = source.get(path)
        parts = ((path, leaf),) if quantize is None else quantized.quantize(path, leaf)
        flat |= {path: jax.device_put(part, places[path]) for path, part in parts}
    return traverse_util.unflatten_dict(flat)


def _restore(source: Source, mesh: Mesh | None) -> Params:
    places = _places(source.family, source.config, mesh)
    saved = {path: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=places[path]) for path, a in source.saved.items()}
    try:
        params = orbax_files.restore(source.directory / ORBAX, traverse_util.unflatten_dict(saved))
    except Exception as error:  # Orbax raises many kinds for a damaged directory; all mean the same to a user
        refuse_transfer_guard(error)
        reason = shorten(str(error))
        raise CheckpointError(f"{source.directory}: the Orbax checkpoint cannot be restored: {reason}") from error
    return jax.tree.map(lambda a, leaf: a.astype(leaf.dtype), params, traverse_util.unflatten_dict(source.shapes))


@with_own_settings
def export_hf(model: Model, directory: str | os.PathLike, *, dtype: str | None = None) -> None:
    """Write the model in HF layout: config.json, tokenizer, safetensors (in shards with an index from 5 GB on).

    dtype: None gives each tensor the dtype it had in the checkpoint the model came from, so that an export of a loaded
    HF checkpoint is bit-equal to it; only where the parameters were narrowed at loading do tensors stay as narrow as
    they are. "float32" or "bfloat16" casts all, and config.json says so.

    The directory must not exist; it appears whole or not at all. Raises `OptionError` if it exists, and `CheckpointError` where
    the disk is full.
    """
    known_model(model)
    known_dtype(dtype)
    _as_it_came(model)
    flat = traverse_util.flatten_dict(model.params)
    with new_directory(directory) as partial:
        as_they_are = kinds(model.family, model.config, model.stored, model.dtype, dtype)
        tensors = rules.unload(written(model.family, model.config), lambda path: np.asarray(flat[path]))
        safetensors_files.write(partial, as_they_are, safetensors_files.cast(tensors, as_they_are))
        write_description(model, partial, dtype)


def known_dtype(dtype: str | None) -> None:
    if dtype is not None:
        checks.word(dtype, "dtype", tuple(DTYPES), ", or None for the checkpoint's own")


def known_not_finite(not_finite: str) -> str:
    return checks.word(not_finite, "not_finite", NOT_FINITE)


def _as_it_came(model: Model) -> None:
    if model.quantized:
        raise OptionError(
            f"model: expected one that was not quantised, got one that holds {model.quantized}; load it without quantize= first"
        )


def write_description(of: Model | Source, directory: Path, dtype: str | None = None) -> None:
    """config.json, which says the dtype if it is another, and the tokenizer."""
    hf = dict(of.hf_config)
    if dtype is not None:
        hf = {key: value for key, value in hf.items() if key != "dtype"} | {"torch_dtype": dtype}
    (directory / "config.json").write_text(json.dumps(hf, indent=2) + "\n", "utf-8")
    if of.tokenizer is not None:
        of.tokenizer.save_pretrained(str(directory))
