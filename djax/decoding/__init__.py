"""Which tokens are accepted: one file a decoder, all of them in this registry, the contract in `contract.py`."""

from djax.decoding.credit import Credit
from djax.decoding.edit import Edit
from djax.decoding.entropy import Entropy
from djax.decoding.factor import Factor
from djax.decoding.fixed import Fixed
from djax.decoding.freedave import FreeDave
from djax.decoding.hierarchy import Hierarchy
from djax.decoding.threshold import Threshold

DECODERS: dict[str, type] = {
    "threshold": Threshold,
    "fixed": Fixed,
    "credit": Credit,
    "hierarchy": Hierarchy,
    "factor": Factor,
    "entropy": Entropy,
    "edit": Edit,
    "freedave": FreeDave,
}
