"""Chats as text: a tokenizer's chat template, rendered as transformers renders it but within bounds (`bounded_jinja`)."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
import numpy as np

from djax.errors import CheckpointError, PromptError
from djax.text import bounded_jinja
from djax.text.bounded_jinja import LONGEST, LimitError, RefusedError
from djax.text.contract import Tokenizer

ROLES = ("system", "user", "assistant")
# Published templates have up to about 30,000 characters.
LONGEST_TEMPLATE = 200_000
# What stands for a message where a template is asked in which form it takes messages.
_NEEDLE = "djaxneedle"

Message = dict[str, Any]


def check_template(tokenizer: Tokenizer, where: str) -> None:
    """Raises `CheckpointError` if the tokenizer has a chat template that does not parse. `where` names it in the error."""
    try:
        text = _template(tokenizer)
    except PromptError:  # several, none of which is the default: token ids still decode
        return
    if text is None:
        return
    try:
        _compiled(text)
    except Exception as error:  # of jinja2's parser and of Python's, also RecursionError and MemoryError
        raise CheckpointError(f"{where}: the chat template cannot be compiled: {_words(error)}") from error


def render_chat(tokenizer: Tokenizer, chat: Sequence[Mapping[str, Any]]) -> str:
    """The prompt that the tokenizer's chat template makes of the messages, the assistant's turn begun.

    A message's content is a string or a list of parts `{"type": "text", "text": ...}`. The template gets what it takes: parts
    are joined by newlines for one that prints strings, and a string becomes a part for one that goes through parts. Raises
    `PromptError` for messages that are none, for a template that refuses them (with its own words), fails on them, or
    does more than `bounded_jinja` lets it, and for text of more than `LONGEST` characters.
    """
    try:
        messages = [_read_message(message) for message in chat]
        specials = _plain(dict(tokenizer.special_tokens_map))
    except RecursionError as error:
        raise PromptError("prompts: expected chat messages of plain values, got some that are nested too deep") from error
    text = _template(tokenizer)
    if not text:
        raise PromptError("prompts: this checkpoint's tokenizer has no chat template; pass a string or token ids")
    size = sum(len(_text_of(message)) for message in messages)
    if size > LONGEST:
        raise PromptError(f"prompts: expected at most {LONGEST:,} characters of text, got {size:,}")
    if not messages or not _text_of(messages[-1]).strip():
        raise PromptError("prompts: expected some text, got an empty last message")
    try:
        rendered = _render_as_taken(text, specials, messages)
    except LimitError as error:
        raise PromptError(f"prompts: this checkpoint's chat template does more than it may: {error}; pass token ids") from error
    except RefusedError as error:
        raise PromptError(f"prompts: this checkpoint's chat template refuses the chat: {_words(error)}") from error
    except Exception as error:  # whatever a template runs into, also RecursionError and MemoryError
        kind = type(error).__name__
        raise PromptError(f"prompts: this checkpoint's chat template fails on the chat: {kind}: {_words(error)}") from error
    if not rendered:
        raise PromptError("prompts: this checkpoint's chat template makes nothing of the chat; pass token ids")
    return rendered


def _template(tokenizer: Tokenizer) -> str | None:
    """The template that a chat goes through. Raises `PromptError` for several of which none is the default."""
    if not tokenizer.chat_template:
        return None
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise PromptError(f"prompts: {_words(error)}") from error


@lru_cache(maxsize=16)
def _compiled(text: str) -> jinja2.Template:
    if not isinstance(text, str):
        raise TypeError(f"expected a string, got {type(text).__name__}")
    if len(text) > LONGEST_TEMPLATE:
        raise ValueError(f"expected at most {LONGEST_TEMPLATE:,} characters, got {len(text):,}")
    return bounded_jinja.compile_template(text)


def _words(error: BaseException) -> str:
    """An error's message in a line, with the template's line where it is known."""
    at = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
    words = " ".join(str(error)[:2000].split())
    return at + (words if len(words) <= 500 else words[:500] + "...")


def _read_message(message: object) -> Message:
    """A message as templates see it: plain values, without those that are None. Raises `PromptError`."""
    if not isinstance(message, Mapping):
        raise PromptError(f"prompts: expected chat messages, got {type(message).__name__} among them")
    role, content = message.get("role"), message.get("content")
    parts = content if isinstance(content, Sequence) and not isinstance(content, str | bytes) else None
    if not isinstance(role, str) or not (isinstance(content, str) or parts is not None):
        raise PromptError(
            "prompts: expected chat messages with the strings 'role' and 'content', which may be a list of text parts, got "
            f"{_shown(message)}"
        )
    if role not in ROLES:
        raise PromptError(f"prompts: expected role system, user or assistant, got {role!r:.100}")
    for part in parts or ():
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise PromptError(
                "prompts: expected content parts {'type': 'text', 'text': ...}, since djax's models read text only, got one of "
                f"type {kind!r:.100}"
            )
    plain = {_plain(key): _plain(value) for key, value in message.items() if value is not None}
    if parts is not None:
        plain["content"] = [_plain(part) for part in parts]
    # Newer transformers fills in the other names of a message's reasoning.
    thought = next((plain[name] for name in ("reasoning_content", "thinking", "reasoning") if name in plain), None)
    return plain if thought is None else {"thinking": thought, **plain, "reasoning_content": thought}


def _shown(value: object) -> str:
    try:
        return f"{value!r:.200}"
    except Exception:  # a caller's own repr
        return type(value).__name__


def _plain(value: object) -> Any:
    """The value in JSON's types, as transformers hands them to templates: what is none of them is only named."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool | None):
        return value
    # Not by the constructors, which a subclass may answer.
    if isinstance(value, str):
        return value if type(value) is str else str.__str__(value)
    if isinstance(value, int):
        return value if type(value) is int else int.__int__(value)
    if isinstance(value, float):
        return value if type(value) is float else float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return f"<{type(value).__name__}>"


