"""`djax convert`: convert a checkpoint."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import Positional, arg

from djax.cli.console import say


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

        from djax.checkpoints.checkpoint import warn_of
        from djax.checkpoints.conversion import convert

        bar = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*bar, console=console, transient=True, disable=not console.is_terminal) as shown:
            tasks: dict[str, Any] = {}

            def progress(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = shown.add_task(what, total=total)
                shown.update(tasks[what], completed=done)

            report = convert(
                self.source,
                self.out,
                to=self.to,
                dtype=self.dtype,
                verify=self.verify,
                not_finite=self.not_finite,
                progress=progress,
            )
        warn_of(list(report.spoiled), Path(self.source))
        if report.rounding is not None:
            say(f"largest rounding error: {report.rounding[0]:.3g}, in {report.rounding[1]}")
        rate = report.bytes / max(report.seconds, 1e-9) / 1e6
        done = "converted and verified" if report.verified else "converted"
        say(
            f"{self.out}: {report.family}, {report.dtype}, {report.layout}; {report.bytes / 1e6:,.1f} MB {done} in "
            f"{report.seconds:.1f} s ({rate:,.0f} MB/s)"
        )
