"""From what a user asks to what the program takes: every check of the public door, then prompts laid out as canvases."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from djax import text
from djax.caching import CACHES, Uncached
from djax.caching.contract import TO_THE_END, Plan, Policy
from djax.checks import INT32_MAX, boolean, plug, reading, real_number, show, type_name, whole_number, whole_numbers
from djax.decoding import DECODERS
from djax.decoding.contract import MOST_DRAFTS, MOST_POST_STEPS, Decoder, Look, Tick, Verdict
from djax.engine import stop
from djax.engine.carry import Plugs, Request, Spec
from djax.engine.options import Options
from djax.errors import BatchError, CanvasError, OptionError
from djax.kernels.choice import Kernels, traced_kernels, with_wanted_kernels
from djax.models.contract import Config, DType
from djax.models.model import Model, device_memory, known_model
from djax.plugs import spelled
from djax.pytree import classes
from djax.runtime.process import make_key


@dataclasses.dataclass(frozen=True)
class Asked:
    """A checked call: one request a group of prompts, the plugs, and what is static to their programs.

    stops: the stop strings of each group's prompts. sampled: decoders get a random key. truncated: some prompt cuts what it
    draws from (top_p, top_k), which matters where something is drawn. traced: every forward is recorded. single: the user gave
    one prompt and no list.
    """

    asks: list[Request[np.ndarray]]
    stops: list[list[tuple[str, ...]]]
    plugs: Plugs
    block_length: int
    sampled: bool
    truncated: bool
    traced: bool
    single: bool
    kernels: Kernels = "djax"

    def block(self, ask: Request[np.ndarray]) -> int:
        """S: a block, however long, is never more than the canvas."""
        return min(self.block_length, ask.tokens.shape[1])

    def spec(self, model: Model, ask: Request[np.ndarray]) -> Spec:
        """What is static to the program of a request."""
        plugs, kinds = jax.tree.structure(self.plugs), tuple(map(classes, self.plugs))
        truncated = self.sampled and self.truncated
        block = self.block(ask)
        return Spec(model.family, model.config, block, self.sampled, self.traced, plugs, kinds, truncated, self.kernels)


@with_wanted_kernels
def prepare(model: Model, prompts: object, options: Options) -> Asked:
    """Check the arguments of `djax.generate`, whose docstring has their meaning, and lay its prompts out. Compiles nothing.

    Raises `OptionError`, `PromptError`, `CanvasError` or `BatchError`.
    """
    known_model(model)
    block_length = whole_number(options.block_length, "block_length", at_least=1)
    align_blocks, trace = boolean(options.align_blocks, "align_blocks"), boolean(options.trace, "trace")
    if model.block_causal and not align_blocks:
        raise OptionError(
            "align_blocks: expected True, since this family's blocks are counted from the canvas' start; got False"
        )
    ids, single = text.encode(model.tokenizer, prompts, model.config.vocab, model.config.mask_id, model.pad_ids)
    count = len(ids)
    seeds = whole_numbers(options.seed, "seed", count, at_least=0, at_most=2**32 - 1)
    lengths = whole_numbers(options.gen_length, "gen_length", count, at_least=1)
    least = whole_numbers(options.min_gen_length, "min_gen_length", count, at_least=0)
    heats = [real_number(one, "temperature", at_least=0.0) for one in _one_each(options.temperature, "temperature", count)]
    top_p = [real_number(one, "top_p", above=0.0, at_most=1.0) for one in _one_each(options.top_p, "top_p", count)]
    top_k = whole_numbers(options.top_k, "top_k", count, at_least=0)
    early = [boolean(one, "early_stop") for one in _one_each(options.early_stop, "early_stop", count)]
    stops = stop.read(options.stop, count)
    if any(stops) and model.tokenizer is None:
        raise OptionError(f"stop: expected None, since this checkpoint has no tokenizer and no text; got {show(options.stop)}")
    plugs, each = _plugs_each(model, options.decoder, options.cache, options.smoothing, count)
    for i, prompt in enumerate(ids):
        if model.block_causal:
            lengths[i] += -(len(prompt) + lengths[i]) % block_length
        _check_canvas(model, f"prompt {i}", len(prompt), lengths[i], least[i], plugs[1])
    most = options.max_batch
    group = count if most is None else min(count, whole_number(most, "max_batch", at_least=1))
    asks = [
        request(
            *(ids[i : i + group], seeds[i : i + group], model.config),
            rows=-(-group // model.parts) * model.parts,
            gen_length=lengths[i : i + group],
            min_gen_length=least[i : i + group],
            block=block_length,
            temperature=heats[i : i + group],
            top_p=top_p[i : i + group],
            top_k=top_k[i : i + group],
            early_stop=early[i : i + group],
            align_blocks=align_blocks,
            plugs=each[i : i + group],
        )
        for i in range(0, count, group)
    ]
    if plugs[0].drafts:
        if max(heats) > 0:
            raise OptionError(f"temperature: expected 0 with drafts, which are checked against the likeliest, got {max(heats)}")
        if plugs[0].drafts > block_length:
            raise OptionError(f"decoder: expected at most {block_length} drafts, the block_length, got {show(plugs[0])}")
    sampled, truncated = max(heats) > 0 or plugs[0].draws, min(map(np.float32, top_p)) < 1 or max(top_k) > 0
    grouped = [stops[i : i + group] for i in range(0, count, group)]
    asked = Asked(asks, grouped, plugs, block_length, sampled, bool(truncated), trace, single, traced_kernels())
    _try_plugs(model, asks[0], plugs, asked.block(asks[0]), sampled)
    for ask in asks:
        check_memory(model, ask, plugs, asked.block(ask))
    return asked


def _one_each(value: Any, name: str, count: int) -> list[Any]:
    """One value for all prompts, or a list with one for each."""
    if type(value) not in (list, tuple):
        return [value] * count
    if len(value) != count:
        raise OptionError(f"{name}: expected one, or a list with one for each of the {count} prompts, got {len(value)}")
    return list(value)


def refuse_lists(options: Mapping[str, Any], expected: str) -> None:
    """Raise `OptionError` for plugs that are given as lists, one a prompt, to a function that takes one of each."""
    for name in ("decoder", "cache", "smoothing"):
        if type(options.get(name)) in (list, tuple):
            raise OptionError(f"{name}: expected {expected}")


def _plugs_each(model: Model, decoder: object, cache: object, smoothing: object, count: int) -> tuple[Plugs, list[Plugs]]:
    """The first prompt's plugs, and each prompt's: of one kind with equal static fields, since one program serves them."""
    named = dict(decoder=decoder, cache=cache, smoothing=smoothing)
    if not any(type(value) in (list, tuple) for value in named.values()):
        plugs = _plugs(model, decoder, cache, smoothing)
        return plugs, [plugs] * count
    columns = [_one_each(value, name, count) for name, value in named.items()]
    each = [_plugs(model, *row) for row in zip(*columns, strict=True)]
    for n, name in enumerate(named):
        kinds = {(jax.tree.structure(row[n]), classes(row[n])) for row in each}
        shapes = {tuple(np.shape(leaf) for leaf in jax.tree.leaves(row[n])) for row in each}
        if len(kinds) > 1 or len(shapes) > 1:
            raise OptionError(
                f"{name}: expected one kind with equal static fields in all prompts of a call, got {show(named[name])}"
            )
    return each[0], each


def _plugs(model: Model, decoder: Any, cache: Any, smoothing: Any) -> Plugs:
    """The three plugs as the program takes them, or `OptionError`: not a plug, or one that the model's family lacks."""
    plug(decoder, "decoder", Decoder, spelled(DECODERS))
    decoder = _with_values(decoder, "decoder")
    _refuse_traced(decoder, ("draws", "edits", "post_steps", "drafts", "advances"), "decoder")
    with reading("decoder"):
        for name in ("draws", "edits", "advances"):
            boolean(getattr(decoder, name), f"decoder: {type_name(decoder)}.{name}")
        most = decoder.post_steps
        whole_number(most, f"decoder: {type_name(decoder)}.post_steps", at_least=0, at_most=MOST_POST_STEPS)
        whole_number(decoder.drafts, f"decoder: {type_name(decoder)}.drafts", at_least=0, at_most=MOST_DRAFTS)
    policy = Uncached() if cache is None else cache
    plug(policy, "cache", Policy, spelled(CACHES))
    policy = _with_values(policy, "cache")
    _refuse_traced(policy, ("keeps", "appends", "commits"), "cache")
    with reading("cache"):
        for name in ("keeps", "appends", "commits"):
            boolean(getattr(policy, name), f"cache: {type_name(policy)}.{name}")
        for reach in policy.reach():
            whole_number(reach, f"cache: {type_name(policy)}.reach()", at_least=0)
    if smoothing is not None:
        plug(smoothing, "smoothing", ("weight", "least"), "None, djax.Smoothing(...)")
        smoothing = _with_values(smoothing, "smoothing")
        with reading("smoothing"):
            top = getattr(smoothing, "top", None)
        if top is not None:
            whole_number(top, f"smoothing: {type_name(smoothing)}.top", at_least=1, at_most=model.config.vocab)
    name = model.family.name
    if policy.keeps and not model.family.caches:
        raise OptionError(f"cache: expected None, since the family {name} keeps no keys and values; got {show(cache)}")
    if policy.appends and not model.block_causal:
        raise OptionError(
            f"cache: expected None, Prefix, Dual or Vicinity: in the family {name} finished blocks see later ones, and their "
            f"keys and values change; got {show(cache)}"
        )
    if policy.keeps and not policy.appends and model.block_causal:
        raise OptionError(
            f"cache: expected None or Block(), which is exact, for the block-causal family {name}; got {show(cache)}"
        )
    sees_past = model.family.visibility == "past"
    if policy.keeps and policy.commits != sees_past:
        legal = "None or a cache that commits what windows read" if sees_past else "a cache that commits nothing"
        raise OptionError(f"cache: expected {legal} for the family {name}; got {show(cache)}")
    if decoder.advances and (model.block_causal or (policy.keeps and not policy.commits)):
        raise OptionError(
            f"decoder: expected one whose blocks follow one another for the family {name} and cache {show(cache)}, which go by "
            f"blocks; got {show(decoder)}"
        )
    if policy.commits and (decoder.edits or decoder.post_steps):
        raise OptionError(
            f"decoder: expected one that does not edit, because {show(cache)} keeps what is read once; got {show(decoder)}"
        )
    if (policy.appends or policy.commits) and not policy.keeps:
        raise OptionError(f"cache: expected keeps=True of a policy that appends or commits; got {show(cache)}")
    if smoothing is not None and decoder.drafts:
        raise OptionError(f"smoothing: expected None with drafts, which soft embeddings do not have; got {show(smoothing)}")
    if smoothing is not None and (not model.family.smooths or model.family.shift):
        raise OptionError(f"smoothing: expected None, since the family {name} takes no soft embeddings; got {show(smoothing)}")
    return decoder, policy, smoothing


