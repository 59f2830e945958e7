"""Programs made before they are needed: compiled into the cache, or exported as a file that runs without djax."""

import contextlib
import dataclasses
import importlib.util
import json
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from djax.checks import plain_text, show, whole_number, word
from djax.engine.carry import NOTHING, Request, Rows
from djax.engine.generate import ask, compiled
from djax.engine.loop import decode
from djax.engine.options import show_options
from djax.engine.request import Asked, dtype_of, refuse_lists
from djax.errors import OptionError
from djax.kernels.choice import restrict_to_portable
from djax.models.model import Model, computing, known_model
from djax.runtime.compilation import enable_cache
from djax.runtime.process import with_own_settings
from djax.storage.directories import free, new_directory

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
PROGRAM, PARAMETERS, MANIFEST = "program.jaxexport", "parameters.safetensors", "manifest.json"
_RESULTS = ("tokens", "active", "forwards", "refreshes", "positions")
# Custom calls whose form XLA does not promise to keep. The manifest names the version of jax that must run them.
_UNPROMISED = ("__gpu$xla.gpu.triton", "LayoutConstraint")


@with_own_settings
@show_options()
def compile(model: Model, *, prompt_length: int = 64, rows: int = 1, **options: object) -> tuple[int, float]:
    """Compile the program that `djax.generate(model, prompts, **options)` would run for `rows` prompts of up to
    `prompt_length` tokens, and keep it: in this process, and in the compile cache for the next.

    Returns the length of its canvas (what fits into it shares the program) and the seconds it took: 0 if it was there.
    Takes `generate`'s options and raises its errors.
    """
    asked = _asked(model, prompt_length, rows, options, "compile")
    enable_cache()
    return asked.asks[0].tokens.shape[1], compiled(model, asked, asked.asks[0])[1]


@with_own_settings
@show_options()
def export_program(
    model: Model,
    directory: str | os.PathLike,
    *,
    prompt_length: int = 64,
    rows: int = 1,
    platform: str | None = None,
    **options: object,
) -> None:
    """Write the decode as a directory that jax alone can run, with djax's Python code nowhere near.

    program.jaxexport: what `jax.export.deserialize` reads; its `call(parameters, request, numbers)` returns a dict of tokens
    int32 `[B, L]`, forwards, refreshes and positions int32 `[B]`, and active bool `[B]`, true only for a row left unfinished.
    parameters.safetensors: the first argument, a flat dict. manifest.json: shapes and dtypes of the request's fields
    (`djax.engine.carry.Request` has their meaning; without a temperature above 0 or a decoder that draws there is neither
    temperature nor seed, without top_p or top_k neither of them), the numbers of decoder, cache and smoothing as they were
    given, the ids of the mask and of every token that ends an answer (eos_id, the first of eos_ids, fills what follows).

    platform: what it is to run on, cpu, cuda, rocm or tpu, which need not be here; None for this process' own. The other
    options are `generate`'s. The directory must not exist and appears whole or not at all. Raises `OptionError` for an unknown
    platform, for a model on a mesh, and where the package flatbuffers is not installed.
    """
    known_model(model)
    free(directory)  # before anything is traced
    platform = jax.default_backend() if platform is None else platform
    platform = word("cuda" if plain_text(platform) == "gpu" else platform, "platform", PLATFORMS)
    if importlib.util.find_spec("flatbuffers") is None:
        raise OptionError(
            "export_program: jax writes its exports with flatbuffers, which is not installed; pip install flatbuffers"
        )
    if model.mesh is not None:
        raise OptionError("export_program: expected a model on one device, this one lies on a mesh; load it without one")
    if options.get("stop") is not None:
        raise OptionError("stop: expected None, since an exported program gives tokens and no text")
    refuse_lists(options, "one for all rows, since an exported program takes one set of numbers")
    asked = _asked(model, prompt_length, rows, options, "export_program")
    (request,), numbers = asked.asks, jax.tree.leaves(asked.plugs)
    kernels = restrict_to_portable(asked.kernels)
    spec, request = asked.spec(model, request), request._replace(numbers=())
    spec = dataclasses.replace(spec, traced=False, kernels=kernels)
    parameters = {".".join(path): leaf for path, leaf in traverse_util.flatten_dict(model.params).items()}
    numbers = [np.asarray(n, dtype_of(n)) for n in numbers]

    def program(parameters: dict[str, Any], request: dict[str, Any], numbers: list[Any]) -> dict[str, Any]:
        params = traverse_util.unflatten_dict(parameters, sep=".")
        each = tuple(jnp.broadcast_to(n, (len(request["prompt"]), *n.shape)) for n in numbers)
        whole = dict.fromkeys(left_out, NOTHING)
        out: Rows[jax.Array] = decode(params, Request(**request, **whole, numbers=each), spec=spec)
        return {name: getattr(out, name) for name in _RESULTS}

    # What this program would not read it does not take: nobody passes a temperature that is ignored.
    left_out = (() if spec.sampled else ("temperature", "seed")) + (() if spec.truncated else ("top_p", "top_k"))
    fields = {name: value for name, value in request._asdict().items() if name not in ("numbers", *left_out)}
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (parameters, fields, numbers))
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in _UNPROMISED]
    with computing(model, kernels), _assume_device(platform):
        exported = jax.export.export(jax.jit(program), platforms=[platform], disabled_checks=allowed)(*arguments)
    manifest = {
        "jax": jax.__version__,
        "platform": platform,
        "request": {name: {"shape": list(a.shape), "dtype": str(a.dtype)} for name, a in fields.items()},
        "numbers": [n.tolist() for n in numbers],
        "decoder, cache, smoothing": [repr(p) for p in asked.plugs],
        "mask_id": model.config.mask_id,
        "eos_id": model.config.eos_id,
        "eos_ids": list(model.config.eos_ids),
    }
    with new_directory(directory) as partial:
        (partial / PROGRAM).write_bytes(exported.serialize())
        save_file({name: np.asarray(a) for name, a in parameters.items()}, partial / PARAMETERS)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")


@contextlib.contextmanager
def _assume_device(platform: str) -> Iterator[None]:
    """Trace for a GPU that is not here: newer jax must know which one its kernels are for; this names an H100."""
    if platform != "cuda" or jax.default_backend() == "gpu":
        yield
        return
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        yield


def _asked(model: Model, prompt_length: int, rows: int, options: dict[str, Any], caller: str) -> Asked:
    """The request of prompts of this length, whose tokens do not matter."""
    known_model(model)
    prompt_length = whole_number(prompt_length, "prompt_length", at_least=1)
    rows = whole_number(rows, "rows", at_least=1)
    if options.get("max_batch") is not None:
        raise OptionError(f"max_batch: expected None, the rows of a program are `rows`; got {show(options['max_batch'])}")
    token = int(model.config.mask_id == 0)  # the one id that no prompt may hold
    # However long and however many, they take no memory before they are found to fit.
    return ask(model, np.broadcast_to(np.int32(token), (rows, prompt_length)), options, caller)
