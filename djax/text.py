"""Prompts to tokens and tokens to text: the tokenizer, the chat template, and what counts as one prompt."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from djax.errors import CheckpointError, PromptError

FORMS = "a string, a list of strings, chat messages, a list of chats, token ids, or a list of token ids"


def load_tokenizer(directory: Path) -> Any:
    """The HF fast tokenizer of a checkpoint directory, None if it has none. No code of the checkpoint is run."""
    if not (directory / "tokenizer.json").is_file():
        return None
    # transformers advises at import that torch is missing; djax uses its tokenizers alone.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # the tokenizer library raises bare Exception for a malformed file
        raise CheckpointError(f"{directory}: tokenizer.json cannot be read: {error}") from error
    from djax import chat_template  # here, since it imports jinja2, which takes long

    chat_template.check_template(tokenizer, str(directory))
    return tokenizer


def encode(tokenizer: Any, prompts: Any, vocab: int, mask_id: int) -> tuple[list[np.ndarray], bool]:
    """Every prompt as int32 ids, and whether a single prompt came.

    A string is a user's message and goes through the chat template if the tokenizer has one; token ids are taken as they
    are. Raises `PromptError` for an empty prompt, for an id outside the vocabulary, for a prompt that contains the
    mask token (it would be decoded over), and for text without a tokenizer.
    """
    many, single = _separate(prompts)
    return [_checked(_one(tokenizer, p), i, vocab, mask_id, tokenizer) for i, p in enumerate(many)], single


def decode(tokenizer: Any, tokens: np.ndarray) -> str | None:
    return None if tokenizer is None else tokenizer.decode(tokens.tolist(), skip_special_tokens=True)


def _separate(prompts: Any) -> tuple[list, bool]:
    """A list of prompts, each a string, a chat (list of mappings) or ids, and whether there was just one."""
    if isinstance(prompts, str):
        return [prompts], True
    if isinstance(prompts, np.ndarray) or hasattr(prompts, "__array__"):
        array = np.asarray(prompts)
        if array.ndim not in (1, 2):
            raise PromptError(f"prompts: expected token ids of shape [P] or [B, P], got an array of shape {array.shape}")
        return ([array], True) if array.ndim == 1 else (list(array), False)
    if not isinstance(prompts, Sequence):
        raise PromptError(f"prompts: expected {FORMS}, got {type(prompts).__name__}")
    if not prompts:
        raise PromptError(f"prompts: expected {FORMS}, got an empty list")
    kinds = {_kind(p) for p in prompts}
    if kinds == {"message"} or kinds == {"id"}:
        return [prompts], True
    if "other" in kinds or len(kinds) > 1:
        raise PromptError(f"prompts: expected {FORMS}, got a list of {sorted({type(p).__name__ for p in prompts})}")
    return list(prompts), False


def _kind(item: Any) -> str:
    if isinstance(item, str):
        return "text"
    if isinstance(item, Mapping):
        return "message"
    if isinstance(item, int | np.integer) and not isinstance(item, bool):
        return "id"
    if isinstance(item, Sequence) or hasattr(item, "__array__"):
        return "list"
    return "other"


def _one(tokenizer: Any, prompt: Any) -> np.ndarray:
    is_chat = not isinstance(prompt, str | np.ndarray) and len(prompt) and isinstance(prompt[0], Mapping)
    if not isinstance(prompt, str) and not is_chat:
        return _ids(prompt)
    if tokenizer is None:
        raise PromptError("prompts: this checkpoint has no tokenizer.json, so text has no meaning to it; pass token ids")
    from djax import chat_template

    if isinstance(prompt, str):
        if not prompt.strip():
            raise PromptError("prompts: expected some text, got an empty prompt")
        if len(prompt) > chat_template.LONGEST:
            most = f"at most {chat_template.LONGEST:,} characters of text"
            raise PromptError(f"prompts: expected {most}, got {len(prompt):,}")
        _encodable(prompt)
        if not tokenizer.chat_template:
            return _ids(tokenizer(prompt)["input_ids"])
        prompt = [{"role": "user", "content": prompt}]
    rendered = chat_template.render_chat(tokenizer, prompt)
    _encodable(rendered)
    return _ids(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def _encodable(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"prompts: expected text that UTF-8 can write, got {prompt!r:.200}: {error}") from error


def _ids(prompt: Any) -> np.ndarray:
    try:
        array = np.asarray(prompt)
    except ValueError as error:
        raise PromptError(f"prompts: expected token ids as integers of shape [P], got {prompt!r}") from error
    if array.size and (array.ndim != 1 or not np.issubdtype(array.dtype, np.integer)):
        raise PromptError(f"prompts: expected token ids as integers of shape [P], got {array.dtype} of shape {array.shape}")
    return array


def _checked(ids: np.ndarray, index: int, vocab: int, mask_id: int, tokenizer: Any) -> np.ndarray:
    where = f"prompt {index}"
    if not ids.size:
        raise PromptError(f"{where}: expected at least one token, got an empty prompt")
    outside = ids[(ids < 0) | (ids >= vocab)]
    if outside.size:
        raise PromptError(f"{where}: expected token ids from 0 to {vocab - 1}, got {outside[0]}")
    if np.any(ids == mask_id):
        token = f"{mask_id}" if tokenizer is None else f"{mask_id}, {tokenizer.convert_ids_to_tokens(mask_id)!r}"
        raise PromptError(
            f"{where}: contains the mask token ({token}), which would be decoded over as if it were to be generated; "
            "remove it, or write it differently, for instance with a space inside"
        )
    return ids.astype(np.int32)
