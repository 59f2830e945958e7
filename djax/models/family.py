"""A model family as one value: what a checkpoint says of it, its network, and the functions over plain parameter trees."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from djax.kernels import dispatch
from djax.kernels.choice import without_kernels
from djax.kernels.sight import Sight
from djax.models.contract import Config, DType, ExpertConfig, Params
from djax.models.layers import Cache, by_head
from djax.models.sight import Visibility
from djax.models.transformer import Transformer
from djax.runtime.process import make_key


@dataclasses.dataclass(frozen=True)
class Family:
    """Everything djax knows of a family. Hashable, and equal to what it is pickled to.

    name:          as `djax info` prints it and a manifest keeps it.
    architectures: the entries of config.json's `architectures` that mean it.
    config_type:   its Config, a frozen dataclass with `from_hf`.
    network:       its Transformer.
    layouts:       its rule tables, Config -> {layout: rules} (`convert/rules.py`); an export writes the one named "hf".
    mask_id, eos_id: what its checkpoints use where they name none.
    visibility:    what a position sees: "all" positions, its block and those before ("blocks"), or the "past".
    shift:         how many positions before its own a token is predicted: 1 for what was once autoregressive.
    has_experts:   whether its layers have a router.
    caches:        whether its keys and values can be kept.
    smooths:       whether it takes soft embeddings.
    """

    name: str
    architectures: tuple[str, ...]
    config_type: type[Config]
    network: type[Transformer]
    layouts: Callable[[Any], dict[str, list]]
    mask_id: int
    eos_id: int
    visibility: Visibility = "all"
    shift: int = 0
    has_experts: bool = False
    caches: bool = True
    smooths: bool = True

    def abstract(self, config: Config, dtype: DType) -> Params:
        """The parameters' tree without values: boxed `ShapeDtypeStruct`s that know their logical axes."""
        tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        with without_kernels():
            return jax.eval_shape(self.network(config, dtype).init, make_key(0), tokens, tokens)["params"]

    def init(self, config: Config, key: jax.Array, dtype: DType = jnp.float32) -> Params:
        """Random parameters, normal with variance 1 / fan-in."""
        tokens = jnp.zeros((1, 2), jnp.int32)
        with without_kernels():
            variables = jax.jit(self.network(config, dtype).init)(key, tokens, tokens)
        return nn.meta.unbox(variables["params"])

    def embed(self, params: Params, config: Config, tokens: jax.Array) -> jax.Array:
        """int32 `[B, W]` -> `[B, W, D]` in the parameters' dtype."""
        return self._apply(params, config, tokens, method="embed")

    def trunk(
        self,
        params: Params,
        config: Config,
        x: jax.Array,
        positions: jax.Array,
        sight: Sight,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, tuple]:
        """Run all layers over a window.

        x `[B, W, D]`; positions int32 `[B, W]`, absolute, for rotary; sight: which keys each position sees. A position that is
        hidden from everybody is padding: its output means nothing. With `cache` the window also attends to the cached
        positions of low enough rank (hide the window's own there).
        Returns the normalised output `[B, W, D]` and each layer's fresh (k, v), `[B, G, W * K]`, k after rotary.
        Invariant: a window over tokens unchanged since the cache was filled gives the full forward's output at its positions.
        """
        return self._apply(params, config, x, positions, sight, cache, method="trunk")

    def trunk_with_routing(
        self, params: Params, config: Config, x: jax.Array, positions: jax.Array, sight: Sight, *, remat: bool = False
    ) -> tuple[jax.Array, list]:
        """`trunk` without cache, for training, and the router's choice of each layer that has one (probabilities `[T, E]`, ids
        `[T, J]`). remat: a layer's activations are computed again for its gradient, not kept."""
        network = self.network(config, remat=remat)
        (x, _), collected = network.apply({"params": params}, x, positions, sight, None, method="trunk", mutable=["routing"])
        layers = (collected.get("routing", {}).get(f"layer_{n}") for n in range(config.layers))
        return x, [layer["choice"][0] for layer in layers if layer]

    def unembed(self, params: Params, config: Config, x: jax.Array) -> jax.Array:
        """`[B, W, D]` -> float32 logits `[B, W, V]`."""
        return self._apply(params, config, x, method="unembed")

    def _apply(self, params: Params, config: Config, *arguments: object, method: str) -> Any:
        """What a method of the network returns; by flax's stubs it could be with what it collected."""
        return self.network(config).apply({"params": params}, *arguments, method=method)

    def expected_embedding(
        self,
        params: Params,
        config: Config,
        x: jax.Array,
        top: int | None = None,
        logits: jax.Array | None = None,
        chunk: int = 256,
    ) -> jax.Array:
        """softmax(unembed(x)) @ embedding: the trunk's output `[B, W, D]` as the embedding it expects at each position.

        Softmax in float32. In chunks of positions, so that no array of canvas x vocabulary is ever made, unless the caller
        has x's `logits` already. With `top` only that many tokens' rows of the embedding are read, weighted by their
        probabilities in the whole softmax.
        """
        embedding = params["embedding"]

        def expect(logits: jax.Array) -> jax.Array:
            p = jax.nn.softmax(logits, axis=-1)
            if top is None or top >= config.vocab:
                return p.astype(x.dtype) @ embedding
            p, ids = jax.lax.top_k(p, top)
            return jnp.einsum("...k,...kd->...d", p.astype(x.dtype), embedding[ids])

        if logits is not None:
            return expect(logits)
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) <= chunk:
            return expect(self.unembed(params, config, flat)).reshape(x.shape)
        padded = jnp.pad(flat, ((0, -len(flat) % chunk), (0, 0))).reshape(-1, chunk, x.shape[-1])
        expected = jax.lax.map(lambda x: expect(self.unembed(params, config, x)), padded)
        return expected.reshape(-1, x.shape[-1])[: len(flat)].reshape(x.shape)

    def empty_cache(self, params: Params, config: Config, batch: int, length: int) -> tuple[tuple[jax.Array, jax.Array], ...]:
        """Zeroed keys and values of a canvas: one (k, v) a layer, `[B, G, L * K]` in the parameters' dtype."""
        shape = (batch, config.groups, length * config.head_dim)
        dtype = params["embedding"].dtype
        return tuple((by_head(jnp.zeros(shape, dtype)), by_head(jnp.zeros(shape, dtype))) for _ in range(config.layers))

    def back_ends(self, config: Config, site: dispatch.Site, dtype: jnp.dtype, held: jnp.dtype) -> dict[str, str]:
        """What computes each kind of layer in a program of this site, for people to read.

        dtype: of what is computed; held: of the matrices.
        """
        found = {"attention": dispatch.describe(dispatch.Attention(config.head_dim, dtype), site)}
        if not self.has_experts:
            return found
        assert isinstance(config, ExpertConfig), "has_experts"
        w_in = (config.experts, config.width, 2 * config.expert_width)
        # Of the most tokens at once, whose description holds for fewer, too.
        case = dispatch.Experts(dispatch.DENSE + 1, w_in, dtype, held)
        return {"experts": dispatch.describe(case, site)} | found
