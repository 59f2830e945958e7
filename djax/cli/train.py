"""`djax train`: train a model from scratch."""

import dataclasses
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from djax.cli.console import say
from djax.cli.run_configs import find_config


@dataclasses.dataclass
class Train:
    """Train a model from scratch, or go on with an interrupted run. `djax train small --out runs/small` is the shipped one."""

    config: Positional[str]
    """A run of configs/, by file name."""
    out: Annotated[Path, arg(metavar="DIR")]
    """Where checkpoints, log.jsonl and the finished model go."""

    def run(self, console: Console) -> None:
        from djax.training.train import Run, train

        say(train(find_config(self.config, Run), self.out, console=console))
