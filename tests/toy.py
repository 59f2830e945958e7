"""A model of plain arithmetic: each position of the canvas proposes a token of its own, whatever else the canvas says.

It is sure of all of them, or with `doubt` in every third position less the further it stands, so that the forwards of a decode
can be counted by hand. For laws about forwards, which are the program's and not the network's: it compiles in a fraction of
a real one's time, and what it says and where it doubts are parameters, which compile nothing.
"""

import jax
import jax.numpy as jnp
from tiny import CONFIG

from djax.models.family import Family
from djax.models.model import Model


def embed(params, config, tokens):
    return params["embedding"][tokens]


def trunk(params, config, x, positions, sight, cache=None):
    """Carries the positions; what it returns as keys and values nobody reads."""
    x = positions[..., None].astype(jnp.float32)
    return x, ((x[..., None], x[..., None]),)


def unembed(params, config, x):
    """A confidence near 1, or below a half and falling."""
    position = x[..., 0].astype(jnp.int32)
    sharpness = jnp.where(params["third"] & (position % 3 == 0), 3 - position / 100, 12)
    return sharpness[..., None] * jax.nn.one_hot(params["says"][position], config.vocab)


def expected_embedding(params, config, x, top, logits=None):
    return jnp.zeros_like(x)


def empty_cache(params, config, batch, length):
    return ((jnp.zeros((batch, length, 1, 1)),) * 2,)


def family(*without, **instead):
    """The functions above as a family: some with others in their place; `without` caches or smooths."""
    functions = dict(embed=embed, trunk=trunk, unembed=unembed, expected_embedding=expected_embedding, empty_cache=empty_cache)
    functions |= {"back_ends": lambda *_: {}} | instead
    kind = type("Toy", (Family,), {name: staticmethod(f) for name, f in functions.items()})
    able = {name: name not in without for name in ("caches", "smooths")}
    return kind("toy", (), type(CONFIG), None, None, mask_id=CONFIG.mask_id, eos_id=CONFIG.eos_id, **able)


TOY = family()


def toy_model(stop=CONFIG.max_positions, *, says=None, doubt=False, family=TOY, config=CONFIG, tokenizer=None):
    """It says token 1 up to position `stop` and EOS from there on, or what stands in `says`."""
    at = jnp.arange(config.max_positions)
    says = jnp.where(at < stop, 1, config.eos_id) if says is None else jnp.asarray(says)
    params = {"embedding": jnp.zeros((config.vocab, 1)), "says": says, "third": jnp.bool(doubt)}
    return Model(family, config, params, tokenizer, {}, {})
