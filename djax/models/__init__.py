"""The model families: one file each, found by the `architectures` entry of a checkpoint's config.json."""

from djax.models import llada, llada2, llada_moe
from djax.models.family import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (llada_moe.FAMILY, llada.FAMILY, llada2.FAMILY)}
