"""The `djax` command. Each subcommand is a dataclass whose fields are its options and whose `run` does the work."""

import argparse
import contextvars
import dataclasses
import functools
import importlib
import json
import operator
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from tyro.conf import Positional, UseAppendAction, arg, subcommand

from djax import interrupt
from djax.errors import DjaxError, OptionError, PromptError
from djax.files import decode
from djax.options import FIELDS, describe, is_repeated, list_types

PRESET = """A published way to decode, whose values then are the defaults of the options below (with --help: shown there):
llada, fast_dllm_prefix, fast_dllm_dual, dinfer_vicinity, dinfer_credit or dinfer_hierarchy."""
# Options that are no part of how an answer is decoded: commands have them, or what needs them, of their own.
APART = ("trace", "max_batch")
# Options that are given as text, which is read by the registry of this name in djax.
PLUGS = {"decoder": "decoding.DECODERS", "cache": "caching.CACHES", "smoothing": "smoothing.SMOOTHINGS"}


def describe_flag(option: str) -> str:
    """The documentation of an option of `djax.generate`, as a sentence."""
    text = describe(option)
    return text[0].upper() + text[1:]


def _spell(option: str, value: Any) -> Any:
    """An option's value as the command line has it."""
    if option in PLUGS:
        return "none" if value is None else repr(value)
    return tuple(value or ()) if is_repeated(option) else value


def _make_flag(option: str) -> tuple[str, Any, Any]:
    """An option of `djax.generate` as one of a command: name, type and default."""
    kind: Any = functools.reduce(operator.or_, list_types(option))
    described = arg(help=describe_flag(option))
    if option in PLUGS:
        kind = Annotated[str, described]
    elif is_repeated(option):
        kind = Annotated[tuple[str, ...], described, UseAppendAction]
    else:
        kind = Annotated[kind, described]
    return option, kind, dataclasses.field(default=_spell(option, FIELDS[option].default))


@dataclasses.dataclass
class Decoding(
    dataclasses.make_dataclass(
        "Fields",
        [("preset", Annotated[str | None, arg(help=PRESET)], None), *(_make_flag(n) for n in FIELDS if n not in APART)],
    )
):
    """How an answer is decoded; the same names and defaults as `djax.generate`."""

    @classmethod
    def of(cls, name: str | None) -> "Decoding":
        """The defaults; with a name, those of a preset."""
        from djax.presets import preset

        chosen = preset(name) if name is not None else {}
        return cls(name, **{option: _spell(option, value) for option, value in chosen.items()})

    def options(self) -> dict[str, Any]:
        """What to pass to `djax.generate`."""
        from djax.plugs import parse

        options = {name: getattr(self, name) for name in FIELDS if name not in APART}
        for name in options:
            if name in PLUGS:
                module, registry = PLUGS[name].split(".")
                found = getattr(importlib.import_module(f"djax.{module}"), registry)
                options[name] = parse(options[name], found, f"--{name}")
            elif is_repeated(name):
                options[name] = tuple(typed(text, f"--{name}") for text in options[name]) or None
        return options


# What a command's decoding options start from while its arguments are read.
START: contextvars.ContextVar[Decoding] = contextvars.ContextVar("START")
DecodingOptions = Annotated[Decoding, arg(name="")]


def start() -> Decoding:
    return START.get(Decoding())


Checkpoint = Annotated[str | None, arg(metavar="DIR")]


