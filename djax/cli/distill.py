"""`djax distill`: train a model to need fewer forwards."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import Positional, arg

from djax.cli.arguments import Checkpoint
from djax.cli.console import make_note, say
from djax.cli.run_configs import find_config
from djax.errors import OptionError


@dataclasses.dataclass
class Distill:
    """Record how a model decodes, keep what is right, and train on it to need fewer forwards. A killed run goes on.

    djax distill tiny_td --out runs/td --eval

    djax distill tiny_td --model DIR --prompts train.jsonl --held-out test.jsonl --verifier python --out runs/mine

    OUT gets traces/, training/ and, in the end, model/ in HF layout: the best one on the held-out problems.
    """

    config: Positional[str]
    """A distillation of configs/, by file name; the options below replace its values."""
    out: Annotated[Path, arg(metavar="DIR")]
    """Where all of it goes."""
    model: Checkpoint = None
    """A checkpoint directory; without it, the small model that ships with djax."""
    dtype: str | None = None
    """float32 or bfloat16 for the parameters; by default the checkpoint's own."""
    devices: int = 1
    """Split the model over this many devices."""
    data: int = 1
    """Split the rows of an update over this many groups of devices."""
    prompts: Annotated[Path | None, arg(metavar="FILE")] = None
    """Problems to record, JSON lines: "prompt" (text or messages) and what the verifier needs ("result", "tests"). Without it
    word problems are generated."""
    held_out: Annotated[Path | None, arg(metavar="FILE")] = None
    """Problems to judge by, as in --prompts."""
    verifier: str = "exact"
    """Which answers are right: exact (the number after ####, against "result") or python (runs the snippet and "tests")."""
    traces: Annotated[Path | None, arg(metavar="DIR")] = None
    """Where trajectories are, or go (default: OUT/traces). Runs may share them."""
    recordings: tuple[str, ...] | None = None
    """How the teacher decodes, one or several: 'Settings(gen_length=256, block_length=32, decoder=Threshold(0.9))'."""
    decoding: str | None = None
    """How held-out problems are answered to choose the best, written as in --recordings."""
    validation: int | None = None
    """By how many held-out problems the best is chosen."""
    problems: int | None = None
    """How many word problems to generate."""
    samples: int | None = None
    """Trajectories a problem; above 1 the recordings need a temperature."""
    objectives: tuple[str, ...] | None = None
    """What is learned: 'Compression(Stride(4))', 'Compression(Uniform())', 'Compression(Curriculum(1, 16))',
    'Certainty(beta=2)', 'Plain()'; several are added."""
    steps: int | None = None
    """Updates."""
    rows: int | None = None
    """Trajectories an update."""
    accumulate: int | None = None
    """In how many parts one after another."""
    rate: float | None = None
    """Peak learning rate."""
    muon: float | None = None
    """Peak rate of Muon, which then moves the matrices; 0 for AdamW alone."""
    lora: int | None = None
    """Train adapters of this rank instead of all parameters."""
    compute: str | None = None
    """float32 or bfloat16 for the network's sums while training."""
    remat: bool = False
    """Compute activations again for the gradient instead of keeping them."""
    seed: int | None = None
    """Of order and noise."""
    eval: bool = False
    """Then compare before and after on the ladder: ladder.jsonl, ladder.md and ladder.png in OUT."""
    eval_problems: int | None = None
    """How many held-out word problems that takes (default: 500), or of --held-out, those after --validation."""

    def run(self, console: Console) -> None:
        import djax
        from djax.checks import whole_number
        from djax.distill.run import distil, read_problems

        run = self._run()
        if self.problems is not None and self.prompts is not None:
            raise OptionError("--problems: expected without --prompts, which are the problems")
        if self.eval_problems is not None and not self.eval:
            raise OptionError("--eval-problems: expected with --eval")
        if (self.prompts is None) != (self.held_out is None):
            raise OptionError("--prompts and --held-out go together: what is judged by must not be trained on")
        problems = None if self.prompts is None else read_problems(self.prompts, "--prompts")
        held_out = None if self.held_out is None else read_problems(self.held_out, "--held-out")
        count = whole_number(500 if self.eval_problems is None else self.eval_problems, "--eval-problems", at_least=1)
        # By the first ones the best is chosen; what it is worth the others say.
        rest = None if held_out is None else held_out[run.validation :][:count]
        if self.eval and held_out is not None and not rest:
            raise OptionError(
                f"--held-out: expected more than {run.validation} problems with --eval: by so many the best is chosen, got "
                f"{len(held_out)}; --validation changes it"
            )
        mesh = None if self.devices == self.data == 1 else djax.mesh(model=self.devices, data=self.data)
        model = djax.load(self.model, dtype=self.dtype, mesh=mesh)
        if self.eval and (self.out / "model").exists():
            make_note(console)(f"{self.out / 'model'}: this run is finished, so nothing is trained, only measured")
            trained = djax.load(self.out / "model", dtype=str(model.dtype), mesh=mesh)
        else:
            trained = distil(
                model,
                run,
                self.out,
                problems=problems,
                held_out=held_out,
                verifier=self.verifier,
                traces=self.traces,
                console=console,
                note=make_note(console),
            )
        if self.eval:
            from djax.benchmarks import distill as benchmark

            compared = benchmark.compare(
                {"before": model, "after": trained},
                self.out,
                problems=rest,
                count=count,
                verifier=self.verifier,
                gen_length=run.decoding.gen_length,
                note=make_note(console),
            )
            say(compared)
        say(self.out / "model")

    def _run(self) -> Any:
        """The config's distillation with the options that were given."""
        from djax.distill import OBJECTIVES, PAIRS, Distillation, Lora, Settings
        from djax.plugs import parse

        run = find_config(self.config, Distillation)
        recipe = {n: getattr(self, n) for n in ("steps", "rows", "accumulate", "rate", "seed")} | {"dtype": self.compute}
        if self.objectives is not None:
            plugs = {**OBJECTIVES, **PAIRS}
            recipe["objectives"] = tuple(parse(text, plugs, "--objectives") for text in self.objectives)
        if self.lora is not None:
            recipe["lora"] = Lora(self.lora)
        recipe = {name: value for name, value in recipe.items() if value is not None}
        if self.muon is not None or self.lora is not None:
            recipe["muon"] = self.muon or None
        if self.remat:
            recipe["remat"] = True
        more: dict[str, Any] = {"problems": self.problems, "samples": self.samples, "validation": self.validation}
        if self.decoding is not None:
            more["decoding"] = Settings.read(self.decoding, "--decoding")
        if self.recordings is not None:
            more["recordings"] = tuple(Settings.read(text, "--recordings") for text in self.recordings)
        more = {name: value for name, value in more.items() if value is not None}
        return dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, **recipe), **more)
