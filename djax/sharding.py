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

DATA, MODEL = AXES = ("data", "model")
# Logical axes of parameters, as the families name them, to axes of the mesh. What is not here is on every device.
RULES = {"vocab": MODEL, "heads": MODEL, "expert": MODEL, "mlp": MODEL}


def mesh(model: int = 1, data: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of data x model devices, for `djax.load(path, mesh=...)`.

    model: devices that share each layer; must divide the model's heads, key/value heads, experts and vocabulary.
    data:  how many such groups, each with all of the parameters and its part of a batch's rows.
    devices: which; by default jax's first ones. Raises `OptionError` if there are too few.
    """
    model, data = whole_number(model, "model", at_least=1), whole_number(data, "data", at_least=1)
    there = jax.devices() if devices is None else _distinct(devices, model * data)
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
        spec = [RULES.get(name) for name in names]
        for name, axis, size in zip(names, spec, shapes[path], strict=True):
            if axis is not None and size % mesh.shape[axis]:
                wrong[name, size] = f"{name} {size} ({path[-1]})"
        out[path] = NamedSharding(mesh, P(*spec))
    if wrong:
        raise OptionError(f"mesh: model={mesh.shape[MODEL]} does not divide {', '.join(wrong.values())}; use a common divisor")
    return out


def over_rows(program: Callable[..., Any], mesh: Mesh, ask: Any) -> Callable[..., Any]:
    """The program (parameters, request, plugs ... -> rows), each part of the data axis running it on its own rows.

    Scalars of the request go to all. The rows must be a multiple of the axis.
    """
    if mesh.shape[DATA] == 1:
        return program
    rows = jax.tree.map(lambda a: P(DATA) if np.ndim(a) else P(), ask)

    def split(params: Any, ask: Any, *plugs: Any) -> Any:
        specs = (P(), rows, *(P() for _ in plugs))
        # Its checks of what varies over the axis do not know a while_loop whose trips differ from part to part.
        f = jax.shard_map(program, mesh=mesh, in_specs=specs, out_specs=P(DATA), axis_names={DATA}, check_vma=False)
        return f(params, ask, *plugs)

    return split
