"""The gate scale and the load-balancing bias of a layer: the same in every kernel, and nothing where they are 0."""

import copy

import pytest
import torch

import moefy
import tiny
from moefy import kernels
from moefy.moe import MoEFFN, moe_layers
from moefy.tuning.balance import _spreads, direction
from native_problem import middle, needs_native
from test_construct import make_stats
from test_moe import build

NATIVE = pytest.param("native", marks=needs_native)
ROUTERS = ["linear", "representative", "mlp"]


def layer(router, threshold=False):
    """A layer of 4 routed experts of which 2 run, and its inputs."""
    stats, x = make_stats()
    moe = build(stats, router=router)
    if threshold:
        made = MoEFFN(moe.spec.__class__(**{**vars(moe.spec), "most": 3})).requires_grad_(False).eval()
        scores = moe.router(x, None)
        made.load_state_dict({**moe.state_dict(), "router.threshold": middle(scores)})
        moe = made
    return moe, x


def by_definition(moe, x):
    """The layer's output from what each expert gives, in float64."""
    scores = moe.router(x, None)
    ranked = scores if moe.router.balance is None else scores + moe.router.balance
    if moe.spec.most:
        taken = (ranked > moe.router.threshold) & (ranked.argsort(1, descending=True).argsort(1) < moe.spec.most)
    else:
        taken = torch.zeros_like(ranked, dtype=torch.bool).scatter(1, ranked.topk(moe.top_k, dim=1).indices, True)
    weight = 1 if moe.router.scale is None else 1 + scores.double().softmax(1) * moe.router.scale.double()
    weights = moe.weights()
    shared, routed = weights.shared.to(torch.float64), weights.routed.to(torch.float64)
    y, size = shared.forward(x.double()), weights.expert_size
    for e in range(moe.spec.experts):
        out = routed.slice(e * size, (e + 1) * size).forward(x.double())
        y = y + (taken * weight)[:, e, None] * out
    return y if weights.bias is None else y + weights.bias


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("threshold", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("kernel", [NATIVE, *kernels.KERNELS])
def test_every_kernel_runs_the_definition(kernel, router, threshold, scaled, balanced):
    moe, x = layer(router, threshold)
    plain = moe(x)
    spread = moe.router(x, None).std()
    scale = torch.tensor([3.0, -2.0, 5.0, 1.0]) if scaled else None
    balance = torch.tensor([0.5, -0.5, 0.0, 1.0]) * spread if balanced else None
    moe.set_gate(scale, balance)
    expected = by_definition(moe, x)
    with kernels.using(kernel), torch.no_grad():
        for _ in range(2):  # the second native call might be the prepared one, which has no place for a scale
            torch.testing.assert_close(moe(x).double(), expected, rtol=1e-4, atol=1e-4)
    assert ((plain - expected).abs().max() > 1e-2) == (scaled or balanced)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("kernel", [NATIVE, "reference", "grouped", "masked"])
def test_a_scale_and_a_balance_of_zero_change_no_bit(kernel, router):
    moe, x = layer(router)
    with kernels.using(kernel), torch.no_grad():
        before = moe(x)
        moe.set_gate(torch.zeros(4), torch.zeros(4))
        assert torch.equal(moe(x), before)
        moe.set_gate(None, None)
        assert torch.equal(moe(x), before)


@pytest.mark.parametrize("kernel", [NATIVE, "reference"])
def test_with_every_expert_active_they_are_weighted_too(kernel):
    moe, x = layer("linear")
    moe.top_k = 4
    moe.set_gate(torch.tensor([3.0, -2.0, 5.0, 1.0]), None)
    expected = by_definition(moe, x)
    with kernels.using(kernel), torch.no_grad():
        torch.testing.assert_close(moe(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_the_scale_has_the_gradient_of_finite_differences():
    moe, x = layer("linear")
    moe.double()
    x = x[:5].double()
    moe.router.forward = lambda inputs, _: inputs @ moe.router.weight.t() + moe.router.bias  # routers are float32
    moe.set_gate(torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64), None)
    moe.router.scale.requires_grad_()
    x.requires_grad_()

    def run(scale, inputs):
        chosen, gate = moe.choose(inputs)
        return kernels.KERNELS["reference"](inputs, moe.weights(), chosen, gate)

    assert torch.autograd.gradcheck(run, (moe.router.scale, x), eps=1e-7, atol=1e-4)


def test_a_scale_that_is_trained_is_not_run_on_the_native_kernel():
    moe, x = layer("linear")
    moe.set_gate(torch.zeros(4), None)
    moe.router.scale.requires_grad_()
    moe(x).sum().backward()
    assert moe.router.scale.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_they_are_saved_and_loaded(kind, tmp_path):
    model, feed = tiny.tiny("llama"), tiny.inputs("llama")
    moefy.convert(model, moefy.Recipe(experts=6, shared=2, active=2), [feed])
    moefy.save(model, tmp_path / "plain")
    model = moefy.load(tmp_path / "plain", dtype=getattr(torch, kind))
    plain = tiny.output(model, feed)
    for moe in moe_layers(model).values():
        moe.set_gate(torch.tensor([3.0, -2.0, 5.0, 1.0]), torch.tensor([0.0, 1.0, 0.0, -1.0]))
    model.config.moefy["layers"] = {name: vars(moe.spec) for name, moe in moe_layers(model).items()}
    moefy.save(model, tmp_path / "made")
    again = moefy.load(tmp_path / "made")
    scales = [moe.router.scale for moe in moe_layers(again).values()]
    assert all(s.dtype == torch.float32 and s.tolist() == [3.0, -2.0, 5.0, 1.0] for s in scales)
    assert torch.equal(tiny.output(again, feed), tiny.output(model, feed))
    assert not torch.equal(tiny.output(again, feed), plain)
    with pytest.raises(moefy.MoefyError, match="gate scale"):
        moefy.to_dense(again)


def test_a_checkpoint_from_before_gate_scales_loads(tmp_path):
    model, feed = tiny.tiny("llama"), tiny.inputs("llama")
    moefy.convert(model, moefy.Recipe(experts=6, shared=2, active=2), [feed])
    for spec in model.config.moefy["layers"].values():
        del spec["gate_scale"], spec["balance"]
    moefy.save(model, tmp_path / "old")
    again = moefy.load(tmp_path / "old")
    assert torch.equal(tiny.output(again, feed), tiny.output(model, feed))


def test_the_bias_moves_against_the_load():
    assert direction(torch.tensor([4, 0, 2, 2])).tolist() == [-1, 1, 0, 0]
    moe, x = layer("representative")
    moe.set_gate(None, torch.zeros(4))
    first = torch.bincount(moe.route(x).flatten(), minlength=4)
    spread = moe.router(x, None).std()
    for _ in range(400):
        counts = torch.bincount(moe.route(x).flatten(), minlength=4)
        moe.router.balance.add_(direction(counts) * 0.01 * spread)
    assert counts.double().std() < 0.3 * first.double().std()


def test_a_copy_has_its_own():
    moe, _ = layer("linear")
    moe.set_gate(torch.ones(4), None)
    other = copy.deepcopy(moe)
    other.router.scale.fill_(2)
    assert moe.router.scale.tolist() == [1] * 4


def test_scores_are_measured_on_as_many_batches_as_it_takes():
    model, feed = tiny.tiny("llama"), tiny.inputs("llama")
    moefy.convert(model, moefy.Recipe(experts=6, shared=2, active=2), [feed])
    layers, tried = moe_layers(model), []

    def probes():
        for number in range(4):
            tried.append(number)
            yield feed if number == 2 else {name: rows[:0] for name, rows in feed.items()}

    found = _spreads(lambda **batch: len(batch["input_ids"]) and model(**batch), layers, probes())
    assert found == _spreads(model, layers, [feed, feed])
    assert tried == [0, 1, 2]
