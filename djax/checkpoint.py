"""Checkpoints in and out: HF directories read directly, Orbax directories saved and restored, HF written back."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, Sharding

from djax import sharding, text
from djax.convert import TABLES, rules, safetensors_files
from djax.convert.safetensors_files import TensorFiles
from djax.errors import CheckpointError, OptionError, PathError, UnsupportedModelError
from djax.model import Model
from djax.models import FAMILIES

SHIPPED = Path(__file__).parent / "small"
MANIFEST, ORBAX = "djax.json", "params"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_STORED = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
# How tokenizers of known families spell the mask, for those that do not declare it as their mask token.
_MASK_TEXTS = ("<|mask|>", "<|mdm_mask|>")


def load(path: str | os.PathLike | None = None, *, dtype: str | None = None, mesh: Mesh | None = None) -> Model:
    """Load a model.

    path:  None for the small model that ships with djax; a HF directory (config.json, safetensors in one file or in
           shards, tokenizer.json); or a directory written by `save`.
    dtype: "float32" or "bfloat16" for the parameters; None takes what the config says (torch_dtype), float16 and
           float64 as float32.
    mesh:  None for one device; `djax.mesh(model=8)` splits heads, experts and vocabulary over eight, each of which reads only
           its part. `djax.generate` is the same.

    Tensors are read one at a time and without torch. Every tensor must be used exactly once and every parameter filled
    exactly once. Raises `OptionError` (for a mesh that does not fit the model, too), `PathError`, `CheckpointError` (with all
    that is wrong) or `UnsupportedModelError`.
    """
    _known_dtype(dtype)
    directory = _directory(path)
    family, config, hf, tokenizer = _describe(directory)
    if (directory / MANIFEST).is_file():
        params, stored = _restore(directory, family, config, dtype, mesh)
    else:
        params, stored = _read_hf(directory, family, config, hf, dtype, mesh)
    return Model(family, config, params, tokenizer, hf, stored, mesh)


def inspect(path: str | os.PathLike | None = None) -> dict[str, Any]:
    """What a checkpoint is, without reading weights: family, sizes, ids. HF tensors are checked against the config."""
    directory = _directory(path)
    family, config, hf, tokenizer = _describe(directory)
    if (directory / MANIFEST).is_file():
        form, dtype = "Orbax", DTYPES[_manifest(directory)["dtype"]]
    else:
        with TensorFiles(directory) as files:
            table, stored = _match(family, config, files)
            dtype = _parameter_dtype(hf, stored, None)
            form = f"HF, {len(table)} tensors, stored as {', '.join(sorted(set(stored.values())))}"
    shapes = _shapes(family, config, dtype).values()
    facts = {
        "path": str(directory),
        "layout": form,
        "family": _name(family),
        "parameters": sum(math.prod(a.shape) for a in shapes),
        "bytes": sum(math.prod(a.shape) * a.dtype.itemsize for a in shapes),
        "dtype": str(np.dtype(dtype)),
        "tokenizer": f"{len(tokenizer)} tokens" if tokenizer is not None else "none",
        "chat template": "yes" if tokenizer is not None and tokenizer.chat_template else "no",
    }
    return facts | dataclasses.asdict(config)


def _directory(path: str | os.PathLike | None) -> Path:
    directory = SHIPPED if path is None else Path(path).expanduser()
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise PathError(f"{directory}: expected a checkpoint directory, this {what}; a hub model must be downloaded first")
    return directory


def _describe(directory: Path) -> tuple[ModuleType, Any, dict, Any]:
    """Family, config, config.json and tokenizer of a checkpoint, HF's or ours."""
    file = directory / "config.json"
    if not file.is_file():
        raise PathError(f"{directory}: expected a checkpoint with a config.json, there is none")
    try:
        hf = json.loads(file.read_text())
        architectures = list(hf.get("architectures") or [])
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{file}: expected a JSON object: {error}") from error
    names = [n for n, family in FAMILIES.items() if set(family.ARCHITECTURES) & set(architectures)]
    if not names:
        known = "; ".join(f"{n} ({', '.join(family.ARCHITECTURES)})" for n, family in FAMILIES.items())
        raise UnsupportedModelError(f"{file}: unknown model family, architectures={architectures}; djax knows {known}")
    family = FAMILIES[names[0]]
    tokenizer = text.load_tokenizer(directory)
    mask_id, eos_id = _special_ids(hf, tokenizer, family, directory)
    config = family.Config.from_hf(hf, mask_id=mask_id, eos_id=eos_id)
    for name, value in (("mask", mask_id), ("eos", eos_id)):
        if not 0 <= value < config.vocab:
            raise CheckpointError(
                f"{directory}: the {name} token id {value} is outside the vocabulary of {config.vocab}; "
                f"set {name}_token_id in config.json"
            )
    if tokenizer is not None and len(tokenizer) > config.vocab:
        raise CheckpointError(f"{directory}: the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {config.vocab}")
    return family, config, hf, tokenizer


