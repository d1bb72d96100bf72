"""Weights in the native kernel's packed form: the experts of one size, or the rows of a router.

T tokens, D model width, E routed experts, M neurons per expert; weights are neuron-major as everywhere: one row per
neuron, `down` too.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from moefy.errors import MoefyError
from moefy.kernels.extension import EXTENSION

ACTIVATIONS = {
    "linear": 0,
    "relu": 1,
    "relu2": 2,
    "gelu": 3,
    "gelu_python": 3,
    "gelu_new": 4,
    "gelu_fast": 4,
    "gelu_accurate": 4,
    "gelu_pytorch_tanh": 4,
    "gelu_python_tanh": 4,
    "silu": 5,
    "swish": 5,
    "quick_gelu": 6,
    "sigmoid": 7,
    "tanh": 8,
}
WEIGHTS = {"fp32": 0, "bf16": 1, "int8": 2, "fp16": 3}
#: What holds values of a type exactly, and the other way round, the type of what is packed so.
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_DTYPES = {name: dtype for dtype, name in PRECISIONS.items()}
_GATE, _UP, _DOWN = 0, 1, 2


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def own_memory(tensor: Tensor) -> Tensor:
    """A tensor that was made to be written; MoefyError if a mode of torch has made a fake one, without memory."""
    if type(tensor) is not Tensor or (tensor.data_ptr() == 0 and tensor.numel()):
        raise MoefyError(
            "The native kernel cannot write fake tensors; leave their mode, or call moefy.kernels.use('torch') "
            "and unpack() of what is packed before."
        )
    return tensor


def plain(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.detach().to("cpu", dtype).resolve_neg().contiguous()


def _check_shapes(up: Tensor, matrices: list[Tensor], biases: tuple[Tensor | None, Tensor | None]) -> None:
    if any(m.shape != up.shape for m in matrices):
        raise ValueError(f"matrices must have one shape: {[tuple(m.shape) for m in matrices]}")
    if any(b is not None and b.shape != up.shape[:2] for b in biases):
        raise ValueError(f"biases must be {tuple(up.shape[:2])}")


def size_of_columns(matrices: list[Tensor]) -> Tensor:
    """How large the weights of each column (D,) of some (..., D) matrices are, as fp32: the fourth root of their mean
    fourth power, 1 for a column of zeros.

    A neuron that writes a massive activation has one weight in `down` far above its others, which one scale for all
    rounds coarsely, and a hidden value as large: int8 of layer 11's `down` alone cost SmolLM2 4.3 % of its perplexity.
    Divided by its column's size that weight is like others. A column's largest weight does so best (0.0017 nats from
    the fp32 model, this 0.0026, mean squares 0.0058, no scale 0.034), but where it is one neuron's, far above the
    others', tokens without that neuron lose the column.
    """
    rows = [part for m in matrices if m.numel() for part in m.detach().flatten(0, -2).split(1024)]
    total = torch.zeros(matrices[0].shape[-1], dtype=torch.float64, device="cpu")
    for part in rows:
        total += part.double().pow_(4).sum(0).cpu()
    size = (total / max(1, sum(map(len, rows)))).pow(0.25).float()
    return torch.where(size == 0, 1.0, size)  # what is not finite stays, and makes its column of y NaN


def smallest_exact(matrices: Iterable[Tensor | None]) -> str:
    """The name of the smallest type that holds every value exactly: 16 bits where a checkpoint in bf16 or fp16 was
    loaded in fp32."""
    found = ["bf16", "fp16"]
    for matrix in matrices:
        for rows in () if matrix is None else matrix.detach().flatten(0, -2).split(1024):
            found = [name for name in found if _holds(_DTYPES[name], rows)]
            if not found:
                return "fp32"
    return found[0]


def _holds(dtype: torch.dtype, values: Tensor) -> bool:
    if values.dtype == dtype:
        return True
    exact = values.float()
    return torch.equal(values.to(dtype).float().view(torch.int32), exact.view(torch.int32))


def check_fits_fp16(matrices: Iterable[Tensor]) -> None:
    """MoefyError if a matrix (..., D) holds what fp16 rounds to infinity."""
    for rows in (part for m in matrices if m.dtype != torch.float16 for part in m.detach().flatten(0, -2).split(1024)):
        low, high = rows.aminmax() if rows.numel() else (0, 0)
        inside = low > -65520 and high < 65520  # a NaN is not, and with it nothing is known of the others
        if not inside and (rows.isfinite() & (rows.abs() >= 65520)).any():
            raise MoefyError("Some weights are too large for fp16, which ends at 65,504; pack them as bf16.")


class Bank:
    """Experts of one size in packed memory. Matrices (E, M, D), biases (E, M)."""

    def __init__(
        self,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor | None,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        activation: str,
        activate_up: bool,
        weights: tuple[str, str],
        tiled: bool = False,
        absolute: bool = False,
        columns: Tensor | None = None,
    ) -> None:
        """`weights`: the types of gate and up, and of down. `columns` (D,) fp32, for int8 only: what the columns of
        `down` are divided by before they are rounded."""
        if activation not in ACTIVATIONS:
            raise ValueError(f"no native {activation!r}; there are {', '.join(ACTIVATIONS)}")
        for name in weights:
            if name not in WEIGHTS:
                raise ValueError(f"precision is one of {', '.join(WEIGHTS)}, not {name!r}")
        matrices = [m for m in (gate, up, down) if m is not None]
        _check_shapes(up, matrices, (gate_bias, up_bias))
        if weights == ("fp16", "fp16"):  # one of both is chosen only where it holds its matrices exactly
            check_fits_fp16(matrices)
        if gate is None and (gate_bias is not None or activate_up):
            raise ValueError("gate_bias and activate_up need a gate")
        self.shape = tuple(up.shape)
        self.gated, self.weights, self._columns = gate is not None, weights, columns
        of_one_type = len({m.dtype for m in matrices}) == 1 and up.dtype in PRECISIONS
        source = up.dtype if of_one_type else torch.float32
        gate, up, down = (plain(m, source) for m in (gate, up, down))  # type: ignore[assignment]
        gate_bias, up_bias = plain(gate_bias, torch.float32), plain(up_bias, torch.float32)
        self.packed = EXTENSION.Bank(
            *self.shape,
            ACTIVATIONS[activation],
            activate_up,
            absolute,
            *(WEIGHTS[name] for name in weights),
            WEIGHTS[PRECISIONS[source]],
            *map(address, (gate, up, down, columns, gate_bias, up_bias)),
            torch.get_num_threads(),
            tiled,
        )

    def unpack(self, prefix: str) -> dict[str, Tensor]:
        """The matrices (E, M, D) and biases (E, M) it was made of, named `prefix` + gate, up, down, ..._bias."""
        found = {}
        for name, which in (("gate", _GATE), ("up", _UP), ("down", _DOWN)):
            if which != _GATE or self.gated:
                dtype = _DTYPES.get(self.weights[which == _DOWN], torch.float32)
                found[prefix + name] = own_memory(torch.empty(self.shape, dtype=dtype, device="cpu"))
                self.packed.unpack(which, found[prefix + name].data_ptr(), torch.get_num_threads())
                if which == _DOWN and self._columns is not None:
                    found[prefix + name] *= self._columns
            bias = own_memory(torch.empty(self.shape[:2], dtype=torch.float32, device="cpu"))
            if which != _DOWN and self.packed.unpack_bias(which, bias.data_ptr()):
                found[f"{prefix}{name}_bias"] = bias
        return found


class PackedRouter:
    """Scores every expert in fp32; made by `linear` or `representative`."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank

    @classmethod
    def linear(cls, weight: Tensor, bias: Tensor | None = None) -> PackedRouter:
        """x·weightᵀ + bias: weight (E, D), bias (E,)."""
        up_bias = None if bias is None else bias[None].float()
        return cls(Bank(None, weight[None].float(), None, None, up_bias, "linear", False, ("fp32", "fp32")))

    @classmethod
    def representative(cls, up: Tensor, gate: Tensor | None = None, *, activation: str) -> PackedRouter:
        """CMoE: |act(x·gateᵀ) * (x·upᵀ)|, ungated |act(x·upᵀ)|; rows (E, D) of one neuron per expert."""
        gates = None if gate is None else gate[None].float()
        return cls(Bank(gates, up[None].float(), None, None, None, activation, False, ("fp32", "fp32"), absolute=True))

    @property
    def experts(self) -> int:
        return self._bank.shape[1]

    @property
    def nbytes(self) -> int:
        return self._bank.packed.nbytes
