"""The prepared native call of a layer (kernels/bound.py) against the one that checks its arguments."""

from dataclasses import replace

import pytest
import torch

import moefy
from moefy import kernels
from moefy.construct import construct
from moefy.kernels.bound import Bound
from moefy.moe import MoEFFN
from moefy.routers import ROUTERS
from moefy.usage import usage
from native_problem import middle, needs_native
from test_construct import make_stats

pytestmark = needs_native


def build(most=0, router="linear"):
    """A layer of 4 experts of which 2 are taken, or by threshold up to `most`; its inputs."""
    stats, x = make_stats(activation="silu", bias=router == "linear")
    recipe = moefy.Recipe(construction="activation", router=router, experts=6, shared=2, active=2)
    spec = replace(recipe.layer_spec(stats.ffn, "ffn"), most=most)
    partition = construct("activation", spec, stats, seed=0)
    made = ROUTERS[router].build(spec, partition, stats, 0)
    if most:
        made.threshold.fill_(middle(made(x, None)))
    return MoEFFN.from_dense(stats.ffn, partition, spec, made).requires_grad_(False), x


@pytest.fixture
def prepared(monkeypatch):
    """How many calls were made by `Bound`, as a list that grows."""
    calls = []
    once = Bound.__call__
    monkeypatch.setattr(Bound, "__call__", lambda self, x: calls.append(1) or once(self, x))
    return calls


@pytest.mark.parametrize("most", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("router", ["linear", "representative"])
@torch.no_grad()
def test_equals_the_call_that_checks(most, dtype, router, prepared):
    moe, x = build(most, router)
    moe, x = moe.to(dtype), x.to(dtype)
    first = moe(x)
    assert not prepared
    assert torch.equal(moe(x), first)
    assert torch.equal(moe(x[:, None, :]), first[:, None, :])
    assert moe(x[:0]).shape == (0, x.shape[1])
    assert torch.equal(moe(x[:1]), first[:1])
    assert len(prepared) == 4


@torch.no_grad()
def test_other_inputs_take_the_other_call(prepared):
    moe, x = build()
    expected = moe(x)
    assert torch.equal(moe(x.T.contiguous().T), expected)
    assert moe(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"x must be \(T, 16\)"):
        moe(x[:, :8].contiguous())
    with kernels.using("reference"):
        torch.testing.assert_close(moe(x), expected, rtol=1e-4, atol=1e-4)
    moe(x)
    with torch.enable_grad():
        moe(x.clone().requires_grad_()).sum().backward()
    assert not prepared


@torch.no_grad()
def test_follows_what_changes(prepared):
    moe, x = build(most=3)
    before = moe(x)
    moe.router.threshold.fill_(-1e9)
    every = moe(x)
    assert prepared
    assert not torch.equal(every, before)
    with usage(moe) as used:
        assert torch.equal(moe(x), every)
    assert used[""].counts.sum() == 3 * len(x)

    moe.router.threshold = torch.nn.Parameter(torch.tensor(1e9), requires_grad=False)
    none = moe(x)
    assert not torch.equal(none, every)
    assert torch.equal(moe(x), none)

    moe, x = build()
    before = moe(x)
    moe.top_k, count = 3, len(prepared)
    more = moe(x)
    assert len(prepared) == count
    assert not torch.equal(more, before)
    assert torch.equal(moe(x), more)
    assert len(prepared) == count + 1
    moe.load_state_dict(moe.state_dict())
    assert torch.equal(moe(x), more)
    assert len(prepared) == count + 1


@pytest.mark.parametrize("router", sorted(name for name, made in ROUTERS.items() if made.ships))
@torch.no_grad()
def test_another_router_is_the_one_that_routes(router, prepared):
    moe, x = build()
    for _ in range(2):
        moe(x)  # packed and prepared
    stats, _ = make_stats(activation="silu", bias=True)
    spec = replace(moe.spec, router=router)
    moe.router = ROUTERS[router].build(spec, construct("activation", spec, stats, seed=0), stats, 1)
    for parameter in moe.router.parameters():  # a linear router would otherwise be the one that was there
        parameter.mul_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    got = [moe(x) for _ in range(2)]
    with kernels.using("reference"):
        expected = moe(x)
    for y in got:
        torch.testing.assert_close(y, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("change", ["in place", "another parameter"])
@torch.no_grad()
def test_changed_router_weights_route(change, prepared):
    moe, x = build()
    before = [moe(x) for _ in range(2)]
    if change == "in place":
        moe.router.weight.neg_()
    else:
        moe.router.weight = torch.nn.Parameter(-moe.router.weight, requires_grad=False)
    count = len(prepared)
    got = [moe(x) for _ in range(2)]
    assert len(prepared) == count + 1
    with kernels.using("reference"):
        expected = moe(x)
    for y in got:
        assert not torch.equal(y, before[0])
        torch.testing.assert_close(y, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_a_router_made_in_inference_mode_runs(prepared):
    with torch.inference_mode():
        moe, x = build()
        assert torch.equal(moe(x), moe(x))
    assert len(prepared) == 1


@torch.no_grad()
def test_is_what_a_compiled_model_runs(prepared):
    moe, x = build()
    compiled = torch.compile(moe, backend="eager")
    expected = compiled(x)
    assert torch.equal(compiled(x), expected)
    assert len(prepared) == 1


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inputs_of_16_bits_that_the_kernel_takes_as_fp32(prepared, dtype):
    moe, x = build()
    moe = moe.to(dtype)  # fp16 weights; bf16 ones that are held in fp32
    moe = moe if dtype == torch.float16 else moe.float()
    moe.eval()(x.to(dtype))
    expected = moe._packed.ffn.forward(x.to(dtype), router=moe._packed.router, top_k=2)
    for _ in range(2):
        y = moe(x.to(dtype))
        assert y.dtype == dtype
        assert torch.equal(y, expected)
    assert len(prepared) == 2
