"""LLaDA's plain decoding: the surest token of the block at each forward, no cache (arXiv 2502.09992, low-confidence remasking).

    djax generate --preset llada "..."

LLaDA's blocks start at the end of the prompt and its whole canvas is decoded, whatever EOS stands in it.
"""

from djax.decoding import Fixed

PRESET = dict(decoder=Fixed(1), cache=None, block_length=32, align_blocks=False, early_stop=False)
