"""The native CPU kernel: packed FFNs, one call per FFN. See docs/kernels.md for what and why.

T tokens, D model width, E routed experts, M neurons per expert, K experts chosen, S shared neurons;
weights are neuron-major as everywhere: one row per neuron, `down` too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moefy.kernels.bank import (
    ACTIVATIONS,
    PRECISIONS,
    Bank,
    PackedRouter,
    address,
    check_fits_fp16,
    own_memory,
    plain,
    size_of_columns,
    smallest_exact,
)
from moefy.kernels.extension import (
    EXTENSION,
    available,
    default_isa,
    instruction_sets,
    return_freed_memory,
    why_not,
)
from moefy.types import has_tangents

__all__ = [
    "ACTIVATIONS",
    "PHASES",
    "PRECISIONS",
    "PackedFFN",
    "PackedRouter",
    "available",
    "check_fits_fp16",
    "default_isa",
    "instruction_sets",
    "readable",
    "return_freed_memory",
    "supports",
    "why_not",
]

#: What a call does, in the order of Phase in run.h; `select` and `sort` are the choice of experts and sorting by them.
PHASES = ("copy", "score", "select", "sort", "up", "down")


def supports(activation: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> bool:
    """Whether an FFN with this activation (a name of transformers' ACT2FN) can run on inputs like these."""
    return available() and activation in ACTIVATIONS and dtype in PRECISIONS and torch.device(device).type == "cpu"


def readable(x: Tensor) -> bool:
    """Whether x is on the CPU and its memory holds its values: not those of fake or vmapped ones or negative views.

    Nor if it may have a tangent (forward-mode differentiation), which the kernel would drop.
    """
    if type(x) not in (Tensor, nn.Parameter) or not x.is_cpu or x.is_neg() or has_tangents():
        return False
    try:
        return x.data_ptr() != 0 or x.numel() == 0  # zeros that take no memory, and functionalized tensors
    except RuntimeError:  # a wrapper of torch.func
        return False


def _one(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor[None]


def _check_plain(name: str, tensor: Tensor | None) -> None:
    if tensor is not None and not (
        tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta
    ):
        raise ValueError(f"{name} must be a dense tensor of real numbers, with memory: {tensor.dtype}")


def _check_parts(
    group: str, dims: tuple[int, int], matrices: dict[str, Tensor | None], biases: dict[str, Tensor | None]
) -> None:
    """ValueError unless the parts of the routed ("experts") or of the shared neurons belong together. `dims`: of
    matrices and of biases."""
    given = {f"{group}_{part}": m for part, m in matrices.items() if m is not None}
    given |= {f"{group}_{part}_bias": b for part, b in biases.items() if b is not None}
    for name, tensor in given.items():
        _check_plain(name, tensor)
    up, down = matrices["up"], matrices["down"]
    if (up is None) != (down is None) or (up is None and given):
        raise ValueError(f"{group}_up and {group}_down are needed: given are {', '.join(given)}")
    for name, tensor in given.items():
        if tensor.ndim != dims[name.endswith("bias")] or tensor.shape != up.shape[: tensor.ndim]:  # type: ignore[union-attr]
            raise ValueError(f"{name} must fit {group}_up: {tuple(tensor.shape)}, {tuple(up.shape)}")  # type: ignore[union-attr]
    if matrices["gate"] is None and biases["gate"] is not None:
        raise ValueError(f"{group}_gate_bias needs {group}_gate")


class PackedFFN:
    """A conditional FFN in packed memory: routed experts, shared neurons, output bias.

    Rows of all matrices are neurons: `experts_up`, `_down` and `_gate` are (E, M, D), the shared ones (S, D); biases
    (E, M) and (S,), `down_bias` (D,). E, M or S may be 0. Without gates the FFN is down(act(up(x))), with them
    down(act(gate(x)) * up(x)), of act(up(x)) with `activate_up`. `precision` is what weights are kept in: "fp32"
    (sums of fp32; less memory where 16 bits hold the values), "bf16", "fp16" or "int8"; `isa` one of
    `instruction_sets()`, the fastest if None. The given tensors are copied. ValueError for shapes that do not fit,
    RuntimeError without a kernel, MoefyError for weights that fp16 cannot hold.
    """

    def __init__(
        self,
        *,
        experts_up: Tensor,
        experts_down: Tensor,
        experts_gate: Tensor | None = None,
        experts_up_bias: Tensor | None = None,
        experts_gate_bias: Tensor | None = None,
        shared_up: Tensor | None = None,
        shared_down: Tensor | None = None,
        shared_gate: Tensor | None = None,
        shared_up_bias: Tensor | None = None,
        shared_gate_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        activation: str,
        activate_up: bool = False,
        precision: str = "fp32",
        isa: str | None = None,
    ) -> None:
        self.precision, self.isa = precision, isa or (default_isa() if available() else "")
        self._check_machine()
        rows = {"up": experts_up, "down": experts_down, "gate": experts_gate}
        _check_parts("experts", (3, 2), rows, {"up": experts_up_bias, "gate": experts_gate_bias})
        rows = {"up": shared_up, "down": shared_down, "gate": shared_gate}
        _check_parts("shared", (2, 1), rows, {"up": shared_up_bias, "gate": shared_gate_bias})
        self.experts, self.width = experts_up.shape[0], experts_up.shape[-1]
        self._check_together(experts_up, experts_gate, shared_up, shared_gate, down_bias)
        downs = [m for m in (experts_down, shared_down) if m is not None]
        # Half the bytes, the same values; the sums are those of fp32, bit for bit where nothing is tiled. `down` on its
        # own: conversion makes it anew, in fp32 if the model was loaded so.
        self._stored = precision, precision
        if precision == "fp32":
            ups = experts_gate, experts_up, shared_gate, shared_up
            self._stored = smallest_exact(ups), smallest_exact(downs)
        # Half of a tile is empty where an expert has no more than 8 columns, and fp32 x fills it three times:
        # 256 tokens of 512 such experts take 12.1 ms through AMX and 7.5 ms through AVX-512. x has the type of weights.
        few = self.experts and experts_up.shape[1] <= 8
        half_empty = few and experts_gate is None and experts_up.dtype != torch.bfloat16
        tiled = EXTENSION.tiled(self.isa) and not half_empty
        self._columns = size_of_columns(downs) if precision == "int8" else None

        def bank(up: Tensor, *rest: Tensor | None) -> Bank:
            gate, down, gate_bias, up_bias = rest
            kind = activation, activate_up, self._stored, tiled, False
            return Bank(gate, up, down, gate_bias, up_bias, *kind, self._columns)

        self._routed = self._shared = None
        if self.experts and experts_up.shape[1]:
            self._routed = bank(experts_up, experts_gate, experts_down, experts_gate_bias, experts_up_bias)
        if shared_up is not None and len(shared_up):
            rest = shared_gate, shared_down, shared_gate_bias, shared_up_bias
            self._shared = bank(shared_up[None], *map(_one, rest))
        bias = plain(down_bias, torch.float32)
        self._bias = None if bias is None else F.pad(bias, (0, -self.width % 16))

    def _check_machine(self) -> None:
        if not available():
            raise RuntimeError(f"there is no native kernel: {why_not()}")
        if self.isa not in instruction_sets():
            raise ValueError(f"no instruction set {self.isa!r} here; there are {', '.join(instruction_sets())}")

    def _check_together(
        self, up: Tensor, gate: Tensor | None, shared_up: Tensor | None, shared_gate: Tensor | None, bias: Tensor | None
    ) -> None:
        if shared_up is not None and shared_up.shape[1] != self.width:
            raise ValueError(f"shared width {shared_up.shape[1]} is not the experts' {self.width}")
        if up.numel() and shared_up is not None and shared_up.numel() and (gate is None) != (shared_gate is None):
            raise ValueError("shared and routed experts must both have gates, or neither")
        if bias is not None and bias.shape != (self.width,):
            raise ValueError(f"down_bias must be ({self.width},): {tuple(bias.shape)}")
        _check_plain("down_bias", bias)

    @property
    def nbytes(self) -> int:
        columns = 0 if self._columns is None else self._columns.nbytes
        return sum(bank.packed.nbytes for bank in (self._routed, self._shared) if bank) + columns

    def unpack(self) -> dict[str, Tensor]:
        """The tensors it was made of, under the names of the constructor: exact but for int8."""
        found = self._routed.unpack("experts_") if self._routed else {}
        if self._shared:
            found |= {name: tensor[0] for name, tensor in self._shared.unpack("shared_").items()}
        if self._bias is not None:
            found["down_bias"] = self._bias[: self.width].clone()
        return {name: tensor.float() for name, tensor in found.items()} if self.precision == "fp32" else found

    def forward(self, x: Tensor, **routing: Any) -> Tensor:
        """The FFN of x (T, D), in x's dtype. The arguments are those of `forward_with_chosen`."""
        return self._run(x, None, **routing)

    def forward_with_chosen(self, x: Tensor, **routing: Any) -> tuple[Tensor, Tensor]:
        """The FFN of x and the experts it chose: (T, K) int32, -1 where a token has fewer.

        K is `top_k`, `most` or the columns of `chosen`.

        Experts come from one of
        - `chosen` (T, K), integers, no expert twice in a row, below 0 is none; `gate_weights` (T, K) weights them;
        - `scores` (T, E) or `router`, and then `top_k`, or `threshold` with `least` and `most`.
        ValueError for more than one of `chosen`, `top_k` and `threshold`, for none where there are routed experts, and
        for what does not fit.
        `expert_scale` (E,) weights an expert with 1 + softmax(scores) * scale, as CMoE does; it needs scores
        or a router. `counts` (E,) int64 has the tokens of each expert added to it, `phases` (6,) int64 the
        nanoseconds that all threads together spent in each of PHASES.
        """
        chosen: list[Tensor] = []
        y = self._run(x, chosen, **routing)
        return y, chosen[0]

    def _check_rule(self, chosen: Tensor | None, **rule: float | None) -> None:
        """ValueError unless there is one rule by which experts are chosen."""
        given = [name for name in ("top_k", "threshold") if rule[name] is not None]
        given += [] if chosen is None else ["chosen"]
        if len(given) > 1 or (self._routed and not given):
            raise ValueError(f"give one of chosen, top_k and threshold: {' and '.join(given) or 'none is given'}")
        negative = [name for name in ("top_k", "least", "most") if (rule[name] or 0) < 0]
        if negative:
            raise ValueError(f"{negative[0]} must not be negative: {rule[negative[0]]}")
        if rule["most"] is not None and rule["least"] > rule["most"]:  # type: ignore[operator]
            raise ValueError(f"least is more than most: {rule['least']} and {rule['most']}")
        if chosen is not None and (chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool):
            raise ValueError(f"chosen must be (T, K) numbers of experts, in a type of integers: {chosen.dtype}")

    def _capacity(self, chosen: Tensor | None, top_k: int | None, threshold: float | None, most: int | None) -> int:
        if chosen is not None:
            return chosen.shape[1]
        if threshold is not None:
            return self.experts if most is None else max(0, min(most, self.experts))
        return max(0, min(top_k or 0, self.experts))

    def _run(
        self,
        x: Tensor,
        chosen_out: list[Tensor] | None,
        *,
        router: PackedRouter | None = None,
        scores: Tensor | None = None,
        chosen: Tensor | None = None,
        top_k: int | None = None,
        threshold: float | None = None,
        least: int = 0,
        most: int | None = None,
        gate_weights: Tensor | None = None,
        expert_scale: Tensor | None = None,
        counts: Tensor | None = None,
        phases: Tensor | None = None,
    ) -> Tensor:
        dtype, x = x.dtype, self._input(x)
        tokens = x.shape[0]
        self._check_rule(chosen, top_k=top_k, threshold=threshold, least=least, most=most)
        capacity = self._capacity(chosen, top_k, threshold, most)
        routed = self._routed if capacity else None
        if routed:
            self._check_routing(tokens, router, scores, chosen, gate_weights, expert_scale)
        if chosen is not None:
            chosen = chosen.long().clamp(-1, self.experts)  # what int32 cannot hold would be another expert
        chosen, scores = plain(chosen, torch.int32), plain(scores, torch.float32)
        gate_weights, expert_scale = plain(gate_weights, torch.float32), plain(expert_scale, torch.float32)
        self._check_added("counts", counts, self.experts)
        self._check_added("phases", phases, len(PHASES))
        y = own_memory(torch.empty((tokens, self.width), dtype=x.dtype, device="cpu"))
        if chosen_out is not None:
            chosen_out.append(torch.full((tokens, capacity), -1, dtype=torch.int32, device="cpu"))
        valid = EXTENSION.forward(
            *self._fixed(routed, router, capacity, threshold is not None),
            *(x.data_ptr(), x.stride(0), x.stride(1), x.dtype == torch.bfloat16, y.data_ptr(), tokens),
            *(address(chosen), address(scores), threshold or 0.0, least),
            *map(address, (gate_weights, expert_scale, chosen_out[-1] if chosen_out else None, counts, phases)),
            torch.get_num_threads(),
        )
        if not valid:
            raise ValueError(
                f"chosen names an expert that does not exist (there are {self.experts}), or one twice for a token"
            )
        return y.to(dtype)

    def _fixed(self, routed: Bank | None, router: PackedRouter | None, capacity: int, by_threshold: bool) -> tuple:
        """The extension's arguments that are the same in every call of a layer."""
        return (
            self.isa,
            routed.packed if routed else None,
            self._shared.packed if self._shared else None,
            router._bank.packed if router and routed else None,
            address(self._bias),
            address(self._columns),
            self.width,
            capacity,
            by_threshold,
        )

    def _input(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.width:
            raise ValueError(f"x must be (T, {self.width}): {tuple(x.shape)}")
        if not readable(x) or not x.is_floating_point():
            raise ValueError(
                "x must be a plain tensor on the CPU, of real numbers, in no mode that differentiates forward"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("the native kernel has no gradients; use torch.no_grad() or the torch kernel")
        return x if self._takes(x.dtype) else x.float()

    def _takes(self, dtype: torch.dtype) -> bool:
        widen = self.precision == "fp32" and self._stored == ("bf16", "bf16")  # else hidden values would be rounded
        return dtype == torch.float32 or (dtype == torch.bfloat16 and not widen)

    @staticmethod
    def _check_added(name: str, added: Tensor | None, size: int) -> None:
        if added is None:
            return
        if added.dtype != torch.int64 or not added.is_contiguous() or added.shape != (size,) or not readable(added):
            raise ValueError(f"{name} must be ({size},) int64, on the CPU")

    def _check_routing(
        self,
        tokens: int,
        router: PackedRouter | None,
        scores: Tensor | None,
        chosen: Tensor | None,
        gate_weights: Tensor | None,
        expert_scale: Tensor | None,
    ) -> None:
        if chosen is None and scores is None and router is None:
            raise ValueError("experts come from `chosen`, `scores` or `router`: none was given")
        every = (tokens, self.experts)
        if router is not None and router._bank.shape[1:] != (self.experts, self.width):
            raise ValueError(f"the router must be ({self.experts}, {self.width}): {router._bank.shape[1:]}")
        if scores is not None and (router is not None or scores.shape != every):
            raise ValueError(f"scores, instead of a router, must be {every}: {tuple(scores.shape)}")
        if chosen is not None and (chosen.ndim != 2 or len(chosen) != tokens):
            raise ValueError(f"chosen must be ({tokens}, K): {tuple(chosen.shape)}")
        shape = None if chosen is None or expert_scale is not None else chosen.shape
        if gate_weights is not None and gate_weights.shape != shape:
            raise ValueError("gate_weights needs `chosen`, of the same shape, and excludes expert_scale")
        missing = router is None and scores is None
        if expert_scale is not None and (missing or expert_scale.shape != (self.experts,)):
            raise ValueError(f"expert_scale must be ({self.experts},) and needs scores or a router")