@dataclasses.dataclass
class Generate:
    """Answer a question.

    djax generate "Anna has 12 pens. She buys 7 more. She loses 4. How many pens does Anna have now?"

    djax generate --cache "Vicinity(16, 16)" --decoder "Threshold(0.8)" --file question.txt

    Without --model, the small model that ships with djax answers: it knows word problems like the one above.
    """

    question: Positional[str | None] = None
    """The question; '-' reads it from standard input."""
    file: Path | None = None
    """Read the question from this file instead."""
    lines: bool = False
    """Every line of the file or of standard input is a question of its own; they are decoded together. Lines end at newlines
    alone; blank ones are left out, but counted."""
    model: Checkpoint = None
    """A checkpoint directory, HF's or one that `djax convert` wrote; tiny-td is the small model, distilled."""
    dtype: str | None = None
    """float32 or bfloat16 for the parameters; by default the checkpoint's own."""
    quantize: str | None = None
    """int8 halves the bytes of attention and experts; answers may differ."""
    devices: int = 1
    """Split the model over this many devices."""
    decoding: DecodingOptions = dataclasses.field(default_factory=start)
    max_batch: Annotated[int | None, arg(help=describe_flag("max_batch"))] = FIELDS["max_batch"].default
    show: bool = False
    """Replay the decode in the terminal, each token coloured by the forward that accepted it."""
    html: Annotated[Path | None, arg(metavar="FILE")] = None
    """Write the decode as a page to step through, one file that needs no network."""
    json: bool = False
    """Print one JSON object a question instead of text, a line each: index (of the question's line, from 0), prompt, text,
    tokens, prompt_tokens (how many), finish_reason ("stop" at the end of text or at a stop string, "length" where the canvas
    ended), stopped_at (that stop string, or null), seed, forwards, refreshes, positions, tokens_per_forward. Questions decoded
    together share compile_seconds and decode_seconds: the first of them has both, so that sums are right."""
    compile_cache: bool = True
    """Keep compiled programs in the user's cache directory, so that the next run starts at once."""

    def run(self, console: Console) -> None:
        from djax.pictures import frames, page, terminal

        questions = self._questions()
        options = self.decoding.options()
        drawn = self.show or self.html is not None
        if self.html is not None:
            page.check(self.html)
        with working(console, "loading"):
            import djax

            if not self.compile_cache:
                djax.compile_cache(None)
            mesh = None if self.devices == 1 else djax.mesh(model=self.devices)
            model = djax.load(self.model, dtype=self.dtype, mesh=mesh, quantize=self.quantize)
        with working(console, "compiling and decoding"):
            texts = [text for _, text in questions]
            answers = djax.generate(model, texts, max_batch=self.max_batch, trace=drawn, **options)
        replays = [frames.replay(answer, model.tokenizer) for answer in answers] if drawn else []
        if self.show:
            # What --json prints is for programs, so the picture goes beside it.
            terminal.show(replays, console if self.json else Console())
        if self.json:
            say("\n".join(json.dumps(entry) for entry in as_json(questions, answers, self.decoding.seed)))
        else:
            say("\n\n".join(answer.text for answer in answers), end="\n\n")
            say(figures(answers))
        if self.html is not None:
            page.write(self.html, replays, [page.facts(q, a, options) for q, a in zip(texts, answers, strict=True)])

    def _questions(self) -> list[tuple[int, str]]:
        """The questions, each with the number of its line, counted from 0."""
        if (self.question is None) == (self.file is None):
            raise OptionError("give either a question, or '-' for standard input, or --file FILE")
        if self.file is not None:
            text = self._read(self.file)
        elif self.question == "-":
            text = self._read(None)
        elif self.lines:
            raise OptionError("--lines goes with --file or '-', not with a question on the command line")
        else:
            text = typed(self.question)
        if not self.lines:
            questions = [(0, text.strip())]
        else:
            # str.splitlines knows a dozen other ends of lines, which stand inside of questions.
            questions = [(n, line.removesuffix("\r")) for n, line in enumerate(text.split("\n"))]
        questions = [(n, text) for n, text in questions if text.strip()]
        if not questions:
            raise PromptError("the question is empty")
        return questions

    @staticmethod
    def _read(file: Path | None) -> str:
        """The text of a file; None is standard input."""
        try:
            if file is None:
                if sys.stdin is None:
                    raise PromptError("the question cannot be read: standard input is closed")
                return decode(sys.stdin.buffer.read())
            if not file.is_file():
                raise OptionError(f"--file: {file} does not exist or is not a file")
            return decode(file.read_bytes())
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(f"the question cannot be read as UTF-8 text: {error}") from error


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
    decoding: DecodingOptions = dataclasses.field(default_factory=start)

    def run(self, console: Console) -> None:
        options = self.decoding.options()
        with working(console, "loading"):
            import numpy as np

            import djax
            from djax.checks import whole_number

            if self.question is not None and self.prompt_length is not None:
                raise OptionError("--prompt-length: expected without a question, whose length is its own")
            model = djax.load(self.model)
        length = whole_number(64 if self.prompt_length is None else self.prompt_length, "--prompt-length", at_least=1)
        token = int(model.config.mask_id == 0)  # the one id that no prompt may hold
        # However long, it takes no memory before it is found to fit.
        prompt = np.broadcast_to(np.int32(token), (length,)) if self.question is None else typed(self.question)
        say(djax.explain(model, prompt, **options))


