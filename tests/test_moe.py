"""MoEFFN and its kernels: the master property, and the loop as the specification of every fast path."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moefy
from moefy import kernels
from moefy.construct import CONSTRUCTIONS, construct
from moefy.kernels import grouped, masked, reference
from moefy.moe import MoEFFN
from moefy.routers import ROUTERS
from moefy.types import LayerSpec, MoEWeights
from native_problem import needs_native
from test_construct import make_stats


def build(stats, method="activation", router="linear", experts=6, shared=2, active=2):
    recipe = moefy.Recipe(construction=method, router=router, experts=experts, shared=shared, active=active)
    spec = recipe.layer_spec(stats.ffn, "ffn")
    partition = construct(method, spec, stats, seed=0)
    made = ROUTERS[spec.router].build(spec, partition, stats, 0) if spec.router else None
    return MoEFFN.from_dense(stats.ffn, partition, spec, made).requires_grad_(False)


@pytest.mark.parametrize("method", CONSTRUCTIONS)
@pytest.mark.parametrize("kernel", kernels.KERNELS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_all_experts_active_equals_dense(method, kernel, gated, bias):
    stats, x = make_stats(gated, bias=bias)
    moe = build(stats, method)
    moe.top_k = moe.spec.experts
    with kernels.using(kernel):
        torch.testing.assert_close(moe(x), stats.ffn.forward(x), rtol=1e-5, atol=1e-4)
    dense = moe.to_dense()
    for part in ("up", "down", "gate", "up_bias", "down_bias"):
        ours, theirs = getattr(dense, part), getattr(stats.ffn, part)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("gated", [True, False])
def test_every_router_scores_and_survives_a_round_trip(router, gated):
    stats, x = make_stats(gated, activation="relu", bias=True)
    moe = build(stats, router=router)
    scores = moe.router(x, moe.weights())
    assert scores.shape == (len(x), moe.spec.experts)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert torch.equal(moe.route(x[:1]), moe.route(x)[:1])
    empty = MoEFFN(moe.spec).requires_grad_(False).eval()
    empty.load_state_dict(moe.state_dict())
    assert torch.equal(empty(x), moe(x))


def test_oracle_beats_every_router_and_random_is_chance():
    # Wide enough for the input to say something about the experts: 200 tokens, 48 neurons.
    stats, x = make_stats(activation="relu", tokens=400)
    oracle = build(stats, router="oracle")

    def captured(router):
        moe = build(stats, router=router)
        true = oracle.router(x, moe.weights())
        return true.gather(1, moe.route(x)).sum().item() / true.sum().item()

    shares = {name: captured(name) for name in ROUTERS}
    assert max(shares, key=lambda name: shares[name]) == "oracle"
    assert abs(shares["random"] - 2 / 4) < 0.05
    assert shares["linear"] > shares["random"] + 0.02


def test_random_router_uses_every_expert_evenly():
    stats, x = make_stats(tokens=2000)
    load = torch.bincount(build(stats, router="random").route(x).flatten(), minlength=4) / (2 * len(x))
    assert (load - 0.25).abs().max() < 0.03


def random_moe(tokens, width, size, experts, shared, gated, bias, dtype, seed):
    g = torch.Generator().manual_seed(seed)

    def ffn(neurons):
        def rows(*shape):
            return (torch.randn(*shape, generator=g) / width**0.5).to(dtype)

        return moefy.FFNWeights(
            up=rows(neurons, width),
            down=rows(neurons, width),
            gate=rows(neurons, width) if gated else None,
            up_bias=rows(neurons) if bias else None,
            gate_bias=rows(neurons) if bias and gated else None,
            activation="gelu" if not gated else "silu",
        )

    weights = MoEWeights(ffn(shared), ffn(experts * size), experts, torch.randn(width, generator=g).to(dtype))
    return weights, torch.randn(tokens, width, generator=g).to(dtype), g


def dense_reference(x, weights, chosen, expert_weight):
    """Float64, every expert computed for every token, then masked."""
    w = MoEWeights(weights.shared.to(torch.float64), weights.routed.to(torch.float64), weights.experts, weights.bias)
    x = x.double()
    y = w.shared.forward(x) + (0 if w.bias is None else w.bias.double())
    for e in range(w.experts):
        share = ((chosen == e) * (1 if expert_weight is None else expert_weight.double())).sum(1, keepdim=True)
        y = y + share * reference.expert_ffn(w, e).forward(x)
    return y


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.sampled_from([0, 1, 2, 3, 5, 17]),
    width=st.sampled_from([1, 4, 7, 16]),
    size=st.sampled_from([1, 3, 4, 8]),
    experts=st.sampled_from([1, 2, 5]),
    shared=st.sampled_from([0, 1, 6]),
    gated=st.booleans(),
    bias=st.booleans(),
    weighted=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_kernels_equal_the_reference(tokens, width, size, experts, shared, gated, bias, weighted, dtype, seed):
    weights, x, g = random_moe(tokens, width, size, experts, shared, gated, bias, dtype, seed)
    k = max(1, experts // 2)
    chosen = torch.rand(tokens, experts, generator=g).argsort(1)[:, :k]
    chosen[torch.rand(tokens, k, generator=g) < 0.2] = -1
    share = torch.rand(tokens, k, generator=g) if weighted else None
    expected = dense_reference(x, weights, chosen, share)
    # Rounding of sums of `length` products, and of the intermediate activations in the type itself.
    length = width + shared + k * size
    tolerance = 8 * torch.finfo(dtype).eps * length**0.5 * (1 + expected.abs().max().item() if tokens else 1)
    for name, kernel in kernels.KERNELS.items():
        if name == "grouped" and not grouped.supports(x, weights):
            continue
        out = kernel(x, weights, chosen, share)
        assert out.dtype == dtype
        assert out.shape == x.shape
        assert ((out.double() - expected).abs() <= tolerance).all(), name


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("held", [1, 200, 1000])
def test_grouped_in_slices_of_tokens_computes_the_same(held, weighted, monkeypatch):
    weights, x, g = random_moe(23, 8, 4, 6, 3, True, True, torch.float32, 3)
    chosen = torch.rand(23, 6, generator=g).argsort(1)[:, :3]
    chosen[:5] = -1
    share = torch.rand(23, 3, generator=g) if weighted else None
    monkeypatch.setattr(grouped, "GATHERED_BYTES", held)
    expected = dense_reference(x, weights, chosen, share).float()
    torch.testing.assert_close(grouped.moe_ffn(x, weights, chosen, share), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", kernels.KERNELS)
@pytest.mark.parametrize("case", ["none", "all on one", "one token on all", "empty experts"])
def test_lopsided_routing(kernel, case):
    weights, x, _ = random_moe(9, 8, 4, 6, 3, True, True, torch.float32, 1)
    chosen = {
        "none": torch.full((9, 2), -1),
        "all on one": torch.cat([torch.full((9, 1), 4), torch.full((9, 1), -1)], 1),
        "one token on all": torch.cat([torch.arange(6)[None], torch.full((8, 6), -1)]),
        "empty experts": torch.tensor([[0, 5]]).expand(9, 2),
    }[case]
    expected = dense_reference(x, weights, chosen, None).float()
    torch.testing.assert_close(kernels.KERNELS[kernel](x, weights, chosen, None), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_gradients_reach_inputs_and_weights(kernel):
    weights, x, _ = random_moe(9, 8, 4, 6, 3, True, False, torch.float32, 2)
    chosen = torch.rand(9, 6).argsort(1)[:, :2]
    leaves = [weights.routed.up, weights.routed.gate, weights.routed.down, weights.shared.up, x]
    grads = []
    for run in (kernels.KERNELS[kernel], dense_reference):
        for leaf in leaves:
            leaf.requires_grad_().grad = None
        run(x, weights, chosen, None).square().sum().backward()
        grads.append([leaf.grad.clone() for leaf in leaves])
    for ours, exact in zip(*grads, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("router", [name for name, made in ROUTERS.items() if made.ships])
def test_a_router_costs_what_was_planned(router):
    """A layer that uses all of its budget would otherwise run more than it."""
    stats, _ = make_stats(activation="silu", bias=True)
    moe = build(stats, router=router)
    assert moe.router.multiply_adds() == ROUTERS[router].planned_multiply_adds(moe.spec)


@needs_native
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_native_inference_equals_the_reference_and_unpacks_to_the_same_bits(router, dtype):
    stats, x = make_stats(activation="silu", bias=True)
    moe, x = build(stats, router=router).to(dtype), x.to(dtype)
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    with kernels.using("reference"):
        expected = moe(x)
    out = moe(x)
    assert (moe._packed is not None) == ROUTERS[router].ships
    # Sums of up to 24 products whose factors are rounded to the type, relative to the largest output.
    tolerance = 16 * torch.finfo(dtype).eps * 24**0.5 * expected.abs().max()
    assert ((out - expected).abs() <= tolerance).all()
    after = moe.state_dict()
    assert moe._packed is None
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@needs_native
def test_packing_releases_the_parameters_until_they_are_needed():
    stats, x = make_stats()
    moe = build(stats)
    expected = moe(x)
    assert all(p.numel() == 0 for p in moe.parameters(recurse=False))
    twin = copy.deepcopy(moe)
    assert torch.equal(twin(x), expected)
    assert moe.train().experts_up.shape == (4, 8, 16)
    assert moe.eval()(x).equal(expected)
    assert moe.double().experts_up.dtype == torch.float64
    torch.testing.assert_close(moe(x.double()).float(), expected, rtol=1e-4, atol=1e-3)


@needs_native
def test_int8_is_near_and_has_no_way_back():
    stats, x = make_stats()
    moe = build(stats)
    expected = moe(x)
    moefy.pack(torch.nn.Sequential(moe), "int8")
    assert 0 < (moe(x) - expected).norm() < 0.015 * expected.norm()
    with pytest.raises(moefy.MoefyError, match="int8"):
        moe.state_dict()


@needs_native
def test_what_cannot_be_packed_is_told():
    moe = build(make_stats()[0]).double()
    with pytest.raises(moefy.MoefyError, match=r"torch.float64 cannot be packed as they are; name a precision"):
        moe.pack()
    with pytest.raises(ValueError, match="precision is one of fp32, bf16, int8"):
        moe.pack("int4")
    with pytest.raises(moefy.MoefyError, match="no experts to pack; convert it first"):
        moefy.pack(torch.nn.Linear(2, 2), "int8")


@needs_native
def test_no_layer_is_packed_where_one_is_refused():
    first, second = (build(make_stats()[0]) for _ in range(2))
    with torch.no_grad():
        second.experts_down[-1, -1, -1] = 1e5
    with pytest.raises(moefy.MoefyError, match="too large for fp16"):
        moefy.pack(torch.nn.Sequential(first, second), "fp16")
    assert not first.packed_bytes()
    assert not second.packed_bytes()


def test_one_place_chooses_the_kernel():
    weights, x, _ = random_moe(3, 8, 4, 2, 3, True, False, torch.float32, 0)
    with kernels.using("reference"):
        assert kernels.pick(x, weights) is reference.moe_ffn
    with pytest.raises(moefy.MoefyError, match="no kernel 'fast'"):
        kernels.use("fast")


def test_active_fraction_counts_the_router():
    spec = LayerSpec(
        width=16, shared=12, experts=6, expert_size=6, top_k=2, router="linear", activation="silu", gated=True
    )
    moe = MoEFFN.from_dense(
        make_stats()[0].ffn,
        moefy.Partition(torch.arange(12), torch.arange(12, 48).view(6, 6)),
        spec,
        ROUTERS["linear"](spec),
    )
    assert moe.active_fraction() == ((12 + 12) * 3 * 16 + 6 * 16) / (48 * 3 * 16)


def test_gradients_of_small_experts_on_cpu_are_found_by_masking():
    weights, x, _ = random_moe(9, 16, 16, 6, 3, True, False, torch.float32, 2)
    large, _, _ = random_moe(9, 16, 2 * masked.SMALL, 2, 3, True, False, torch.float32, 2)
    assert kernels.pick(x, weights) is not masked.moe_ffn
    x.requires_grad_()
    assert kernels.pick(x, weights) is masked.moe_ffn
    assert kernels.pick(x, large) is not masked.moe_ffn
    with torch.no_grad():
        assert kernels.pick(x, weights) is not masked.moe_ffn


def test_masking_is_not_reached_by_what_experts_overflow_to():
    weights, x, _ = random_moe(9, 16, 16, 6, 3, True, False, torch.float32, 2)
    weights.routed.up[:16] = 1e38
    chosen = torch.tensor([[1, 2]]).expand(9, 2)
    assert not weights.routed.hidden(x).isfinite().all()
    x.requires_grad_()
    y = masked.moe_ffn(x, weights, chosen)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert torch.equal(y, reference.moe_ffn(x, weights, chosen))


@torch.no_grad()
def test_the_grouped_kernel_says_what_it_cannot_run():
    stats, x = make_stats(width=37)
    moe = build(stats)
    with (
        kernels.using("grouped"),
        pytest.raises(moefy.MoefyError, match=r"cannot run inputs .*37.*multiple of 16 bytes"),
    ):
        moe(x)
    with kernels.using("torch"):
        moe(x)