def _refuse_traced(plug: object, attributes: tuple[str, ...], name: str) -> None:
    """`OptionError` for a field that sets a shape or a branch of the program and is not static."""
    if dataclasses.is_dataclass(plug):
        for field in dataclasses.fields(plug):
            if field.name in attributes and not field.metadata.get("static"):
                raise OptionError(
                    f"{name}: expected {type_name(plug)}.{field.name} to be static, since the program is made for it; write "
                    f'dataclasses.field(default=..., metadata={{"static": True}}) or a ClassVar'
                )


def _with_values(plug: object, name: str) -> Any:
    """The plug as its constructors check and store it, its leaves numbers. Plugs that jax or `object.__setattr__` made were
    checked by nobody, and one that was made while jax traced something may hold what has no value."""
    with reading(name):
        plug = _made_anew(plug)
        for leaf in jax.tree.leaves(plug):
            traced = isinstance(leaf, jax.core.Tracer)
            if traced or not isinstance(leaf, bool | int | float | np.generic | np.ndarray | jax.Array):
                what = "a value that exists only while jax traces a function" if traced else show(leaf)
                raise OptionError(f"{name}: expected numbers and arrays in its fields, got {what} in a {type_name(plug)}")
            if isinstance(leaf, int) and not -INT32_MAX <= leaf <= INT32_MAX:
                raise OptionError(f"{name}: expected whole numbers of 32 bits in its fields, got {show(leaf)}")
            if isinstance(leaf, np.ndarray | np.generic | jax.Array):
                jax.eval_shape(lambda x: x, leaf)  # refuses arrays of objects
            if isinstance(leaf, jax.Array) and leaf.is_deleted():
                raise OptionError(f"{name}: got an array that was donated or deleted in a {type_name(plug)}")
        hash((jax.tree.structure(plug), classes(plug)))  # part of a program's key
    return plug


