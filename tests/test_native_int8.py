"""int8 weights: what a scale per neuron and one per column of y keep, and what has none."""

from __future__ import annotations

import pytest
import torch

from moefy.kernels import native
from native_problem import Problem, needs_native

pytestmark = needs_native


@pytest.mark.parametrize("bias", [True, False])
def test_int8_keeps_small_columns_of_y_beside_large_ones(bias: bool) -> None:
    """Layers that write massive activations have such columns in `down`."""
    problem = Problem(E=4, M=24, D=40, S=16, bias=bias)
    size = torch.logspace(-4, 4, 39)
    weights = {k: v * torch.cat([size, torch.zeros(1)]) if "down" in k else v for k, v in problem.weights.items()}
    x, (chosen, _) = problem.x(33), problem.choose(33, 2)
    exact, int8 = (
        native.PackedFFN(**weights, activation="silu", precision=precision).forward(x, chosen=chosen)
        for precision in ("fp32", "int8")
    )
    error = (int8 - exact).norm(dim=0)[:-1] / exact.norm(dim=0)[:-1]
    assert 0 < error.max() < 0.025
    assert not int8[:, -1].any()


def test_int8_with_weights_that_are_no_numbers_or_nearly_none() -> None:
    problem = Problem(E=2, M=8, D=16, S=0, bias=False)
    weights = {k: v.clone() for k, v in problem.weights.items()}
    weights["experts_down"][0, 3, 5] = float("nan")
    chosen, _ = problem.choose(4, 1)
    y = native.PackedFFN(**weights, activation="silu", precision="int8").forward(problem.x(4), chosen=chosen)
    assert y[:, 5].isnan().all()
    assert y[:, :5].isfinite().all()
    assert y[:, 6:].isfinite().all()
    weights["experts_up"][1, 3, 5] = float("nan")  # of a broken checkpoint, which has to be seen
    weights["experts_down"][0, 3, 5] = 0
    y = native.PackedFFN(**weights, activation="silu", precision="int8").forward(problem.x(4), chosen=chosen)
    assert torch.equal(y.isnan().all(1), (chosen == 1).any(1))
    tiny = torch.tensor([[[1, 1e-42, -1e-42], [0.5, 0.9e-42, 5e-43]]])
    unpacked = native.PackedFFN(experts_up=tiny, experts_down=tiny, activation="relu", precision="int8").unpack()
    assert (unpacked["experts_down"] - tiny).abs().max() < 0.01
    assert (unpacked["experts_down"] * tiny >= 0).all()
    for wrong in ({"experts_down": torch.zeros(0, 4, 8)}, {"shared_up": tiny[0], "shared_down": torch.zeros(2, 2)}):
        with pytest.raises(ValueError, match="must fit"):
            native.PackedFFN(
                **{"experts_up": torch.zeros(0, 4, 3), "experts_down": torch.zeros(0, 4, 3)} | wrong,
                activation="relu",
                precision="int8",
            )


@pytest.mark.parametrize("outlier", [5, 20])
def test_int8_keeps_what_shares_a_row_or_a_column_with_one_huge_weight(outlier: int) -> None:
    problem = Problem(E=1, M=1536, D=64, S=0, activation="relu", gated=False, bias=False)
    down = problem.weights["experts_down"]
    down[0, 7, 3] = outlier * down.abs().max()
    x, chosen = problem.x(128), torch.zeros(128, 1).long()
    exact, int8 = (
        native.PackedFFN(
            experts_up=problem.weights["experts_up"], experts_down=down, activation="relu", precision=precision
        ).forward(x, chosen=chosen)
        for precision in ("fp32", "int8")
    )
    runs = x @ problem.weights["experts_up"][0, 7] > 0
    error = int8 - exact
    assert error[runs].norm() < 0.015 * exact[runs].norm()
    assert error[runs][:, 4:].norm() < 0.012 * exact[runs][:, 4:].norm()
    assert error[~runs][:, 3].norm() < 0.15 * exact[~runs][:, 3].norm()
