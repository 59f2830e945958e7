"""The decode as a Python loop over one row: the oracle of the one program.

It calls the same step functions (embed, trunk, unembed, the decoder's step, the policy's plan) and nothing else of the
program: where the program masks, counts and gathers on the device, this slices NumPy arrays on the host.
"""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from djax.decoding.contract import Look, Tick
from djax.models.layers import Cache
from djax.models.sight import rank_keys, see


@partial(jax.jit, static_argnames=("family", "config"))
def trunk(params, x, at, valid, cache, *, family, config):
    return family.trunk(params, config, x, at, see("all", at, valid, 1), cache)


@partial(jax.jit, static_argnames=("family", "config", "top"))
def expected(params, x, *, family, config, top):
    return family.expected_embedding(params, config, x, top)


@jax.jit
def step(decoder, state, look):
    return decoder.step(state, look)


def decode(
    model, prompt, *, gen_length, min_gen_length, block_length, decoder, policy, smoothing, early_stop, align_blocks, seed
):
    """One prompt (ids) at temperature 0; a namespace with canvas, forwards, refreshes, positions."""
    family, c, params = model.family, model.config, model.params
    total, start = len(prompt) + gen_length, len(prompt)
    length = -(-total // 64) * 64
    canvas = np.full(total, c.mask_id, np.int32)
    canvas[:start] = prompt
    soft = np.array(params["embedding"])[canvas]
    out = SimpleNamespace(canvas=canvas, forwards=0, refreshes=0, positions=0)
    cache, cached_block, turns = None, -1, 0
    state, done = decoder.init(block_length, c.vocab), False
    # Of a decoder that verifies: what the next forward reads, and the forwards that were saved.
    drafts, saved = [], 0

    def tick(block, call):
        iteration = turns if smoothing is None else out.forwards
        return Tick(*(jnp.int32(n) for n in (iteration + saved, out.forwards + saved, block, call)))

    def forward(left, right, width, begin, end, block, call):
        """Run [left, right) in a window of `width`, decode [begin, end), return the window's keys and values. Drafts of the
        block are run one after another."""
        nonlocal state, done, drafts, saved
        n = right - left
        if decoder.drafts:
            read = drafts[:1] if cache is None and policy.keeps else drafts
            logits = np.zeros((decoder.drafts, block_length, c.vocab), np.float32)
            for number, draft in enumerate(read):
                before, canvas[begin:end] = canvas[begin:end].copy(), draft[: end - begin]
                logits[number], x, fresh = run(left, right, width, begin, end)
                canvas[begin:end] = before
            out.positions += n * (len(read) - 1)
            padded = np.stack([*read, *read[:1] * (decoder.drafts - len(read))])
        else:
            logits, x, fresh = run(left, right, width, begin, end)
        tokens, may_write = np.zeros(block_length, np.int32), np.zeros(block_length, bool)
        tokens[: end - begin] = canvas[begin:end]
        may_write[max(0, len(prompt) - begin) : end - begin] = True
        key = jax.random.fold_in(jax.random.key(seed), out.forwards) if decoder.draws else None
        floor = -np.inf if smoothing is None else float(smoothing.least(jnp.array([out.forwards]))[0])
        at = np.arange(begin, begin + block_length, dtype=np.int32)
        seen = (jnp.asarray(x) for x in (logits, tokens, may_write, at))
        look = Look(*seen, tick(block, call), jnp.int32(c.mask_id), jnp.float32(floor), jnp.float32(0), key)
        if decoder.drafts:
            look = look._replace(drafts=jnp.asarray(padded), read=jnp.int32(len(read)))
        state, verdict = step(decoder, state, look)
        if decoder.drafts:
            drafts = [np.asarray(draft) for draft in verdict.drafts[: max(1, int(verdict.drafted))]]
            saved += int(verdict.steps) - 1
        done = bool(verdict.done)
        canvas[begin:end] = verdict.tokens[: end - begin]
        if smoothing is not None:
            weight = float(smoothing.weight(jnp.array([out.forwards]))[0])
            hope = np.asarray(expected(params, x, family=family, config=c, top=smoothing.top))[0]
            for i, position in enumerate(range(left, right)):
                soft[position] = np.asarray(params["embedding"])[canvas[position]]
                if canvas[position] == c.mask_id:
                    soft[position] += np.float32(weight) * hope[i]
        out.forwards += 1
        out.positions += n
        return fresh

    def run(left, right, width, begin, end):
        """The block's logits, the trunk's output and the window's keys and values, for the canvas as it stands."""
        n = right - left
        at = np.zeros((1, width), np.int32)
        valid = np.zeros((1, width), bool)
        at[0, :n], valid[0, :n] = np.arange(left, right), True
        x = np.zeros((1, width, c.width), np.float32)
        x[0, :n] = np.array(params["embedding"])[canvas[left:right]] if smoothing is None else soft[left:right]
        behind = None
        if cache is not None and n < total:
            visible = np.zeros((1, length), bool)
            visible[0, :total] = True
            visible[0, left:right] = False
            behind = Cache(cache, rank_keys("all", None, jnp.asarray(visible), 1))
        x, fresh = trunk(params, jnp.asarray(x), jnp.asarray(at), jnp.asarray(valid), behind, family=family, config=c)
        logits = np.zeros((1, block_length, c.vocab), np.float32)
        logits[0, : end - begin] = family.unembed(params, c, x[:, begin - left : end - left])[0]
        early = np.arange(begin, end) < len(prompt) + min_gen_length
        for eos_id in c.eos_ids:
            logits[0, : end - begin, eos_id] = np.where(early, -1e30, logits[0, : end - begin, eos_id])
        return logits[0], x, fresh

    before, after = policy.reach()
    first = start // block_length * block_length if align_blocks else start
    for block, begin in enumerate(range(first, total, block_length)):
        end, call, done = min(begin + block_length, total), 0, False
        drafts = [np.pad(canvas[begin:end], (0, block_length - (end - begin)))]
        while not done:
            full, refresh, window = map(bool, policy.plan(tick(block, call), jnp.int32(cached_block))[:3])
            if full:
                kept, cache = cache, None
                fresh = forward(0, total, length, begin, end, block, call)
                cache, call = (fresh if refresh else kept), call + 1
                if refresh:
                    cached_block = block
                    out.refreshes += 1
            if window:
                # No draft goes past the whole canvas that the policy runs next.
                later = (
                    tick(block, call)._replace(iteration=turns + saved + n, forward=out.forwards + saved + n)
                    for n in range(1, len(drafts) + 1)
                )
                refreshes = [bool(policy.plan(jax.tree.map(jnp.int32, t), jnp.int32(cached_block)).full) for t in later]
                if decoder.drafts and policy.keeps and True in refreshes:
                    drafts = drafts[: refreshes.index(True) + 1]
                left, right = max(0, begin - before), min(total, end + after)
                forward(left, right, min(before + block_length + after, length), begin, end, block, call)
                call += 1
            turns += 1
        if early_stop and any(one in canvas[max(begin, len(prompt)) : end] for one in c.eos_ids):
            canvas[end:] = c.eos_id
            break
    return out
