"""The benchmarks: what they compute by hand, and a whole small run of each."""

import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny import CONFIG
from toy import toy_model

import djax
from djax import text
from djax.benchmarks import ladder, oracle, soft_top
from djax.benchmarks.ladder import Rung
from djax.benchmarks.report import with_part
from djax.engine.request import bucket
from djax.errors import OptionError
from djax.models import llada_moe
from djax.models.model import Model
from djax.runtime.programs import Programs
from djax.tasks.evaluate import Report, difference, wilson
from djax.tasks.problems import held_out

BEGIN, END = "<!-- djax bench ladder writes this -->", "<!-- end of ladder -->"
PROBLEMS = held_out(4, seed=2)
RUNGS = (Rung("threshold", ladder.thresholds(0.9, 0.99, 0.2)), Rung("dual", ("Threshold(0.9)",), "Dual()", block_length=64))
POINTS = [(rung.name, decoder) for rung in RUNGS for decoder in rung.decoders]


def point(tokens_per_forward, accuracy, **more):
    return {"tokens_per_forward": tokens_per_forward, "accuracy": accuracy, "oracle": False} | more


def test_front():
    best = [point(2, 0.9), point(3, 0.8), point(4, 0.5)]
    beaten = [point(1, 0.9), point(2.5, 0.6), point(3, 0.7), point(4, 0.4)]
    assert ladder.front([beaten[0], best[1], beaten[1], best[2], beaten[3], best[0], beaten[2]]) == best
    assert ladder.front([best[0], point(9, 1.0, oracle=True)]) == best[:1], "an oracle is no way to decode"


def test_fastest():
    reference = dict(correct=450, problems=500)
    lines = [dict(correct=c, tokens_per_forward=t) for c, t in ((445, 5.0), (444, 9.0), (480, 3.0))]
    assert ladder.fastest(lines, reference) is lines[0], "5 of 500 is one point, and 6 is more"
    assert ladder.fastest(lines, reference, points=0.012) is lines[1]
    assert ladder.fastest(lines[1:2], reference) is None


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson(correct, count, low, high):
    """The values of Newcombe (Statistics in Medicine 17, 1998, table I, method 3)."""
    assert wilson(correct, count) == pytest.approx((low, high), abs=5e-5)


def test_difference():
    """Of four problems, 0b1011 answers two that 0b0110 does not, and leaves one that it does."""
    half = 1.96 * math.sqrt((3 / 4 - 1 / 16) / 4)
    assert difference("b", "6", 4) == pytest.approx((0.25, 0.25 - half, 0.25 + half))
    assert difference("6", "b", 4) == pytest.approx((-0.25, -0.25 - half, -0.25 + half))
    assert difference("f", "f", 4) == (0, 0, 0)
    assert difference("f", "0", 4) == (1, 1, 1)


@pytest.fixture(scope="module")
def speaker(small):
    """A toy that gives the result of the second problem, whatever it is asked."""
    words = small.tokenizer
    answer = words(f"#### {PROBLEMS[1].result}")["input_ids"]
    says = np.full(CONFIG.max_positions, small.config.eos_id, np.int32)
    says[:90] = words(".")["input_ids"]
    says[90 : 90 + len(answer)] = answer
    ids = dict(vocab=small.config.vocab, mask_id=small.config.mask_id, eos_id=small.config.eos_id)
    return toy_model(says=says, doubt=True, config=dataclasses.replace(CONFIG, **ids), tokenizer=words)


@pytest.fixture(scope="module")
def measured(speaker, tmp_path_factory):
    """A ladder of four points, killed after the second and gone on with; and the answers of the third."""
    out, notes = tmp_path_factory.mktemp("ladder") / "new" / "results", []

    def killing(note):
        notes.append(note)
        if len(notes) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder, "BATCH", 2)
        patch.setattr(ladder, "GEN_LENGTH", 140)
        # As in a process of its own, whatever other tests compiled in this one.
        patch.setattr(sys.modules["djax.engine.generate"], "PROGRAMS", Programs(most=32))
        with pytest.raises(KeyboardInterrupt):
            ladder.measure(speaker, PROBLEMS, out, resume=False, note=killing, rungs=RUNGS)
        killed = (out / "ladder.jsonl").read_text()
        ladder.measure(speaker, PROBLEMS, out, resume=True, note=notes.append, rungs=RUNGS)
        answers = []
        for two in (PROBLEMS[:2], PROBLEMS[2:]):
            answers += djax.generate(speaker, [p.question for p in two], gen_length=140, decoder=djax.Threshold(0.2))
    lines = [json.loads(line) for line in (out / "ladder.jsonl").read_text().splitlines()]
    return SimpleNamespace(out=out, notes=notes, killed=killed, lines=lines, answers=answers)


