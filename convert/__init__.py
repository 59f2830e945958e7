"""HF safetensors to parameter trees and back: one rule table a family, applied strictly (`rules.py`)."""

from djax.convert import llada, llada2, llada_moe

# Family name (as in djax.models.FAMILIES) to its rule tables: config -> {layout name: rules}.
TABLES = {"llada_moe": llada_moe.layouts, "llada": llada.layouts, "llada2": llada2.layouts}
