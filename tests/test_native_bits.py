"""Whatever the batch, the threads or the length of the sums: the native kernel's results are the same bits."""

from __future__ import annotations

import pytest
import torch

from moefy.kernels import native
from moefy.kernels.bank import WEIGHTS
from native_problem import ISAS, REFERENCE, Problem, needs_native

pytestmark = needs_native


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", REFERENCE)
def test_activations_have_the_same_bits_in_any_batch(isa: str, activation: str) -> None:
    """Ungated experts of 8, of which a Zen 4 multiplies some rows with AVX-512 and more rows with AVX2."""
    for precision in ("fp32", "int8", "fp16"):
        problem = Problem(E=2, M=8, D=200, S=0, gated=False, activation=activation, precision=precision, isa=isa)
        x, chosen = problem.x(40), torch.tensor([[0, 1]]).expand(40, 2)
        y = problem.packed.forward(x, chosen=chosen)
        for size in (1, 6, 7):
            parts = [problem.packed.forward(part, chosen=chosen[: len(part)]) for part in x.split(size)]
            assert torch.equal(torch.cat(parts), y)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", WEIGHTS)
@pytest.mark.parametrize(
    ("E", "M", "K", "gated"), [(12, 20, 5, True), (90, 8, 37, True), (90, 8, 70, False), (9, 66, 4, False)]
)
def test_bits_do_not_depend_on_threads_or_batch(isa: str, precision: str, E: int, M: int, K: int, gated: bool) -> None:
    problem = Problem(E=E, M=M, D=200, S=300, gated=gated, precision=precision, isa=isa)
    routing = {"router": native.PackedRouter.linear(problem.router), "top_k": K}
    before = torch.get_num_threads()
    try:
        for dtype in (torch.float32, torch.bfloat16):
            x = problem.x(257, dtype)
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(problem.packed.forward(x, **routing))
                parts = [problem.packed.forward(part, **routing) for part in x.split((1, 2, 5, 40, 209))]
                together, apart = found[0], torch.cat(parts)
                if isa == "amx" and precision == "bf16" and dtype == torch.float32:  # a row alone is not split there
                    assert (apart - together).abs().max() < 1e-5 * together.abs().max()
                else:
                    found.append(apart)
            assert all(torch.equal(y, found[0]) for y in found)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", WEIGHTS)
@pytest.mark.parametrize(("E", "K"), [(64, 2), (200, 3), (40, 1)])
def test_narrow_layers_cut_tokens_among_threads_with_the_same_bits(isa: str, precision: str, E: int, K: int) -> None:
    """Where columns are few each thread has slices of tokens, in which an expert may have a single one."""
    problem = Problem(E=E, M=24, D=31, S=33, gated=False, precision=precision, isa=isa)
    x, before = problem.x(257), torch.get_num_threads()
    chosen, weight = problem.choose(257, K)
    found = [problem.check(x, weight, chosen=chosen)]
    try:
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            found.append(problem.packed.forward(x, chosen=chosen))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize("isa", ISAS)
def test_two_tokens_that_are_left_for_two_threads_are_not_rows_alone(isa: str) -> None:
    """Tiles are of 1,024 tokens and the last has two, one for each thread's slice."""
    torch.manual_seed(0)
    tokens, before = 1023 * 1024 + 2, torch.get_num_threads()
    weights = {"experts_up": (1, 16, 32), "experts_down": (1, 16, 32), "shared_up": (24, 32), "shared_down": (24, 32)}
    made = {name: torch.randn(shape) for name, shape in weights.items()}
    packed = native.PackedFFN(**made, activation="gelu", precision="bf16", isa=isa)
    x, found = torch.randn(tokens, 32), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(packed.forward(x, chosen=torch.empty(tokens, 0, dtype=torch.long))[-4:])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", WEIGHTS)
@pytest.mark.parametrize(("D", "M", "gated"), [(1100, 20, True), (1100, 56, False), (2100, 8, False), (40, 600, True)])
def test_long_sums_and_many_panels(isa: str, precision: str, D: int, M: int, gated: bool) -> None:
    """Few rows take panels in turns or far apart, and many rows chunks of the sums."""
    problem = Problem(E=4, M=M, D=D, S=17, gated=gated, precision=precision, isa=isa)
    x = problem.x(80)
    chosen, weight = problem.choose(80, 2)
    y = problem.check(x, weight, chosen=chosen)
    for T in (1, 2, 3, 5, 9, 32):
        few = problem.check(x[:T], weight[:T], chosen=chosen[:T])
        assert torch.equal(few, y[:T]) or (isa, precision) == ("amx", "bf16")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", WEIGHTS)
@pytest.mark.parametrize(("M", "gated"), [(5, False), (8, True), (33, False), (64, True), (130, False)])
def test_zeros_of_relu_are_left_out_with_the_same_bits(isa: str, precision: str, M: int, gated: bool) -> None:
    """A row with few values other than 0 alone, where the others are left out, and among rows without a zero."""
    for activation, dtype in (("relu", torch.float32), ("relu2", torch.bfloat16)):
        problem = Problem(E=3, M=M, D=150, S=70, gated=gated, activation=activation, precision=precision, isa=isa)
        _, weight = problem.choose(40, 3)  # all of them
        rare, full = problem.x(40), torch.zeros(160, 150)
        rare[:, 0], rare[:, 1], full[:, 1] = 1, 0, 1
        first = "gate" if gated else "up"
        for part in ("experts_", "shared_"):  # input 0 makes nine of ten hidden values 0, input 1 none
            problem.weights[part + first][..., 0] = -1.3
            problem.weights[part + first][..., 1] = 6
            problem.weights[f"{part}{first}_bias"] *= 0.1
        problem.packed = native.PackedFFN(**problem.weights, activation=activation, precision=precision, isa=isa)
        chosen = torch.arange(3).expand(40, 3)
        rare, full = rare.to(dtype), full.to(dtype)
        alone = problem.check(rare, weight, chosen=chosen)
        for T in (1, 2, 7, 40):
            mixed = torch.cat([full[: 3 * T], rare[:T], full[:T]])
            ids = torch.arange(3).expand(5 * T, 3)
            among = problem.packed.forward(mixed, chosen=ids)[3 * T : 4 * T]
            few = problem.packed.forward(rare[:T], chosen=chosen[:T])
            if (isa, precision) != ("amx", "bf16"):
                assert torch.equal(few, alone[:T])
                assert torch.equal(few, among)
