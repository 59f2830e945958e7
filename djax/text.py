"""Prompts to tokens and tokens to text: the tokenizer, the chat template, and what counts as one prompt."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from djax.checks import show
from djax.errors import PromptError
from djax.prompts import read
from djax.tokenizer_files import read_tokenizer


def load_tokenizer(directory: Path) -> Any:
    """The HF fast tokenizer of a checkpoint directory, None if it has none. No code of the checkpoint is run.

    Raises `CheckpointError` for files that are damaged, contradict each other, or are links out of the directory.
    """
    return read_tokenizer(directory)


def encode(tokenizer: Any, prompts: Any, vocab: int, mask_id: int, pads: Collection[int] = ()) -> tuple[list[np.ndarray], bool]:
    """Every prompt as int32 ids, and whether a single prompt came; see `prompts.read` for the forms and for `pads`.

    A string is a user's message and goes through the chat template if the tokenizer has one; token ids are taken as they
    are. Raises `PromptError` for an empty prompt, for an id outside the vocabulary, for a prompt that contains the
    mask token (it would be decoded over), and for text without a tokenizer.
    """
    many, single = read(prompts, pads)
    return [_checked(_one(tokenizer, p), i, vocab, mask_id, tokenizer) for i, p in enumerate(many)], single


def decode(tokenizer: Any, tokens: np.ndarray) -> str | None:
    return None if tokenizer is None else tokenizer.decode(tokens.tolist(), skip_special_tokens=True)


def _one(tokenizer: Any, prompt: Any) -> np.ndarray:
    is_chat = not isinstance(prompt, str | np.ndarray) and len(prompt) and isinstance(prompt[0], Mapping)
    if not isinstance(prompt, str) and not is_chat:
        return _ids(prompt)
    if tokenizer is None:
        raise PromptError("prompts: this checkpoint has no tokenizer.json, so text has no meaning to it; pass token ids")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise PromptError("prompts: expected some text, got an empty prompt")
        _encodable(prompt)
        if not tokenizer.chat_template:
            return _ids(tokenizer(prompt)["input_ids"])
        prompt = [{"role": "user", "content": prompt}]
    for message in prompt:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise PromptError(f"prompts: expected chat messages with the strings 'role' and 'content', got {show(message)}")
        if message["role"] not in ("system", "user", "assistant"):
            raise PromptError(f"prompts: expected role system, user or assistant, got {show(message['role'])}")
        _encodable(message["content"])
    if not prompt[-1]["content"].strip():
        raise PromptError("prompts: expected some text, got an empty last message")
    if not tokenizer.chat_template:
        raise PromptError("prompts: this checkpoint's tokenizer has no chat template; pass a string or token ids")
    return _ids(tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=True)["input_ids"])


def _encodable(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"prompts: expected text that UTF-8 can write, got {show(prompt)}: {error}") from error


def _ids(prompt: Any) -> np.ndarray:
    return np.asarray(prompt)


def _checked(ids: np.ndarray, index: int, vocab: int, mask_id: int, tokenizer: Any) -> np.ndarray:
    where = f"prompt {index}"
    if not ids.size:
        raise PromptError(f"{where}: expected at least one token, got an empty prompt")
    outside = ids[(ids < 0) | (ids >= vocab)]
    if outside.size:
        raise PromptError(f"{where}: expected token ids from 0 to {vocab - 1}, got {show(int(outside[0]))}")
    if np.any(ids == mask_id):
        token = f"{mask_id}" if tokenizer is None else f"{mask_id}, {tokenizer.convert_ids_to_tokens(mask_id)!r}"
        raise PromptError(
            f"{where}: contains the mask token ({token}), which would be decoded over as if it were to be generated; "
            "remove it, or write it differently, for instance with a space inside"
        )
    return ids.astype(np.int32)
