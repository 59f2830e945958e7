"""A second opinion on every family's forward: transformers' models of the nearest architectures, on the same random weights.

Their logits for one set of weights are in goldens/oracles.npz, for where there is no torch; where there is, that file is
compared with them, and they with djax on other weights. How each is made from djax's checkpoint: oracles.py.
"""

import numpy as np
import oracles
import pytest

import djax

FIGURES = np.load(oracles.FILE)
TOLERANCE = 3e-4
CASES = [(case, block) for case, blocks in oracles.BLOCKS.items() for block in blocks]


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is an optional test dependency (pip install torch)")


def ours(directory, block):
    return np.asarray(djax.logits(djax.load(directory), oracles.TOKENS, block_length=block))


@pytest.mark.parametrize(("case", "block"), CASES)
def test_logits_equal_the_recorded_ones(tmp_path, case, block):
    oracles.checkpoint(tmp_path, case)
    np.testing.assert_allclose(ours(tmp_path, block), FIGURES[f"{case}/{block}"], atol=TOLERANCE)


def test_the_masks_are_told_apart():
    for a, b in ((None, 4), (4, 1)):
        assert np.abs(FIGURES[f"llada2/{a}"] - FIGURES[f"llada2/{b}"]).max() > 0.1


def test_the_record_is_what_the_models_give(torch):
    again = oracles.record()
    assert set(again) == set(FIGURES) == {f"{case}/{block}" for case, block in CASES}
    for name, figures in again.items():
        np.testing.assert_allclose(figures, FIGURES[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("case", oracles.BLOCKS)
def test_logits_equal_the_models(tmp_path, torch, case):
    """LLaDA-MoE and Qwen3-MoE: both normalise heads before rotary, take a softmax over all experts and renormalise the chosen
    ones' weights if asked. Bridged: the causal mask (a four-dimensional one of ours in its place, as for all), stacked experts.

    LLaDA and Llama: neither normalises heads; rotary over the whole head, one gated MLP, in both; groups of queries, too, which
    no published LLaDA has. Bridged: the causal mask; OLMo's names of tensors and settings.

    LLaDA2 and GLM-4.5 (Glm4Moe). The same in both (what a setting can change, the next test changes): scores are sigmoids in
    float32; a bias takes part in choosing only; a group counts as its two best biased scores, experts of the other groups are
    out; the chosen scores are divided by their sum (+ 1e-20), then scaled; a shared expert is added unscaled, on the same
    normalised input; the first layers are dense; heads are normalised by one scale each for queries and keys, before rotary;
    rotary turns a head's first features, half-split, its frequencies spread over those alone; neighbouring queries share keys;
    one eps, inside the root, for all norms.
    Bridged, GLM's way on the right:
    - blocks, or all positions, are seen / causal: a mask of ours.
    - queries, keys and values in one matrix / three: cut by rows.
    - three matrices an expert / stacked, gate rows first: stacked.
    - `expert_bias` / `e_score_correction_bias`, a buffer; other tensors and two settings by name.
    - heads are always normalised / if `use_qk_norm`, which is off unless said: said.
    - no layers beyond those that are counted / layers for several tokens at once: `num_nextn_predict_layers=0`.
    - rotary's settings at the top of the config / in `rope_parameters`: moved.
    Not bridged: several shared experts, biases of attention and tied embeddings, which djax refuses; the choice between equal
    scores, which GLM leaves to `torch.topk`; anything below float32.
    """
    model = oracles.oracle(case, oracles.checkpoint(tmp_path, case, seed=1))
    with torch.no_grad():
        causal = model(torch.from_numpy(oracles.TOKENS)).logits.numpy()
    for block in oracles.BLOCKS[case]:
        logits = ours(tmp_path, block)
        np.testing.assert_allclose(logits, oracles.logits(model, block), atol=TOLERANCE)
        if block == 1:
            np.testing.assert_allclose(logits, causal, atol=TOLERANCE)
        else:
            assert np.abs(logits - causal).max() > 0.1, "the comparison would notice a causal mask"


DIFFERENCES = {
    "llada_moe": [dict(num_experts_per_tok=1), dict(norm_topk_prob=True), dict(rope_theta=1e4), dict(rms_norm_eps=1e-6)],
    "llada": [dict(rope_theta=1e4), dict(rms_norm_eps=1e-6)],
    "llada2": [
        dict(n_group=1, topk_group=1),
        dict(topk_group=1),
        dict(num_experts_per_tok=3),
        dict(norm_topk_prob=False),
        dict(routed_scaling_factor=1.0),
        dict(without="expert_bias"),
        dict(without="shared_experts"),
        dict(use_qk_norm=False),
        dict(partial_rotary_factor=1.0),
        dict(rope_theta=1e4),
        dict(rms_norm_eps=1e-6),
    ],
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_the_comparison_would_notice(tmp_path, torch, case):
    """A model of theirs that differs in one thing gives other logits, so none of these differs."""
    tensors = oracles.checkpoint(tmp_path, case, seed=1)
    logits = ours(tmp_path, None)
    for changed in DIFFERENCES[case]:
        settings = {key: value for key, value in changed.items() if key != "without"}
        without = changed.get("without", " ")
        others = {name: 0 * tensor if without in name else tensor for name, tensor in tensors.items()}
        other = oracles.logits(oracles.oracle(case, others, **settings), None)
        assert np.abs(logits - other).max() > 0.1, changed
