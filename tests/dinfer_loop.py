"""dInfer's iteration managers and decoders, right and wrong, as a plain NumPy loop over djax's network: the oracle for every
recorded trace that djax does not reproduce. Facts from dInfer at commit fce4e32, as the recorded data have them."""

from functools import partial

import jax
import numpy as np

from djax.models.layers import Cache
from djax.models.sight import rank_keys, see


@partial(jax.jit, static_argnames=("family", "config"))
def network(params, x, at, valid, cached, *, family, config):
    x, fresh = family.trunk(params, config, x, at, see("all", at, valid, 1), cached)
    return family.unembed(params, config, x), fresh


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


class DInfer:
    """A dInfer object: `generate` keeps dInfer's rules, right and wrong. Settings are a trace's.

    The rows of a batch share the block, the clock and the refreshes. clock: dInfer's iter_no. registered: the block for
    which the cache was last asked whether it is stale. credit: a matrix a block, which outlives `generate`.
    """

    def __init__(self, model, settings):
        self.model, self.settings, self.credit = model, settings, {}
        self.table = np.asarray(model.params["embedding"])
        self.smooth = settings["algo"].startswith("itersmooth")
        self.shift = int(settings.get("use_shift", False))

    def generate(self, prompts, most):
        """Fill the canvases after `prompts` `[B, P]`; `steps` has them after each forward, `most` forwards at most."""
        s, c = self.settings, self.model.config
        self.canvas = np.concatenate([prompts, np.full((len(prompts), s["gen_length"]), c.mask_id)], axis=1)
        self.soft = self.table[self.canvas]
        self.clock, self.cached, self.registered, self.refreshes, self.steps = 0, None, None, 0, []
        total, length = self.canvas.shape[1], s["block_length"]
        known = (prompts != c.mask_id).sum(axis=1).min()
        start = known // length * length if s["start_block_align"] else prompts.shape[1]
        for number, begin in enumerate(range(start, total, length)):
            block = slice(begin, min(begin + length, total))
            self.call = 0
            while masks := np.sum(self.canvas[:, block] == c.mask_id):
                for _ in range(max(1, min(masks // s["expected_tpf"], s["maximum_unroll"]))):
                    self.turn(number, block)
                if len(self.steps) >= most:
                    return
            ended = (self.canvas[:, block] == c.eos_id).any(axis=1)
            if s["early_stop"]:
                self.canvas[ended, block.stop :] = c.eos_id
            if ended.all():
                return

    def stale(self, block):
        every, entered = self.settings.get("cache_update_freq"), self.registered != block
        self.registered = block
        return entered or (every is not None and self.clock % every == 0)

    def turn(self, number, block):
        s, total = self.settings, self.canvas.shape[1]
        to_the_end = s["cache"] == "prefix"
        if s["algo"].endswith("vicinity"):
            if self.clock < s["warmup_steps"]:
                return self.forward(block, 0, total)
            if self.cached is None or (self.stale(block) and number > 0):
                self.forward(block, 0, total, refresh=True)
            left, right = max(0, block.start - s["prefix_look"]), min(total, block.stop + s["after_look"])
        elif s["cache"] == "none":
            return self.forward(block, 0, total)
        else:
            if self.stale(block):
                self.forward(block, 0, total, refresh=True)
                self.clock -= not self.smooth  # the refresh and the window are one iteration
            left, right = block.start - self.shift, block.stop - self.shift
        return self.forward(block, left, total if to_the_end else right, window=True)

    def forward(self, block, left, right, refresh=False, window=False):
        s, c, (rows, total) = self.settings, self.model.config, self.canvas.shape
        length, width = (-(-n // 64) * 64 for n in (total, right - left))  # rounded up, so that few programs compile
        at = np.minimum(left + np.arange(width), length - 1)[None].astype(np.int32)
        valid = (np.arange(width) < right - left)[None]
        visible = ((np.arange(length) < left) | (np.arange(length) >= right)) & (np.arange(length) < total)
        outputs = []
        for row in range(rows):
            x = np.zeros((1, width, self.table.shape[1]), np.float32)
            x[0, : right - left] = (self.soft if self.smooth else self.table[self.canvas])[row, left:right]
            cached = Cache(self.cached[row], rank_keys("all", None, visible[None], 1)) if window else None
            outputs.append(network(self.model.params, x, at, valid, cached, family=self.model.family, config=c))
        logits = np.stack([np.asarray(z)[0, : right - left] for z, _ in outputs])
        threshold = s.get("threshold") or 2.0
        if self.smooth:
            threshold = max(1 - s.get("threshold_decay", 0.02) * self.clock, threshold)
        first = block.start - self.shift - left
        self.decode(logits[:, first : first + block.stop - block.start], block, threshold)
        if self.smooth:
            weight = s.get("cont_weight_init", 0.15) + s.get("cont_weight_growth", 0.02) * self.clock
            weight = np.float32(min(weight, s.get("cont_weight", 0.3)))
            here = self.canvas[:, left:right]
            hope = np.where((here == c.mask_id)[..., None], weight * (softmax(logits) @ self.table), 0)
            self.soft[:, left:right] = self.table[here] + hope
        if refresh:
            self.cached = [fresh for _, fresh in outputs]
        self.refreshes += refresh
        self.clock += 1
        self.call += 1
        self.steps.append(self.canvas.copy())

    def decode(self, logits, block, threshold):
        s, mask = self.settings, self.model.config.mask_id
        masked = self.canvas[:, block] == mask
        if s["decoder"] == "credit":
            alpha, gamma, beta = s.get("credit_alpha", 0.7), s.get("boost_gamma", 0.2), s.get("decay_beta", 0.8)
            known = (block.start, block.stop)
            credit = np.float32(beta) * self.credit[known] if known in self.credit else np.zeros_like(logits)
            row, position = np.nonzero(masked)
            top = logits[masked].argmax(axis=-1)
            credit[row, position, top] += softmax(logits[masked]).max(axis=-1) ** np.float32(gamma)
            self.credit[known] = credit
            logits = logits + np.float32(alpha) * np.log1p(credit)
        p = softmax(logits)
        token, sure = p.argmax(axis=-1), np.where(masked, p.max(axis=-1), -np.inf)
        if s["decoder"] == "hierarchy":
            run = np.cumsum(masked & ~np.pad(masked, ((0, 0), (1, 0)))[:, :-1], axis=1)
            best = np.max(np.where(run[:, :, None] == run[:, None, :], sure[:, None, :], -np.inf), axis=-1)
            accept = ((sure == best) & (sure > s["low_threshold"])) | (sure > threshold) | (sure == sure.max())
        elif s["decoder"] == "fixed":
            if self.call == 0:
                self.begun = masked.sum(axis=1, keepdims=True)
            count = self.begun // s["steps"] + (self.call < self.begun % s["steps"])
            accept = np.argsort(np.argsort(-sure, axis=1, kind="stable"), axis=1) < count
        else:
            sure = np.where(token != mask, sure, -np.inf)
            accept = (sure >= np.minimum(sure.max(axis=1, keepdims=True) - 1e-5, threshold)) & (sure > -np.inf)
        self.canvas[:, block] = np.where(accept & masked, token, self.canvas[:, block])
        if mask not in self.canvas:
            self.credit = {}  # so an early stop, which fills the rest in later, leaves it