def _made_anew(plug: Any) -> Any:
    if not _is_ours(type(plug)):
        return plug
    fields = {field.name: getattr(plug, field.name) for field in dataclasses.fields(plug)}
    return type(plug)(**{name: _made_anew(value) for name, value in fields.items()})


def _is_ours(kind: object) -> bool:
    return kind.__module__.split(".")[0] == "djax" and dataclasses.is_dataclass(kind)


def _try_plugs(model: Model, ask: Request[np.ndarray], plugs: Plugs, block: int, sampled: bool) -> None:
    """Call the methods of plugs that are not djax's on shapes alone: `OptionError` for what they raise, and for results that
    their contracts (`decoding/contract.py`, `caching/contract.py`) do not allow."""
    vocab = model.config.vocab

    def shape(*sizes: int, dtype: DType) -> Any:
        """What stands for an array where only shapes are computed."""
        return jax.ShapeDtypeStruct(sizes, dtype)

    whole, real = shape(dtype=jnp.int32), shape(dtype=jnp.float32)
    tick = Tick(whole, whole, whole, whole)
    tokens, where = shape(block, dtype=jnp.int32), shape(block, dtype=bool)
    decoder, policy, smoothing = plugs
    several = (decoder.drafts,) if decoder.drafts else ()
    logits = shape(*several, block, vocab, dtype=jnp.float32)
    drafts = (shape(*several, block, dtype=jnp.int32), whole) if several else (None, None)
    look = Look(logits, tokens, where, tokens, tick, whole, real, real, None, drafts=drafts[0], read=drafts[1])

    name = f"decoder: {type_name(decoder)}"

    def step(decoder: Decoder[Any], look: Look, seed: jax.Array) -> tuple[Any, ...]:
        state = decoder.init(block, vocab)
        results = decoder.step(state, look._replace(key=make_key(seed) if sampled else None))
        if not isinstance(results, tuple | list) or isinstance(results, Verdict) or len(results) != 2:
            what = _count(results)
            raise OptionError(f"{name}.step: expected two results, the state and a djax.Verdict; got {what}")
        return state, *results

    def plan(policy: Policy, tick: Tick, cached: jax.Array) -> Plan:
        planned = policy.plan(tick, cached)
        if not isinstance(planned, Plan):
            what = _count(planned)
            raise OptionError(f"cache: {type_name(policy)}.plan: expected a djax.caching.contract.Plan; got {what}")
        return Plan(*map(jnp.asarray, planned))

    if not _all_ours(decoder):
        with reading(f"decoder: trying {type_name(decoder)}"):
            seed = shape(dtype=jnp.uint32)
            state, after, verdict = jax.eval_shape(step, decoder, look, seed)
            if _kinds(after) != _kinds(state):
                raise OptionError(f"{name}.step: expected the state's shapes {state}, got {after}")
            if not isinstance(verdict, Verdict):
                raise OptionError(
                    f"{name}.step: expected a djax.Verdict (djax.decoding.contract.write makes one), got {show(verdict)}"
                )
            for field in ("tokens", "proposals"):
                _expect(getattr(verdict, field), (block,), jnp.integer, f"{name}: the {field} of its verdict")
            _expect(verdict.confidence, (block,), jnp.floating, f"{name}: the confidence of its verdict")
            for field in ("done", "stop"):
                _expect(getattr(verdict, field), (), jnp.bool_, f"{name}: {field} of its verdict")
            if several:
                _expect(verdict.drafts, (*several, block), jnp.integer, f"{name}: the drafts of its verdict")
                _expect(verdict.drafted, (), jnp.integer, f"{name}: drafted of its verdict")
            if verdict.steps is not None:
                _expect(verdict.steps, (), jnp.integer, f"{name}: steps of its verdict")
            if several and policy.commits and verdict.kept is not None:
                _expect(verdict.kept, (), jnp.integer, f"{name}: kept of its verdict")
            if decoder.advances:
                _expect(verdict.advance, (), jnp.integer, f"{name}: advance of its verdict")
    if not _all_ours(policy):
        with reading(f"cache: trying {type_name(policy)}"):
            planned = jax.eval_shape(plan, policy, tick, whole)
            for field in Plan._fields:
                _expect(getattr(planned, field), (), jnp.bool_, f"cache: {type_name(policy)}.plan: its {field}")
    if smoothing is not None and not _all_ours(smoothing):
        with reading(f"smoothing: trying {type_name(smoothing)}"):
            for method in ("weight", "least"):
                out = jax.eval_shape(lambda s, n, method=method: getattr(s, method)(n), smoothing, whole)
                _expect(out, (), jnp.floating, f"smoothing: {type_name(smoothing)}.{method}")