def test_a_kill_loses_a_point_and_resume_adds_what_lacks(measured):
    assert measured.killed.count("\n") == 2
    assert (measured.out / "ladder.jsonl").read_text().startswith(measured.killed)
    assert [(line["rung"], line["decoder"]) for line in measured.lines] == POINTS
    assert [note.split(": ")[0] for note in measured.notes] == [", ".join(p) for p in POINTS], "each was measured once"
    assert [p.name for p in measured.out.iterdir()] == ["ladder.jsonl"]


def test_a_line_says_all_there_is_to_say(measured, speaker):
    settings = {"rung", "decoder", "cache", "smoothing", "block_length", "gen_length", "batch", "dtype", "model", "oracle"}
    circumstances = {"hardware", "threads", "allocator", "python", "jax", "djax", "commit", "command"}
    for line in measured.lines:
        assert set(line) == settings | circumstances | {f.name for f in dataclasses.fields(Report)}
        assert (line["problems"], line["gen_length"], line["batch"]) == (4, 140, 2)
        assert (line["dtype"], line["model"]) == ("float32", repr(speaker))
    assert [line["cache"] for line in measured.lines] == ["none", "none", "none", "Dual()"]
    assert [line["block_length"] for line in measured.lines] == [32, 32, 32, 64]
    assert measured.lines[3]["refreshes"] >= 1
    assert measured.lines[0]["refreshes"] == 0


def test_a_line_is_what_the_answers_say(measured):
    line, answers = measured.lines[2], measured.answers
    assert answers[1].text.endswith(f".#### {PROBLEMS[1].result}")
    assert [p.result == PROBLEMS[1].result for p in PROBLEMS] == [False, True, False, False]
    assert (line["correct"], line["accuracy"], line["correct_bits"]) == (1, 0.25, "2")
    assert (line["accuracy_low"], line["accuracy_high"]) == pytest.approx(wilson(1, 4), abs=1e-4)
    assert line["tokens"] == sum(len(a.tokens) for a in answers)
    rates = [a.tokens_per_forward for a in answers]
    assert len(set(rates)) == 4
    half = 1.96 * np.std(rates) / 2
    for name, value in (("", 0), ("_low", -half), ("_high", half)):
        assert line[f"tokens_per_forward{name}"] == pytest.approx(np.mean(rates) + value, abs=1e-3)
    for name in ("forwards", "refreshes", "positions"):
        assert line[name] == pytest.approx(np.mean([getattr(a, name) for a in answers]), abs=0.05)


def test_a_sweep_compiles_once_a_bucket(measured, speaker):
    c = speaker.config
    lengths = [len(text.encode(speaker.tokenizer, p.question, c.vocab, c.mask_id)[0][0]) for p in PROBLEMS]
    assert [bucket(max(two) + 140) for two in (lengths[:2], lengths[2:])] == [192, 256]
    assert [line["programs"] for line in measured.lines] == [2, 0, 0, 2]
    assert [line["compile_seconds"] > 0 for line in measured.lines] == [True, False, False, True]


def test_what_is_measured_is_not_lost_by_accident(measured, speaker, monkeypatch):
    before = (measured.out / "ladder.jsonl").read_bytes()
    with pytest.raises(OptionError, match=r"--resume: .*ladder.jsonl has gen_length 140, this run 128; choose another --out"):
        ladder.measure(speaker, PROBLEMS, measured.out, resume=True, note=pytest.fail, rungs=RUNGS)
    monkeypatch.setattr(ladder, "GEN_LENGTH", 140)
    monkeypatch.setattr(ladder, "BATCH", 2)
    for resume, count, message in (
        (False, 4, r"--out: .*ladder.jsonl exists; give --resume to go on with it, or remove it"),
        (True, 3, r"--resume: .*ladder.jsonl has problems 4, this run 3; choose another --out"),
    ):
        with pytest.raises(OptionError, match=message):
            ladder.measure(speaker, PROBLEMS[:count], measured.out, resume=resume, note=pytest.fail, rungs=RUNGS)
    ladder.measure(speaker, PROBLEMS, measured.out, resume=True, note=pytest.fail, rungs=RUNGS)
    assert (measured.out / "ladder.jsonl").read_bytes() == before