def _special_ids(hf: dict, tokenizer: Any, family: ModuleType, directory: Path) -> tuple[int, int]:
    """Mask and EOS ids: tokenizer, then config.json, then the family's default, which is announced."""
    found: dict[str, dict[str, int]] = {"mask": {}, "eos": {}}
    if tokenizer is not None:
        vocabulary = tokenizer.get_vocab()
        texts = [t for t in (tokenizer.mask_token, *_MASK_TEXTS) if t in vocabulary]
        if texts:
            found["mask"]["tokenizer.json"] = vocabulary[texts[0]]
        if tokenizer.eos_token_id is not None:
            found["eos"]["tokenizer.json"] = tokenizer.eos_token_id
    for name in found:
        value = hf.get(f"{name}_token_id")
        if isinstance(value, int) and not isinstance(value, bool):
            found[name]["config.json"] = value
        elif value is not None:
            raise CheckpointError(f"{directory / 'config.json'}: {name}_token_id: expected one integer, got {value!r}")
    if len(set(found["mask"].values())) > 1:
        raise CheckpointError(f"{directory}: the mask token id differs, {found['mask']}; correct the wrong file")
    # A tokenizer's eos may end a turn rather than a text, so where the model's config names one it is the config's.
    eos = found["eos"].get("config.json", found["eos"].get("tokenizer.json"))
    mask = next(iter(found["mask"].values()), None)
    if mask is None:
        mask = _announce("mask", family.DEFAULT_MASK_ID, directory)
    if eos is None:
        eos = _announce("eos", family.DEFAULT_EOS_ID, directory)
    return mask, eos


def _announce(name: str, value: int, directory: Path) -> int:
    print(f"djax: {directory} names no {name} token; using the family's default, id {value}", file=sys.stderr)
    return value


def _shapes(family: ModuleType, config: Any, dtype: Any) -> dict[tuple, jax.ShapeDtypeStruct]:
    return traverse_util.flatten_dict(nn.meta.unbox(family.abstract(config, dtype)))


def _places(family: ModuleType, config: Any, mesh: Mesh | None) -> dict[tuple, Sharding]:
    """Where each parameter goes."""
    boxed = family.abstract(config, jnp.float32)
    axes = {path: tuple(spec) for path, spec in traverse_util.flatten_dict(nn.get_partition_spec(boxed)).items()}
    if mesh is None:
        return dict.fromkeys(axes, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    shapes = {path: a.shape for path, a in traverse_util.flatten_dict(nn.meta.unbox(boxed)).items()}
    return sharding.place(sharding.check(mesh), axes, shapes)


def abstract(family: ModuleType, config: Any, dtype: Any, mesh: Mesh | None) -> Any:
    """The parameters' tree without values, each leaf a `ShapeDtypeStruct` that knows where it goes."""
    places, shapes = _places(family, config, mesh), _shapes(family, config, dtype)
    flat = {path: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=places[path]) for path, a in shapes.items()}
    return traverse_util.unflatten_dict(flat)


def _parameter_dtype(hf: dict, stored: dict[str, str], wish: str | None) -> Any:
    if wish is not None:
        return DTYPES[wish]
    declared = str(hf.get("torch_dtype") or hf.get("dtype") or "").removeprefix("torch.")
    if not declared and stored:
        declared = {"BF16": "bfloat16"}.get(Counter(stored.values()).most_common(1)[0][0], "float32")
    return DTYPES.get(declared, jnp.float32)


def _read_hf(
    directory: Path, family: ModuleType, config: Any, hf: dict, dtype: str | None, mesh: Mesh | None
) -> tuple[Any, dict[str, str]]:
    places = _places(family, config, mesh)
    with TensorFiles(directory) as files:
        table, stored = _match(family, config, files)
        target = _parameter_dtype(hf, stored, dtype)
        leaves = {path: (leaf.shape, leaf.dtype) for path, leaf in _shapes(family, config, target).items()}
        flat = {path: jax.device_put(leaf, places[path]) for path, leaf in rules.load(table, leaves, files.read)}
    return traverse_util.unflatten_dict(flat), stored


def _match(family: ModuleType, config: Any, files: TensorFiles) -> tuple[list[rules.Rule], dict[str, str]]:
    """The rule table of the layout the files are in, checked strictly, and each tensor's stored dtype."""
    # The layout whose names match best; whatever does not match it is reported against it.
    table = max(_layouts(family, config).values(), key=lambda t: len(files.found.keys() & {r.source for r in t}))
    rules.check(files.found, table, {path: leaf.shape for path, leaf in _shapes(family, config, jnp.float32).items()})
    return table, {name: kind for name, (_, kind) in files.found.items()}


def _layouts(family: ModuleType, config: Any) -> dict[str, list[rules.Rule]]:
    return TABLES[_name(family)](config)


