"""Whole decodes against dInfer's: the canvas after every decode call, forwards and refreshes of every `exact` trace.

A failure here means that djax no longer gives dInfer's tokens. It is never mended by editing the data.
"""

import json

import numpy as np
import pytest
from conftest import GOLDENS

import djax

FAMILIES = ("moe_blockwise", "moe_vicinity", "moe_itersmooth", "moe_itersmooth_vicinity")
# Those whose `exact` traces come out call by call; the first four's others are in test_golden_deviations.py.
EXACT = (*FAMILIES, "llada_dense")
CLEAN = json.loads((GOLDENS / "clean.json").read_text())


def policy(settings):
    every = settings.get("cache_update_freq")
    if settings["algo"].endswith("vicinity"):
        return djax.Vicinity(settings["prefix_look"], settings["after_look"], settings["warmup_steps"], every)
    return {"none": None, "dual": djax.Dual(every), "prefix": djax.Prefix(every)}[settings["cache"]]


def decoder(settings):
    threshold = djax.Threshold(settings.get("threshold") or 2.0)
    match settings["decoder"]:
        case "threshold":
            return threshold
        case "credit":
            numbers = [settings.get(k, d) for k, d in (("credit_alpha", 0.7), ("boost_gamma", 0.2), ("decay_beta", 0.8))]
            return djax.Credit(threshold, *numbers)
        case "hierarchy":
            return djax.Hierarchy(threshold.tau, settings["low_threshold"])
        case "fixed":
            return djax.Fixed(steps=settings["steps"])


def smoothing(settings):
    if not settings["algo"].startswith("itersmooth"):
        return None
    names = {"cont_weight_init": 0.15, "cont_weight_growth": 0.02, "cont_weight": 0.3, "threshold_decay": 0.02}
    return djax.Smoothing(*(settings.get(name, default) for name, default in names.items()))


def recorded(family):
    return {t["id"]: t for t in json.loads((GOLDENS / f"{family}.json").read_text())["traces"]}


def traces(kind):
    for family in EXACT:
        for name, trace in recorded(family).items():
            if name in CLEAN[family][kind]:
                yield pytest.param(family, trace, id=f"{family}-{name}")


def replay(family, trace, request, row=0):
    """The recorded prompt of one row decoded by djax alone; dInfer's last canvas and the one after each decode call."""
    settings = trace["settings"]
    data = np.load(GOLDENS / f"{family}.npz")
    prompt = data[f"{trace['id']}/prompt"][row].astype(int)
    prompt = prompt[prompt != trace["mask_id"]]  # a shorter second prompt is padded with masks
    total = data[f"{trace['id']}/final"].shape[1]
    out = djax.generate(
        request.getfixturevalue(settings["model"]),
        prompt.tolist(),
        gen_length=total - len(prompt),
        block_length=settings["block_length"],
        decoder=decoder(settings),
        cache=policy(settings),
        smoothing=smoothing(settings),
        early_stop=settings["early_stop"],
        align_blocks=settings["start_block_align"],
        trace=True,
    )
    return out, data[f"{trace['id']}/final"][row], data[f"{trace['id']}/steps"][:, row]


@pytest.mark.parametrize(("family", "trace"), list(traces("exact")))
def test_exact(family, trace, request):
    out, final, steps = replay(family, trace, request)
    np.testing.assert_array_equal(out.canvas, final)
    prompt, mask_id = trace["settings"]["prompt_length"], trace["mask_id"]
    assert len(steps) == out.forwards, "every forward decodes"
    for forward, step in enumerate(steps):
        np.testing.assert_array_equal(out.trace.canvas(out.canvas, prompt, forward, mask_id), step)
    assert (out.forwards, out.refreshes) == (trace["num_forwards"], trace["cache_updates"])


@pytest.mark.parametrize(("family", "trace"), list(traces("tokens_only")))
def test_tokens_only(family, trace, request):
    """dInfer ran forwards on finished blocks here (loop unrolling), which a loop on the device has no need of."""
    out, final, _ = replay(family, trace, request)
    np.testing.assert_array_equal(out.canvas, final)
    assert out.forwards <= trace["num_forwards"]


def test_the_traces_are_there():
    assert len(list(traces("exact"))) == 102
    assert len(list(traces("tokens_only"))) == 7
