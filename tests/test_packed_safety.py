"""Weights are never lost or stale: what is stopped amid packing, other threads, modes and processes, new `.data`."""

import contextlib
import copy
import threading

import pytest
import torch
from torch.nn.utils import prune

import moefy
import tiny
from moefy import kernels, packed
from moefy.kernels import native
from moefy.moe import MoEFFN
from moefy.types import LayerSpec
from native_problem import needs_native
from test_bound import build
from test_packed import close

pytestmark = needs_native


@pytest.mark.parametrize("where", ["follow", "empty", "amid"])
@torch.no_grad()
def test_what_stops_packing_leaves_the_weights(where, monkeypatch):
    moe, x = build()
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    with kernels.using("reference"):
        expected = moe(x)

    def stopped(self, *args):
        if where == "amid":
            next(iter(self._parameters.values())).data = torch.empty(0)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packed.Packed, "follow" if where == "follow" else "empty", stopped)
        with pytest.raises(KeyboardInterrupt):
            moe(x)
    assert all(torch.equal(moe.state_dict()[name], tensor) for name, tensor in before.items())
    close(moe(x), expected)
    assert moe.packed_bytes()


@pytest.mark.parametrize("first", [True, False])
@torch.no_grad()
def test_under_another_default_device(first):
    moe, x = build()
    expected, before = copy.deepcopy(moe)(x), {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    if not first:
        moe(x)
    with torch.device("meta"):
        assert torch.equal(moe(x), expected)  # checked
        assert torch.equal(moe(x), expected)  # prepared
        after = moe.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("owner", "method", "read"),
    [
        (torch.nn.Module, "_save_to_state_dict", lambda moe: moe.state_dict()),
        (torch.nn.Parameter, "__deepcopy__", lambda moe: copy.deepcopy(moe).state_dict()),
        (torch.nn.Module, "_apply", lambda moe: moe._apply(torch.clone).state_dict()),
    ],
)
@torch.no_grad()
def test_a_thread_that_infers_packs_nothing_while_another_reads(owner, method, read, monkeypatch):
    moe, x = build()
    shapes = {name: tensor.shape for name, tensor in moe.state_dict().items()}
    moe(x)
    once, threads = getattr(owner, method), []

    def infer():
        with torch.no_grad():
            moe(x)

    def interrupted(self, *args, **kwargs):
        if not threads:
            threads.append(threading.Thread(target=infer))
            threads[0].start()
            threads[0].join(0.5)  # as far as it comes
        return once(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, interrupted)
        found = read(moe)
    threads[0].join()
    assert {name: tensor.shape for name, tensor in found.items()} == shapes


@torch.no_grad()
def test_new_data_of_a_packed_parameter_is_run():
    moe, x = build()
    other = torch.randn(moe.experts_down.shape)
    expected = copy.deepcopy(moe)
    expected.experts_down.copy_(other)
    moe(x)
    moe(x)
    moe.experts_down.data = other.clone()
    assert torch.equal(moe(x), expected(x))
    assert torch.equal(moe(x), expected(x))


@torch.no_grad()
def test_weights_that_processes_share_stay_where_they_are():
    moe, x = build()
    expected = copy.deepcopy(moe)(x)
    moe.share_memory()
    close(moe(x), expected)
    assert not moe.packed_bytes()
    assert all(p.is_shared() and p.numel() for p in moe.parameters())


@torch.no_grad()
def test_parameters_of_a_functional_call_stay_the_caller_s():
    moe, x = build()
    expected = copy.deepcopy(moe)(x)
    given = {name: torch.nn.Parameter(p.clone()) for name, p in moe.named_parameters()}
    for _ in range(2):
        close(torch.func.functional_call(moe, given, x), expected)
    assert all(p.numel() for p in given.values())
    assert not moe.packed_bytes()
    assert torch.equal(moe(x), expected)
    assert moe.packed_bytes()