@dataclasses.dataclass
class CompileAhead:
    """Compile programs before they are needed, so that the first answer starts at once, or export one to run without djax.

    djax compile --prompt-length 64 256 --rows 1 8 --cache "Vicinity(16, 16)"

    Prompts of up to --prompt-length tokens share a program where they fall into one canvas.
    """

    prompt_length: tuple[int, ...] = (64,)
    """Tokens of the prompts, one or several numbers."""
    rows: tuple[int, ...] = (1,)
    """Prompts at once, one or several numbers."""
    model: Checkpoint = None
    """A checkpoint directory; without it, the small model that ships with djax."""
    dtype: str | None = None
    """float32 or bfloat16 for the parameters; by default the checkpoint's own."""
    quantize: str | None = None
    """int8 halves the bytes of attention and experts; answers may differ."""
    export: Annotated[Path | None, arg(metavar="DIR")] = None
    """Instead write the one program, its parameters and a manifest into this new directory; jax alone runs it."""
    platform: str | None = None
    """With --export, what it is to run on: cpu, cuda, rocm or tpu; by default what this machine has."""
    decoding: DecodingOptions = dataclasses.field(default_factory=start)

    def run(self, console: Console) -> None:
        options = self.decoding.options()
        if self.platform is not None and self.export is None:
            raise OptionError("--platform: expected with --export")
        if self.export is not None and len(self.prompt_length) * len(self.rows) > 1:
            raise OptionError("--export: expected one --prompt-length and one --rows, an export holds one program")
        with working(console, "loading"):
            import jax

            import djax
            from djax.compilation import enable_cache

            enable_cache()
            if self.export is None and not jax.config.jax_compilation_cache_dir:
                raise OptionError("djax compile: the compile cache is off, nothing would be kept; unset DJAX_COMPILE_CACHE")
            model = djax.load(self.model, dtype=self.dtype, quantize=self.quantize)
        if self.export is not None:
            shape = dict(prompt_length=self.prompt_length[0], rows=self.rows[0])
            djax.export_program(model, self.export, platform=self.platform, **shape, **options)
            say(f"{self.export}: one program")
            return
        for rows in self.rows:
            for length in self.prompt_length:
                with working(console, "compiling"):
                    canvas, seconds = djax.compile(model, prompt_length=length, rows=rows, **options)
                say(f"{rows} x {canvas}: {seconds:.1f} s" if seconds else f"{rows} x {canvas}: the same program")


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
        from djax.checkpoint import inspect

        with working(console, "verifying") if self.verify else nullcontext():
            facts = inspect(self.model, verify=self.verify)
        if self.json:
            say(json.dumps(facts))
        else:
            width = max(map(len, facts))
            for name, value in facts.items():
                say(f"{name:{width}}  {value:,}" if isinstance(value, int) and value > 9999 else f"{name:{width}}  {value}")


