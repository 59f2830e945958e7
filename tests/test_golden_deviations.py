"""Every recorded trace that djax is not expected to reproduce: how far the two go together, why they part, what comes out.

Three roads. (1) `DInfer`, a plain loop with dInfer's rules and defects over djax's network, gives every one of these
records: nothing but those rules sets the two apart. (2) djax decodes each row alone. Up to the first decode call in which
dInfer does to the row what djax never does (`Record.departure`, found in the record alone) both canvases are equal after
every call; from there each reason has a test of its own. (3) `goldens/deviations.json` holds what came out, row by row,
and the README's table counts it. After a change that is meant, read what changed, then write both anew:

    python tests/test_golden_deviations.py
"""

import dataclasses
import json
from collections import Counter
from functools import cache, cached_property

import numpy as np
import pytest
from conftest import GOLDENS
from dinfer_loop import DInfer
from test_golden_traces import CLEAN, FAMILIES, recorded, replay, smoothing

import djax
from djax.errors import OptionError
from djax.runtime.compilation import enable_cache

OUTCOMES = GOLDENS / "deviations.json"
README = GOLDENS.parent.parent / "README.md"

# Why the two part, and how the README's line on it begins.
REASONS = {
    "waits": "rows of a batch wait for each other",
    "gap": "rows of a batch start at the longest prompt's end",
    "unrolled": "a finished block runs up to three more forwards",
    "refreshes twice": "vicinity: two refreshes in a row",
    "stops": "`early_stop=False` still stops at EOS",
    "prompt's EOS": "an EOS inside the prompt",
    "no candidate": "a forward whose masked positions all propose the mask token",
    "credit left over": "credit left from an answer that stopped early",
    "window too wide": "vicinity takes a window wider than the canvas",
    "shifted logits": "shifted logits (Dream)",
}


@cache
def arrays(family):
    data = np.load(GOLDENS / f"{family}.npz")
    return {name: data[name] for name in data.files}


@dataclasses.dataclass(frozen=True)
class Record:
    """One row of a trace. dInfer decodes from every forward, so `steps`, `calls` and `forwards` have one entry for each."""

    family: str
    trace: dict
    row: int

    def __str__(self):
        return f"{self.family}-{self.trace['id']}-{self.row}"

    def _array(self, name):
        return arrays(self.family)[f"{self.trace['id']}/{name}"].astype(int)

    @property
    def settings(self):
        return self.trace["settings"]

    @cached_property
    def prompt(self):
        """With the masks that stand after a shorter second prompt."""
        return self._array("prompt")[self.row]

    @cached_property
    def steps(self):
        return self._array("steps")[:, self.row]

    @cached_property
    def final(self):
        return self._array("final")[self.row]

    @cached_property
    def calls(self):
        return self._array("calls")

    @cached_property
    def whole(self):
        """Bool, a forward: it ran the canvas and no cache."""
        return self._array("forwards")[:, 4] == 0

    @cached_property
    def refresh(self):
        return self.whole & (self._array("forwards")[:, 5] == 1)

    @cached_property
    def before(self):
        """The canvas that each call found: what the last one left, and EOS where an early stop then filled it in."""
        canvas = np.full_like(self.final, self.trace["mask_id"])
        canvas[: len(self.prompt)] = self.prompt
        before = [canvas]
        for step, (_, begin, end), following in zip(self.steps, self.calls, self.calls[1:], strict=False):
            canvas = step.copy()
            if self.settings["early_stop"] and following[1] != begin and self.trace["eos_id"] in step[begin:end]:
                canvas[end:] = self.trace["eos_id"]
            before.append(canvas)
        return before

    @cached_property
    def masked(self):
        """Bool, a call: the row's block had a mask."""
        blocks = zip(self.before, self.calls, strict=True)
        return np.array([self.trace["mask_id"] in canvas[begin:end] for canvas, (_, begin, end) in blocks])

    @cached_property
    def rest(self):
        """Bool, a call: its turn began when the row's block was finished. A refresh and the window after it are one turn,
        also in djax, even if the refresh finishes the block."""
        second = np.concatenate([[False], self.refresh[:-1]])
        first = np.arange(len(second)) - second
        return ~self.masked[first]

    @cached_property
    def idle(self):
        """Bool, a call: the row's block had masks and dInfer wrote none of them."""
        return self.masked & np.array([(a == b).all() for a, b in zip(self.before, self.steps, strict=True)])

    @cached_property
    def again(self):
        """Bool, a call: vicinity refills the cache though the turn before did, in the same block and without being asked to."""
        again = np.zeros(len(self.calls), bool)
        if self.settings["algo"].endswith("vicinity") and self.settings.get("cache_update_freq") is None:
            again[2:] = self.refresh[2:] & self.refresh[:-2] & (self.calls[2:, 1] == self.calls[:-2, 1])
        return again

    @cached_property
    def departure(self):
        """The first call in which dInfer does to this row what djax never does, and what that is; (all calls, None) if it
        never does."""
        settings, calls = self.settings, len(self.calls)
        if settings.get("use_shift"):
            return 0, "shifted logits"
        if self.trace.get("differs_from_fresh"):
            return 0, "credit left over"
        if settings["algo"] == "vicinity" and settings["after_look"] > len(self.final):
            return 0, "window too wide"
        if self.trace["mask_id"] in self.prompt and not settings["start_block_align"]:
            return 0, "gap"
        first = {
            "waits" if settings["batch"] > 1 else "unrolled": self.rest,
            "no candidate": self.idle,
            "refreshes twice": self.again,
        }
        found = [(int(np.argmax(happens)), why) for why, happens in first.items() if happens.any()]
        if found:
            return min(found)
        _, begin, end = self.calls[-1]
        if self.trace["mask_id"] in self.final:
            return calls, "stops"
        if self.trace["eos_id"] in self.prompt[begin:] and self.trace["eos_id"] not in self.final[len(self.prompt) : end]:
            return calls, "prompt's EOS"
        return calls, None

    @property
    def counts_rests(self):
        """Whether forwards at rest move something that later forwards of the row depend on: smoothing's weight and threshold,
        a refresh at every so many turns, vicinity's warm-up. Without these a wait costs time and changes nothing."""
        settings = self.settings
        warming = settings.get("warmup_steps") or 0
        return smoothing(settings) is not None or settings.get("cache_update_freq") is not None or self.rest[:warming].any()


