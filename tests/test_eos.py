"""Several ids that end an answer: any of them ends it, the first one fills what an early stop leaves."""

import dataclasses
import json
import shutil
import subprocess

import numpy as np
import pytest
from conftest import GOLDENS
from plain_loop import decode
from tiny import CONFIG, DENSE, LLADA2, tiny_model
from toy import toy_model

import djax
from djax.caching import Uncached
from djax.checkpoints.source import describe
from djax.distill import recording, store
from djax.errors import CheckpointError

# Ids that these models' random weights propose now and then, so that answers end at each of them.
ENDS = {"moe": (19, 46, 29), "dense": (19, 27, 9), "llada2": (27, 37, 45)}
CONFIGS = {"moe": CONFIG, "dense": DENSE, "llada2": LLADA2}


def several(name):
    first, *more = ENDS[name]
    return tiny_model(config=dataclasses.replace(CONFIGS[name], eos_id=first, more_eos_ids=tuple(more)))


def facts(out):
    return out.canvas.tolist(), out.forwards, out.refreshes, out.positions


@pytest.mark.parametrize(
    ("name", "decoder", "cache", "smoothing", "early_stop"),
    [
        ("moe", djax.Threshold(0.3), None, None, True),
        ("moe", djax.Threshold(0.3), None, None, False),
        ("moe", djax.Credit(djax.Threshold(0.5)), djax.Dual(every=3), None, True),
        ("moe", djax.Fixed(2), djax.Vicinity(3, 5, warmup=2), djax.Smoothing(), True),
        ("moe", djax.Edit(djax.Threshold(0.3), tau=0.6, post_steps=3), None, None, True),
        ("dense", djax.Hierarchy(0.6, 0.2), djax.Prefix(), None, True),
        ("dense", djax.Hierarchy(0.6, 0.2), djax.Prefix(), None, False),
    ],
    ids=str,
)
def test_rows_alone_and_the_plain_loop(name, decoder, cache, smoothing, early_stop):
    """Any end id stops a row, none is proposed before min_gen_length, and the first one fills."""
    model, rng = several(name), np.random.default_rng(3)
    ends, met, filled = model.config.eos_ids, set(), 0
    for _ in range(3):
        prompts = [rng.integers(0, 47, rng.integers(1, 33)).tolist() for _ in range(3)]
        lengths = [int(n) for n in rng.integers(17, 32, 3)]
        least = [int(rng.integers(0, n // 2)) for n in lengths]
        shared = dict(block_length=8, decoder=decoder, smoothing=smoothing, early_stop=early_stop, align_blocks=True)
        together = djax.generate(model, prompts, gen_length=lengths, min_gen_length=least, cache=cache, **shared)
        for row, out in enumerate(together):
            own = dict(gen_length=lengths[row], min_gen_length=least[row], seed=0)
            assert facts(out) == facts(djax.generate(model, prompts[row], cache=cache, **own, **shared))
            policy = Uncached() if cache is None else cache
            assert facts(out) == facts(decode(model, prompts[row], policy=policy, **own, **shared))
            answer = out.canvas[out.prompt_length :]
            assert not set(ends) & set(answer[: least[row]].tolist())
            at = next((i for i, token in enumerate(answer) if token in ends), len(answer))
            assert out.tokens.tolist() == answer[:at].tolist()
            met |= set(answer[at : at + 1].tolist())
            if early_stop and at < len(answer):
                border = -(-(out.prompt_length + at + 1) // 8) * 8
                assert np.all(out.canvas[border:] == ends[0])
                filled += len(out.canvas[border:])
    assert met & set(ends[1:]), "some answer must end at an id that is not the first"
    assert filled or not early_stop


def test_block_causal_rows_alone():
    """LLaDA2 has a loop of its own for blocks: end ids stop it the same way."""
    model, met = several("llada2"), set()
    rng = np.random.default_rng(0)
    for cache in (None, djax.Block()):
        prompts = [rng.integers(0, 47, n).tolist() for n in (3, 17, 24, 9)]
        options = dict(gen_length=24, block_length=8, cache=cache, min_gen_length=5)
        for prompt, out in zip(prompts, djax.generate(model, prompts, **options), strict=True):
            assert facts(out) == facts(djax.generate(model, prompt, **options))
            assert not set(model.config.eos_ids) & set(out.tokens.tolist())
            assert len(out.tokens) >= 5
            met |= set(out.canvas[out.prompt_length + len(out.tokens) :][:1].tolist())
    assert len(met) > 1


@pytest.mark.parametrize("which", [0, 1, 2])
def test_each_of_them_ends_an_answer(which):
    """By hand: 1s up to position 20, then one of three ids."""
    ends = (46, 0, 45)
    config = dataclasses.replace(CONFIG, eos_id=ends[0], more_eos_ids=ends[1:])
    says = np.full(config.max_positions, 1, np.int32)
    says[20] = ends[which]
    model = toy_model(says=says, config=config)
    stopped = djax.generate(model, [1, 2, 3, 4], gen_length=60, block_length=8)
    assert stopped.tokens.tolist() == [1] * 16
    assert stopped.canvas[20:24].tolist() == [ends[which], 1, 1, 1]
    assert stopped.canvas[24:].tolist() == [46] * 40
    whole = djax.generate(model, [1, 2, 3, 4], gen_length=60, block_length=8, early_stop=False)
    assert whole.tokens.tolist() == [1] * 16
    assert whole.canvas[21:].tolist() == [1] * 43
    # Only generated ids end: the same one in the prompt does not.
    prompted = djax.generate(model, [1, ends[which], 3, 4], gen_length=12, block_length=8)
    assert prompted.tokens.tolist() == [1] * 12
    # Struck until the answer is long enough, and then it has passed.
    longer = djax.generate(model, [1, 2, 3, 4], gen_length=60, min_gen_length=17, block_length=8)
    assert longer.canvas[20] not in ends
    assert len(longer.tokens) >= 17


def test_one_id_is_the_program_it_was():
    """The same id once more would be another program; a tuple of one is not."""
    assert CONFIG.eos_ids == (46,)
    assert dataclasses.replace(CONFIG, eos_id=5).eos_ids == (5,)
    assert hash(dataclasses.replace(CONFIG, more_eos_ids=(3,))) != hash(CONFIG)
    assert dataclasses.replace(CONFIG, more_eos_ids=()) == CONFIG


# --- checkpoints


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(GOLDENS / "moe_a", tmp_path / "copy")


def write(directory, name, **changes):
    file = directory / name
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({k: v for k, v in (found | changes).items() if v != "absent"}))


def ids(directory):
    config = describe(directory)[1]
    return config.mask_id, config.eos_ids


MASK = 318  # of moe_a, whose eos is 317 and whose vocabulary 320


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": [0, 4]}, {}, (0, 4)),
        ({"eos_token_id": [317]}, {}, (317,)),
        ({"eos_token_id": [4, 0, 317, 12, 9]}, {}, (4, 0, 317, 12, 9)),
        ({"eos_token_id": 317, "pad_token_id": 317, "bos_token_id": 317}, {}, (317,)),
        ({"pad_token_id": 0, "bos_token_id": 319}, {}, (317,)),
        ({"pad_token_id": None, "bos_token_id": None}, {"pad_token_id": None}, (317,)),
        # generation_config.json agrees, says more, or is all there is.
        ({"eos_token_id": 4}, {"eos_token_id": 4}, (4,)),
        ({"eos_token_id": 4}, {"eos_token_id": [4]}, (4,)),
        ({"eos_token_id": 4}, {"eos_token_id": [0, 4]}, (4, 0)),
        ({"eos_token_id": [4, 0]}, {"eos_token_id": 4}, (4, 0)),
        ({"eos_token_id": "absent"}, {"eos_token_id": [0, 4]}, (0, 4)),
        ({"eos_token_id": None}, {"eos_token_id": 4}, (4,)),
    ],
)
def test_ids_that_load(copy, config, generation, ends):
    write(copy, "config.json", **config)
    if generation:
        write(copy, "generation_config.json", **generation)
    assert ids(copy) == (MASK, ends)


@pytest.mark.parametrize(
    ("config", "generation", "message"),
    [
        ({"eos_token_id": MASK}, {}, "the eos token id 318 is the mask's too"),
        ({"eos_token_id": [317, MASK]}, {}, "the eos token id 318 is the mask's too"),
        ({"pad_token_id": MASK}, {}, "config.json: the pad token id 318 is the mask's too"),
        ({"bos_token_id": MASK}, {}, "config.json: the bos token id 318 is the mask's too"),
        ({}, {"pad_token_id": MASK}, "generation_config.json: the pad token id 318 is the mask's too"),
        ({}, {"eos_token_id": MASK}, "generation_config.json: the eos token id 318 is the mask's too"),
        ({}, {"eos_token_id": [317, MASK]}, "the eos token id 318 is the mask's too"),
        ({"mask_token_id": 317}, {}, "the eos token id 317 is the mask's too"),
        ({"eos_token_id": [317, 320]}, {}, "the eos token id 320 is outside the vocabulary of 320; set eos_token_id"),
        ({"eos_token_id": [-1, 317]}, {}, "the eos token id -1 is outside"),
        ({"pad_token_id": 320}, {}, "config.json: the pad token id 320 is outside the vocabulary of 320; correct pad_token"),
        ({"pad_token_id": -1}, {}, "the pad token id -1 is outside"),
        ({"bos_token_id": 2**70}, {}, "the bos token id 1180591620717411303424 is outside"),
        ({}, {"bos_token_id": 320}, "generation_config.json: the bos token id 320 is outside"),
        ({}, {"mask_token_id": 5}, "the mask token id differs, {'config.json': 318, 'generation_config.json': 5}"),
        ({"eos_token_id": []}, {}, r"eos_token_id: expected one integer or a list of them, got \[\]"),
        ({"eos_token_id": [4, 4]}, {}, r"eos_token_id: expected different ids, got \[4, 4\]"),
        ({"eos_token_id": [4, "5"]}, {}, "eos_token_id: expected one integer or a list of them"),
        ({"eos_token_id": [4, [5]]}, {}, "eos_token_id: expected one integer or a list of them"),
        ({"eos_token_id": [True]}, {}, "eos_token_id: expected one integer or a list of them"),
        ({"eos_token_id": [None]}, {}, "eos_token_id: expected one integer or a list of them"),
        ({"eos_token_id": 4.0}, {}, "eos_token_id: expected one integer or a list of them, got 4.0"),
        ({"eos_token_id": {"id": 4}}, {}, "eos_token_id: expected one integer or a list of them"),
        ({"eos_token_id": list(range(300))}, {}, "eos_token_id: expected at most 64 ids, got 300"),
        ({"mask_token_id": [MASK]}, {}, "mask_token_id: expected one integer, got"),
        ({"pad_token_id": [0]}, {}, "pad_token_id: expected one integer, got"),
        ({"bos_token_id": False}, {}, "bos_token_id: expected one integer, got False"),
        ({}, {"eos_token_id": {}}, "generation_config.json: eos_token_id: expected one integer or a list of them"),
    ],
)
def test_ids_that_do_not(copy, config, generation, message):
    write(copy, "config.json", **config)
    if generation:
        write(copy, "generation_config.json", **generation)
    with pytest.raises(CheckpointError, match=message):
        djax.load(copy)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '"x"'])
