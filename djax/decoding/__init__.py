"""Which tokens are accepted: one file a decoder, all of them in this registry, the contract in `contract.py`."""

from djax.decoding.fixed import Fixed
from djax.decoding.threshold import Threshold

DECODERS: dict[str, type] = {"fixed": Fixed, "threshold": Threshold}