@dataclasses.dataclass
class Convert:
    """Convert a checkpoint of any size: HF to Orbax, or back to HF. OUT appears whole or not at all."""

    source: Positional[Annotated[str, arg(metavar="DIR")]]
    """The checkpoint to read: HF's, an earlier conversion, or the name of one on the Hugging Face hub."""
    out: Positional[Annotated[str, arg(metavar="OUT")]]
    """The directory to write; it must not exist."""
    to: Annotated[str, arg(metavar="{orbax,hf}")] = "orbax"
    """The layout to write."""
    dtype: str | None = None
    """float32 or bfloat16; by default the checkpoint's own. The largest rounding error is reported."""
    verify: bool = False
    """Read the output again, and the source, and compare."""
    not_finite: Annotated[str, arg(metavar="{refuse,warn,allow}")] = "refuse"
    """What to do about weights that are NaN or infinite."""

    def run(self, console: Console) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        from djax.checkpoint import warn_of
        from djax.conversion import convert

        bar = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*bar, console=console, transient=True, disable=not console.is_terminal) as shown:
            tasks: dict[str, Any] = {}

            def progress(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = shown.add_task(what, total=total)
                shown.update(tasks[what], completed=done)

            options = dict(to=self.to, dtype=self.dtype, verify=self.verify, not_finite=self.not_finite)
            report = convert(self.source, self.out, **options, progress=progress)
        warn_of(list(report.spoiled), Path(self.source))
        if report.rounding is not None:
            say(f"largest rounding error: {report.rounding[0]:.3g}, in {report.rounding[1]}")
        rate = report.bytes / max(report.seconds, 1e-9) / 1e6
        done = "converted and verified" if report.verified else "converted"
        say(
            f"{self.out}: {report.family}, {report.dtype}, {report.layout}; {report.bytes / 1e6:,.1f} MB {done} in "
            f"{report.seconds:.1f} s ({rate:,.0f} MB/s)"
        )


@dataclasses.dataclass
class Train:
    """Train a model from scratch, or go on with an interrupted run. `djax train small --out runs/small` is the shipped one."""

    config: Positional[str]
    """A run of configs/, by file name."""
    out: Annotated[Path, arg(metavar="DIR")]
    """Where checkpoints, log.jsonl and the finished model go."""

    def run(self, console: Console) -> None:
        from djax.training.train import Run, train

        say(train(_config(self.config, Run), self.out, console=console))


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
        if self.eval and rest is not None and not rest:
            raise OptionError(
                f"--held-out: expected more than {run.validation} problems with --eval: by so many the best is chosen, got "
                f"{len(held_out)}; --validation changes it"
            )
        mesh = None if self.devices == self.data == 1 else djax.mesh(model=self.devices, data=self.data)
        model = djax.load(self.model, dtype=self.dtype, mesh=mesh)
        options = dict(problems=problems, held_out=held_out, verifier=self.verifier, traces=self.traces, console=console)
        if self.eval and (self.out / "model").exists():
            _note(console)(f"{self.out / 'model'}: this run is finished, so nothing is trained, only measured")
            trained = djax.load(self.out / "model", dtype=str(model.dtype), mesh=mesh)
        else:
            trained = distil(model, run, self.out, note=_note(console), **options)
        if self.eval:
            from djax.benchmarks import distill as benchmark

            options = dict(problems=rest, count=count)
            options |= dict(verifier=self.verifier, gen_length=run.decoding.gen_length, note=_note(console))
            say(benchmark.compare({"before": model, "after": trained}, self.out, **options))
        say(self.out / "model")

    def _run(self) -> Any:
        """The config's distillation with the options that were given."""
        from djax.distill import OBJECTIVES, PAIRS, Distillation, Lora, Settings
        from djax.plugs import parse

        run = _config(self.config, Distillation)
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
        more = {"problems": self.problems, "samples": self.samples, "validation": self.validation}
        if self.decoding is not None:
            more["decoding"] = Settings.read(self.decoding, "--decoding")
        if self.recordings is not None:
            more["recordings"] = tuple(Settings.read(text, "--recordings") for text in self.recordings)
        more = {name: value for name, value in more.items() if value is not None}
        return dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, **recipe), **more)


