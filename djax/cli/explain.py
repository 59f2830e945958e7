"""`djax explain`: say what a decode would do."""

import dataclasses

from rich.console import Console
from tyro.conf import Positional

from djax.cli.arguments import Checkpoint, read_argument
from djax.cli.console import say, show_working
from djax.cli.decoding_options import DecodingOptions, get_start
from djax.errors import OptionError


@dataclasses.dataclass
class Explain:
    """Say what a decode would do: what is legal, the forwards of each block, what is kept in memory. Compiles nothing.

    djax explain --decoder "Credit(Threshold(0.8))" --cache "Vicinity(16, 16)"
    """

    question: Positional[str | None] = None
    """A question; without it, a prompt of --prompt-length tokens stands for one."""
    prompt_length: int | None = None
    """Tokens of the prompt, where no question is given (default: 64)."""
    model: Checkpoint = None
    """A checkpoint directory; without it, the small model that ships with djax."""
    decoding: DecodingOptions = dataclasses.field(default_factory=get_start)

    def run(self, console: Console) -> None:
        options = self.decoding.options()
        with show_working(console, "loading"):
            import numpy as np

            import djax
            from djax.checks import whole_number

            if self.question is not None and self.prompt_length is not None:
                raise OptionError("--prompt-length: expected without a question, whose length is its own")
            model = djax.load(self.model)
        length = whole_number(64 if self.prompt_length is None else self.prompt_length, "--prompt-length", at_least=1)
        token = int(model.config.mask_id == 0)  # the one id that no prompt may hold
        # However long, it takes no memory before it is found to fit.
        prompt = np.broadcast_to(np.int32(token), (length,)) if self.question is None else read_argument(self.question)
        say(djax.explain(model, prompt, **options))
