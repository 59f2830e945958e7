"""What djax's speed is measured against: the same model and the same decode as a PyTorch user would write them.

transformers' Qwen3-MoE, made to see in both directions, is LLaDA-MoE's architecture. The decode keeps keys and values of the
whole canvas, refills them when a block begins, and in between runs the block and its neighbours, whose keys and values replace
the cached ones in place. Nothing of it is slowed down: attention is torch's fused one, logits are made for the block alone.
"""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.cache_utils import Cache


@dataclasses.dataclass(frozen=True)
class Run:
    """tokens: the canvas. windows, refreshes: seconds of each forward with its decoding, in order."""

    tokens: np.ndarray
    windows: list[float]
    refreshes: list[float]
    seconds: float


class CanvasCache(Cache):
    """Keys and values of a canvas, those of the window that runs replaced in place."""

    def __init__(self, layers: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.keys = [torch.zeros(shape, dtype=dtype) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype) for _ in range(layers)]
        self.at = torch.arange(shape[2])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys[layer_idx].index_copy_(2, self.at, key_states)
        self.values[layer_idx].index_copy_(2, self.at, value_states)
        return self.keys[layer_idx], self.values[layer_idx]


class Network(torch.nn.Module):
    """The window's tokens to the block's logits: the layers of the model without the causal mask that its own forward makes."""

    def __init__(self, model: Qwen3MoeForCausalLM) -> None:
        super().__init__()
        self.model = model
        for layer in model.model.layers:
            layer.self_attn.is_causal = False

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, cache: CanvasCache, skip: int, block: int) -> torch.Tensor:
        inner = self.model.model
        x = inner.embed_tokens(tokens)
        angles = inner.rotary_emb(x, positions)
        for layer in inner.layers:
            x = layer(x, attention_mask=None, position_ids=positions, cache=cache, position_embeddings=angles)
        return self.model.lm_head(inner.norm(x[:, skip : skip + block]))


class Peer:
    """One way to run it. experts: transformers' name of an expert layer; compiled: torch.compile or eager."""

    def __init__(
        self, hf: Mapping[str, Any], tensors: Mapping[str, np.ndarray], mask_id: int, dtype: str, experts: str, compiled: bool
    ) -> None:
        settings: dict[str, Any] = dict(
            **{k: hf[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
            **{k: hf[k] for k in ("num_key_value_heads", "num_experts", "num_experts_per_tok", "rms_norm_eps")},
            max_position_embeddings=hf["max_position_embeddings"],
            head_dim=hf["hidden_size"] // hf["num_attention_heads"],
            moe_intermediate_size=hf["expert_intermediate_size"],
            norm_topk_prob=bool(hf.get("norm_topk_prob")),
            rope_parameters={"rope_theta": float(hf["rope_theta"]), "rope_type": "default"},
            tie_word_embeddings=False,
        )
        config = Qwen3MoeConfig(**settings)
        config._attn_implementation = "sdpa"
        config._experts_implementation = experts
        self.dtype, self.mask_id = getattr(torch, dtype), mask_id
        with torch.device("meta"):
            model = Qwen3MoeForCausalLM(config)
        model = model.to_empty(device="cpu").to(self.dtype)
        model.load_state_dict({k: torch.tensor(v).to(self.dtype) for k, v in tensors.items()}, strict=True, assign=True)
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        self.network = Network(model.eval())
        # One program a layer and shape, where the default would give up after eight and go on uncompiled.
        torch._dynamo.config.recompile_limit = 256
        self.forward = torch.compile(self.network) if compiled else self.network

    @torch.inference_mode()
    def decode(self, tokens: np.ndarray, prompt: int, block: int, before: int, after: int, per_step: int) -> Run:
        """Fill the masks of a canvas `[L]`, the `per_step` surest of the block at each forward; blocks stand at multiples of
        `block`, as in `djax.Vicinity(before, after, warmup=0)` with `djax.Fixed(per_step)`."""
        began = time.perf_counter()
        canvas = torch.from_numpy(tokens.astype(np.int64))[None]
        length = canvas.shape[1]
        config = self.network.model.config
        shape = (1, config.num_key_value_heads, length, config.head_dim)
        cache = CanvasCache(config.num_hidden_layers, shape, self.dtype)
        windows: list[float] = []
        refreshes: list[float] = []
        for start in range(prompt // block * block, length, block):
            end, fresh = min(start + block, length), True
            while (canvas[0, start:end] == self.mask_id).any():
                at = time.perf_counter()
                left, right = (0, length) if fresh else (max(start - before, 0), min(end + after, length))
                cache.at = torch.arange(left, right)
                logits = self.forward(canvas[:, left:right], cache.at[None], cache, start - left, end - start)
                self._accept(canvas, logits[0], start, end, per_step)
                (refreshes if fresh else windows).append(time.perf_counter() - at)
                fresh = False
        return Run(canvas[0].numpy(), windows, refreshes, time.perf_counter() - began)

    def _accept(self, tokens: torch.Tensor, logits: torch.Tensor, start: int, end: int, per_step: int) -> None:
        logits = logits.float()
        best, choice = logits.max(dim=-1)
        confidence = torch.exp(best - torch.logsumexp(logits, dim=-1))
        masked = tokens[0, start:end] == self.mask_id
        confidence = torch.where(masked, confidence, -1.0)
        accept = confidence.topk(min(per_step, int(masked.sum()))).indices
        tokens[0, start + accept] = choice[accept]
