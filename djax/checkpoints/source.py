"""A checkpoint as it lies on disk, HF's or ours: what it is, and its parameters one at a time on the host."""

import dataclasses
import hashlib
import math
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from djax import text
from djax.convert import orbax_files, rules
from djax.convert.safetensors_files import INDEX, READ, SINGLE, TensorFiles
from djax.errors import CheckpointError, OptionError, PathError, UnsupportedModelError, list_problems, shorten
from djax.models import FAMILIES
from djax.models.contract import Config, DType, ExpertConfig
from djax.models.family import Family
from djax.runtime.sharding import find_devices
from djax.storage.checkpoint_files import check_tree, is_there, read_object
from djax.storage.consistency import check_dtypes, check_generation_config, check_manifest
from djax.storage.files import expand_home
from djax.text.contract import Tokenizer

SHIPPED = Path(__file__).parents[1] / "small"
# Others that ship, by name.
NAMED = {"tiny-td": Path(__file__).parents[1] / "tiny_td"}
MANIFEST, ORBAX = "djax.json", "params"
CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# How tokenizers of known families spell the mask, for those that do not declare it as their mask token.
_MASK_TEXTS = ("<|mask|>", "<|mdm_mask|>")
# Roles that may share an id with each other, but not with the mask.
_OTHER_ROLES = ("pad", "bos", "unk", "sep", "cls")
# Published lists have up to five. Each id is a comparison in the compiled program.
_MOST_EOS_IDS = 64
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Examine = Callable[[str, np.ndarray], None]


