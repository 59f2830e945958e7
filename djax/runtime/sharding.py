"""One mesh for a model and its batch: which axis of a parameter lies on which axis of the devices.

The mesh has two axes. `model` splits heads, experts, the width of dense MLPs and vocabulary, so that a layer costs two
all-reduces, after its attention and after its experts or MLP. `data` splits the rows of a batch: each part runs its own loop
and never waits for another.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from djax.checks import is_array, reading, show, whole_number
from djax.errors import OptionError
from djax.runtime.process import with_own_settings

DATA, MODEL = AXES = ("data", "model")
# Logical axes of parameters, as the families name them, to axes of the mesh. What is not here is on every device.
RULES = {"vocab": MODEL, "heads": MODEL, "expert": MODEL, "mlp": MODEL}


def find_devices() -> list[Any]:
    """jax's devices. Raises `OptionError` if jax is set to platforms that are not there."""
    try:
        return jax.devices()
    except (AssertionError, RuntimeError) as error:
        # jax asserts that it has a default device, and has none if the only platform is a GPU's that it does not see.
        wish = getattr(jax.config, "jax_platforms")  # noqa: B009  (its stubs lack it)
        reason = " ".join(str(error).split()) or "it sees no such device"
        raise OptionError(
            f"JAX_PLATFORMS={wish or ''}: expected platforms that jax finds on this machine ({reason}); for an NVIDIA GPU "
            "install djax[cuda12] and a driver (nvidia-smi must list the GPU); JAX_PLATFORMS=cpu computes on the CPU, and "
            "without the variable jax takes what there is"
        ) from None


@with_own_settings
def mesh(model: int = 1, data: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of data x model devices, for `djax.load(path, mesh=...)`.

    model: devices that share each layer; must divide the model's heads, key/value heads, experts and vocabulary.
    data:  how many such groups, each with all of the parameters and its part of a batch's rows.
    devices: which; by default jax's first ones. Raises `OptionError` if there are too few.
    """
    model, data = whole_number(model, "model", at_least=1), whole_number(data, "data", at_least=1)
    there = find_devices() if devices is None else _distinct(devices, model * data)
    if model * data > len(there):
        platform = there[0].platform if there else "none"
        raise OptionError(
            f"mesh: data={data} times model={model} takes {model * data} devices, there are {len(there)} "
            f"({platform}); on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count={model * data} simulates them"
        )
    return Mesh(np.array(there[: model * data]).reshape(data, model), AXES)


def _distinct(devices: Any, most: int) -> list[jax.Device]:
    """The first devices of any iterable, or `OptionError` if some are no devices or come twice."""
    found: list[jax.Device] = []
    with reading("devices"):
        if is_array(devices):
            devices = np.asarray(devices).ravel()
        for device in itertools.islice(devices, most):
            if not issubclass(type(device), jax.Device) or device in found:
                raise OptionError(f"devices: expected distinct devices, such as jax.devices()[:2], got {show(device)}")
            found.append(device)
    return found


def split() -> bool:
    """Whether a mesh is set whose model axis splits anything; a caller's own mesh, with other axes, is none of ours."""
    return jax.sharding.get_abstract_mesh().shape.get(MODEL, 1) > 1


def check(given: Any) -> Mesh:
    """The mesh, if it is one with our two axes."""
    if not issubclass(type(given), Mesh) or set(given.axis_names) != set(AXES):
        raise OptionError(
            f"mesh: expected djax.mesh(model=..., data=...), or a jax Mesh with the axes {AXES}, got {show(given)}"
        )
    return given


def place(mesh: Mesh, axes: Mapping[tuple, tuple[str | None, ...]], shapes: Mapping[tuple, tuple[int, ...]]) -> dict:
    """Each parameter's `NamedSharding`, from its logical axes. Raises `OptionError` with all sizes the mesh does not divide."""
    wrong, out = {}, {}
    for path, names in axes.items():
        spec = [None if name is None else RULES.get(name) for name in names]
        for name, axis, size in zip(names, spec, shapes[path], strict=True):
            if axis is not None and size % mesh.shape[axis]:
                wrong[name, size] = f"{name} {size} ({path[-1]})"
        out[path] = NamedSharding(mesh, P(*spec))
    if wrong:
        raise OptionError(f"mesh: model={mesh.shape[MODEL]} does not divide {', '.join(wrong.values())}; use a common divisor")
    return out


def over_rows(program: Callable[..., Any], mesh: Mesh, ask: object) -> Callable[..., Any]:
    """The program (parameters, request -> rows), each part of the data axis running it on its own rows.

    The rows must be a multiple of the axis.
    """
    if mesh.shape[DATA] == 1:
        return program

    def split(params: object, ask: object) -> Any:
        specs = P(), jax.tree.map(lambda _: P(DATA), ask)
        # Its checks of what varies over the axis do not know a while_loop whose trips differ from part to part.
        f = jax.shard_map(program, mesh=mesh, in_specs=specs, out_specs=P(DATA), axis_names={DATA}, check_vma=False)
        return f(params, ask)

    return split
