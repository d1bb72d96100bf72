"""Weights of 16 bits: that every value is read as it is, and that fp32 weights which 16 bits hold take no more."""

from __future__ import annotations

import pytest
import torch

from moefy.errors import MoefyError
from moefy.kernels import native
from native_problem import ISAS, Problem, needs_native

pytestmark = needs_native

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", HALVES)
def test_every_value_of_16_bits_is_read_as_it_is(isa: str, precision: str) -> None:
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(HALVES[precision])
    if isa == "amx":  # whose tiles take numbers of less than 2^-126 as 0, and what is infinite to all columns
        values = values[values.float().isfinite() & ~((values != 0) & (values.float().abs() < 2**-126))]
    one = torch.zeros(1, 1, len(values), dtype=values.dtype)
    one[..., 0] = 1
    x = torch.zeros(7, len(values))
    x[:, 0] = 1
    weights = {"experts_up": one, "experts_down": values[None, None]}
    packed = native.PackedFFN(**weights, activation="linear", precision=precision, isa=isa)
    for name, tensor in packed.unpack().items():
        assert torch.equal(tensor.view(torch.int16), weights[name].view(torch.int16))
    for T in (1, 7):
        y = packed.forward(x[:T], chosen=torch.zeros(T, 1).long())
        torch.testing.assert_close(y, values.float().expand(T, -1), rtol=0, atol=0, equal_nan=True)
    many = native.PackedFFN(  # the same through the up phase, 2 values a neuron
        experts_up=values.nan_to_num(0, 0, 0).view(1, -1, 2),
        experts_down=torch.ones(1, len(values) // 2, 2, dtype=values.dtype) / 64,
        activation="relu",
        precision=precision,
        isa=isa,
    )
    rows = torch.tensor([[2.0**-13, 0.0], [0.0, 2.0**-13]])
    if precision == "fp16":
        expected = torch.stack([u.double().clamp(min=0).sum() for u in many.unpack()["experts_up"][0].T]) * 2**-19
        y = many.forward(rows, chosen=torch.zeros(2, 1).long())
        torch.testing.assert_close(y, expected.float()[:, None].expand(2, 2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("precision", HALVES)
def test_fp32_is_rounded_to_16_bits_as_torch_rounds(precision: str) -> None:
    g = torch.Generator().manual_seed(0)
    some = torch.randint(-(2**31), 2**31 - 1, (1, 500, 64), generator=g).to(torch.int32).view(torch.float32)
    ties = torch.arange(2**15)[None, None].to(torch.int16).view(HALVES[precision]).float()
    ties = (ties + (ties * (1 + 2.0**-7)).to(HALVES[precision]).float()) / 2  # half-way between two, and elsewhere
    if precision == "fp16":
        some = some.where((some.abs() < 65520) | ~some.isfinite(), 1.0)
    for values in (some, ties, torch.cat([ties * (1 + 2.0**-23), ties * (1 - 2.0**-24)], 1)):
        packed = native.PackedFFN(experts_up=values, experts_down=values, activation="relu", precision=precision)
        expected = values.to(HALVES[precision])
        for found in packed.unpack().values():
            same = found.view(torch.int16) == expected.view(torch.int16)
            assert (same | (found.isnan() & expected.isnan())).all()


def test_what_fp16_cannot_hold_is_refused() -> None:
    large = torch.full((1, 4, 8), 65519.0)
    native.PackedFFN(experts_up=large, experts_down=large, activation="relu", precision="fp16")
    large[0, 3, 7] = -65520
    with pytest.raises(MoefyError, match="too large for fp16"):
        native.PackedFFN(experts_up=large, experts_down=large, activation="relu", precision="fp16")
    held = {
        "experts_up": torch.full((1, 4, 8), 2.0**17),
        "experts_down": torch.full((1, 4, 8), 1 + 2**-9),
    }  # bf16, fp16
    found = native.PackedFFN(**held, activation="relu").unpack()
    assert all(torch.equal(found[name], tensor) for name, tensor in held.items())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("M", "gated"), [(20, True), (8, False)])
@pytest.mark.parametrize("held_by", HALVES)
def test_fp32_weights_that_16_bits_hold_take_half_the_memory(isa: str, M: int, gated: bool, held_by: str) -> None:
    plain = Problem(E=6, M=M, D=256, S=32, gated=gated, isa=isa)
    weights = {k: v if "bias" in k else v.to(HALVES[held_by]).float() for k, v in plain.weights.items()}
    packed = native.PackedFFN(**weights, activation="silu", isa=isa)
    assert packed.precision == "fp32"
    assert packed.nbytes < 0.55 * plain.packed.nbytes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in packed.unpack().items())
    other_down = {k: v.clone() for k, v in weights.items()}
    other_down["shared_down"][-1, -1] += 2**-20  # `down` alone is kept in fp32
    other_both = {k: v.clone() for k, v in other_down.items()}
    other_both["shared_up"][-1, -1] += 2**-20
    mixed, as_fp32 = (native.PackedFFN(**w, activation="silu", isa=isa) for w in (other_down, other_both))
    share = (2 if gated else 1) / (3 if gated else 2)
    assert as_fp32.nbytes == plain.packed.nbytes
    assert mixed.nbytes < (1 - share / 2 + 0.03) * plain.packed.nbytes
    assert all(torch.equal(tensor, other_down[name]) for name, tensor in mixed.unpack().items())
    for T in (1, 40):
        for dtype in (torch.float32, torch.bfloat16):  # hidden values stay fp32 for bf16 inputs too
            x = plain.x(T, dtype)
            x[:, -1] = 0
            chosen, _ = plain.choose(T, 2)
            y, some, want = (ffn.forward(x, chosen=chosen) for ffn in (packed, mixed, as_fp32))
            assert torch.equal(some, want)
            same = torch.arange(256) < 255  # the changed weight is of the last column
            if (isa, held_by) != ("amx", "bf16") or M == 8:
                assert torch.equal(y[:, same], want[:, same])
            torch.testing.assert_close(y[:, same], want[:, same])


@pytest.mark.parametrize("isa", ISAS)
def test_experts_of_8_in_bf16_take_fp32_inputs_and_bf16_ones(isa: str) -> None:
    """With AMX the layout depends on the inputs to come, which have the type of the model's weights."""
    problem = Problem(E=40, M=8, D=70, S=0, gated=False, activation="relu", precision="bf16", isa=isa)
    of_fp32 = {name: tensor.bfloat16().float() for name, tensor in problem.weights.items()}
    fp32_model = native.PackedFFN(**of_fp32, activation="relu", precision="bf16", isa=isa)
    bf16_model = problem.packed
    assert all(torch.equal(bf16_model.unpack()[name], tensor) for name, tensor in fp32_model.unpack().items())
    for T in (1, 70):
        chosen, weight = problem.choose(T, 10)
        for packed in (fp32_model, bf16_model):
            problem.packed = packed
            problem.check(problem.x(T), weight, chosen=chosen)
            problem.check(problem.x(T, torch.bfloat16), weight, chosen=chosen)
