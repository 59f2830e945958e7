"""Arguments that several commands take, and text as the shell hands it over."""

import os
from typing import Annotated

from tyro.conf import arg

from djax.errors import PromptError
from djax.storage.files import decode

Checkpoint = Annotated[str | None, arg(metavar="DIR")]


def read_argument(text: str, name: str = "the question") -> str:
    """Text of the command line. Python decodes it by the locale; what a locale does not know is UTF-8 all the same."""
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            return decode(os.fsencode(text))
        except UnicodeError as error:
            raise PromptError(f"{name} cannot be read as UTF-8 text: {error}") from error
    return text
