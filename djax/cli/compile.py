"""`djax compile`: compile programs before they are needed."""

import dataclasses
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import arg

from djax.cli.arguments import Checkpoint
from djax.cli.console import say, show_working
from djax.cli.decoding_options import DecodingOptions, get_start
from djax.errors import OptionError


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
    decoding: DecodingOptions = dataclasses.field(default_factory=get_start)

    def run(self, console: Console) -> None:
        options = self.decoding.options()
        if self.platform is not None and self.export is None:
            raise OptionError("--platform: expected with --export")
        if self.export is not None and len(self.prompt_length) * len(self.rows) > 1:
            raise OptionError("--export: expected one --prompt-length and one --rows, an export holds one program")
        with show_working(console, "loading"):
            import jax

            import djax
            from djax.runtime.compilation import enable_cache

            enable_cache()
            kept = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009  (its stubs lack it)
            if self.export is None and not kept:
                raise OptionError("djax compile: the compile cache is off, nothing would be kept; unset DJAX_COMPILE_CACHE")
            model = djax.load(self.model, dtype=self.dtype, quantize=self.quantize)
        if self.export is not None:
            shape = dict(prompt_length=self.prompt_length[0], rows=self.rows[0])
            djax.export_program(model, self.export, platform=self.platform, **shape, **options)
            say(f"{self.export}: one program")
            return
        for rows in self.rows:
            for length in self.prompt_length:
                with show_working(console, "compiling"):
                    canvas, seconds = djax.compile(model, prompt_length=length, rows=rows, **options)
                say(f"{rows} x {canvas}: {seconds:.1f} s" if seconds else f"{rows} x {canvas}: the same program")
