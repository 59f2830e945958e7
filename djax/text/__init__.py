"""Prompts to tokens and tokens to text: the tokenizer, the chat template, and what counts as one prompt."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from djax.checks import describe, show
from djax.errors import CheckpointError, DjaxError, PromptError
from djax.text.contract import Tokenizer
from djax.text.prompts import read
from djax.text.tokenizer_files import is_panic, read_tokenizer


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The HF fast tokenizer of a checkpoint directory, None if it has none. No code of the checkpoint is run.

    Raises `CheckpointError` for files that are damaged, contradict each other, or are links out of the directory, and for a
    chat template that does not parse.
    """
    tokenizer = read_tokenizer(directory)
    if tokenizer is not None:
        from djax.text import chat_template  # here, since it imports jinja2, which takes long

        chat_template.check_template(tokenizer, str(directory))
    return tokenizer


def encode(
    tokenizer: Tokenizer | None, prompts: object, vocab: int, mask_id: int, pads: Collection[int] = ()
) -> tuple[list[np.ndarray], bool]:
    """Every prompt as int32 ids, and whether a single prompt came; see `prompts.read` for the forms and for `pads`.

    A string is a user's message and goes through the chat template if the tokenizer has one; token ids are taken as they
    are. Raises `PromptError` for an empty prompt, for an id outside the vocabulary, for a prompt that contains the
    mask token (it would be decoded over), and for text without a tokenizer.
    """
    many, single = read(prompts, pads)
    return [_checked(_one(tokenizer, p), i, vocab, mask_id, tokenizer) for i, p in enumerate(many)], single


def decode(tokenizer: Tokenizer | None, tokens: np.ndarray) -> str | None:
    if tokenizer is None:
        return None
    with _failures_named("this checkpoint's tokenizer fails on the answer's tokens", CheckpointError):
        return tokenizer.decode(tokens.tolist(), skip_special_tokens=True)


def _one(tokenizer: Tokenizer | None, prompt: Any) -> np.ndarray:
    is_chat = not isinstance(prompt, str | np.ndarray) and len(prompt) and isinstance(prompt[0], Mapping)
    if not isinstance(prompt, str) and not is_chat:
        return _ids(prompt)
    if tokenizer is None:
        raise PromptError("prompts: this checkpoint has no tokenizer.json, so text has no meaning to it; pass token ids")
    from djax.text import chat_template

    if isinstance(prompt, str):
        if not prompt.strip():
            raise PromptError("prompts: expected some text, got an empty prompt")
        if len(prompt) > chat_template.LONGEST:
            most = f"at most {chat_template.LONGEST:,} characters of text"
            raise PromptError(f"prompts: expected {most}, got {len(prompt):,}")
        _encodable(prompt)
        if not tokenizer.chat_template:
            return _tokenize(tokenizer, prompt)
        prompt = [{"role": "user", "content": prompt}]
    rendered = chat_template.render_chat(tokenizer, prompt)
    _encodable(rendered)
    return _tokenize(tokenizer, rendered, add_special_tokens=False)


def _tokenize(tokenizer: Tokenizer, prompt: str, **options: Any) -> np.ndarray:
    with _failures_named("prompts: this checkpoint's tokenizer fails on the text", PromptError):
        return _ids(tokenizer(prompt, **options)["input_ids"])


@contextlib.contextmanager
def _failures_named(what: str, kind: type[DjaxError]) -> Iterator[None]:
    """Raise `kind` for what the tokenizers library raises: bare Exceptions, and panics, which are BaseExceptions."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise kind(f"{what}: {describe(error)}") from error


def _encodable(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"prompts: expected text that UTF-8 can write, got {show(prompt)}: {error}") from error


def _ids(prompt: object) -> np.ndarray:
    return np.asarray(prompt)


def _checked(ids: np.ndarray, index: int, vocab: int, mask_id: int, tokenizer: Tokenizer | None) -> np.ndarray:
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