def _name(family: ModuleType) -> str:
    return next(name for name, module in FAMILIES.items() if module is family)


def hf_names(family: ModuleType, config: Any) -> list[str]:
    """The tensors an export writes."""
    return [rule.source for rule in _layouts(family, config)["hf"]]


def save(model: Model, directory: str | os.PathLike) -> None:
    """Write an Orbax checkpoint that `load` restores: parameters, config, tokenizer and a manifest.

    The directory must not exist; it appears whole or not at all. Raises `OptionError` if it exists.
    """
    from orbax.checkpoint.experimental import v1 as orbax

    with new_directory(directory) as partial:
        orbax.save(partial.resolve() / ORBAX, model.params)
        _write_description(model, partial)
        manifest = {"dtype": str(model.dtype), "stored": dict(model.stored)}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _restore(
    directory: Path, family: ModuleType, config: Any, dtype: str | None, mesh: Mesh | None
) -> tuple[Any, dict[str, str]]:
    from orbax.checkpoint.experimental import v1 as orbax

    manifest = _manifest(directory)
    saved = DTYPES[manifest["dtype"]]
    try:
        params = orbax.load(directory.resolve() / ORBAX, abstract(family, config, saved, mesh))
    except Exception as error:  # Orbax raises many kinds for a damaged directory; all mean the same to a user
        raise CheckpointError(f"{directory}: the Orbax checkpoint cannot be restored: {error}") from error
    target = abstract(family, config, DTYPES[dtype] if dtype is not None else saved, mesh)
    return jax.tree.map(lambda a, wanted: a.astype(wanted.dtype), params, target), manifest["stored"]


def _manifest(directory: Path) -> dict[str, Any]:
    """dtype: of the saved parameters. stored: HF tensor name to the dtype it had in the converted checkpoint."""
    file = directory / MANIFEST
    try:
        manifest = json.loads(file.read_text())
        if manifest["dtype"] in DTYPES and isinstance(manifest["stored"], dict):
            return manifest
    except (ValueError, KeyError, TypeError):
        pass
    raise CheckpointError(f"{file}: not a manifest that djax wrote; convert the checkpoint again")


def export_hf(model: Model, directory: str | os.PathLike, *, dtype: str | None = None) -> None:
    """Write the model in HF layout: config.json, tokenizer, safetensors (in shards with an index from 5 GB on).

    dtype: None gives each tensor the dtype it had in the checkpoint the model came from, so that an export of a loaded
    HF checkpoint is bit-equal to it; only where the parameters were narrowed at loading do tensors stay as narrow as
    they are. "float32" or "bfloat16" casts all, and config.json says so.

    The directory must not exist; it appears whole or not at all. Raises `OptionError` if it exists.
    """
    _known_dtype(dtype)
    flat = traverse_util.flatten_dict(model.params)
    # Rules that share a parameter together, so that each parameter is fetched once.
    table = sorted(_layouts(model.family, model.config)["hf"], key=lambda rule: rule.target)
    common = Counter(model.stored.values()).most_common(1)

    def kind(name: str) -> np.dtype:
        if dtype is not None:
            return np.dtype(DTYPES[dtype])
        stored = model.stored.get(name, common[0][0] if common else None)
        wide = np.dtype(_STORED[stored]) if stored else np.dtype(model.dtype)
        return wide if wide.itemsize <= np.dtype(model.dtype).itemsize else np.dtype(model.dtype)

    sizes = {rule.source: math.prod(rule.shape) * kind(rule.source).itemsize for rule in table}
    tensors = ((name, t.astype(kind(name))) for name, t in rules.unload(table, lambda path: np.asarray(flat[path])))
    with new_directory(directory) as partial:
        safetensors_files.write(partial, sizes, tensors)
        _write_description(model, partial)
        if dtype is not None:
            hf = {key: value for key, value in model.hf_config.items() if key != "dtype"} | {"torch_dtype": dtype}
            (partial / "config.json").write_text(json.dumps(hf, indent=2) + "\n")


def _known_dtype(dtype: str | None) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"dtype: expected one of {', '.join(DTYPES)}, or None for the checkpoint's own, got {dtype!r}")


def _write_description(model: Model, directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps(dict(model.hf_config), indent=2) + "\n")
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(str(directory))


def free(directory: str | os.PathLike) -> Path:
    """The path, if nothing is there yet."""
    path = Path(directory).expanduser()
    if path.exists():
        raise OptionError(f"{path}: already exists; choose another directory or remove it")
    return path


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike) -> Iterator[Path]:
    """A directory beside the wanted one, renamed to it when the block ends well and removed when it does not."""
    final = free(directory)
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        yield partial
        # Temporary files are private; the finished checkpoint gets the permissions any new file of the user gets.
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o777 & ~umask)
        for file in filter(Path.is_file, partial.iterdir()):
            file.chmod(0o666 & ~umask)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