class Source:
    """A checkpoint that is open for reading.

    family, config, hf_config (config.json), tokenizer: what it is. dtype, shapes: of the parameters as they will be; saved:
    their shapes and dtypes as they are in an Orbax directory. stored: HF tensor name -> safetensors' name of the dtype that
    it has, or had before it was converted. sha256: HF tensor name -> digest of its bytes, where a conversion noted it.
    order: the parameters' paths, in the order in which they are best read.
    """

    def __init__(self, directory: Path, dtype: str | None, examine: Examine | None, verify: bool = False) -> None:
        self.directory, self._wish, self._examine, self._verify = directory, dtype, examine, verify
        self.family, self.config, self.hf_config, self.tokenizer = describe(directory)
        self._files: TensorFiles | None = None
        self.sha256: dict[str, str] = {}
        manifest = read_manifest(directory)
        if verify and manifest is None:
            raise OptionError(
                f"verify: expected a directory that `djax convert` or `djax.save` wrote, which holds SHA-256 sums; "
                f"{directory} is in HF's layout, which has none"
            )
        if manifest is not None:
            self._open_orbax(manifest)
        else:
            self._files = TensorFiles(directory)
            try:
                self._open_hf(self._files)
            except BaseException:
                self._files.close()
                raise
        self.shapes = shapes(self.family, self.config, self.dtype)

    def _open_orbax(self, manifest: Mapping[str, Any]) -> None:
        directory, config = self.directory, self.config
        self.layout, self.stored, self.sha256 = "Orbax", manifest["stored"], manifest.get("sha256", {})
        self._sums: dict[str, str] = manifest.get("parameters", {})
        check_manifest(directory, manifest, self.family.name, dataclasses.asdict(config))
        self.dtype = DTYPES[self._wish or manifest["dtype"]]
        if not is_there(directory, ORBAX):
            raise PathError(f"{directory / ORBAX}: the Orbax checkpoint cannot be restored: it is not there")
        check_tree(directory, ORBAX)
        with self._orbax_errors():
            there = orbax_files.describe(directory / ORBAX)
        # Before anything is made from the config's numbers.
        if config.layers > len(there):
            raise CheckpointError(f"{directory}: config.json says {config.layers} layers, there are {len(there)} parameters")
        self.saved = shapes(self.family, config, DTYPES[manifest["dtype"]])
        self.order = list(self.saved)
        # Orbax itself reads arrays of another shape, and casts those of another dtype.
        wanted = {path: (leaf.shape, np.dtype(leaf.dtype)) for path, leaf in self.saved.items()}
        wrong = [
            f"{'.'.join(path)}: there is {_kind(there.get(path))}, config.json and {MANIFEST} ask for {_kind(wanted.get(path))}"
            for path in sorted({*there, *wanted})
            if there.get(path) != wanted.get(path)
        ]
        if wrong:
            raise CheckpointError(f"{directory}: {len(wrong)} problems with the parameters:\n  {list_problems(wrong)}")
        if self._verify:
            self._check_sums()

    @contextmanager
    def _orbax_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax raises many kinds for a damaged directory; all mean the same to a user
            reason = shorten(str(error))
            raise CheckpointError(f"{self.directory}: the Orbax checkpoint cannot be restored: {reason}") from error

    def _check_sums(self) -> None:
        """Whether there is a sum for each parameter; older versions of djax noted only those of HF's tensors."""
        file = self.directory / MANIFEST
        if self._sums:
            missing = [".".join(path) for path in self.order if ".".join(path) not in self._sums]
            if missing:
                raise CheckpointError(f"{file}: has no SHA-256 sum for {list_problems(missing, ', ')}; convert it again")
            return
        tables = [t for t in self.family.layouts(self.config).values() if {r.source for r in t} == self.sha256.keys()]
        if not tables:
            raise CheckpointError(
                f"{file}: holds no SHA-256 sums of these parameters, so nothing can be verified; convert it again"
            )
        for rule in tables[0]:
            was, leaf = READ.get(self.stored.get(rule.source, "")), self.saved[rule.target]
            if was is None or np.promote_types(was, leaf.dtype) != leaf.dtype:
                raise CheckpointError(
                    f"{file}: holds the SHA-256 sums of HF's tensors alone, and {rule.source} was narrowed when it was "
                    "converted, so nothing can be verified; convert it again"
                )
        self._parts: dict[rules.Path, list[rules.Rule]] = defaultdict(list)
        for rule in tables[0]:
            self._parts[rule.target].append(rule)

    def _verify_leaf(self, path: rules.Path, leaf: np.ndarray) -> None:
        name = ".".join(path)
        if self._sums:
            sums = {name: (self._sums[name], sum_bytes(leaf))}
        else:
            tensors = rules.unload(self._parts[path], lambda _: leaf)
            sums = {n: (self.sha256[n], sum_bytes(_narrow_exactly(t, READ[self.stored[n]]))) for n, t in tensors}
        for of, (expected, found) in sums.items():
            if found != expected:
                raise CheckpointError(
                    f"{self.directory}: {of} is damaged: its SHA-256 is {found}, {MANIFEST} says {expected}; "
                    "copy or convert it again"
                )

    def _open_hf(self, files: TensorFiles) -> None:
        self.stored = {name: kind for name, (_, kind) in files.found.items()}
        # Before anything is made from the config's numbers.
        if self.config.layers > len(files.found):
            raise CheckpointError(
                f"{self.directory}: config.json says {self.config.layers} layers, there are {len(files.found)} tensors"
            )
        # An expert has tensors of its own, or a row of one.
        experts = 1
        if self.family.has_experts:
            assert isinstance(self.config, ExpertConfig), "has_experts"
            experts = self.config.experts
        if experts > max([len(files.found), *(shape[0] for shape, _ in files.found.values() if shape)]):
            raise CheckpointError(f"{self.directory}: config.json says {experts} experts, the tensors have fewer")
        table = match(self.family, self.config, files)
        self.layout = (
            f"HF, {len({rule.source for rule in table})} tensors, stored as {', '.join(sorted(set(self.stored.values())))}"
        )
        self.dtype = parameter_dtype(self.hf_config, self.stored, self._wish)
        self._parts = defaultdict(list)
        for rule in table:
            self._parts[rule.target].append(rule)
        self.order = list(self._parts)

    @property
    def bytes(self) -> int:
        """Of the parameters as stored: what reading all of them reads."""
        if self._files is not None:
            return self._files.bytes
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in self.saved.values())

    def get(self, path: rules.Path) -> np.ndarray:
        """A parameter, complete, in the dtype it will have."""
        leaf = self.shapes[path]
        if self._files is None:
            saved = self.saved[path]
            with self._orbax_errors():
                found = orbax_files.read(self.directory / ORBAX, path, saved.shape, saved.dtype)
            if self._verify:
                self._verify_leaf(path, found)
            return found.astype(leaf.dtype, copy=False)
        return rules.load(self._parts[path], leaf.shape, leaf.dtype, self._read)

    def _read(self, name: str) -> np.ndarray:
        assert self._files is not None, "only HF's layout is read by rules"
        tensor = self._files.read(name)
        if self._examine is not None:
            self._examine(name, tensor)
        return tensor

    def close(self) -> None:
        if self._files is not None:
            self._files.close()


def _kind(kind: tuple[tuple[int, ...], np.dtype] | None) -> str:
    return "nothing" if kind is None else f"{kind[1]} {list(kind[0])}"


