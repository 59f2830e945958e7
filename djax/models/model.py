"""A model as a value: family, config, parameters, tokenizer."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from djax.checks import reading, show, type_name, whole_number
from djax.errors import BatchError, CanvasError, OptionError, PromptError
from djax.kernels.choice import Kernels, read_choice, use_kernels
from djax.models.contract import Config, Params
from djax.models.family import Family
from djax.models.quantized import SCALE
from djax.models.sight import Visibility, see
from djax.runtime.compilation import enable_cache
from djax.runtime.process import own_settings, with_own_settings
from djax.runtime.programs import PROGRAMS, kinds
from djax.runtime.sharding import DATA
from djax.runtime.sharding import mesh as make_mesh
from djax.text import prompts
from djax.text.contract import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """family: module of `djax.models`. config: its Config. params: tree of arrays. tokenizer: HF fast tokenizer or None.

    hf_config: config.json as read, carried along for export. stored: dtype name of each HF tensor in the checkpoint the
    parameters came from, so that an export is bit-equal to it even where the parameters were widened; empty if unknown.
    mesh: the devices the parameters lie on (`djax.mesh`); None for one.
    """

    family: Family
    config: Config
    params: Params
    tokenizer: Tokenizer | None
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
    def dtype(self) -> np.dtype[Any]:
        """Of every parameter, and of what is computed; where a model is quantised, of those that are not."""
        return self.params["embedding"].dtype

    @property
    def quantized(self) -> str | None:
        """ "int8" if weights are held so (`djax.load(quantize=...)`)."""
        return "int8" if any(a.dtype == jnp.int8 for a in jax.tree.leaves(self.params)) else None

    @property
    def block_causal(self) -> bool:
        """Whether a block of positions sees only itself and the blocks before it (LLaDA2)."""
        return self.family.visibility == "blocks"

    @property
    def pad_ids(self) -> tuple[int, ...]:
        """The ids that fill rows of a batch up, as tokenizer and config.json name them, or else EOS, as is usual then."""
        named = {getattr(self.tokenizer, "pad_token_id", None), self.hf_config.get("pad_token_id")}
        return tuple(i for i in named if type(i) is int) or (self.config.eos_id,)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by value: for `spawn`ed processes. djax itself never reads a pickle."""
        specs = None if self.mesh is None else jax.tree.map(lambda a: a.sharding.spec, self.params)
        axes = None if self.mesh is None else dict(self.mesh.shape)
        rest = self.tokenizer, dict(self.hf_config), dict(self.stored)
        return _rebuild, (self.family, self.config, jax.device_get(self.params), *rest, axes, specs)

    def __repr__(self) -> str:
        ids = f"mask {self.config.mask_id}, eos {', '.join(map(str, self.config.eos_ids))}"
        kind = f"{self.quantized} and {self.dtype}" if self.quantized else self.dtype
        return f"Model({self.family.name}, {self.parameter_count:,} parameters, {kind}, {ids})"


@with_own_settings
def _rebuild(
    family: Family,
    config: Config,
    params: Params,
    tokenizer: Tokenizer | None,
    hf_config: dict,
    stored: dict,
    axes: dict | None,
    specs: object,
) -> Model:
    """A model from what `Model.__reduce__` gives, on one device or on a mesh of the same shape."""
    mesh = None if axes is None else make_mesh(**axes)
    place = jax.devices()[0] if mesh is None else jax.tree.map(partial(NamedSharding, mesh), specs)
    params = jax.device_put(params, place)
    return Model(family, config, params, tokenizer, hf_config, stored, mesh)


def known_model(model: object) -> None:
    """`OptionError` for anything but a model."""
    if not issubclass(type(model), Model):
        raise OptionError(f"model: expected a djax.Model, as djax.load() returns, got {show(model)} of type {type_name(model)}")