def traces():
    for family in (*FAMILIES, "moe_reuse", "moe_stuck"):
        for name, trace in recorded(family).items():
            if family not in CLEAN or name in CLEAN[family]["not_expected"]:
                yield family, trace


RECORDS = [Record(family, trace, row) for family, trace in traces() for row in range(trace["settings"]["batch"])]


def part(*reasons):
    """The rows that part for one of these reasons."""
    chosen = [record for record in RECORDS if record.departure[1] in reasons]
    return pytest.mark.parametrize("record", chosen, ids=str)


# --- dInfer's rules over djax's network ------------------------------------------------------------------------------------


def sessions():
    """Traces by the dInfer object that made them: fresh for each, except in moe_reuse."""
    found = {}
    for family, trace in traces():
        found.setdefault((family, trace.get("group", trace["id"])), []).append(trace)
    return [pytest.param(family, several, id=f"{family}-{several[0]['id']}") for (family, _), several in found.items()]


@pytest.mark.parametrize(("family", "several"), sessions())
def test_dinfers_rules_give_the_record(family, several, request):
    """With djax's network and dInfer's rules every canvas of every record comes out, forward for forward."""
    enable_cache()
    dinfer = DInfer(request.getfixturevalue(several[0]["settings"]["model"]), several[0]["settings"])
    for trace in several:
        prompts, steps, final = (arrays(family)[f"{trace['id']}/{name}"] for name in ("prompt", "steps", "final"))
        dinfer.generate(prompts.astype(int), most=len(steps) if trace.get("stuck") else 1000)
        np.testing.assert_array_equal(dinfer.steps, steps)
        np.testing.assert_array_equal(dinfer.canvas, final)
        assert trace.get("stuck") or dinfer.refreshes == trace["cache_updates"]


# --- djax, each row alone --------------------------------------------------------------------------------------------------


def outcome(record, out):
    """A row's entry in deviations.json. Counts stand only beside equal canvases: where tokens differ they say nothing."""
    why = record.departure[1]
    if out is None:
        return {"why": why, "canvas": "refused"}
    if (out.canvas == record.final).all():
        return {"why": why, "canvas": "same", "forwards": out.forwards, "refreshes": out.refreshes}
    return {"why": why, "canvas": "differs"}


def answer(trace, generated):
    """What djax takes for the answer: the tokens before the first EOS, and before the first mask, if dInfer left one."""
    ends = np.flatnonzero(np.isin(generated, (trace["eos_id"], trace["mask_id"])))
    return generated[: ends[0]] if ends.size else generated


def canvases(record, out):
    """djax's canvas after each forward."""
    prompt, mask = out.prompt_length, record.trace["mask_id"]
    return np.array([out.trace.canvas(out.canvas, prompt, forward, mask) for forward in range(out.forwards)])


def decoded(record, request):
    """What djax makes of the row alone; it is checked here that both go together up to the departure, and the outcome."""
    out, _, _ = replay(record.family, record.trace, request, record.row)
    together, _ = record.departure
    np.testing.assert_array_equal(canvases(record, out)[:together], record.steps[:together])
    np.testing.assert_array_equal(out.trace.whole[:together], record.whole[:together])
    assert record.trace["mask_id"] not in out.canvas
    np.testing.assert_array_equal(out.tokens, answer(record.trace, out.canvas[out.prompt_length :]))
    assert outcome(record, out) == json.loads(OUTCOMES.read_text())[record.family][record.trace["id"]][record.row]
    return out


