"""One table of back ends: what it says runs, and what runs is what was chosen for the program."""

import dataclasses
import threading
from functools import partial

import jax
import jax.numpy as jnp
import pytest

import djax
from djax.decoding.contract import write
from djax.engine.generate import ask as asking
from djax.engine.loop import decode
from djax.kernels import dispatch
from djax.kernels.choice import read_choice, traced_kernels, use_kernels, with_wanted_kernels
from djax.kernels.linear import linear
from djax.models.model import computing

F32 = jnp.float32
CASES = (
    *(dispatch.Attention(head_dim, F32) for head_dim in (16, 64)),
    *(dispatch.Experts(n, shape, F32, F32) for n in (8, 999) for shape in ((8, 64, 128), (8, 48, 64))),
    *(dispatch.Product(summed, 64, F32, F32) for summed in (24, 64)),
    *(dispatch.Peaks(vocab, F32) for vocab in (30, 64)),
    dispatch.Exclude(F32),
)


def test_every_operation_has_a_back_end_everywhere():
    assert set(map(type, CASES)) == set(dispatch.TABLE)
    sites = [dispatch.Site(*s) for s in (("djax", "cpu"), ("portable", "cpu"), ("xla", "cpu"), ("djax", "gpu", True))]
    for case in CASES:
        for site in sites:
            for platform in ("cpu", "cuda", "gpu", "rocm", "tpu"):
                back_end, refused = dispatch.choose(case, platform, site)
                assert back_end.platform in (dispatch.ANY, platform) or (back_end.platform, platform) == ("cuda", "gpu")
                assert all(why for _, why in refused)
                if site.kernels == "xla":
                    assert back_end.name not in ("C++", "Pallas", "dense Pallas", "columns")
                if site.kernels == "portable" or site.host != "cpu":
                    assert back_end.name not in ("C++", "columns")


def test_every_reason_against_the_functions_is_told():
    case, site = dispatch.Product(64, 64, F32, F32), dispatch.Site("djax", "cpu")
    for changed, why in (
        ({"kernels": "xla", "host": "gpu"}, "DJAX_KERNELS=xla"),
        ({"host": "gpu", "kernels": "portable"}, "this process computes elsewhere"),
        ({"kernels": "portable", "automatic": True}, "the program is to run without djax"),
        ({"automatic": True}, "a mesh's axis that XLA splits by itself would have every device compute all"),
        ({"split": True}, "a mesh's axis splits it"),
    ):
        assert dispatch.choose(case, "cpu", site._replace(**changed)).refused[0][1] == why


def lower(model, asked, kernels):
    """The text of a decode with these kernels, whatever this process' environment says."""
    ask = asked.asks[0]
    spec = dataclasses.replace(asked.spec(model, ask), kernels=kernels)
    with computing(model, kernels):
        return jax.jit(partial(decode, spec=spec)).lower(model.params, ask).as_text()


@pytest.mark.cpp
@pytest.mark.parametrize("kernels", ["djax", "xla"])
@pytest.mark.parametrize("name", ["small", "llada2", "dense"])
def test_what_is_explained_is_what_runs(request, monkeypatch, name, kernels):
    model, options = request.getfixturevalue(name), dict(gen_length=8, block_length=8)
    monkeypatch.setenv("DJAX_KERNELS", kernels)
    facts = djax.explain(model, [5, 6, 7], **options).facts
    asked = asking(model, [5, 6, 7], options, "generate")
    assert asked.kernels == kernels
    text = lower(model, asked, kernels)
    for layer, function in (("attention", "@djax_attention"), ("experts", "@djax_experts")):
        said = facts.get(layer, "")
        assert (function in text) == ("djax's own C++" in said and "not" not in said), (layer, said)


@djax.pytree
@dataclasses.dataclass(frozen=True)
class Meeting(djax.Decoder):
    """Accepts everything, and meets the other threads that trace one, if there are to be any."""

    def step(self, state, look):
        for barrier in BARRIERS:
            barrier.wait(60)
        return state, write(look, djax.Fixed(1).step((), look)[1].proposals, look.masked)


BARRIERS = []


@pytest.mark.cpp
def test_threads_that_trace_with_other_kernels_do_not_disturb_each_other(small, monkeypatch):
    """Each is in the middle of its decode while the other is: before the decoder is the network, after it `find_peaks`."""
    asked = asking(small, [5, 6, 7], dict(gen_length=8, block_length=8, decoder=Meeting()), "generate")
    alone = {kernels: lower(small, asked, kernels) for kernels in ("djax", "xla")}
    assert "@djax_attention" in alone["djax"] and "@djax_" not in alone["xla"]
    monkeypatch.setenv("DJAX_KERNELS", "nothing that is traced reads it")
    monkeypatch.setattr(__name__ + ".BARRIERS", [threading.Barrier(2)])
    together = {}
    threads = [
        threading.Thread(target=lambda kernels=kernels: together.update({kernels: lower(small, asked, kernels)}))
        for kernels in alone
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


@pytest.mark.cpp
def test_a_spec_traces_its_own_kernels_under_any_other(small):
    asked = asking(small, [5, 6, 7], dict(gen_length=8, block_length=8), "generate")
    ask = asked.asks[0]
    spec = dataclasses.replace(asked.spec(small, ask), kernels="xla")
    with use_kernels("djax"):
        text = jax.jit(partial(decode, spec=spec)).lower(small.params, ask).as_text()
        assert "@djax_" not in text and traced_kernels() == "djax"
    assert spec != dataclasses.replace(spec, kernels="djax"), "each has a program of its own"


@pytest.mark.cpp
def test_jax_s_own_caches_keep_choices_apart():
    """Also for what a user jits."""
    product, x, w = jax.jit(partial(linear, "wd,dv->wv")), jnp.ones((2, 64)), jnp.ones((64, 64))

    def calls(kernels):
        with use_kernels(kernels):
            return product.lower(x, w).as_text().count("@djax_dense")

    assert [calls(kernels) for kernels in ("djax", "xla", "portable", "djax")] == [1, 0, 0, 1]


def test_the_environment_is_read_once_a_door(monkeypatch):
    monkeypatch.setenv("DJAX_KERNELS", "xla")

    @with_wanted_kernels
    def door():
        monkeypatch.setenv("DJAX_KERNELS", "djax")
        return traced_kernels()

    assert (door(), read_choice(), traced_kernels()) == ("xla", "djax", "djax")
    monkeypatch.setenv("DJAX_KERNELS", "fast")
    with pytest.raises(djax.OptionError, match="DJAX_KERNELS: expected 'djax' or 'xla', got 'fast'"):
        door()