@pytest.mark.parametrize("kernel", ["native", "reference"])
@torch.no_grad()
def test_layers_that_share_parameters_say_so(kernel):
    moe, x = build()
    other = copy.copy(moe)
    expected = moe(x)
    with kernels.using(kernel), pytest.raises(moefy.MoefyError, match="packed by another that shares its parameters"):
        other(x)
    moe.unpack()
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize(
    ("router", "changes"),
    [("mlp", {}), ("representative", {"up_bias": True}), ("representative", {"activate_up": True}), ("linear", {})],
)
@torch.no_grad()
def test_autocast_changes_no_choice(router, changes):
    torch.manual_seed(0)
    spec = LayerSpec(64, 16, 32, 8, 6, router, "silu", True, **changes)
    moe = MoEFFN(spec).eval().requires_grad_(False)
    for parameter in moe.parameters():
        parameter.normal_(0, 0.3)
    moe.neurons.copy_(torch.arange(spec.neurons))
    x = torch.randn(512, 64)
    chosen, y = moe.route(x), moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(moe.route(x), chosen)
        assert torch.equal(moe(x), y)
    assert moe.packed_bytes()


@torch.no_grad()
def test_a_million_experts():
    experts, width = 800_000, 4
    up, down, rows = torch.randn(experts, 1, width), torch.randn(experts, 1, width), torch.randn(experts, width)
    ffn = native.PackedFFN(experts_up=up, experts_down=down, activation="relu")
    x = torch.randn(1, width)
    _, chosen = ffn.forward_with_chosen(x, router=native.PackedRouter.linear(rows), top_k=5)
    assert set(chosen[0].tolist()) == set((x @ rows.t()).topk(5).indices[0].tolist())


@torch.no_grad()
def test_a_router_with_new_data_or_parametrized_is_the_one_that_chooses():
    moe, x = build()
    moe(x), moe(x)  # packed, and prepared
    assert moe.packed_bytes()
    moe.router.weight.data = moe.router.weight.data.flip(0).clone()
    moe.router.bias.data = moe.router.bias.data.flip(0).clone()
    with kernels.using("reference"):
        expected = copy.deepcopy(moe)(x)
    close(moe(x), expected)

    class Turned(torch.nn.Module):
        def forward(self, weight):
            return -weight

    moe(x)
    torch.nn.utils.parametrize.register_parametrization(moe.router, "weight", Turned())
    for _ in range(2):
        with kernels.using("reference"):
            expected = copy.deepcopy(moe)(x)
        close(moe(x), expected)
        moe.router.parametrizations.weight.original.add_(moe.router.weight.flip(0).abs())


@pytest.mark.parametrize("packs", ["amid", "before the backward pass", "amid the backward pass"])
def test_gradients_beside_a_thread_that_infers(packs, monkeypatch):
    moe, x = build()
    moe.requires_grad_(True)

    def infer():
        thread = threading.Thread(target=torch.no_grad()(moe), args=(x,))
        thread.start()
        thread.join()

    def loss():
        return moe(x.clone().requires_grad_()).square().sum()

    loss().backward()
    expected = {name: p.grad for name, p in moe.named_parameters() if p.grad is not None}
    assert len(expected) > 4
    moe.zero_grad()
    if packs == "amid":
        once, main = MoEFFN.choose, threading.current_thread()

        def choose(self, x):
            if threading.current_thread() is main:
                infer()
            return once(self, x)

        monkeypatch.setattr(MoEFFN, "choose", choose)
    y = moe(x.clone().requires_grad_())
    if packs == "before the backward pass":
        infer()
    if packs == "amid the backward pass":
        y.register_hook(lambda _: infer())
    y.square().sum().backward()
    for name, p in moe.named_parameters():
        assert name not in expected or torch.equal(p.grad, expected[name]), name
    moe.zero_grad()
    infer()
    assert moe.packed_bytes()  # although y and its graph are still there