def test_a_generation_config_that_is_none(copy, text):
    (copy / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config.json: expected (a )?JSON"):
        djax.load(copy)


@pytest.mark.parametrize("role", ["pad", "bos", "unk", "eos"])
def test_a_tokenizer_s_other_roles(tmp_path, role):
    """Two roles may share a token, but none the mask's."""
    directory = shutil.copytree(djax.checkpoints.source.SHIPPED, tmp_path / "copy")
    write(directory, "tokenizer_config.json", **{f"{role}_token": "<|endoftext|>"})
    assert ids(directory) == (1, (0,))
    write(directory, "tokenizer_config.json", **{f"{role}_token": "<|mask|>"})
    with pytest.raises(CheckpointError, match=rf"tokenizer.json: the {role} token id 1 is the mask's too"):
        describe(directory)


def test_a_tokenizer_s_eos_is_the_last_to_be_asked(tmp_path):
    directory = shutil.copytree(djax.checkpoints.source.SHIPPED, tmp_path / "copy")
    write(directory, "config.json", eos_token_id=[9, 0])
    assert ids(directory) == (1, (9, 0))
    write(directory, "config.json", eos_token_id="absent")
    assert ids(directory) == (1, (0,))
    write(directory, "generation_config.json", eos_token_id=[8, 9])
    assert ids(directory) == (1, (8, 9))


def test_they_survive_saving_and_exporting(tmp_path, copy):
    """Also those that only generation_config.json names."""
    write(copy, "config.json", eos_token_id=4)
    write(copy, "generation_config.json", eos_token_id=[0, 4])
    model = djax.load(copy)
    assert model.config.eos_ids == (4, 0)
    assert "eos 4, 0)" in repr(model)
    djax.save(model, tmp_path / "saved")
    djax.export_hf(model, tmp_path / "exported")
    assert json.loads((tmp_path / "saved" / "djax.json").read_text())["config"]["more_eos_ids"] == [0]
    for directory in (tmp_path / "saved", tmp_path / "exported"):
        again = djax.load(directory)
        assert again.config == model.config
        assert json.loads((directory / "config.json").read_text())["eos_token_id"] == [4, 0]
        assert store.checksum(again) == store.checksum(model)


def test_the_command_shows_them(copy):
    write(copy, "config.json", eos_token_id=[0, 4])
    done = subprocess.run([shutil.which("djax"), "info", "--json", copy], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["eos_id"], facts["more_eos_ids"]) == (0, [4])
    assert "more_eos_ids" not in djax.checkpoints.checkpoint.inspect(GOLDENS / "moe_a")


def test_prompts_made_up_avoid_only_the_mask(tmp_path):
    """The smallest ids may all be ends."""
    model = tiny_model(config=dataclasses.replace(CONFIG, eos_id=0, more_eos_ids=(1, 2), mask_id=47))
    assert djax.compile(model, prompt_length=3, gen_length=8, block_length=8)[0] == 64


def test_an_export_names_them(tmp_path):
    model = several("moe")
    djax.export_program(model, tmp_path / "out", prompt_length=3, gen_length=8, block_length=8)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["eos_id"], manifest["eos_ids"]) == (19, [19, 46, 29])


def test_recorded_trajectories_keep_what_ended_them():
    """The end that stands in the canvas is one thing, what fills the rest another."""
    ends = (46, 5)
    config = dataclasses.replace(CONFIG, eos_id=ends[0], more_eos_ids=ends[1:])
    says = np.full(config.max_positions, 1, np.int32)
    says[10:12] = 5
    model = toy_model(says=says, config=config)
    answer = djax.generate(model, [1, 2, 3], gen_length=40, block_length=8, trace=True)
    (trajectory,) = store.unpacked(store.packed([recording.trajectory({"prompt": [1, 2, 3]}, 0, answer)]))
    assert trajectory.tokens[10:16].tolist() == [5, 5, 1, 1, 1, 1]
    assert trajectory.tokens[16:].tolist() == [46] * 27
    assert (trajectory.accepted_at[16:] == -1).all()