def _narrow_exactly(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """An array in the dtype it was widened from, or as it is, where a value has bits that dtype cannot hold.

    A flipped low bit of a widened value would be rounded away, and its sum would be right.
    """
    narrow = array.astype(dtype, copy=False)
    return narrow if np.array_equal(narrow.astype(array.dtype), array, equal_nan=True) else array


def sum_bytes(array: np.ndarray) -> str:
    """SHA-256 of an array's values, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


@contextmanager
def opened(
    path: str | os.PathLike | None, dtype: str | None = None, examine: Examine | None = None, verify: bool = False
) -> Iterator[Source]:
    """The checkpoint at a path, or the small model's. examine: called with each HF tensor as it is read, whole. verify: each
    parameter is compared with its SHA-256 sum as it is read.

    Raises `PathError`, `CheckpointError` (with all that is wrong), `UnsupportedModelError`, or
    `OptionError` if jax has no devices.
    """
    find_devices()  # also shapes are traced on one: before anything is fetched
    source = Source(find(path), dtype, examine, verify)
    try:
        yield source
    finally:
        source.close()


def find(path: str | os.PathLike | None) -> Path:
    """The directory of a checkpoint: as it is, or fetched from the hub. Raises `PathError`."""
    try:
        directory = SHIPPED if path is None else expand_home(path)
        is_entry = os.path.lexists(directory)
        if not is_entry:
            directory = NAMED.get(str(path), directory)
        is_entry, is_directory = directory.exists(), directory.is_dir()
    except (OSError, ValueError, RuntimeError, TypeError) as error:  # names no file can have, a ~ without a home, no path
        raise PathError(f"{shorten(repr(path))}: expected the path of a checkpoint directory: {error}") from error
    if not is_entry and _HUB_ID.fullmatch(str(path)):
        return _fetch(str(path))
    if not is_directory:
        what = "is a file" if is_entry else "does not exist"
        raise PathError(f"{directory}: expected a checkpoint directory, this {what}")
    return directory


def _fetch(name: str) -> Path:
    """A hub model's files that djax reads, in the hub's own cache; without a network, as they lie there. None is code."""
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_CACHE.startswith("~"):  # it would become a directory of that name here
        raise PathError(f"{name}: no such directory, and no home directory for the hub's cache; set HF_HOME to a directory")
    # At the top only: repositories keep the same weights for other programs in folders.
    wanted = ["*.json", "*.safetensors", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as error:  # the client and what it is built on raise many kinds
        no = f"{name}: there is no such directory, and as a model of the Hugging Face hub it cannot be had"
        raise PathError(f"{no}: {_why_not(name, error)}") from error


def _why_not(name: str, error: Exception) -> str:
    """What the hub's client met, and what would work."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return f"only accounts that agreed to its terms get it; agree at {hub}/{name}, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{hub} knows no such model; check the name, or run `hf auth login` if it is a private one"
    if isinstance(error, errors.LocalEntryNotFoundError):  # in the cache, where the client looks if it reaches nobody
        return (
            f"the hub's cache, {constants.HF_HUB_CACHE}, does not have all of it, and {hub} cannot be asked "
            f"({_in_a_line(error.__cause__ or error)}); where there is a network run `hf download {name} --local-dir DIR`, "
            "bring DIR here and give its path"
        )
    return _in_a_line(error)


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def describe(directory: Path) -> tuple[Family, Any, dict, Any]:
    """Family, config, config.json and tokenizer of a checkpoint, HF's or ours."""
    file = directory / "config.json"
    hf = read_object(directory, "config.json")
    if hf is None:
        raise PathError(f"{directory}: expected a checkpoint with a config.json, there is none")
    # Not by model_type: LLaDA and LLaDA-MoE share one.
    architectures = hf.get("architectures") or []
    if not isinstance(architectures, list):
        architectures = [architectures]
    names = [n for n, family in FAMILIES.items() if any(name in family.architectures for name in architectures)]
    if not names:
        known = "; ".join(f"{n} ({', '.join(family.architectures)})" for n, family in FAMILIES.items())
        raise UnsupportedModelError(
            f"{file}: unknown model family, architectures={shorten(repr(architectures))}, "
            f"model_type={shorten(repr(hf.get('model_type')))}; djax knows {known}"
        )
    if len(names) > 1:
        raise CheckpointError(f"{file}: architectures={architectures} are of {' and '.join(names)}; correct the wrong one")
    family = FAMILIES[names[0]]
    tokenizer = text.load_tokenizer(directory)
    # Only its token ids are of interest: djax takes its settings from the caller.
    generation = read_object(directory, GENERATION) or {}
    check_dtypes(directory, hf)
    mask_id, eos_ids, named = _special_ids(hf, generation, tokenizer, family, directory)
    config = family.config_type.from_hf(hf, mask_id=mask_id, eos_id=eos_ids[0], more_eos_ids=eos_ids[1:])
    _check_ids(mask_id, eos_ids, named, config.vocab, directory)
    check_generation_config(directory, hf, generation)
    if GENERATION in named["eos"] and eos_ids != named["eos"].get(CONFIG):
        # What is saved or exported has no generation_config.json: its config.json names all of them.
        hf = hf | {"eos_token_id": eos_ids[0] if len(eos_ids) == 1 else list(eos_ids)}
    if tokenizer is not None and len(tokenizer) > config.vocab:
        raise CheckpointError(f"{directory}: the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {config.vocab}")
    return family, config, hf, tokenizer


Named = dict[str, dict[str, tuple[int, ...]]]


def _special_ids(
    hf: dict, generation: dict, tokenizer: Tokenizer | None, family: Family, directory: Path
) -> tuple[int, tuple[int, ...], Named]:
    """The mask's id; the ids that end an answer; and every id that the checkpoint names: role -> file -> ids.

    The mask is the tokenizer's or config.json's, which must agree. What ends an answer is config.json's eos_token_id, one id or
    a list of them, and what generation_config.json names in addition, where it names all of config.json's too (then it says
    more, otherwise something else); if config.json has none generation_config.json's, then the tokenizer's: that one may end a
    turn rather than a text. The first id fills what follows an early stop. What no file names is the family's default, which is
    announced. Raises `CheckpointError` for a value of the wrong type, an empty list and an id that is in it twice.
    """
    named: Named = {role: {} for role in ("mask", "eos", *_OTHER_ROLES)}
    if tokenizer is not None:
        vocabulary = tokenizer.get_vocab()
        texts = [t for t in (tokenizer.mask_token, *_MASK_TEXTS) if t in vocabulary]
        if texts:
            named["mask"][TOKENIZER] = (vocabulary[texts[0]],)
        for role in ("eos", *_OTHER_ROLES):
            value = getattr(tokenizer, f"{role}_token_id", None)
            if value is not None:
                named[role][TOKENIZER] = (value,)
    for file, found in ((CONFIG, hf), (GENERATION, generation)):
        for role in ("mask", "eos", "pad", "bos"):
            value = found.get(f"{role}_token_id")
            if value is not None:
                named[role][file] = _read_ids(value, f"{directory / file}: {role}_token_id", many=role == "eos")
    if len(set(named["mask"].values())) > 1:
        which = {file: ids[0] for file, ids in named["mask"].items()}
        raise CheckpointError(f"{directory}: the mask token id differs, {which}; correct the wrong file")
    mask = next(iter(named["mask"].values()), None)
    if mask is None:
        mask = (_announce("mask", family.mask_id, directory),)
    eos = named["eos"].get(CONFIG)
    generated = named["eos"].get(GENERATION, ())
    if eos is None:
        eos = generated or named["eos"].get(TOKENIZER) or (_announce("eos", family.eos_id, directory),)
    elif set(eos) < set(generated):
        eos += tuple(one for one in generated if one not in eos)
    return mask[0], eos, named


def _read_ids(value: object, where: str, many: bool) -> tuple[int, ...]:
    """One id, or where there may be many a list of them."""
    ids = value if many and isinstance(value, list) else [value]
    expected = "one integer or a list of them" if many else "one integer"
    if not ids or not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
        raise CheckpointError(f"{where}: expected {expected}, got {value!r:.200}")
    if len(set(ids)) != len(ids):
        raise CheckpointError(f"{where}: expected different ids, got {value!r:.200}")
    if len(ids) > _MOST_EOS_IDS:
        raise CheckpointError(f"{where}: expected at most {_MOST_EOS_IDS} ids, got {len(ids)}")
    return tuple(ids)


def _check_ids(mask_id: int, eos_ids: tuple[int, ...], named: Named, vocab: int, directory: Path) -> None:
    """Every id lies in the vocabulary, and the mask's is no other's: a position that holds it waits for a token, so a token
    with its id could never be proposed. Other roles often share an id. Raises `CheckpointError`."""
    used: dict[str, list[tuple[int, str | None]]] = {
        "mask": [(mask_id, None)],
        "eos": [(one, None) for one in eos_ids],
    }
    for role in ("eos", *_OTHER_ROLES):
        used.setdefault(role, []).extend((one, file) for file, ids in named[role].items() for one in ids)
    for role, ids in used.items():
        for value, file in ids:
            where = f"{directory}: " if file is None else f"{directory / file}: "
            if not 0 <= value < vocab:
                cure = f"set {role}_token_id in config.json" if file is None else f"correct {role}_token_id there, or remove it"
                raise CheckpointError(f"{where}the {role} token id {value} is outside the vocabulary of {vocab}; {cure}")
            if role != "mask" and value == mask_id:
                raise CheckpointError(
                    f"{where}the {role} token id {value} is the mask's too, so no {role} token could ever stand in a canvas; "
                    f"set {role}_token_id or mask_token_id in config.json to its own id"
                )


def _announce(name: str, value: int, directory: Path) -> int:
    print(f"djax: {directory} names no {name} token; using the family's default, id {value}", file=sys.stderr)
    return value


def shapes(family: Family, config: Config, dtype: DType) -> dict[rules.Path, jax.ShapeDtypeStruct]:
    """Each parameter's shape and dtype in a model of this dtype."""
    return traverse_util.flatten_dict(nn.meta.unbox(family.abstract(config, dtype)))


def parameter_dtype(hf: dict, stored: dict[str, str], wish: str | None) -> Any:
    """What is wished, what config.json says, or what most tensors are stored as."""
    if wish is not None:
        return DTYPES[wish]
    declared = str(hf.get("torch_dtype") or hf.get("dtype") or "").removeprefix("torch.")
    if not declared and stored:
        declared = {"BF16": "bfloat16"}.get(Counter(stored.values()).most_common(1)[0][0], "float32")
    return DTYPES.get(declared, jnp.float32)


def match(family: Family, config: Config, files: TensorFiles) -> list[rules.Rule]:
    """The rule table of the layout the files are in, checked strictly."""

    def count_known(table: list[rules.Rule]) -> int:
        wanted = {rule.source for rule in table}
        return len(set(rules.undo_prefix(files.found, wanted)[0].values()) & wanted)

    # The layout whose names match best; whatever does not match it is reported against it.
    table = max(family.layouts(config).values(), key=count_known)
    rules.check(files.found, table, {path: leaf.shape for path, leaf in shapes(family, config, jnp.float32).items()})
    return table


def written(family: Family, config: Config) -> list[rules.Rule]:
    """What an export writes: the rules that share a parameter together, so that each parameter is fetched once."""
    return sorted(family.layouts(config)["hf"], key=lambda rule: rule.target)


def kinds(
    family: Family, config: Config, stored: Mapping[str, str], have: DType, wish: str | None
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each tensor of an export: the dtype that is wished, else the one it is known to have had, but never
    wider than its parameter in a model of dtype `have`."""
    common = Counter(stored.values()).most_common(1)
    leaves = shapes(family, config, have)

    def kind(rule: rules.Rule) -> np.dtype:
        if wish is not None:
            return np.dtype(DTYPES[wish])
        narrowest = np.dtype(leaves[rule.target].dtype)
        was = stored.get(rule.source, common[0][0] if common else None)
        wide = np.dtype(READ[was]) if was in READ else narrowest
        return wide if wide.itemsize <= narrowest.itemsize else narrowest

    # In the table's order, by which tensors are dealt out to shards: those of a checkpoint that comes back lie where they lay.
    return {rule.source: (rule.shape, kind(rule)) for rule in family.layouts(config)["hf"]}


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The facts about an Orbax directory; None if this is none.

    dtype: of the saved parameters. stored, sha256: of the HF tensors they were made from, by name. parameters: SHA-256 of each
    parameter as it is saved, by its path's parts with dots. Raises `CheckpointError`, also for HF's weights next to it.
    """
    file = directory / MANIFEST
    manifest = read_object(directory, MANIFEST)
    if manifest is None:
        return None

    def names(key: str, default: object = None) -> bool:
        value = manifest.get(key, default)
        return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())

    dtype = manifest.get("dtype")
    known = isinstance(dtype, str) and dtype in DTYPES
    if not known or not names("stored") or not names("sha256", {}) or not names("parameters", {}):
        raise CheckpointError(f"{file}: not a manifest that djax wrote; convert the checkpoint again")
    weights = [name for name in (SINGLE, INDEX) if is_there(directory, name)]
    if weights:
        raise CheckpointError(
            f"{directory}: {MANIFEST}, of an Orbax checkpoint, and {' and '.join(weights)} are both there; if the Orbax "
            f"checkpoint has the weights you want, remove {weights[0]}, if not, remove {MANIFEST} and {ORBAX}"
        )
    return manifest