def _count(results: Any) -> str:
    """How many results a method returned, as an error says it."""
    several = isinstance(results, tuple | list) and not hasattr(results, "_fields")
    return f"{len(results)} results" if several else f"one, a {type_name(results)}"


def _all_ours(plug: object) -> bool:
    return all(
        _is_ours(kind) for kind in jax.tree.leaves(classes(plug)) if dataclasses.is_dataclass(kind) or kind is type(plug)
    )


def _kinds(tree: object) -> tuple:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _expect(value: Any, shape: tuple[int, ...], kind: Any, name: str) -> None:
    if getattr(value, "shape", None) != shape or not jnp.issubdtype(value.dtype, kind):
        raise OptionError(f"{name}: expected {kind.__name__} of shape {shape}, got {show(value)}")


def _check_canvas(model: Model, where: str, prompt: int, gen_length: int, min_gen_length: int, policy: Policy) -> None:
    """One prompt's lengths against the model's positions and the cache's reach; `where` names it in the error."""
    total, most = prompt + gen_length, model.config.max_positions
    if total > most:
        raise CanvasError(
            f"{where}: {prompt} tokens + gen_length {gen_length} = {total} positions, the model has {most}; gen_length may "
            f"be {max(0, most - prompt)} at most"
        )
    if min_gen_length > gen_length:
        raise OptionError(f"min_gen_length: expected at most gen_length, {gen_length}, for {where}, got {min_gen_length}")
    beyond = [reach for reach in policy.reach() if total < reach != TO_THE_END]
    if beyond:
        raise OptionError(
            f"cache: {show(policy)} reaches {beyond[0]} positions beyond its block; {where} has a canvas of {total}, "
            f"so expected at most {total}"
        )


