"""The speed benchmark measures what it says: its contenders decode the same tokens, on a model small enough for a test."""

import importlib.util
import json

import numpy as np
import pytest

from djax.benchmarks import midsize, speed
from djax.errors import OptionError

SMALL = midsize.HF | {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 2, "expert_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(midsize, "HF", SMALL)
    monkeypatch.setattr(midsize, "MASK", 319)
    monkeypatch.setattr(midsize, "EOS", 318)
    return midsize.model()


PROMPT = [int(t) for t in np.random.default_rng(0).integers(0, 300, speed.PROMPT)]


def canvas():
    return np.array([*PROMPT, *[midsize.MASK] * speed.GENERATED])


def test_the_python_loop_gives_djax_s_tokens(small):
    window, refresh, tokens = speed.python_loop(small, canvas())
    assert window > 0 and refresh > 0
    assert tokens.tolist() == speed.decode(small, PROMPT, 4).canvas.tolist()


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is an optional test dependency")
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_the_peer_gives_djax_s_tokens_in_the_same_forwards(small, experts):
    from djax.benchmarks.peer import Peer

    peer = Peer(SMALL, midsize.tensors(small), midsize.MASK, "float32", experts, False)
    ran = peer.decode(canvas(), speed.PROMPT, speed.BLOCK, speed.BEFORE, speed.AFTER, 4)
    ours = speed.decode(small, PROMPT, 4)
    assert ran.tokens.tolist() == ours.canvas.tolist()
    assert (len(ran.windows) + len(ran.refreshes), len(ran.refreshes)) == (ours.forwards, ours.refreshes)


def test_the_prompts_are_tokens_of_the_model():
    ids = midsize.prompts()
    assert {name: len(some) for name, some in ids.items()} == {"gsm8k": 32, "humaneval": 32}
    assert all(0 <= t < midsize.EOS for some in ids.values() for prompt in some for t in prompt)


def test_a_part_measured_anew_leaves_the_others(tmp_path, monkeypatch):
    def part(seconds):
        return lambda repeats, note: iter([{"of": "start", "name": "import djax", "seconds": seconds, "repeats": repeats}])

    other = {"of": "growth", "canvas": 256, "batch": 1, "block": 32, "window": 1.0, "refresh_of_a_row": 2.0, "repeats": 1}
    facts = {"hardware": "a", "threads": 2, "allocator": "default", "jax": "0", "commit": "c", "command": "djax"}
    (tmp_path / "speed.jsonl").write_text(json.dumps(other | facts) + "\n")
    readme = tmp_path / "README.md"
    readme.write_text("<!-- djax bench speed writes this -->\n<!-- end of speed -->\n")
    for seconds in (1.0, 2.0):
        monkeypatch.setitem(speed.PARTS, "start", part(seconds))
        table = speed.run(["start"], 1, tmp_path, readme, print)
    assert "| import djax | 2.00 s |" in table and "| 256 | 1 | 32 | 1000.0 ms | 2000.0 ms |" in table
    assert "1.00 s" not in table and table in readme.read_text()


def test_unknown_parts(tmp_path):
    with pytest.raises(OptionError, match="--parts: unknown speed; there are: windows, answers, growth, experts, start"):
        speed.run(["speed"], 1, tmp_path, None, print)
