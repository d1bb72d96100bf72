"""One layer's weights in the native kernel's form, and whether they are still the layer's."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.utils import stateless

from moefy.errors import MoefyError
from moefy.kernels import native
from moefy.kernels.bound import Bound
from moefy.routers import Router
from moefy.types import LayerSpec

# Packing empties a layer's parameters and unpacking fills them: one thread at a time, since several may make the first
# call of a model at once. A fork waits until nobody is at it.
LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)

_VERSION = attrgetter("_version")
# The stride of what is left of a packed parameter, which nothing else has: an empty `.data` that somebody gave it, as
# vector_to_parameters does, is told from it.
_RELEASED = (1_000_003,)


def check_not_recorded() -> None:
    """MoefyError where torch records a graph, which would hold the choices of one input, or nothing of the kernel."""
    if torch.jit.is_tracing():
        by = "torch.jit.trace"
    elif torch.compiler.is_exporting():
        by = "torch.export"
    elif torch._C._len_torch_dispatch_stack() and get_proxy_mode() is not None:
        by = "torch.fx's make_fx"
    else:
        return
    raise MoefyError(f"{by} cannot record routing; use torch.compile, or the recipe slim.")


class Snapshot:
    """Which parameters a module has, and how often they have been changed in place.

    Changes through `.data`, and of tensors made in inference mode, are not seen.
    """

    def __init__(self, parameters: Mapping[str, Tensor | None]):
        self._parameters = list(parameters.values())  # kept: ids of what is gone are given again
        self._ids = list(map(id, self._parameters))
        self._watched = [p for p in self._parameters if p is not None and _counts(p)]
        self._versions = list(map(_VERSION, self._watched))

    def same(self, parameters: Mapping[str, Tensor | None]) -> bool:
        return list(map(id, parameters.values())) == self._ids

    def unchanged(self) -> bool:
        return list(map(_VERSION, self._watched)) == self._versions


def _counts(tensor: Tensor) -> bool:
    """Whether changes in place are counted: not of what was made in inference mode, even if its data is not."""
    try:
        return tensor._version >= 0
    except RuntimeError:
        return False


def _memory(tensors: Iterable[Tensor | None]) -> list[int]:
    """Where tensors are."""
    return [t.data_ptr() for t in tensors if t is not None]


class _Graph:
    """Lives as long as a graph of autograd does."""


class Graphs:
    """The graphs of autograd that may still need a layer's weights: from its forward pass until the end of a backward
    pass, or until nobody has the graph any more. Copies and pickles know of none."""

    def __init__(self) -> None:
        self._alive: weakref.WeakSet[_Graph] = weakref.WeakSet()

    def begin(self) -> _Graph:
        """Count a graph that is about to be made; it counts for as long as the caller holds it, or `watch` has it."""
        graph = _Graph()
        self._alive.add(graph)
        return graph

    def watch(self, graph: _Graph, y: Tensor) -> None:
        """Count the graph until a backward pass from y is over, if there is one to come."""
        if not y.requires_grad:
            return
        alive = self._alive

        def over(_: Tensor) -> None:  # the hook, and with it `graph`, is the graph's own
            # Not now: the gradients of the weights are made after that of y.
            torch.autograd.Variable._execution_engine.queue_callback(lambda: alive.discard(graph))

        y.register_hook(over)

    def alive(self) -> bool:
        return len(self._alive) > 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, ()


def _outside_transforms() -> AbstractContextManager[Any]:
    """Within torch.func's transforms new tensors are wrappers, which the kernel cannot write."""
    return torch._C._DisableFuncTorch() if hasattr(torch._C, "_DisableFuncTorch") else nullcontext()


def called_functionally() -> bool:
    """Whether torch.func.functional_call is under way: the parameters are its caller's, who goes on with them."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code is stateless._functional_call.__code__:
            return True
        frame = frame.f_back
    return False


def is_alone(layer: nn.Module) -> bool:
    """Whether nobody else holds a layer's parameters: an optimizer's gradients, another process, adapters, an
    offloading hook, a functional call."""
    own = [p for p in layer._parameters.values() if p is not None]
    return (
        all(isinstance(p, nn.Parameter) and p.device.type == "cpu" and p.grad is None for p in own)
        and not any(p.is_shared() for p in own)  # with another process, which would see no change any more
        and not hasattr(layer, "_hf_hook")
        and not hasattr(layer, "parametrizations")  # adapters, whose parameters are elsewhere
        and not called_functionally()
    )


def keeps(fn: Any, dtype: torch.dtype) -> bool:
    """Whether what a module's `_apply` does to tensors of a type on the CPU leaves type and device as they are."""
    after = fn(torch.empty(0, dtype=dtype))
    return after.dtype == dtype and after.device.type == "cpu"


def type_of(parameters: Mapping[str, nn.Parameter | None]) -> torch.dtype | None:
    """The one type of a layer's matrices, which the kernel keeps as it is; None if it cannot, or they have several."""
    given = {name: p for name, p in parameters.items() if p is not None}
    found = {p.dtype for name, p in given.items() if p.numel() and not name.endswith("bias")}
    dtype = found.pop() if found else given["experts_up"].dtype
    known = all(p.dtype in native.PRECISIONS for p in given.values())  # biases are kept in fp32
    return dtype if known and not found else None


