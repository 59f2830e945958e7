"""`djax bench`: each benchmark is a command of its own."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import arg, subcommand

from djax.cli.arguments import Checkpoint
from djax.cli.console import make_note, say
from djax.errors import OptionError


@dataclasses.dataclass
class Ladder:
    """Answer held-out problems with every decoder, cache and smoothing: accuracy against tokens per forward.

    djax bench ladder --out benchmarks/results --readme README.md

    Writes ladder.jsonl (a line a point), ladder.md and ladder.png. On two cores the 500 problems take over an hour.
    """

    out: Annotated[Path, arg(metavar="DIR")]
    """Where the results go."""
    problems: int = 500
    """How many problems; the same ones for the same number."""
    model: Checkpoint = None
    """A checkpoint directory; without it, the small model that ships with djax."""
    resume: bool = False
    """Go on with the points that DIR lacks."""
    draw: bool = False
    """Measure nothing, only make the tables and the picture anew from DIR's ladder.jsonl."""
    readme: Annotated[Path | None, arg(metavar="FILE")] = None
    """Also write the tables into this Markdown file, between its two marks."""

    def run(self, console: Console) -> None:
        from djax.benchmarks import ladder

        if self.draw and (self.resume or self.model is not None or self.problems != Ladder.problems):
            raise OptionError("--draw: expected without --problems, --model and --resume, because it measures nothing")
        if self.draw and not (self.out / "ladder.jsonl").is_file():
            raise OptionError(f"--draw: {self.out / 'ladder.jsonl'} does not exist; measure first")
        if not self.draw:
            model, problems = _load_model_and_problems(self.model, self.problems)
            ladder.measure(model, problems, self.out, resume=self.resume, note=make_note(console))
        say(ladder.finish(self.out, self.readme))


@dataclasses.dataclass
class SoftTop:
    """Measure what smoothing with only the likeliest tokens changes, against the whole softmax."""

    out: Annotated[Path, arg(metavar="DIR")]
    """Where soft_top.jsonl goes."""
    problems: int = 500
    """How many problems; the same ones for the same number."""
    model: Checkpoint = None
    """A checkpoint directory; without it, the small model that ships with djax."""
    readme: Annotated[Path | None, arg(metavar="FILE")] = None
    """Also write the table into this Markdown file, between its two marks."""

    def run(self, console: Console) -> None:
        from djax.benchmarks import report, soft_top

        model, problems = _load_model_and_problems(self.model, self.problems)
        text = soft_top.table(soft_top.measure(model, problems, self.out, make_note(console)))
        report.put(self.readme, "soft-top", text)
        say(text)


@dataclasses.dataclass
class Compile:
    """Compile LLaDA-MoE-7B's decode for GPUs that need not be there, and say what the program is.

    djax bench compile --devices 1 8 --out benchmarks/results --readme README.md

    Needs XLA's GPU compiler: pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt, of jaxlib's version.
    """

    out: Annotated[Path, arg(metavar="DIR")]
    """Where compile.jsonl goes."""
    target: str = "h100"
    """The GPU: h100."""
    devices: tuple[int, ...] = (1, 8)
    """Over how many of them the model is split."""
    readme: Annotated[Path | None, arg(metavar="FILE")] = None
    """Also write the table into this Markdown file, between its two marks."""

    def run(self, console: Console) -> None:
        import jax

        jax.config.update("jax_platforms", "cpu")  # nothing runs on a GPU
        from djax.benchmarks import compile as benchmark

        say(benchmark.run(self.target, list(self.devices), self.out, self.readme, make_note(console)))


@dataclasses.dataclass
class Conversion:
    """Convert and restore a checkpoint of LLaDA-MoE-7B's shape with random weights: memory, and speed compared with cp.

    djax bench convert --work /somewhere/large --out benchmarks/results --readme README.md

    Takes 45 GB of disk for a while, and memory for 15 GB of parameters.
    """

    work: Annotated[Path, arg(metavar="DIR")]
    """Where the checkpoints are made; it must not exist, and is removed at the end."""
    out: Annotated[Path, arg(metavar="DIR")]
    """Where convert.jsonl goes."""
    readme: Annotated[Path | None, arg(metavar="FILE")] = None
    """Also write the table into this Markdown file, between its two marks."""

    def run(self, console: Console) -> None:
        from djax.benchmarks import conversion

        say(conversion.run(self.work, self.out, self.readme, make_note(console)))