@part(None)
def test_nothing_parts(record, request):
    """The defect for which the trace was set apart does not come to pass in this row, or there is none, as in a second answer
    without credit and with the mended fixed-step decoder: everything is equal."""
    out = decoded(record, request)
    np.testing.assert_array_equal(out.canvas, record.final)
    assert (out.forwards, out.refreshes) == (record.trace["num_forwards"], record.trace["cache_updates"])


@part("waits", "unrolled")
def test_waits(record, request):
    """djax runs no forward on a finished block. Where nothing counts these forwards, all others are equal.

    Where something does, only what lies before the first of them is compared here: afterwards a refresh, the end of the
    warm-up or a step of smoothing's ramp comes at another forward, and other tokens may follow. That this is all there is
    to it, `test_dinfers_rules_give_the_record` has.
    """
    out = decoded(record, request)
    if not record.counts_rests:
        ours, theirs = canvases(record, out), record.steps[~record.rest]
        np.testing.assert_array_equal(ours, theirs)
        assert out.refreshes == np.sum(record.refresh & ~record.rest)
        np.testing.assert_array_equal(out.canvas, record.final)
        assert out.forwards < record.trace["num_forwards"]


@part("gap")
def test_gap(record, request):
    """dInfer starts this row's first block where the longer prompt ends, and never decodes what lies before."""
    out = decoded(record, request)
    masks = np.flatnonzero(record.final == record.trace["mask_id"])
    np.testing.assert_array_equal(masks, np.arange(out.prompt_length, len(record.prompt)))
    assert out.trace.starts[0] == out.prompt_length


@part("refreshes twice")
def test_refreshes_twice(record, request):
    """Where dInfer refills the cache it has just filled, djax runs the window; and it refills once a block."""
    out = decoded(record, request)
    again, _ = record.departure
    assert record.refresh[again]
    assert not out.trace.whole[again]
    filled = [int(start) for start, whole in zip(out.trace.starts, out.trace.whole, strict=True) if whole]
    filled = filled[record.settings["warmup_steps"] :]
    assert len(filled) == len(set(filled)) == out.refreshes
    assert np.sum(record.refresh[: again + 1]) == 1 + np.sum(out.trace.whole[record.settings["warmup_steps"] : again + 1])


@part("stops")
def test_stops(record, request):
    """dInfer ends with the first block in which every row has an EOS, asked to or not; djax goes on from the same canvas."""
    out = decoded(record, request)
    assert not record.settings["early_stop"]
    _, begin, end = record.calls[-1]
    assert all(record.trace["eos_id"] in row[begin:end] for row in arrays(record.family)[f"{record.trace['id']}/final"])
    written = record.final != record.trace["mask_id"]
    assert not written[end:].any()
    np.testing.assert_array_equal(out.canvas[written], record.final[written])
    assert out.forwards > record.trace["num_forwards"]


@part("prompt's EOS")
def test_prompts_eos(record, request):
    """dInfer fills all blocks after the first with EOS, for one that stands in the prompt; djax decodes them."""
    out = decoded(record, request)
    _, begin, end = record.calls[-1]
    assert record.trace["eos_id"] in record.prompt[begin:]
    assert record.trace["eos_id"] not in out.canvas[out.prompt_length : end]
    np.testing.assert_array_equal(out.canvas[:end], record.final[:end])
    assert (record.final[end:] == record.trace["eos_id"]).all()
    assert np.any(out.trace.accepted_at[end:] >= 0)


@part("no candidate")
def test_no_candidate(record, request):
    """Where dInfer writes nothing, djax strikes the mask from the row's logits and accepts. dInfer does not get further,
    unless smoothing changes what the next forward reads."""
    out = decoded(record, request)
    call, _ = record.departure
    assert np.any(out.trace.accepted_at == call)
    still = all((step == record.steps[call]).all() for step in record.steps[call:])
    assert still == bool(record.trace.get("stuck"))
    assert still != record.settings["algo"].startswith("itersmooth")
    if record.settings["cache"] == "none" and still:
        _, begin, end = record.calls[call]
        logits = djax.logits(request.getfixturevalue(record.settings["model"]), record.steps[call][None])[0, begin:end]
        masked = record.steps[call][begin:end] == record.trace["mask_id"]
        assert (np.argmax(logits, axis=-1)[masked] == record.trace["mask_id"]).all()


