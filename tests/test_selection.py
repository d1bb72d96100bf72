"""Selection by threshold: what it chooses, its mean and its bound, native and torch alike, and counted as it ran."""

import pytest
import torch
import transformers as tf

import moefy
import tiny
from moefy import kernels
from moefy.construct import construct
from moefy.moe import MoEFFN, moe_layers
from moefy.routers import ROUTERS, logistic
from moefy.selection import _threshold, above, held_out_parts, set_threshold
from moefy.usage import realised_fraction, usage
from native_problem import needs_native
from test_construct import make_stats


def build(stats, router="linear", active=2, most_active=2.0, **changes):
    recipe = moefy.Recipe(
        construction="weights", router=router, experts=12, shared=2, active=active, selection="threshold",
        most_active=most_active, **changes,
    )  # fmt: skip
    spec = recipe.layer_spec(stats.ffn, "ffn")
    partition = construct("weights", spec, stats, seed=0)
    moe = MoEFFN.from_dense(stats.ffn, partition, spec, ROUTERS[router].build(spec, partition, stats, 0))
    set_threshold({7: moe.router}, stats, moe.weights())
    return moe.requires_grad_(False)


def test_above_takes_the_highest_and_no_more_than_most():
    scores = torch.tensor([[0.0, 3.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0], [9.0, 8.0, 7.0, 6.0]])
    chosen = above(scores, 0.5, 2)
    assert [sorted(row) for row in chosen.tolist()] == [[1, 3], [-1, -1], [0, 1]]
    assert (above(scores, float("inf"), 4) == -1).all()
    assert above(torch.tensor([[float("nan"), 1.0]]), 0.0, 2).tolist() == [[1, -1]]


@pytest.mark.parametrize("router", ROUTERS)
def test_the_mean_is_met_on_held_out_tokens_and_the_bound_on_all(router):
    stats, x = make_stats(tokens=4000)
    moe = build(stats, router, active=3)
    held = torch.cat([mask for _, mask in stats.split_inputs()])
    counts = (moe.route(x) >= 0).sum(1)
    # One threshold for all: it can miss the mean by no more than one choice among the held-out tokens.
    assert abs(counts[held].float().mean() - 3) <= 1 / held.sum() + 1e-6 or router == "random"
    assert counts.max() <= moe.spec.most == 6
    assert router == "random" or counts.min() < counts.max()


def test_a_mean_above_the_bound_is_refused():
    stats, _ = make_stats()
    moe = build(stats)
    moe.router.spec = moefy.LayerSpec(**{**vars(moe.spec), "most": 1})
    with pytest.raises(ValueError, match="cannot be"):
        set_threshold({7: moe.router}, stats, moe.weights())


@needs_native
@pytest.mark.parametrize("router", ["linear", "logistic", "mlp"])
@pytest.mark.parametrize("most_active", [1.0, 4.0])
def test_native_and_torch_agree_and_count_the_same(router, most_active):
    stats, x = make_stats(tokens=500)
    moe = build(stats, router, most_active=most_active)
    found = {}
    for kernel in ("reference", "grouped", "native"):
        with kernels.using(kernel), usage(moe) as counted:
            found[kernel] = moe(x[:37]), counted[""].counts.clone(), realised_fraction(moe, counted)
    moe.unpack()
    for kernel in ("grouped", "native"):
        torch.testing.assert_close(found[kernel][0], found["reference"][0], rtol=1e-4, atol=1e-4)
        assert torch.equal(found[kernel][1], found["reference"][1])
        assert found[kernel][2] == found["reference"][2]
    mean = float(found["native"][1].sum()) / 37
    assert found["native"][2] == pytest.approx(moe.active_fraction(mean))