@dataclasses.dataclass
class Devices:
    """Decode by every decoder, cache and smoothing on meshes of up to eight devices, and compare with one.

    djax bench devices --out benchmarks/results --readme README.md

    The devices are simulated by this CPU. About twenty minutes on two cores, nearly all of it compiling.
    """

    out: Annotated[Path, arg(metavar="DIR")]
    """Where devices.jsonl goes."""
    readme: Annotated[Path | None, arg(metavar="FILE")] = None
    """Also write the table into this Markdown file, between its two marks."""

    def run(self, console: Console) -> None:
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)
        from djax.benchmarks import devices

        say(devices.run(self.out, self.readme, make_note(console)))


@dataclasses.dataclass
class Speed:
    """Measure seconds of window steps, refreshes and whole answers on this machine, against PyTorch and the machine's limits.

    djax bench speed --out benchmarks/results --readme README.md

    On a CPU preload tcmalloc, for both sides. PyTorch is compared where it is installed. About twenty minutes on two cores.
    """

    out: Annotated[Path, arg(metavar="DIR")]
    """Where speed.jsonl goes."""
    parts: tuple[str, ...] = ("windows", "answers", "growth", "experts", "start")
    """What to measure: windows, answers, growth, experts, start. The lines of other parts stay."""
    repeats: int = 5
    """How often each is measured."""
    readme: Annotated[Path | None, arg(metavar="FILE")] = None
    """Also write the tables into this Markdown file, between its two marks."""

    def run(self, console: Console) -> None:
        from djax.benchmarks import speed
        from djax.checks import whole_number

        repeats = whole_number(self.repeats, "--repeats", at_least=1)
        say(speed.run(list(self.parts), repeats, self.out, self.readme, make_note(console)))


@dataclasses.dataclass
class Distillation:
    """Train the small model by each distillation objective and by the control, and measure what that bought.

    djax bench distill --work runs/distill --out benchmarks/results --readme README.md

    Arms that DIR has finished stay as they are. About an hour and a half on two cores.
    """

    work: Annotated[Path, arg(metavar="DIR")]
    """Where trajectories and the trained models go."""
    out: Annotated[Path, arg(metavar="DIR")]
    """Where distill.jsonl, distill.md and distill.png go."""
    problems: int = 500
    """How many held-out problems; the same ones for the same number."""
    readme: Annotated[Path | None, arg(metavar="FILE")] = None
    """Also write the table into this Markdown file, between its two marks."""

    def run(self, console: Console) -> None:
        from djax.benchmarks import distill

        model, problems = _load_model_and_problems(None, self.problems)
        table = distill.run(
            self.work,
            self.out,
            self.readme,
            model=model,
            problems=len(problems),
            console=console,
            note=make_note(console),
        )
        say(table)


Benchmark = (
    Annotated[Ladder, subcommand("ladder")]
    | Annotated[Speed, subcommand("speed")]
    | Annotated[SoftTop, subcommand("soft-top")]
    | Annotated[Compile, subcommand("compile")]
    | Annotated[Devices, subcommand("devices")]
    | Annotated[Conversion, subcommand("convert")]
    | Annotated[Distillation, subcommand("distill")]
)


@dataclasses.dataclass
class Bench:
    """Measure again what the README says."""

    of: Annotated[Benchmark, arg(name="")]

    def run(self, console: Console) -> None:
        self.of.run(console)


def _load_model_and_problems(path: str | None, count: int) -> tuple[Any, list[Any]]:
    import djax
    from djax.checks import whole_number
    from djax.tasks.problems import held_out

    problems = held_out(whole_number(count, "--problems", at_least=1))
    return djax.load(path), problems