def check_types(parameters: Mapping[str, nn.Parameter | None]) -> None:
    """MoefyError if the kernel cannot keep a layer's weights as they are."""
    if type_of(parameters) is None:
        types = " and ".join(sorted({str(p.dtype) for p in parameters.values() if p is not None}))
        raise MoefyError(f"Weights in {types} cannot be packed as they are; name a precision.")


class Packed:
    """The packed weights of a layer, whose parameters (in `parameters`) `empty` releases, and of its router."""

    def __init__(self, parameters: Mapping[str, nn.Parameter | None], spec: LayerSpec, precision: str | None):
        own: dict[str, Any] = {name: p for name, p in parameters.items() if p is not None}
        dtype = type_of(parameters)
        self.ffn = native.PackedFFN(
            **own,
            activation=spec.activation,
            activate_up=spec.activate_up,
            precision=precision or native.PRECISIONS[dtype],  # type: ignore[index]
        )
        self._parameters = {name: p for name, p in own.items() if p.numel()}  # what is empty keeps its shape
        self._snapshot = Snapshot(parameters)
        self._strides = [_RELEASED] * len(self._parameters)  # once they are released
        self.router: native.PackedRouter | None = None
        self._router: Router | None = None
        self._router_snapshot = Snapshot({})
        self._router_tensors: list[Tensor] = []
        self._router_memory: list[int] = []
        self._threshold: Tensor | None = None
        self.bound: Bound | None = None
        self.bound_top_k = -1

    def empty(self) -> None:
        """Release the parameters' memory: last, when whoever stops it has the packed weights."""
        for parameter in self._parameters.values():
            parameter.data = parameter.data.new_empty(0).as_strided((0,), _RELEASED)

    def is_of(self, parameters: Mapping[str, nn.Parameter | None]) -> bool:
        """Whether the layer has the parameters that were packed, none with a new `.data`; MoefyError if one was
        changed in place, or given a new empty `.data`, to no effect."""
        if not self._snapshot.same(parameters):
            return False
        replaced = list(map(Tensor.stride, self._parameters.values())) != self._strides
        if replaced and any(map(Tensor.numel, self._parameters.values())):
            return False
        if replaced or not self._snapshot.unchanged():
            raise MoefyError(
                "Weights of a converted layer were changed in place after it had packed them, which has no effect: "
                "call its unpack() (or model.train()) before such a change."
            )
        return True

    def follow(self, router: Router | None) -> None:
        """Pack the router if it is another one, or has other weights, than the packed one."""
        if router is not None and self.is_from(router):
            return
        self.bound = None
        # What parametrizations compute has no parameter here whose changes would be seen: it is scored in torch.
        plain = router is not None and not hasattr(router, "parametrizations")
        self.router = router.packed() if router is not None and plain else None
        self._router, self._router_snapshot = router, Snapshot(router._parameters if router is not None else {})
        # Held: memory that is freed may be given to a later `.data`, which would pass for the packed one.
        parameters = router._parameters.values() if router is not None else ()
        self._router_tensors = [p.data for p in parameters if p is not None]
        self._router_memory = _memory(self._router_tensors)
        self._threshold = router.threshold if router is not None else None

    def is_from(self, router: Router) -> bool:
        """Whether the packed router has this one's weights as they are, and its threshold, whatever that holds."""
        known = self._router_snapshot
        if self._router is not router or router._buffers.get("threshold", self._threshold) is not self._threshold:
            return False
        # A new `.data` is other memory; what is written into the old one through `.data` is not seen.
        return (
            known.same(router._parameters)
            and known.unchanged()
            and _memory(router._parameters.values()) == self._router_memory
        )

    def bind(self, dtype: torch.dtype, top_k: int, most: int) -> None:
        """Prepare the calls that follow on inputs of this type."""
        ready = self.bound is not None and self.bound.dtype == dtype and self.bound_top_k == top_k
        if ready or self.router is None or self._router is None or not Bound.possible(self.ffn):
            return
        routing: dict[str, Any] = {"threshold": self._threshold, "most": most} if most else {"top_k": top_k}
        self.bound = Bound(self.ffn, self.router, dtype, **routing)
        self.bound_top_k = top_k

    def prepared(self, parameters: Mapping[str, nn.Parameter | None], router: Router, top_k: int) -> Bound | None:
        """The prepared call, if it is what the checked one would do."""
        if self.bound is None or self.bound_top_k != top_k or not self.is_from(router) or not self.is_of(parameters):
            return None
        return self.bound

    def unpack(self) -> None:
        """Give the parameters their values again: plain tensors, whatever mode the caller is in."""
        if self.ffn.precision == "int8":
            raise MoefyError("The experts were packed as int8, which cannot be undone; load the model again.")
        with torch.inference_mode(False), torch.no_grad(), _outside_transforms():
            for name, tensor in self.ffn.unpack().items():
                parameter = self._parameters.get(name)
                if parameter is not None and not parameter.numel():  # not empty: `.data` was set since
                    parameter.data = tensor.to(parameter.dtype)

    @property
    def nbytes(self) -> int:
        return self.ffn.nbytes + (self.router.nbytes if self.router is not None else 0)
