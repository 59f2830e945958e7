"""HF safetensors to parameter trees and back: one rule table a family (`llada_moe.py`), applied strictly (`rules.py`)."""

from djax.convert import llada_moe

# Family name (as in djax.models.FAMILIES) to its rule tables: config -> {layout name: rules}.
TABLES = {"llada_moe": llada_moe.layouts}