def _text_of(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _render(text: str, specials: Mapping[str, Any], messages: list[Message]) -> str:
    known = dict(messages=messages, tools=None, documents=None, add_generation_prompt=True)
    return bounded_jinja.render(_compiled(text), {**specials, **known})


def _render_as_taken(text: str, specials: dict[str, Any], messages: list[Message]) -> str:
    """Render the messages with each content in a form that the template takes."""
    key = json.dumps(specials, sort_keys=True)

    def formed() -> list[Message]:
        return [_formed(message, *_takes(text, key, message["role"])) for message in messages]

    if not all(isinstance(message["content"], str) for message in messages):
        return _render(text, specials, formed())
    try:
        rendered = _render(text, specials, messages)
    except LimitError:
        raise
    except Exception:  # is it strings that it fails on?
        if (others := formed()) == messages:
            raise
        return _render(text, specials, others)
    # One that goes through parts finds none in a string.
    if messages[-1]["content"].strip() in rendered or (others := formed()) == messages:
        return rendered
    return _render(text, specials, others)


def _formed(message: Message, strings: bool, parts: bool) -> Message:
    content = message["content"]
    if isinstance(content, str):
        return message | {"content": [{"type": "text", "text": content}]} if parts and not strings else message
    return message if parts else message | {"content": _text_of(message)}


@lru_cache(maxsize=64)
def _takes(text: str, specials: str, role: str) -> tuple[bool, bool]:
    """Whether a template prints a content of this role that is a string, and one that is a list of parts."""
    said = lambda role, content: {"role": role, "content": content}  # noqa: E731
    user: str | list[dict[str, str]] = "hello"
    if role != "user":
        strings, parts = _takes(text, specials, "user")
        user = [{"type": "text", "text": "hello"}] if parts and not strings else user

    def prints(content: object) -> bool:
        chat = [said(role, content)]
        if role == "system":
            chat = [*chat, said("user", user)]
        elif role == "assistant":
            chat = [said("user", user), *chat, said("user", user)]
        try:
            rendered = _render(text, json.loads(specials), chat)
        except LimitError:
            raise
        except Exception:  # then not in this form
            return False
        # A list that is printed as Python or JSON writes lists is not taken.
        return _NEEDLE in rendered and not re.search(rf"""text['"]\s*:\s*['"]{_NEEDLE}""", rendered)

    return prints(_NEEDLE), prints([{"type": "text", "text": _NEEDLE}])
