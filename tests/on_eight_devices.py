"""Run by test_sharding.py in a process of its own, where XLA simulates eight devices: the same tokens on one and on all."""

import jax
import numpy as np
from tiny import CONFIG, tiny_model

import djax
from djax import sharding
from djax.checkpoint import abstract
from djax.model import Model
from djax.models import llada_moe

# Every decoder and every cache at least once, with and without smoothing.
COMBINATIONS = [
    (djax.Threshold(0.5), None, None),
    (djax.Fixed(2), djax.Prefix(), None),
    (djax.Hierarchy(0.6, 0.2), djax.Dual(every=3), djax.Smoothing()),
    (djax.Credit(djax.Threshold(0.5)), djax.Vicinity(3, 5, warmup=2), djax.Smoothing()),
    (djax.Factor(2.0), djax.Vicinity(0, 4, warmup=0, every=4), None),
    (djax.Entropy(1.0), djax.Dual(), None),
]
MESHES = [dict(model=8), dict(model=2, data=4)]


def spread(model: Model, mesh: jax.sharding.Mesh) -> Model:
    places = jax.tree.map(lambda a: a.sharding, abstract(llada_moe, model.config, np.float32, mesh))
    return Model(llada_moe, model.config, jax.device_put(model.params, places), None, {}, {}, mesh)


def facts(answers: list) -> list:
    return [(out.canvas.tolist(), out.forwards, out.refreshes) for out in answers]


def main() -> None:
    assert len(jax.devices()) == 8
    one = tiny_model(config=CONFIG.__class__(**vars(CONFIG) | dict(heads=8, groups=8, experts=8)))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, CONFIG.eos_id, n).tolist() for n in (3, 17, 30, 9, 12)]
    for mesh in MESHES:
        many = spread(one, sharding.mesh(**mesh))
        split = many.params["layer_0"]["w_in"].addressable_shards[0].data
        assert split.shape[0] == 8 // mesh["model"], "each device has its own experts and no others"
        for decoder, cache, smoothing in COMBINATIONS:
            options = dict(gen_length=24, block_length=8, decoder=decoder, cache=cache, smoothing=smoothing)
            assert facts(djax.generate(many, prompts, **options)) == facts(djax.generate(one, prompts, **options)), options
        tokens = rng.integers(0, CONFIG.eos_id, (2, 12))
        np.testing.assert_allclose(djax.logits(many, tokens), djax.logits(one, tokens), atol=1e-5)
    print("equal on", ", ".join(map(str, MESHES)))


if __name__ == "__main__":
    main()
