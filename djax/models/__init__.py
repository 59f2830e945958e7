"""The model families: one module each, found by the `architectures` entry of a checkpoint's config.json.

A family is a module with `ARCHITECTURES`, `DEFAULT_MASK_ID`, `DEFAULT_EOS_ID`, a `Config` with `from_hf`, and functions
over plain parameter trees, which `transformer.Functions` makes from its network: abstract, init, embed, trunk,
trunk_with_routing, unembed, expected_embedding, empty_cache; and `BLOCK_CAUSAL = True` if a block of positions sees
only itself and the blocks before it.
"""

from types import ModuleType

from djax.models import llada, llada2, llada_moe

FAMILIES: dict[str, ModuleType] = {"llada_moe": llada_moe, "llada": llada, "llada2": llada2}
