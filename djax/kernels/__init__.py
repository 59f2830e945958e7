"""What computes with several back ends: attention, experts, products with weights, and reductions over the vocabulary.

`dispatch.py` has the one table that says which back end runs where; `choice.py` says whether a
program may have kernels of djax's own at all. Nothing outside this package names a back end.
"""
