"""A checkpoint's tokenizer: its files are read through the checkpoint's door, checked, and handed to transformers as copies."""

import contextlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from djax.errors import CheckpointError, shorten
from djax.storage.checkpoint_files import list_files, read_object, read_text
from djax.storage.consistency import check_chat_templates, check_special_tokens
from djax.storage.files import parse_json
from djax.text.contract import Tokenizer

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
# What transformers reads besides; a chat_template.json is for processors and only compared.
_OBJECTS = (CONFIG, "special_tokens_map.json", "added_tokens.json", "config.json")
_TEMPLATES = "additional_chat_templates"
# Settings of tokenizer_config.json that name files, or objects that only a caller can pass.
_DROPPED = ("init_inputs", "tokenizer_object", "__slow_tokenizer", "slow_tokenizer_class", "device_map")

# Standard error belongs to the process: one thread at a time.
_STDERR = threading.Lock()


def read_tokenizer(directory: Path) -> Tokenizer | None:
    """The HF fast tokenizer of a checkpoint directory, None if it has none. No code of the checkpoint is run.

    transformers sees copies in a directory of its own: nothing but what `checkpoint_files` has let through, without byte order
    marks and without settings that name other files. Raises `CheckpointError`.
    """
    text = read_text(directory, TOKENIZER)
    if text is None:
        return None
    copies = _copies(directory, text)
    # transformers advises at import that torch is missing; djax uses its tokenizers alone.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    with contextlib.ExitStack() as stack:
        try:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="djax-tokenizer-")))
            for name, content in copies.items():
                (place / name).parent.mkdir(exist_ok=True)
                (place / name).write_bytes(content.encode("utf-8", "surrogatepass"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{directory}: the tokenizer's files cannot be copied: {error}") from error
        try:
            with _panics_raised():
                tokenizer = PreTrainedTokenizerFast.from_pretrained(str(place), local_files_only=True)
                with contextlib.suppress(Exception):  # a word-level tokenizer may know no such word, which is no damage
                    tokenizer.decode(tokenizer("a b")["input_ids"])
        except Exception as error:  # the tokenizer library raises bare Exception for a malformed file
            reason = shorten(str(error).replace(str(place), str(directory)))
            raise CheckpointError(f"{directory}: tokenizer.json cannot be read: {reason}") from error
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = str(directory)
    return tokenizer


def _copies(directory: Path, text: str) -> dict[str, str]:
    """File name -> what transformers is to read. Raises `CheckpointError` for files that contradict each other."""
    try:
        parsed = {TOKENIZER: parse_json(text)}
    except ValueError as error:
        raise CheckpointError(f"{directory}: tokenizer.json cannot be read: {shorten(str(error))}") from error
    if not isinstance(parsed[TOKENIZER], dict):
        raise CheckpointError(f"{directory}: tokenizer.json cannot be read: expected a JSON object")
    parsed |= {name: value for name in _OBJECTS if (value := read_object(directory, name)) is not None}
    if CONFIG in parsed:
        dropped = [k for k in parsed[CONFIG] if k in _DROPPED or k.endswith(("_file", "_files"))]
        parsed[CONFIG] = {key: value for key, value in parsed[CONFIG].items() if key not in dropped}
    names = (TEMPLATE, *list_files(directory, _TEMPLATES, ".jinja"))
    templates = {name: template for name in names if (template := read_text(directory, name)) is not None}
    processor = read_object(directory, "chat_template.json") or {}
    defaults = {
        TEMPLATE: templates.get(TEMPLATE),
        f"{_TEMPLATES}/default.jinja": templates.get(f"{_TEMPLATES}/default.jinja"),
        CONFIG: parsed.get(CONFIG, {}).get("chat_template"),
        "chat_template.json": processor.get("chat_template"),
    }
    check_chat_templates(directory, defaults)
    check_special_tokens(directory, parsed)
    others = {name: json.dumps(value) for name, value in parsed.items() if name != TOKENIZER}
    return {TOKENIZER: text, **others, **templates}


def is_panic(error: BaseException) -> bool:
    """Whether the tokenizers library panicked: no Exception, and no interrupt either."""
    kind = type(error)
    return (kind.__module__, kind.__qualname__) == ("pyo3_runtime", "PanicException")


@contextlib.contextmanager
def _panics_raised() -> Iterator[None]:
    """Raise `RuntimeError` for a panic in the tokenizers library, which is a BaseException and is printed besides.

    What the block writes to standard error is written when it ends, but for a panic's words.
    """
    with _STDERR, contextlib.ExitStack() as stack:
        try:
            sys.stderr.flush()
            real = os.dup(2)
            stack.callback(os.close, real)
            kept = stack.enter_context(tempfile.TemporaryFile())
        except (OSError, ValueError, AttributeError):  # no standard error, or nowhere to keep what is written there
            kept = None
        panicked = False
        try:
            if kept is not None:
                os.dup2(kept.fileno(), 2)
            yield
        except BaseException as error:
            panicked = is_panic(error)
            if not panicked:
                raise
            raise RuntimeError(f"the tokenizers library panics: {error}") from None
        finally:
            if kept is not None:
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    sys.stderr.flush()
                os.dup2(real, 2)
                kept.seek(0)
                if not panicked:
                    with contextlib.suppress(OSError):
                        os.write(2, kept.read())
