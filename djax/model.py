"""A model as a value: family, config, parameters, tokenizer."""

import contextlib
import dataclasses
import importlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from djax.checks import whole_number
from djax.compilation import enable_cache
from djax.errors import CanvasError, OptionError, PromptError
from djax.models.quantized import SCALE
from djax.native import kernels_wanted
from djax.process import own_settings, with_own_settings
from djax.programs import PROGRAMS, kinds
from djax.sharding import DATA
from djax.sharding import mesh as make_mesh


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """family: module of `djax.models`. config: its Config. params: tree of arrays. tokenizer: HF fast tokenizer or None.

    hf_config: config.json as read, carried along for export. stored: dtype name of each HF tensor in the checkpoint the
    parameters came from, so that an export is bit-equal to it even where the parameters were widened; empty if unknown.
    mesh: the devices the parameters lie on (`djax.mesh`); None for one.
    """

    family: ModuleType
    config: Any
    params: Any
    tokenizer: Any
    hf_config: Mapping[str, Any]
    stored: Mapping[str, str]
    mesh: Mesh | None = None

    @property
    def parameter_count(self) -> int:
        leaves = jax.tree_util.tree_leaves_with_path(self.params)
        return sum(a.size for path, a in leaves if not path[-1].key.endswith(SCALE))

    @property
    def parameter_bytes(self) -> int:
        return sum(a.nbytes for a in jax.tree.leaves(self.params))

    @property
    def bytes_per_device(self) -> int:
        leaves = jax.tree.leaves(self.params)
        return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)

    @property
    def parts(self) -> int:
        """Into how many parts the rows of a batch are split."""
        return 1 if self.mesh is None else self.mesh.shape[DATA]

    @property
    def dtype(self) -> Any:
        """Of every parameter, and of what is computed; where a model is quantised, of those that are not."""
        return self.params["embedding"].dtype

    @property
    def quantized(self) -> str | None:
        """ "int8" if weights are held so (`djax.load(quantize=...)`)."""
        return "int8" if any(a.dtype == jnp.int8 for a in jax.tree.leaves(self.params)) else None

    @property
    def block_causal(self) -> bool:
        """Whether a block of positions sees only itself and the blocks before it (LLaDA2)."""
        return getattr(self.family, "BLOCK_CAUSAL", False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by value, the family by its module's name: for `spawn`ed processes. djax itself never reads a pickle."""
        specs = None if self.mesh is None else jax.tree.map(lambda a: a.sharding.spec, self.params)
        axes = None if self.mesh is None else dict(self.mesh.shape)
        rest = self.tokenizer, dict(self.hf_config), dict(self.stored)
        return _rebuild, (self.family.__name__, self.config, jax.device_get(self.params), *rest, axes, specs)

    def __repr__(self) -> str:
        name = self.family.__name__.rsplit(".", 1)[-1]
        ids = f"mask {self.config.mask_id}, eos {', '.join(map(str, self.config.eos_ids))}"
        kind = f"{self.quantized} and {self.dtype}" if self.quantized else self.dtype
        return f"Model({name}, {self.parameter_count:,} parameters, {kind}, {ids})"


@with_own_settings
def _rebuild(
    family: str, config: Any, params: Any, tokenizer: Any, hf_config: dict, stored: dict, axes: dict | None, specs: Any
) -> Model:
    """A model from what `Model.__reduce__` gives, on one device or on a mesh of the same shape."""
    mesh = None if axes is None else make_mesh(**axes)
    place = jax.devices()[0] if mesh is None else jax.tree.map(partial(NamedSharding, mesh), specs)
    params = jax.device_put(params, place)
    return Model(importlib.import_module(family), config, params, tokenizer, hf_config, stored, mesh)


@contextmanager
def computing(model: Model) -> Iterator[None]:
    """What a model's programs are traced under: its mesh, and full float32 products for float32 parameters, which GPUs would
    otherwise round to TF32; the platform's own choice for bfloat16, whose products are exact in float32 anyway."""
    with own_settings(), contextlib.ExitStack() as stack:
        if model.dtype == jnp.float32:
            stack.enter_context(jax.default_matmul_precision("highest"))
        if model.mesh is not None:
            stack.enter_context(jax.set_mesh(model.mesh))
        yield


def _logits(
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    block: jax.Array | None,
    *,
    family: ModuleType,
    config: Any,
) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    until = () if block is None else (None, (positions // block + 1) * block)
    x, _ = family.trunk(params, config, family.embed(params, config, tokens), positions, positions < lengths[:, None], *until)
    return family.unembed(params, config, x)


@with_own_settings
def logits(model: Model, tokens: Any, lengths: Any = None, *, block_length: int | None = None) -> jax.Array:
    """The plain full-canvas forward: token ids int `[B, L]` -> float32 `[B, L, V]`.

    lengths int `[B]` says how many leading tokens of each row are real (default: all); what follows is seen by nobody
    and its logits mean nothing. block_length: for block-causal families (LLaDA2), a position sees its own block of this length
    and those before it; None lets all see all. Raises `PromptError` for another shape or an id outside the vocabulary,
    `CanvasError` for more positions than the model has, `OptionError` for a block_length that means nothing here.
    """
    if block_length is not None:
        block_length = whole_number(block_length, "block_length", at_least=1)
        if not model.block_causal:
            raise OptionError(f"block_length: expected None, since every position of this family sees all; got {block_length}")
    block = None if block_length is None else np.int32(block_length)
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or not tokens.size:
        raise PromptError(f"tokens: expected integers of shape [B, L], got {tokens.dtype} of shape {tokens.shape}")
    if tokens.min() < 0 or tokens.max() >= model.config.vocab:
        raise PromptError(f"tokens: expected ids from 0 to {model.config.vocab - 1}, got {tokens.min()} to {tokens.max()}")
    if tokens.shape[1] > model.config.max_positions:
        raise CanvasError(f"tokens: {tokens.shape[1]} positions, the model has {model.config.max_positions}")
    lengths = np.full(len(tokens), tokens.shape[1]) if lengths is None else np.asarray(lengths)
    whole = np.issubdtype(lengths.dtype, np.integer) and lengths.shape == tokens.shape[:1]
    if not whole or lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        raise PromptError(f"lengths: expected {len(tokens)} integers from 1 to {tokens.shape[1]}, got {lengths.tolist()}")
    enable_cache()
    # A function of its own, so that jax's caches let go of it with the program.
    program = partial(_logits, family=model.family, config=model.config)
    arguments = (model.params, tokens.astype(np.int32), lengths.astype(np.int32), block)
    with computing(model):
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(model.params)):
            return program(*arguments)  # inside a transformation of the caller's
        key = (_logits, model.family, model.config, kernels_wanted(), kinds(arguments))
        run, _ = PROGRAMS.get(key, lambda: jax.jit(program).lower(*arguments).compile())
        return run(*arguments)
