"""A second round: the distilled small model records its own decodes, of other problems, and learns from them.

    djax distill tiny_td_again --model runs/td/model --out runs/td-again --eval

What ships as `tiny-td`. 500 held-out problems, Threshold(0.997): 95.4% at 13.19 tokens a forward; block 128, 94.8% at 18.07.
"""

import dataclasses

from djax.configs import tiny_td

RUN = dataclasses.replace(tiny_td.RUN, problem_seed=1, recipe=dataclasses.replace(tiny_td.RUN.recipe, steps=2000))
