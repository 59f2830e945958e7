"""djax: a JAX engine for diffusion language models. A whole decode is one XLA program."""

from djax.runtime import interrupt

# Before the imports that take a second.
interrupt.leave_while_importing()

from djax.caching import Block, Dual, Prefix, Vicinity
from djax.caching.contract import Policy
from djax.checkpoints.checkpoint import export_hf, load, save
from djax.decoding import Credit, Edit, Entropy, Factor, Fixed, FreeDave, Hierarchy, Threshold
from djax.decoding.contract import Decoder, Verdict
from djax.decoding.smoothing import Smoothing
from djax.engine.ahead import compile, export_program
from djax.engine.explain import explain
from djax.engine.generate import Generation, Timing, generate
from djax.engine.options import Options
from djax.engine.slots import Engine
from djax.engine.trace import Trace
from djax.errors import (
    BatchError,
    CanvasError,
    CheckpointError,
    DjaxError,
    OptionError,
    PathError,
    PromptError,
    TripCapError,
    UnsupportedModelError,
)
from djax.models.model import Model, logits
from djax.presets import preset
from djax.pytree import pytree
from djax.runtime.compilation import compile_cache
from djax.runtime.sharding import mesh
from djax.version import __version__ as __version__

__all__ = [
    "BatchError",
    "Block",
    "CanvasError",
    "CheckpointError",
    "Credit",
    "Decoder",
    "DjaxError",
    "Dual",
    "Edit",
    "Engine",
    "Entropy",
    "Factor",
    "Fixed",
    "FreeDave",
    "Generation",
    "Hierarchy",
    "Model",
    "OptionError",
    "Options",
    "PathError",
    "Policy",
    "Prefix",
    "PromptError",
    "Smoothing",
    "Threshold",
    "Timing",
    "Trace",
    "TripCapError",
    "UnsupportedModelError",
    "Verdict",
    "Vicinity",
    "compile",
    "compile_cache",
    "explain",
    "export_hf",
    "export_program",
    "generate",
    "load",
    "logits",
    "mesh",
    "preset",
    "pytree",
    "save",
]
