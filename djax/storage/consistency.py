"""Files of one checkpoint that contradict each other: refused, since whichever is believed may be the wrong one.

What published checkpoints usually do is no contradiction: a generation_config.json with more EOS ids than config.json, a
tokenizer whose EOS ends a turn rather than a text, a pad token that is the EOS, the same chat template in two files.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from djax.errors import CheckpointError, shorten

GENERATION = "generation_config.json"


def check_generation_config(directory: Path, hf: Mapping[str, Any], generation: Mapping[str, Any]) -> None:
    """generation_config.json against config.json: EOS ids, of which one must be common, and the mask id.

    What config.json does not name, generation_config.json may. Raises `CheckpointError`.
    """
    named = {name: _ids(directory, generation, name) for name in ("eos_token_id", "mask_token_id")}
    for name, ids in named.items():
        used = hf.get(name)
        known = {i for i in (used if isinstance(used, list) else [used]) if isinstance(i, int)}
        if ids and known and not ids & known:
            raise CheckpointError(
                f"{directory}: {GENERATION} says {name}={generation[name]}, config.json says {used}; correct the wrong one, or "
                f"remove {GENERATION}"
            )


def _ids(directory: Path, generation: Mapping[str, Any], name: str) -> set[int]:
    value = generation.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise CheckpointError(
            f"{directory / GENERATION}: {name}: expected an integer or a list of them, got {shorten(repr(value))}"
        )
    return set(ids)


def check_dtypes(directory: Path, hf: Mapping[str, Any]) -> None:
    """torch_dtype and dtype, its newer name, must not differ. Raises `CheckpointError`, also if one is no string."""
    said = {key: hf[key] for key in ("torch_dtype", "dtype") if hf.get(key) is not None}
    for key, value in said.items():
        if not isinstance(value, str):
            raise CheckpointError(f"{directory / 'config.json'}: {key}: expected a string, got {shorten(repr(value))}")
    if len({value.removeprefix("torch.") for value in said.values()}) > 1:
        told = ", ".join(f"{key}={shorten(repr(value))}" for key, value in said.items())
        raise CheckpointError(f"{directory / 'config.json'}: {told}; correct the wrong one")


def check_manifest(directory: Path, manifest: Mapping[str, Any], family: str, config: Mapping[str, Any]) -> None:
    """djax.json against the config that config.json gives. Raises `CheckpointError`."""
    there = manifest.get("family", family)
    if there != family:
        raise CheckpointError(
            f"{directory}: djax.json says family {shorten(repr(there))}, config.json {family!r}; correct the wrong one"
        )
    said = manifest.get("config") or {}
    if not isinstance(said, dict):
        raise CheckpointError(f"{directory / 'djax.json'}: config: expected an object, got {shorten(repr(said))}")
    for name, value in config.items():
        value = list(value) if isinstance(value, tuple) else value
        if name in said and said[name] != value:
            raise CheckpointError(
                f"{directory}: djax.json says {name}={shorten(repr(said[name]))}, config.json and the tokenizer {value!r}; "
                "correct the wrong one"
            )


def check_chat_templates(directory: Path, templates: Mapping[str, Any]) -> None:
    """The default chat template of each file that has one: all must be the same.

    templates: file name -> template. Line ends and one newline at the end, which rendering drops, may differ. Raises
    `CheckpointError`.
    """
    first: tuple[str, str] | None = None
    for file, template in templates.items():
        if template is None:
            continue
        text = _default_template(directory, file, template)
        if text is None:
            continue
        text = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
        if first is not None and text != first[1]:
            raise CheckpointError(
                f"{directory}: {first[0]} and {file} have different chat templates; remove the one that is not meant"
            )
        first = first or (file, text)


def _default_template(directory: Path, file: str, value: object) -> str | None:
    """A template, or the one named default of several, as tokenizer_config.json has them."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        pairs = [(entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None) for entry in value]
    else:
        pairs = list(value.items()) if isinstance(value, dict) else [(None, None)]
    if not all(isinstance(text, str) for pair in pairs for text in pair):
        raise CheckpointError(
            f"{directory / file}: chat_template: expected a string, or names with strings, got {shorten(repr(value))}"
        )
    defaults = [template for name, template in pairs if name == "default"]
    if len(set(defaults)) > 1:
        raise CheckpointError(f"{directory / file}: chat_template: two templates are named 'default'")
    return defaults[0] if defaults else None


def check_special_tokens(directory: Path, files: Mapping[str, Any]) -> None:
    """The mask and EOS tokens that the tokenizer's files name, and their ids: each must be said in one way.

    files: file name -> its JSON object. Raises `CheckpointError`.
    """
    for kind in ("mask_token", "eos_token"):
        named = {}
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            value = files[file].get(kind) if file in files else None
            value = value.get("content") if isinstance(value, dict) else value
            if not isinstance(value, str | None):
                raise CheckpointError(f"{directory / file}: {kind}: expected a string, got {shorten(repr(value))}")
            if value is not None:
                named[file] = value
        if len(set(named.values())) > 1:
            told = ", ".join(f"{file} says {shorten(repr(token))}" for file, token in named.items())
            raise CheckpointError(f"{directory}: {kind}: {told}; correct the wrong one")
        for file, token in named.items():
            ids = _ids_of(token, files)
            if not ids:
                raise CheckpointError(
                    f"{directory}: {file} says {kind} {shorten(repr(token))}, which tokenizer.json does not have; correct it"
                )
            if len(set(map(str, ids.values()))) > 1:
                told = ", ".join(f"{shorten(repr(value))} in {where}" for where, value in ids.items())
                raise CheckpointError(f"{directory}: {kind} {shorten(repr(token))} has the ids {told}; correct the wrong one")


def _ids_of(token: str, files: Mapping[str, Any]) -> dict[str, Any]:
    """Where a token's id is written, and which it is there."""
    found = {}
    tokenizer = files["tokenizer.json"]
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict) and token in vocabulary:
        found["tokenizer.json's vocabulary"] = vocabulary[token]
    if isinstance(vocabulary, list):  # Unigram's pairs of token and score
        places = [n for n, pair in enumerate(vocabulary) if isinstance(pair, list) and pair[:1] == [token]]
        if places:
            found["tokenizer.json's vocabulary"] = places[0]
    added_tokens = tokenizer.get("added_tokens")
    for entry in added_tokens if isinstance(added_tokens, list) else ():
        if isinstance(entry, dict) and entry.get("content") == token:
            found["tokenizer.json's added_tokens"] = entry.get("id")
    decoder = files.get("tokenizer_config.json", {}).get("added_tokens_decoder")
    for value, entry in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict) and entry.get("content") == token:
            found["tokenizer_config.json's added_tokens_decoder"] = value
    added = files.get("added_tokens.json", {})
    if token in added:
        found["added_tokens.json"] = added[token]
    return found
