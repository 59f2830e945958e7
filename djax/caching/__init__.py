"""Which window is run, and when the whole canvas: one file a policy, all in this registry, contract in `contract.py`."""

from djax.caching.block import Block
from djax.caching.dual import Dual
from djax.caching.none import Uncached
from djax.caching.prefix import Prefix
from djax.caching.vicinity import Vicinity

CACHES: dict[str, type] = {"none": Uncached, "prefix": Prefix, "dual": Dual, "vicinity": Vicinity, "block": Block}
