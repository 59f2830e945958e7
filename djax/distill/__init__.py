"""Distillation: record how a model decodes, keep what is right, train on it to need fewer forwards, measure again."""

from djax.distill.lora import Lora
from djax.distill.objectives import OBJECTIVES, Certainty, Compression, Plain
from djax.distill.pairs import PAIRS, Curriculum, Stride, Uniform
from djax.distill.recording import record
from djax.distill.run import Distillation, distil, judge
from djax.distill.selection import keep
from djax.distill.settings import Settings
from djax.distill.store import Store, Trajectory
from djax.distill.trainer import Recipe, train
from djax.tasks.verify import VERIFIERS, exact, python

__all__ = [
    "OBJECTIVES",
    "PAIRS",
    "VERIFIERS",
    "Certainty",
    "Compression",
    "Curriculum",
    "Distillation",
    "Lora",
    "Plain",
    "Recipe",
    "Settings",
    "Store",
    "Stride",
    "Trajectory",
    "Uniform",
    "distil",
    "exact",
    "judge",
    "keep",
    "python",
    "record",
    "train",
]
