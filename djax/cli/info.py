"""`djax info`: show what a checkpoint is."""

import dataclasses
import json
from contextlib import nullcontext

from rich.console import Console
from tyro.conf import Positional

from djax.cli.arguments import Checkpoint
from djax.cli.console import say, show_working


@dataclasses.dataclass
class Info:
    """Show a checkpoint's family, size and token ids. Reads no weights, except to verify them."""

    model: Positional[Checkpoint] = None
    """A checkpoint directory; without it, the small model that ships with djax."""
    json: bool = False
    """Print a JSON object."""
    verify: bool = False
    """Read all parameters of an Orbax directory and compare them with the SHA-256 sums that `djax convert` noted."""

    def run(self, console: Console) -> None:
        from djax.checkpoints.checkpoint import inspect

        with show_working(console, "verifying") if self.verify else nullcontext():
            facts = inspect(self.model, verify=self.verify)
        if self.json:
            say(json.dumps(facts))
        else:
            width = max(map(len, facts))
            for name, value in facts.items():
                say(f"{name:{width}}  {value:,}" if isinstance(value, int) and value > 9999 else f"{name:{width}}  {value}")