@torch.no_grad()
def test_what_was_read_stays_when_a_layer_packs():
    moe, x = build()
    dense, views, state = moe.to_dense(), moe.weights(), moe.__getstate__()
    expected = dense.forward(x), views.bias.clone(), state["_parameters"]["experts_up"].clone()
    moe(x)
    assert moe.packed_bytes()
    assert torch.equal(dense.forward(x), expected[0])
    assert torch.equal(views.bias, expected[1])
    assert torch.equal(state["_parameters"]["experts_up"], expected[2])
    dense.down_bias.add_(1)
    assert torch.equal(moe.weights().bias, expected[1])


def test_transforms_of_torch_func_run_on_a_layer_that_is_packed():
    moe, x = build()
    expected = torch.func.jacrev(moe)(x[:1])
    with torch.no_grad():
        moe(x)
    assert moe.packed_bytes()
    assert torch.equal(torch.func.jacrev(moe)(x[:1]), expected)
    with torch.no_grad():
        moe(x)
    close(torch.func.vjp(moe, x[:1])[1](torch.ones_like(x[:1]))[0], expected.sum((0, 1)))


@torch.no_grad()
def test_values_for_parameters_that_are_released_are_refused():
    moe, x = build()
    expected = moe(x)
    vector = torch.nn.utils.parameters_to_vector(moe.parameters())
    torch.nn.utils.vector_to_parameters(vector * 0, moe.parameters())
    with pytest.raises(moefy.MoefyError, match="changed in place after it had packed them"):
        moe(x)
    moe.unpack()
    whole = torch.nn.utils.parameters_to_vector(moe.parameters())
    assert len(whole) > len(vector)
    torch.nn.utils.vector_to_parameters(whole / 2, moe.parameters())
    assert not torch.allclose(moe(x), expected)


@torch.no_grad()
def test_a_router_whose_data_comes_back_to_the_same_address():
    spec = LayerSpec(512, 16, 32, 4, 4, "linear", "silu", True)
    moe, x = MoEFFN(spec).eval(), torch.randn(8, 512)
    for parameter in moe.parameters():
        parameter.copy_(torch.randn(parameter.shape) / 16)
    moe(x)
    weight = moe.router.weight
    before = weight.data_ptr()
    weight.data = weight.data * -1
    for _ in range(50):  # freed memory is given again after one or two; that of the packed weights is kept
        weight.data = weight.data * 1.0
        if weight.data_ptr() == before:
            break
    got = moe(x)
    with kernels.using("torch"):
        close(got, moe(x))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("experts_up", torch.bfloat16), ("shared_down", torch.bfloat16), ("experts_up_bias", torch.float64)],
)
@torch.no_grad()
def test_weights_of_several_types_are_not_rounded(name, dtype):
    moe, x = build()
    getattr(moe, name).data = getattr(moe, name).data.to(dtype)
    before = {key: tensor.clone() for key, tensor in moe.state_dict().items()}
    with pytest.raises(moefy.MoefyError, match=r"and torch.float.* cannot be packed as they are"):
        moe.pack()
    with contextlib.suppress(RuntimeError):  # torch's, of a product of two types
        moe(x)
    assert all(torch.equal(moe.state_dict()[key], tensor) for key, tensor in before.items())
    moe.pack("bf16")
    assert torch.isfinite(moe(x)).all()


@torch.no_grad()
def test_a_pruned_parameter_that_was_released_is_a_sentence():
    moe, x = build()
    moe(x)
    prune.l1_unstructured(moe, "experts_down", 0.5)
    with pytest.raises(moefy.MoefyError, match=r"were replaced \(pruned\) while they were packed"):
        moe(x)


@pytest.mark.parametrize("change", [torch.nn.Module.half, lambda model: model.to(torch.bfloat16)])
@torch.no_grad()
def test_an_int8_model_that_another_type_is_refused_for_is_whole(change):
    model, feed = tiny.tiny("llama"), tiny.inputs("llama")
    moefy.convert(model, "cmoe", [feed])
    moefy.pack(model, "int8")
    expected = tiny.output(model, feed)
    with pytest.raises(moefy.MoefyError, match="cannot be undone"):
        change(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(tiny.output(model, feed), expected)
    assert torch.equal(tiny.output(model.float(), feed), expected)