def _config(name: str, kind: type) -> Any:
    """RUN of a file of configs/, which must be of this kind."""
    import importlib

    from djax import configs

    there = sorted(p.stem for p in Path(configs.__file__).parent.glob("*.py") if p.stem != "__init__")
    runs = {n: importlib.import_module(f"djax.configs.{n}").RUN for n in there}
    fitting = {n: run for n, run in runs.items() if isinstance(run, kind)}
    if name not in fitting:
        raise OptionError(f"config: unknown {name!r}; there are: {', '.join(fitting)}")
    return fitting[name]


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
    decoding: DecodingOptions = dataclasses.field(default_factory=start)

    def run(self, console: Console) -> None:
        from rich.progress import Progress

        import djax
        from djax.checks import whole_number
        from djax.training.evaluate import evaluate
        from djax.training.problems import held_out

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

        if self.draw and not (self.out / "ladder.jsonl").is_file():
            raise OptionError(f"--draw: {self.out / 'ladder.jsonl'} does not exist; measure first")
        if not self.draw:
            model, problems = _model_and_problems(self.model, self.problems)
            ladder.measure(model, problems, self.out, resume=self.resume, note=_note(console))
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

        model, problems = _model_and_problems(self.model, self.problems)
        text = soft_top.table(soft_top.measure(model, problems, self.out, _note(console)))
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

        say(benchmark.run(self.target, list(self.devices), self.out, self.readme, _note(console)))


@dataclasses.dataclass
class Conversion:
    """Convert and restore a checkpoint of LLaDA-MoE-7B's shape with random weights: memory, and speed beside cp.

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

        say(conversion.run(self.work, self.out, self.readme, _note(console)))


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

        say(devices.run(self.out, self.readme, _note(console)))


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
        say(speed.run(list(self.parts), repeats, self.out, self.readme, _note(console)))


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

        model, problems = _model_and_problems(None, self.problems)
        places = dict(work=self.work, out=self.out, readme=self.readme)
        say(distill.run(**places, model=model, problems=len(problems), console=console, note=_note(console)))


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


def _model_and_problems(path: str | None, count: int) -> tuple[Any, list[Any]]:
    import djax
    from djax.checks import whole_number
    from djax.training.problems import held_out

    problems = held_out(whole_number(count, "--problems", at_least=1))
    return djax.load(path), problems


def _note(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)


def figures(answers: list[Any]) -> str:
    """One line: what the answers took, all together. Groups of a split batch were decoded one after another."""
    tokens, forwards = sum(len(a.tokens) for a in answers), sum(a.forwards for a in answers)
    groups = {id(a.timing): a.timing for a in answers}.values()
    seconds, compiling = sum(t.decode for t in groups), sum(t.compile for t in groups)
    return (
        f"{tokens} tokens, {forwards} forwards ({sum(a.refreshes for a in answers)} refreshes), "
        f"{tokens / forwards:.2f} tokens/forward, {tokens / seconds:.0f} tokens/s "
        f"({seconds:.2f} s; compile {compiling:.2f} s apart)"
    )


def as_json(questions: list[tuple[int, str]], answers: list[Any], seed: int) -> Iterator[dict[str, Any]]:
    """What --json prints of each answer. Answers that were decoded together share a `timing`, which is printed once."""
    timed = set()
    for (index, prompt), answer in zip(questions, answers, strict=True):
        entry = {
            "index": index,
            "prompt": prompt,
            "text": answer.text,
            "tokens": answer.tokens.tolist(),
            "prompt_tokens": answer.prompt_length,
            "finish_reason": answer.finish_reason,
            "stopped_at": answer.stopped_at,
            "seed": seed,
            "forwards": answer.forwards,
            "refreshes": answer.refreshes,
            "positions": answer.positions,
            "tokens_per_forward": answer.tokens_per_forward,
        }
        if id(answer.timing) not in timed:
            timed.add(id(answer.timing))
            entry["compile_seconds"] = round(answer.timing.compile, 3)
            entry["decode_seconds"] = round(answer.timing.decode, 3)
        yield entry


def typed(text: str, name: str = "the question") -> str:
    """Text of the command line. Python decodes it by the locale; what a locale does not know is UTF-8 all the same."""
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            return decode(os.fsencode(text))
        except UnicodeError as error:
            raise PromptError(f"{name} cannot be read as UTF-8 text: {error}") from error
    return text


def say(text: Any, end: str = "\n") -> None:
    """Print, so that whoever reads the output has it at once, and a disk that is full is one sentence."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OptionError(f"standard output cannot be written: {error.strerror}") from error