def test_tables_and_picture(measured, tmp_path):
    (tmp_path / "ladder.jsonl").write_bytes((measured.out / "ladder.jsonl").read_bytes())
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n")
    page = ladder.finish(tmp_path, readme)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "ladder.jsonl", "ladder.md", "ladder.png"]
    assert (tmp_path / "ladder.md").read_text() == page
    rows = [line for line in page[page.index("## Every point") :].splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 4
    for row, line in zip(rows, measured.lines, strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[:2] == [line["rung"], f"`{line['decoder']}`"]
        assert cells[4].startswith(f"{100 * line['accuracy']:.1f}% (")
        assert cells[5].startswith(f"{line['tokens_per_forward']:.2f} (")
    assert "## Against threshold, `Threshold(0.9)`" in page
    assert "## Against threshold, `Threshold(0.99)`" in page
    assert f"commit {measured.lines[0]['commit']}" in page

    from matplotlib import image

    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    picture = image.imread(tmp_path / "ladder.png")
    assert picture.shape[0] > 500
    assert len(np.unique(picture.reshape(-1, 4), axis=0)) > 20, "it shows something"

    new = readme.read_text()
    assert new.startswith(f"before\n{BEGIN}\n| | decoder |")
    assert new.endswith(f"\n{END}\nafter\n")
    assert "stale" not in new
    assert new.count("| `Threshold(0.9)` |") == 2, "a row for each rung's step, and none for its sweep"
    assert "| `Threshold(0.99)` |" not in new
    assert "- At most one point below threshold, `Threshold(0.9)` (" in new
    assert with_part(new, "ladder", ladder.summary(measured.lines)) == new


@pytest.mark.parametrize("readme", ["", BEGIN, END, 2 * (BEGIN + END)])
def test_a_readme_without_its_marks_is_left_alone(readme):
    with pytest.raises(OptionError, match="--readme: expected one line <!-- djax bench ladder writes this --> and one line"):
        with_part(readme, "ladder", "text")


@pytest.fixture(scope="module")
def wordy(small):
    """The tiny model with the shipped model's words."""
    ids = dict(vocab=small.config.vocab, mask_id=small.config.mask_id, eos_id=small.config.eos_id)
    config = dataclasses.replace(CONFIG, **ids)
    return Model(llada_moe.FAMILY, config, llada_moe.FAMILY.init(config, jax.random.key(0)), small.tokenizer, {}, {})


def test_the_oracle_gives_the_answer_it_knows_in_fewer_forwards(wordy):
    options = dict(gen_length=40, block_length=16, decoder=djax.Fixed(1))
    questions = [p.question for p in PROBLEMS[:2]]
    for slow, fast in zip(djax.generate(wordy, questions, **options), oracle.answer(wordy, questions, **options), strict=True):
        np.testing.assert_array_equal(fast.canvas, slow.canvas)
        assert fast.forwards < slow.forwards


def test_soft_top(wordy, tmp_path, monkeypatch):
    """With the whole vocabulary for k, the top-k form is the whole softmax."""
    vocab = wordy.config.vocab
    monkeypatch.setattr(soft_top, "TOPS", (1, vocab))
    notes = []
    one, whole = soft_top.measure(wordy, PROBLEMS[:2], tmp_path / "new", notes.append)
    assert [json.loads(line) for line in (tmp_path / "new" / "soft_top.jsonl").read_text().splitlines()] == [one, whole]
    assert [note.split(":")[0] for note in notes] == ["top 1", f"top {vocab}"]
    assert (one["top"], whole["top"]) == (1, vocab)
    assert 0.01 < one["error_mean"] < one["error_max"]
    assert whole["error_max"] < 1e-4
    assert one["whole"] == whole["whole"]
    for name in ("forwards", "tokens", "positions", "correct_bits"):
        assert whole[name] == whole["whole"][name]
    assert (whole["accuracy_difference"], whole["difference_low"], whole["difference_high"]) == (0, 0, 0)
    assert {"hardware", "commit", "command"} < set(one)