def device_memory() -> int:
    """Bytes of memory of the default device; on a CPU, of the machine."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def computing(model: Model, kernels: Kernels | None = None) -> Iterator[None]:
    """What a model's programs are traced under: its mesh, and full float32 products for float32 parameters, which GPUs would
    otherwise round to TF32; the device's own choice for bfloat16, whose products are exact in float32 anyway.

    kernels: which ones the programs may have; None: what DJAX_KERNELS asks for now. What is traced never reads it.
    """
    kernels = read_choice() if kernels is None else kernels
    with own_settings(), use_kernels(kernels), contextlib.ExitStack() as stack:
        if model.dtype == jnp.float32:
            stack.enter_context(jax.default_matmul_precision("highest"))
        if model.mesh is not None:
            stack.enter_context(jax.set_mesh(model.mesh))
        yield


def _logits(
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    block: jax.Array | np.int32 | None,
    *,
    family: Family,
    config: Config,
) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    valid = positions < lengths[:, None]
    visibility: Visibility = "all" if family.visibility == "blocks" and block is None else family.visibility
    sight = see(visibility, positions, valid, block)
    x, _ = family.trunk(params, config, family.embed(params, config, tokens), positions, sight)
    return family.unembed(params, config, x)


@with_own_settings
def logits(model: Model, tokens: object, lengths: object = None, *, block_length: int | None = None) -> jax.Array:
    """The plain full-canvas forward: token ids int `[B, L]` -> float32 `[B, L, V]`.

    lengths int `[B]` says how many leading tokens of each row are real (default: all); what follows is seen by nobody
    and its logits mean nothing. Or tokens is a mapping with input_ids and attention_mask, padded on either side: each position
    that the mask shows gets what its row alone gets. Without lengths or mask an array is refused if its rows begin, or end with
    a pad id that is not EOS, in different numbers.

    Row p is the network's output at position p: in a family whose logits are shifted it predicts the token after it.

    block_length: for block-causal families (LLaDA2), a position sees its own block of this length and those before it; None
    lets all see all. Raises `PromptError` for another shape or an id outside the vocabulary, `CanvasError` for more positions
    than the model has, `BatchError` for logits that do not fit the device, `OptionError` for a block_length that means nothing
    here.
    """
    known_model(model)
    if block_length is not None:
        block_length = whole_number(block_length, "block_length", at_least=1)
        if not model.block_causal:
            raise OptionError(f"block_length: expected None, since every position of this family sees all; got {block_length}")
    block = None if block_length is None else np.int32(block_length)
    tokens, lengths, offsets = _canvases(model, tokens, lengths)
    enable_cache()
    kernels = read_choice()
    # A function of its own, so that jax's caches let go of it with the program.
    program: Callable[..., jax.Array] = partial(_logits, family=model.family, config=model.config)
    arguments = (model.params, tokens.astype(np.int32), lengths.astype(np.int32), block)
    with computing(model, kernels):
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(model.params)):
            out = program(*arguments)  # inside a transformation of the caller's
        else:
            key = (_logits, model.family, model.config, kernels, kinds(arguments))
            run, _ = PROGRAMS.get(key, lambda: jax.jit(program).lower(*arguments).compile())
            out = run(*arguments)
    if not offsets.any():
        return out
    back = np.arange(tokens.shape[1])[None, :] - offsets[:, None]
    return jnp.take_along_axis(out, np.maximum(back, 0)[..., None], axis=1)


def _canvases(model: Model, tokens: Any, lengths: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The checked tokens `[B, L]`, moved to the front of their rows; how many there are in each, and by how much they moved."""
    mask = None
    with reading("tokens", PromptError):
        if isinstance(tokens, Mapping):
            names = "tokens['input_ids']", "tokens['attention_mask']"
            if not all(name in tokens for name in (prompts.IDS, prompts.MASK)):
                raise PromptError(f"tokens: expected integers of shape [B, L], or a mapping with {' and '.join(names)}")
            if lengths is not None:
                raise PromptError("lengths: expected None, since the tokens have an attention_mask")
            mask = _rectangle(prompts.whole_rows(tokens[prompts.MASK], names[1], PromptError, bools=True), names[1])
            tokens = tokens[prompts.IDS]
        given = prompts.whole_rows(tokens, "tokens", PromptError)
    tokens = _rectangle(given, "tokens")
    if tokens.shape[1] > model.config.max_positions:
        raise CanvasError(f"tokens: {tokens.shape[1]} positions, the model has {model.config.max_positions}")
    need, have = 4 * tokens.size * model.config.vocab, device_memory()
    if need > have:
        raise BatchError(
            f"tokens: the logits of {len(tokens)} rows of {tokens.shape[1]} need {need / 2**30:.1f} GiB, the device has "
            f"{have / 2**30:.1f} GiB; pass fewer rows at once"
        )
    offsets = np.zeros(len(tokens), int)
    if mask is not None:
        if mask.shape != tokens.shape:
            raise PromptError(f"tokens['attention_mask']: expected the shape of input_ids, {tokens.shape}, got {mask.shape}")
        spans = np.array([prompts.span(row, f"tokens['attention_mask'], row {i}") for i, row in enumerate(mask)])
        offsets, lengths = spans[:, 0], spans[:, 1] - spans[:, 0]
        # What the mask hides may be anything, and is seen by nobody.
        tokens = np.where(mask == 1, tokens, model.config.eos_id)
        tokens = np.stack([np.roll(row, -offset) for row, offset in zip(tokens, offsets, strict=True)])
    elif lengths is None:
        if isinstance(given, np.ndarray):
            cure = "pass lengths, or a mapping with input_ids and attention_mask, or lists of ids"
            # Rows of EOS at the end are what a finished canvas has.
            ends = set(model.pad_ids) - {model.config.eos_id}
            prompts.refuse_padded(tokens, model.pad_ids, "tokens", cure, end=ends)
        lengths = np.full(len(tokens), tokens.shape[1])
    else:
        lengths = _lengths(lengths, *tokens.shape)
    if tokens.min() < 0 or tokens.max() >= model.config.vocab:
        least, most = show(int(tokens.min())), show(int(tokens.max()))
        raise PromptError(f"tokens: expected ids from 0 to {model.config.vocab - 1}, got {least} to {most}")
    return tokens, lengths, offsets


def _rectangle(rows: np.ndarray | list[np.ndarray] | None, name: str) -> np.ndarray:
    """Rows of whole numbers, as `prompts.whole_rows` reads them, as an array `[B, L]`, or `PromptError`."""
    if isinstance(rows, list) and len({len(row) for row in rows}) == 1:
        rows = np.stack(rows)
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or not rows.size:
        if isinstance(rows, np.ndarray):
            what = f"shape {rows.shape}"
        else:
            what = "something else" if rows is None else f"rows of {show([len(row) for row in rows])} tokens"
        raise PromptError(f"{name}: expected integers of shape [B, L], got {what}")
    return rows


def _lengths(lengths: object, rows: int, length: int) -> np.ndarray:
    """How many tokens of each row are real, `[B]`, or `PromptError`."""
    found = prompts.whole_rows(lengths, "lengths", PromptError)
    if not isinstance(found, np.ndarray) or found.shape != (rows,) or found.min() < 1 or found.max() > length:
        raise PromptError(f"lengths: expected {rows} integers from 1 to {length}, got {show(lengths)}")
    return found
