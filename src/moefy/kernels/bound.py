"""One layer's native call with all that does not change prepared and checked once.

Between the other parts of a model, Python's side of a call runs from cold caches: in SmolLM2's decoding a layer took
210 us, of which the kernel 127 (2 cores of a Zen 3). `PackedFFN.forward` remains the one that takes any arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moefy.kernels import native
from moefy.kernels.bank import own_memory
from moefy.kernels.extension import EXTENSION


class Bound:
    """`packed.forward(x, router=..., top_k=...)`, or with a `threshold` and `most`, for inputs (..., D).

    The threshold () is a tensor that is read anew in every call. Only for inputs that `takes` agrees to; a ValueError
    where there are no experts to choose from.
    """

    def __init__(
        self,
        packed: native.PackedFFN,
        router: native.PackedRouter,
        dtype: torch.dtype,
        *,
        top_k: int | None = None,
        threshold: Tensor | None = None,
        most: int | None = None,
    ) -> None:
        if not self.possible(packed):
            raise ValueError("there are no experts to choose from: use PackedFFN.forward")
        routing = {"top_k": top_k} if threshold is None else {"threshold": float(threshold), "most": most}
        packed.forward(
            torch.zeros(0, packed.width, dtype=dtype, device="cpu"), router=router, **routing
        )  # checks the arguments
        self.dtype, self.width = dtype, packed.width
        self._owners = packed, router  # their memory is what the call points to
        self._threshold = threshold
        capacity = packed._capacity(None, top_k, None if threshold is None else 0.0, most)
        fixed = packed._fixed(packed._routed, router, capacity, threshold is not None)
        self._widen = not packed._takes(dtype)
        self._call = EXTENSION.Prepared(*fixed, dtype == torch.bfloat16 and not self._widen)

    @staticmethod
    def possible(packed: native.PackedFFN) -> bool:
        """Whether there are experts to choose from."""
        return packed._routed is not None

    def takes(self, x: Tensor) -> bool:
        fits = x.dtype == self.dtype and x.is_cpu and x.is_contiguous() and x.size(-1) == self.width
        return fits and native.readable(x)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float() if self._widen else x
        y = own_memory(torch.empty_like(x))
        threshold = 0.0 if self._threshold is None else self._threshold.item()
        self._call(x.data_ptr(), y.data_ptr(), x.numel() // self.width, threshold, torch.get_num_threads())
        return y.to(self.dtype) if self._widen else y