def bucket(length: int) -> int:
    """The padded canvas length: multiples of 64 up to 1024, then of 256. What is padded is seen by nobody."""
    step = 64 if length <= 1024 else 256
    return -(-length // step) * step


def request(
    ids: Sequence[np.ndarray],
    seeds: Sequence[int],
    config: Config,
    *,
    rows: int,
    gen_length: Sequence[int],
    min_gen_length: Sequence[int],
    block: int,
    temperature: Sequence[float],
    top_p: Sequence[float],
    top_k: Sequence[int],
    early_stop: Sequence[bool],
    align_blocks: bool,
    plugs: Sequence[Plugs],
) -> Request[np.ndarray]:
    """Lay the prompts out as canvases. Rows beyond the prompts have an empty canvas and never start."""
    empty = [0] * (rows - len(ids))
    prompt = np.array([*map(len, ids), *empty], np.int32)
    total = prompt + np.array([*gen_length, *empty], np.int32)
    tokens = np.full((rows, bucket(int(np.max(total)))), config.eos_id, np.int32)
    for b, p in enumerate(ids):
        tokens[b, : len(p)] = p
        tokens[b, len(p) : total[b]] = config.mask_id
    start = prompt // block * block if align_blocks else prompt
    return Request(
        tokens=tokens,
        prompt=prompt,
        total=total,
        least=prompt + np.array([*min_gen_length, *empty], np.int32),
        start=start,
        seed=np.array([*seeds, *empty], np.uint32),
        temperature=np.array([*temperature, *empty], np.float32),
        top_p=np.array([*top_p, *[1.0] * len(empty)], np.float32),
        top_k=np.array([*top_k, *empty], np.int32),
        early_stop=np.array([*early_stop, *empty], bool),
        # Every turn of an unfinished row writes a token, or is one of its block's post-steps.
        cap=total - prompt + -(-(total - start) // block) * np.int32(plugs[0][0].post_steps),
        numbers=_numbers(plugs, rows),
    )


def _numbers(plugs: Sequence[Plugs], rows: int) -> tuple[np.ndarray, ...]:
    """The leaves of the plugs, each with one entry a row; rows without a prompt have the first one's."""
    if all(one is plugs[0] for one in plugs):
        leaves = [np.asarray(n, dtype_of(n)) for n in jax.tree.leaves(plugs[0])]
        return tuple(np.broadcast_to(n, (rows, *n.shape)) for n in leaves)
    padded = [*plugs, *[plugs[0]] * (rows - len(plugs))]
    each = zip(*map(jax.tree.leaves, padded), strict=True)
    return tuple(np.stack([np.asarray(n, dtype_of(column[0])) for n in column]) for column in each)


def dtype_of(number: object) -> Any:
    """A plug's Python number as the program holds it."""
    return {bool: np.bool_, int: np.int32, float: np.float32}.get(type(number), getattr(number, "dtype", None))


def check_memory(model: Model, ask: Request[np.ndarray], plugs: Plugs, block: int) -> None:
    """Refuse a batch whose carry and largest activations cannot fit the device; an estimate from below."""
    (rows, length), c = ask.tokens.shape, model.config
    # Under a mesh an estimate further from below: as if all of this were split evenly, too.
    devices = 1 if model.mesh is None else model.mesh.size
    carried = sum(carried_bytes(model, ask, plugs, block).values()) // devices
    logits = max(1, plugs[0].drafts) * (4 * rows * block * c.vocab if plugs[1].keeps else 4 * block * c.vocab) // devices
    need = model.bytes_per_device + carried + logits + 4 * c.heads * length * length // devices
    have = device_memory()
    if need > have:
        raise does_not_fit(ask, f"at least {need / 2**30:.1f} GiB, the device has {have / 2**30:.1f} GiB")


def carried_bytes(model: Model, ask: Request[np.ndarray], plugs: Plugs, block: int) -> dict[str, int]:
    """Bytes of the large parts of the loop's carry: the decoder's state, the cache, the soft embeddings."""
    (rows, length), c = ask.tokens.shape, model.config
    decoder, policy, smoothing = plugs
    each = jax.eval_shape(lambda: decoder.init(block, c.vocab))
    numbers = sum(n.nbytes for n in ask.numbers)
    parts = {"decoder": jax.tree.map(lambda a: jax.ShapeDtypeStruct((rows, *a.shape), a.dtype), each)}
    if policy.keeps:
        parts["cache"] = jax.eval_shape(lambda p: model.family.empty_cache(p, c, rows, length), model.params)
    if smoothing is not None:
        parts["soft embeddings"] = jax.eval_shape(lambda p, t: model.family.embed(p, c, t), model.params, ask.tokens)
    sizes = {name: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(part)) for name, part in parts.items()}
    return sizes | {"decoder": sizes["decoder"] + numbers}


def does_not_fit(ask: Request[np.ndarray], need: str) -> BatchError:
    rows, length = ask.tokens.shape
    cure = "pass max_batch (it changes no answer)" if rows > 1 else "lower gen_length or block_length"
    return BatchError(f"{rows} prompts on a canvas of {length} need {need}; {cure}")
