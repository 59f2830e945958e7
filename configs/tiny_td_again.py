"""A second round: the distilled small model records its own decodes, of other problems, and learns from them.

djax distill tiny_td_again --model runs/td/model --out runs/td-again --eval
"""

import dataclasses

from djax.configs import tiny_td

RUN = dataclasses.replace(tiny_td.RUN, problem_seed=1, recipe=dataclasses.replace(tiny_td.RUN.recipe, steps=2000))
