"""djax: a JAX engine for diffusion language models. A whole decode is one XLA program."""

from djax import interrupt

# Before the imports that take a second.
interrupt.leave_while_importing()

from djax.ahead import compile, export_program
from djax.caching import Block, Dual, Prefix, Vicinity
from djax.caching.contract import Policy
from djax.checkpoint import export_hf, load, save
from djax.compilation import compile_cache
from djax.decoding import Credit, Edit, Entropy, Factor, Fixed, FreeDave, Hierarchy, Threshold
from djax.decoding.contract import Decoder, Verdict
from djax.engine import Engine
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
from djax.explain import explain
from djax.generate import Generation, Timing, generate
from djax.model import Model, logits
from djax.options import Options
from djax.presets import preset
from djax.pytree import pytree
from djax.sharding import mesh
from djax.smoothing import Smoothing
from djax.trace import Trace

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
__version__ = "0.1.0"
