"""`djax evaluate`: measure accuracy on held-out problems."""

import dataclasses
import json

from rich.console import Console

from djax.cli.arguments import Checkpoint
from djax.cli.console import say
from djax.cli.decoding_options import DecodingOptions, get_start


@dataclasses.dataclass
class Evaluate:
    """Answer held-out word problems and print accuracy and tokens per forward as one JSON line."""

    model: Checkpoint = None
    """A checkpoint directory; without it, the small model that ships with djax."""
    dtype: str | None = None
    """float32 or bfloat16 for the parameters; by default the checkpoint's own."""
    quantize: str | None = None
    """int8 halves the bytes of attention and experts; answers may differ."""
    problems: int = 500
    """How many problems; the same ones for the same number and seed."""
    problem_seed: int = 0
    """Another seed draws other held-out problems."""
    batch: int = 25
    """Problems decoded together. Changes no answer."""
    decoding: DecodingOptions = dataclasses.field(default_factory=get_start)

    def run(self, console: Console) -> None:
        from rich.progress import Progress

        import djax
        from djax.checks import whole_number
        from djax.tasks.evaluate import evaluate
        from djax.tasks.problems import held_out

        options = self.decoding.options()
        whole_number(self.batch, "--batch", at_least=1)
        problems = held_out(whole_number(self.problems, "--problems", at_least=1), self.problem_seed)
        model = djax.load(self.model, dtype=self.dtype, quantize=self.quantize)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("answering", total=len(problems))
            report = evaluate(
                model, problems, max_batch=self.batch, progress=lambda done: bar.update(task, completed=done), **options
            )
        shown = {name: repr(value) if name in ("decoder", "cache", "smoothing") else value for name, value in options.items()}
        say(json.dumps({"model": repr(model), **shown, **dataclasses.asdict(report)}))