@part("credit left over")
def test_credit_left_over(record, request):
    """The second answer of one dInfer object begins with the credit that the first, stopped early, left; djax's does not."""
    out = decoded(record, request)
    assert record.settings["decoder"] == "credit"
    assert record.trace["call_index"] == 1
    model = request.getfixturevalue(record.settings["model"])
    fresh = DInfer(model, record.settings)
    fresh.generate(record.prompt[None], most=1000)
    np.testing.assert_array_equal(out.canvas, fresh.canvas[0])
    np.testing.assert_array_equal(canvases(record, out), [step[0] for step in fresh.steps])


@part("window too wide")
def test_window_too_wide(record, request):
    """dInfer's prefix cache hides all that follows the window's start, so a vicinity window that ends before the canvas does
    would lose what is between; reaching 256 positions too far it works. djax asks for a reach that fits, and then has the
    same tokens."""
    with pytest.raises(OptionError, match=r"reaches 256 positions beyond its block; prompt 0 has a canvas of 81"):
        replay(record.family, record.trace, request, record.row)
    fits = dict(record.settings, after_look=64)
    out, _, _ = replay(record.family, dict(record.trace, settings=fits), request, record.row)
    np.testing.assert_array_equal(canvases(record, out), record.steps)
    assert (out.forwards, out.refreshes) == (record.trace["num_forwards"], record.trace["cache_updates"])


@part("shifted logits")
def test_shifted_logits(record, request):
    """No family of djax reads a token from the position before it, so these prompts are decoded unshifted, to other tokens."""
    out = decoded(record, request)
    assert (canvases(record, out)[0] != record.steps[0]).any()


# --- the counts ------------------------------------------------------------------------------------------------------------


def counted():
    """Rows, and rows with dInfer's canvas, for each reason; under "fixed" those of the fixed-step decoder once more."""
    rows, same, outcomes = Counter(), Counter(), json.loads(OUTCOMES.read_text())
    for record in RECORDS:
        alike = outcomes[record.family][record.trace["id"]][record.row]["canvas"] == "same"
        for kind in (record.departure[1], record.settings["decoder"]):
            rows[kind] += 1
            same[kind] += alike
    return rows, same


def texts():
    """Of all recorded answers to one prompt: how many have an EOS, and for how many of these dInfer's text is another."""
    ended = other = 0
    for family in FAMILIES:
        for name, trace in recorded(family).items():
            prompt, final, returned = (arrays(family)[f"{name}/{key}"][0] for key in ("prompt", "final", "returned"))
            generated = final[len(prompt) :]
            if trace["settings"]["batch"] == 1 and trace["eos_id"] in generated:
                ended += 1
                other += list(returned) != [*prompt, *answer(trace, generated)]
    return ended, other


def test_every_row_has_its_outcome():
    outcomes = json.loads(OUTCOMES.read_text())
    assert {(f, t): len(rows) for f, of in outcomes.items() for t, rows in of.items()} == {
        (family, trace["id"]): trace["settings"]["batch"] for family, trace in traces()
    }
    assert len(RECORDS) == 187
    assert {record.departure[1] for record in RECORDS} == {None, *REASONS}


def test_the_readme_counts_them():
    section = README.read_text().split("## Where djax differs from dInfer")[1].split("\n## ")[0]
    rows, same = counted()
    for kind, opening in {**REASONS, "fixed": "the fixed-step decoder"}.items():
        (line,) = [line for line in section.splitlines() if line.startswith(f"| {opening}")]
        assert f"| {rows[kind]}, {same[kind]} the same |" in line
    ended, other = texts()
    assert f"| {other} of {ended} answers with an EOS |" in section
    alone = sum(record.departure[1] == "no candidate" and record.settings["decoder"] == "hierarchy" for record in RECORDS)
    assert f"| {alone} of the {rows['no candidate']} |" in section
    assert f"{len(list(traces()))} recorded traces" in section
    assert f"{len(RECORDS)} rows" in section
    assert f"{rows[None]} of them" in section


def main():
    """Decode every row, write deviations.json, say what the README's table should count."""

    class Models:
        getfixturevalue = staticmethod(cache(lambda name: djax.load(GOLDENS / name)))

    outcomes = {}
    for record in RECORDS:
        out = None
        if record.departure[1] != "window too wide":
            out, _, _ = replay(record.family, record.trace, Models, record.row)
        outcomes.setdefault(record.family, {}).setdefault(record.trace["id"], []).append(outcome(record, out))
    families = (
        f'"{family}": {{\n' + ",\n".join(f'  "{name}": {json.dumps(rows)}' for name, rows in of.items()) + "\n}"
        for family, of in outcomes.items()
    )
    OUTCOMES.write_text("{\n" + ",\n".join(families) + "\n}\n")
    rows, same = counted()
    for kind in (None, *REASONS, "fixed"):
        print(f"{kind}: {rows[kind]}, {same[kind]} the same")
    print("texts with an EOS, other than dInfer's:", *texts())


if __name__ == "__main__":
    main()