@contextmanager
def working(console: Console, what: str) -> Iterator[None]:
    """A spinner with the seconds so far, on standard error; nothing where that is not a terminal."""
    began = time.monotonic()
    with console.status(f"{what} ...", spinner="line" if console.options.ascii_only else "dots"):
        yield
    if console.is_terminal:
        console.print(f"{what}: {time.monotonic() - began:.1f} s", style="dim")


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Exits with 2 and one line on standard error for anything a user can mend.

    arguments: those of the process by default, which then is the command and nothing else: an interrupt ends it.
    """
    if arguments is None:
        _open_what_is_closed()
    try:
        with interrupt.hold() as interrupted, _escaping():
            code = _run(arguments, interrupted)
    except KeyboardInterrupt:  # between the lines above
        print("djax: interrupted", file=sys.stderr)
        sys.exit(interrupt.STATUS)
    if interrupted():
        # Not by way of what the interpreter and libraries do at exit, which may wait for threads or be interrupted again.
        os._exit(code)
    if code:
        sys.exit(code)


def _run(arguments: list[str] | None, interrupted: Callable[[], bool]) -> int:
    """Run a command and say how it ended: its exit code."""
    console = Console(stderr=True)
    commands = {
        "generate": Generate,
        "explain": Explain,
        "compile": CompileAhead,
        "info": Info,
        "convert": Convert,
        "train": Train,
        "distill": Distill,
        "evaluate": Evaluate,
        "bench": Bench,
    }

    def complain(text: str) -> None:
        console.print(f"djax: {text}", style="red", markup=False, highlight=False, soft_wrap=True)

    before = START.set(Decoding())
    try:
        try:
            arguments = sys.argv[1:] if arguments is None else arguments
            name = _preset(arguments)
            if name is not None:
                START.set(Decoding.of(name))
            about = "A JAX engine for diffusion language models."
            tyro.extras.subcommand_cli_from_dict(commands, prog="djax", description=about, args=arguments).run(console)
        finally:
            say("", end="")  # what help left in the buffer: the interpreter's own flush could only print an error
    except BaseException as error:
        if interrupted() or isinstance(error, KeyboardInterrupt):
            _drop_output()
            # Also where a library has made another error of the interrupt.
            complain("interrupted")
            return interrupt.STATUS
        if isinstance(error, BrokenPipeError):
            # Whoever read the output has enough.
            _drop_output()
            return 141
        if isinstance(error, DjaxError | OSError):
            _drop_output()
            complain(str(error))
            return 2
        raise
    finally:
        START.reset(before)
    return 0


def _drop_output() -> None:
    """What standard output still holds is written, or goes nowhere if it cannot be."""
    try:
        print(end="", flush=True)
    except OSError:
        with suppress(OSError):  # no file of the system, in a program that caught the output
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_what_is_closed() -> None:
    """A closed standard stream's number would go to the next file that is opened, which then gets what is printed."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)
            if name != "stdin":  # a question that was to come from there is missed
                setattr(sys, name, os.fdopen(number, "w", encoding="utf-8"))


@contextmanager
def _escaping() -> Iterator[None]:
    """Inside, what the encoding of the output cannot say is printed as an escape, and no error."""
    changed = [(s, s.errors) for s in (sys.stdout, sys.stderr) if hasattr(s, "reconfigure")]
    for stream, _ in changed:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in changed:
            with suppress(OSError, ValueError):  # it was closed meanwhile
                stream.reconfigure(errors=errors)


def _preset(arguments: list[str]) -> str | None:
    """The preset that the arguments name, read before the others: they start from its values."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--preset", nargs="?")  # without a value it is None here, and an error of the command itself
    return reader.parse_known_args(arguments)[0].preset


if __name__ == "__main__":
    main()
