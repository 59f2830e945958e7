"""`djax generate`: answer questions."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import Positional, arg

from djax.cli.arguments import Checkpoint
from djax.cli.console import say, show_working
from djax.cli.decoding_options import DecodingOptions, describe_flag, get_start
from djax.cli.questions import read_questions
from djax.engine.options import Options


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
    decoding: DecodingOptions = dataclasses.field(default_factory=get_start)
    max_batch: Annotated[int | None, arg(help=describe_flag("max_batch"))] = Options.max_batch
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

        questions = read_questions(self.question, self.file, lines=self.lines)
        options = self.decoding.options()
        drawn = self.show or self.html is not None
        if self.html is not None:
            page.check(self.html)
        with show_working(console, "loading"):
            import djax

            if not self.compile_cache:
                djax.compile_cache(None)
            mesh = None if self.devices == 1 else djax.mesh(model=self.devices)
            model = djax.load(self.model, dtype=self.dtype, mesh=mesh, quantize=self.quantize)
        with show_working(console, "compiling and decoding"):
            texts = [text for _, text in questions]
            answers = djax.generate(model, texts, max_batch=self.max_batch, trace=drawn, **options)
        replays = [frames.replay(answer, model.tokenizer) for answer in answers] if drawn else []
        if self.show:
            # What --json prints is for programs, so the picture goes elsewhere.
            terminal.show(replays, console if self.json else Console())
        if self.json:
            say("\n".join(json.dumps(entry) for entry in list_entries(questions, answers, self.decoding.seed)))
        else:
            say("\n\n".join(answer.text or "" for answer in answers), end="\n\n")
            say(summarize(answers))
        if self.html is not None:
            page.write(self.html, replays, [page.facts(q, a, options) for q, a in zip(texts, answers, strict=True)])


def summarize(answers: list[Any]) -> str:
    """One line: what the answers took, all together. Groups of a split batch were decoded one after another."""
    tokens, forwards = sum(len(a.tokens) for a in answers), sum(a.forwards for a in answers)
    groups = {id(a.timing): a.timing for a in answers}.values()
    seconds, compiling = sum(t.decode for t in groups), sum(t.compile for t in groups)
    return (
        f"{tokens} tokens, {forwards} forwards ({sum(a.refreshes for a in answers)} refreshes), "
        f"{tokens / forwards:.2f} tokens/forward, {tokens / seconds:.0f} tokens/s "
        f"({seconds:.2f} s; compile {compiling:.2f} s apart)"
    )


def list_entries(questions: list[tuple[int, str]], answers: list[Any], seed: int) -> Iterator[dict[str, Any]]:
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