@pytest.mark.parametrize("kernel", ["reference", pytest.param("native", marks=needs_native)])
def test_no_expert_and_every_expert(kernel):
    stats, x = make_stats()
    moe = build(stats, most_active=9.0)
    moe.router.threshold.fill_(float("inf"))
    only_shared = stats.ffn.take(moe.neurons[: moe.spec.shared].long())
    with kernels.using(kernel):
        torch.testing.assert_close(moe(x), only_shared.forward(x) + (moe.down_bias or 0), rtol=1e-4, atol=1e-4)
        moe.router.threshold.fill_(-float("inf"))
        assert moe.spec.most == moe.spec.experts
        torch.testing.assert_close(moe(x), stats.ffn.forward(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_a_threshold_is_exact(scale):
    scores = (torch.randn(64, 9) * scale).float()
    threshold = _threshold(scores, 3, 9)
    assert (scores > threshold).sum() <= 3 * 64
    assert threshold in scores.flatten().tolist()  # a float32 below, one more would be above
    below = torch.tensor(threshold).nextafter(torch.tensor(-torch.inf))
    assert (scores > below).sum() > 3 * 64
    equal = torch.full((4, 9), -2.0 * scale)
    assert (equal > _threshold(equal, 3, 9)).sum() == 0
    assert (equal > _threshold(equal, 9, 9)).all()


def test_the_threshold_is_saved_and_loaded(tmp_path):
    model, batches = tiny.tiny("llama"), [tiny.inputs("llama", seed=i) for i in range(4)]
    moefy.convert(model, moefy.Recipe(experts=8, shared=2, active=2, router="linear", selection="threshold"), batches)
    moefy.save(model, tmp_path / "out")
    again = moefy.load(tmp_path / "out")
    for ours, theirs in zip(moe_layers(model).values(), moe_layers(again).values(), strict=True):
        assert torch.equal(ours.router.threshold, theirs.router.threshold)
        assert ours.router.threshold != 0
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, again(**batches[0]).logits)


@pytest.mark.parametrize("kept", [True, False])
def test_statistics_without_a_part_are_those_of_the_other_tokens(kept):
    stats, x = make_stats(tokens=333)
    if kept:
        _ = stats.gram
    part = torch.cat([held for _, held in stats.split_inputs(2)])
    view = stats.without(2)
    assert view.tokens == 333 - int(part.sum()) == 333 - stats.held_out_tokens(2)
    assert torch.equal(torch.cat(list(view.inputs())), x[~part])
    inputs, hidden, outputs = (torch.cat(each) for each in zip(*view.activations(), strict=True))
    assert torch.equal(inputs, x[~part])
    torch.testing.assert_close(hidden, stats.ffn.hidden(x[~part]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs, stats.ffn.forward(x[~part]), rtol=1e-4, atol=1e-4)
    assert view.gram is stats.gram or not kept
    assert len(view.markers) == view.tokens
    assert stats.tokens == 333  # and these are as they were
    assert len(torch.cat(list(stats.inputs()))) == 333
    few, _ = make_stats(tokens=9)
    assert few.without(0) is few


def test_with_few_tokens_a_threshold_is_set_on_all_parts_each_scored_by_a_router_that_has_not_seen_it():
    stats, x = make_stats(tokens=400)
    moe = build(stats)
    partition, parts = construct("weights", moe.spec, stats, seed=0), held_out_parts(stats)
    assert parts == [7, 6, 5, 4, 3, 2, 1, 0]
    routers = ROUTERS["linear"].build_without(moe.spec, partition, stats, parts, seed=0)
    moe.router = routers[7]
    threshold = set_threshold(routers, stats, moe.weights())
    assert routers[7].threshold == threshold
    unseen = 0
    for part, router in routers.items():
        held = torch.cat([mask for _, mask in stats.split_inputs(part)])
        assert held.sum() == 50
        alone = ROUTERS["linear"].build(moe.spec, partition, stats.without(part), seed=0)
        assert torch.equal(router.weight, alone.weight)
        unseen += int((above(router(x[held], None), threshold, moe.spec.most) >= 0).sum())
    assert abs(unseen - 400 * moe.spec.top_k) <= 1
    assert held_out_parts(stats, enough=90) == [7, 6]
    assert held_out_parts(stats, enough=50) == [7]
    assert held_out_parts(make_stats(tokens=9)[0]) == [7]


def test_routers_made_together_are_those_made_without_each_part():
    """The logistic router looks at the calibration once for all of them."""
    stats, _ = make_stats(tokens=400)
    spec = build(stats).spec
    partition = construct("weights", spec, stats, seed=0)
    for part, router in ROUTERS["logistic"].build_without(spec, partition, stats, [7, 3], seed=0).items():
        alone = ROUTERS["logistic"].build(spec, partition, stats.without(part), seed=0)
        torch.testing.assert_close(router.weight, alone.weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(router.bias, alone.bias, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("router", ["oracle", "mass", "logistic"])
def test_a_refit_leaves_as_many_experts_as_were_asked_for(router):
    """The oracle's scores are of the weights that a refit changes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 256}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=200, num_hidden_layers=2, **sizes)).eval()
    batches = [{"input_ids": torch.randint(0, 200, (1, 256))} for _ in range(16)]
    recipe = moefy.Recipe.of("reconstructed", router=router, budget=0.5, allocation="uniform")
    moefy.convert(model, recipe, batches)
    with torch.no_grad(), usage(model) as counted:
        for batch in batches:
            model(**batch)
    for name, moe in moe_layers(model).items():
        assert counted[name].experts_per_token == pytest.approx(moe.spec.top_k, abs=0.4)


@pytest.mark.parametrize("step", [1, 3, 100])
def test_thinning_takes_every_nth_of_all_tokens_and_not_of_each_chunk(step, monkeypatch):
    stats, x = make_stats(tokens=200, chunk=16)
    spec = moefy.Recipe(experts=6, shared=0, active=2).layer_spec(stats.ffn, "ffn")
    monkeypatch.setattr(logistic, "HOLD_BYTES", -(-200 * 4 * (spec.width + spec.experts) // step))
    found = logistic._examples(spec, construct("random", spec, stats, seed=0), stats)
    assert torch.equal(found.inputs, x[::step])
    assert torch.equal(found.part, stats.parts(0, 200)[::step])
