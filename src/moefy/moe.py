"""MoEFFN: the module that takes a dense FFN's place. Route, run the experts, combine."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from moefy import kernels
from moefy.errors import MoefyError
from moefy.kernels import native
from moefy.kernels.bound import Bound
from moefy.packed import LOCK, Graphs, Packed, check_not_recorded, check_types, is_alone, keeps, type_of
from moefy.routers import ROUTERS, Router
from moefy.routers.base import without_autocast
from moefy.selection import above, highest
from moefy.types import FFNWeights, LayerSpec, MoEWeights, Partition, Usage

_PARTS = ("gate", "up", "down", "gate_bias", "up_bias")
_OWN = frozenset(f"{group}_{part}" for group in ("shared", "experts") for part in _PARTS)


class MoEFFN(nn.Module):
    """A conditional FFN: shared neurons that every token runs and K of E routed experts.

    Parameters: shared_{gate,up,down} (S, D) with biases (S,); experts_{gate,up,down} (E, M, D) with
    biases (E, M); down_bias (D,). `neurons` (S + E·M,) holds each row's index in the dense FFN.

    For inference on the native kernel (`eval()`, no gradients) the weights are packed once and the parameters'
    memory is released (they become empty); whatever needs them again (training, state_dict, a move to another
    device, a torch kernel) unpacks them first, to the same bits. What looks at parameters itself (code of
    your own, peft's target_parameters, DDP, FSDP) needs `unpack` or `model.train()` before; a packed layer refuses
    to run after its empty parameters were changed in place. While a backward pass may come, nothing is packed.
    """

    def __init__(self, spec: LayerSpec, dtype: torch.dtype | None = None):
        super().__init__()
        self.spec = spec
        self.top_k = spec.top_k
        absent = {"gate": not spec.gated, "gate_bias": not spec.gate_bias, "up_bias": not spec.up_bias}
        for part in _PARTS:
            tail = () if part.endswith("bias") else (spec.width,)
            for group, size in (("shared", (spec.shared,)), ("experts", (spec.experts, spec.expert_size))):
                value = nn.Parameter(torch.empty(*size, *tail, dtype=dtype))
                self.register_parameter(f"{group}_{part}", None if absent.get(part) else value)
        self.down_bias = nn.Parameter(torch.empty(spec.width, dtype=dtype)) if spec.down_bias else None
        self.register_buffer("neurons", torch.empty(spec.neurons, dtype=torch.int32))
        self.act: nn.Module = ACT2FN[spec.activation]
        self.router: Router | None = ROUTERS[spec.router](spec) if spec.router else None
        self._packed: Packed | None = None
        self._graphs = Graphs()
        self._usage: Usage | None = None

    @classmethod
    @torch.no_grad()
    def from_dense(cls, ffn: FFNWeights, partition: Partition, spec: LayerSpec, router: Router | None) -> MoEFFN:
        """The FFN's own weights, regrouped, in `eval()`: with every expert active what the dense FFN computed."""
        moe = cls(spec, dtype=ffn.up.dtype)
        rows = {"shared": partition.shared, "experts": partition.experts}
        for part in _PARTS:
            dense = getattr(ffn, part)
            if dense is not None:
                for group, index in rows.items():
                    getattr(moe, f"{group}_{part}").copy_(dense[index])
        if moe.down_bias is not None:  # a refitted MoEFFN has one where the dense FFN has none
            moe.down_bias.copy_(ffn.down_bias if ffn.down_bias is not None else torch.zeros(spec.width))
        moe.neurons.copy_(torch.cat([partition.shared, partition.experts.flatten()]))  # type: ignore[operator]
        if ffn.activation_state:
            moe.act = ffn.act()
        moe.router = router
        return moe.eval()

    @torch.no_grad()
    def to_dense(self) -> FFNWeights:
        """The dense FFN this was made from, in its own order of neurons (the inverse of `from_dense`)."""
        weights = self.weights()
        dense: dict[str, Tensor | None] = {}
        for part in _PARTS:
            shared, routed = getattr(weights.shared, part), getattr(weights.routed, part)
            if shared is None:
                dense[part] = None
                continue
            rows = torch.cat([shared, routed])
            dense[part] = torch.empty_like(rows).index_copy_(0, self.neurons.long(), rows)  # type: ignore[operator]
        return FFNWeights(
            **dense,  # type: ignore[arg-type]
            down_bias=None if weights.bias is None else weights.bias.clone(),
            activation=self.spec.activation,
            activate_up=self.spec.activate_up,
            activation_state=weights.shared.activation_state,
        )

    def weights(self) -> MoEWeights:
        """The parameters as the kernels take them: views, no copies."""
        with LOCK:  # another thread may be about to pack them; views stay
            self.unpack()
            self._check_there()
            return self._views()

    def _check_there(self) -> None:
        """MoefyError if the parameters were emptied by another layer, or replaced while they were empty."""
        own = {name: getattr(self, name) for name in _OWN if not name.endswith("bias")}
        if any(t is not None and t.ndim != (3 if name[0] == "e" else 2) for name, t in own.items()):
            raise MoefyError(
                "The weights of a converted layer are packed by another that shares its parameters, or were replaced "
                "(pruned) while they were packed; call unpack() before, or copy the layer with copy.deepcopy."
            )

    def _views(self) -> MoEWeights:
        spec, state = self.spec, self.act.state_dict() or None

        def part(group: str) -> FFNWeights:
            tensors = {p: getattr(self, f"{group}_{p}") for p in _PARTS}
            last = {p: () if p.endswith("bias") else (spec.width,) for p in _PARTS}
            flat = {p: t.reshape(-1, *last[p]) for p, t in tensors.items() if t is not None}
            return FFNWeights(**flat, activation=spec.activation, activate_up=spec.activate_up, activation_state=state)

        bias = None if self.down_bias is None else self.down_bias.view(-1)
        return MoEWeights(part("shared"), part("experts"), spec.experts, bias)

    def route(self, x: Tensor) -> Tensor:
        """The experts (T, K) int64 that tokens (T, D) take; -1 where a threshold leaves a place empty."""
        return self.choose(x)[0]

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The experts (T, K) that `route` gives and their weights (T, K) float32, None where each weighs 1.

        With a gate scale u an expert weighs 1 + softmax(scores)·u, the softmax over all E (CMoE, arXiv 2502.04416);
        the load-balancing bias is in the choice alone. Gradients reach u and, through the scores, x.
        """
        router, every = self.router, self.top_k >= self.spec.experts
        if every and (router is None or router.scale is None):
            return torch.arange(self.spec.experts, device=x.device).expand(len(x), -1), None
        if router is None or self.top_k == 0:
            return torch.empty(len(x), 0, dtype=torch.long, device=x.device), None
        threshold, scale, balance = router.settings()
        with torch.set_grad_enabled(torch.is_grad_enabled() and scale is not None), without_autocast(x):
            scores = router(x, None if router.ships else self.weights())
        with torch.no_grad():
            ranked = scores if balance is None else scores + balance
            if self.spec.most and not every:
                chosen = above(ranked, threshold, self.spec.most)  # type: ignore[arg-type]
            else:
                chosen = highest(ranked, self.top_k)
        if scale is None:
            return chosen, None
        place = chosen.clamp_min(0)
        return chosen, 1 + scores.softmax(1).gather(1, place) * scale[place]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return (self._break_graph if torch.compiler.is_compiling() else self._run)(hidden_states)

    @torch.compiler.disable(reason="moefy routes by data; leave fullgraph=True out")  # the rest compiles
    def _break_graph(self, hidden_states: Tensor) -> Tensor:
        return self._run(hidden_states)

    def _run(self, hidden_states: Tensor) -> Tensor:
        check_not_recorded()
        bound = self._prepared()
        if bound is not None and bound.takes(hidden_states):
            return bound(hidden_states)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        packed = self._packed_for(x)
        y = self._forward_native(x, packed) if packed is not None else self._forward_torch(x)
        if self._usage:
            self._usage.tokens += len(x)
        return y.view(hidden_states.shape)

    def _prepared(self) -> Bound | None:
        """The call prepared for this layer, if it is what the checked one would do."""
        packed = self._packed
        if packed is None or self._usage is not None or torch.is_grad_enabled() or not kernels.native_wanted():
            return None
        router: Any = self._modules.get("router")  # modules are slow to look up as attributes
        return packed.prepared(self._parameters, router, self.top_k)

    def _packed_for(self, x: Tensor) -> Packed | None:
        """The packed weights, packed now if need be, where tokens (T, D) run on the native kernel; otherwise None."""
        with LOCK:
            if self._packed is not None and not self._packed.is_of(self._parameters):
                self.unpack()
            if not self._runs_native(x):
                return None
            if self._packed is None:
                self.pack()
            assert self._packed is not None
            self._packed.follow(self.router)
            return self._packed

    def _runs_native(self, x: Tensor) -> bool:
        plain = native.readable(x)
        if self.is_int8:
            if torch.is_grad_enabled() and x.requires_grad:
                raise MoefyError("int8 experts have no gradients: run under torch.no_grad(), or load the model again.")
            if not plain:
                raise MoefyError("int8 experts run on plain tensors on the CPU only, not on fake or vmapped ones.")
            return True
        return (
            plain
            and kernels.native_wanted()
            and not (torch.is_grad_enabled() and (x.requires_grad or self._trains()))
            and native.supports(self.spec.activation, x.dtype, x.device)
            and (self._packed is not None or self._may_pack())
            and (self.router is None or self.router.ships or not self.routes)
        )

    def _trains(self) -> bool:
        scale = self.router.scale if self.router is not None else None
        return any(p is not None and p.requires_grad for p in (*self._parameters.values(), scale))

    def _may_pack(self) -> bool:
        """Not while training, nor what autograd or anybody else still holds."""
        return (
            not self.training
            and self._parameters.keys() >= _OWN  # not where pruning has put a plain tensor
            and not self._graphs.alive()
            and type_of(self._parameters) is not None
            and is_alone(self)
        )

    def _forward_torch(self, x: Tensor) -> Tensor:
        with LOCK:  # from here on another thread's inference packs nothing
            graph, weights = self._graphs.begin(), self.weights()
        chosen, gate = self.choose(x)
        y = kernels.pick(x, weights)(x, weights, chosen, gate)
        self._graphs.watch(graph, y)
        if self._usage:
            self._usage.counts += torch.bincount(chosen[chosen >= 0], minlength=self.spec.experts).cpu()
        return y

    def _forward_native(self, x: Tensor, packed: Packed) -> Tensor:
        how: dict[str, Any] = {"counts": self._usage.counts} if self._usage and self.spec.experts else {}
        if not self.routes or self.router is None or self.router.balance is not None:
            chosen, gate = self.choose(x)
            return packed.ffn.forward(x, chosen=chosen, gate_weights=gate, **how)
        if self.spec.most:
            how |= {"threshold": float(self.router.threshold), "most": self.spec.most}  # type: ignore[arg-type]
        else:
            how |= {"top_k": self.top_k}
        if self.router.scale is not None:
            how["expert_scale"] = self.router.scale
        if packed.router is None:
            with without_autocast(x):
                scores = self.router(x, None)
            return packed.ffn.forward(x, scores=scores, **how)
        with LOCK:
            if self.router.scale is None:  # the prepared call has no place for it
                packed.bind(x.dtype, self.top_k, self.spec.most)
            router = packed.router
        return packed.ffn.forward(x, router=router, **how)

    @torch.no_grad()
    def pack(self, precision: str | None = None) -> None:
        """Pack the weights for the native kernel and release the parameters' memory.

        `precision` is "fp32", "bf16", "fp16" (the weights' own type if None; 16 bits round fp32, for good) or "int8":
        weight-only, a scale a neuron and, in `down`, one a column of y; an error of about 1 %, and no way back to the
        parameters. fp32 that 16 bits hold exactly takes half the memory, with the same results. MoefyError where the
        kernel is missing or lacks the activation, for offloaded weights, for types that need a `precision`, and for
        weights beyond fp16's range; ValueError for another precision.
        """
        with LOCK, torch.inference_mode(False):
            self.check_packs(precision)
            packed = Packed(self._parameters, self.spec, precision)
            packed.follow(self.router)
            self._packed = packed
            packed.empty()
        native.return_freed_memory()

    def check_packs(self, precision: str | None = None) -> None:
        """MoefyError if `pack` would refuse; what was packed before is unpacked."""
        if not native.supports(self.spec.activation):
            why = native.why_not() or f"it has no activation {self.spec.activation}"
            raise MoefyError(f"Only the native kernel packs weights, and {why}.")
        self.unpack()
        self._check_there()
        if precision is None:
            check_types(self._parameters)
        if any(p.is_meta for p in self.parameters()):
            raise MoefyError("Weights that are offloaded cannot be packed; load the model without device_map.")
        if precision == "fp16":
            native.check_fits_fp16(p for n, p in self._parameters.items() if p is not None and "bias" not in n)

    def unpack(self) -> None:
        """Give the parameters their values again; nothing to do unless they are packed."""
        with LOCK:
            if self._packed is not None:
                self._packed.unpack()
                self._packed = None

    def set_gate(self, scale: Tensor | None, balance: Tensor | None) -> None:
        """Give the router this gate scale (E,) and load-balancing bias (E,), None for none (see `LayerSpec`)."""
        assert self.router is not None
        self.unpack()
        self.spec = replace(self.spec, gate_scale=scale is not None, balance=balance is not None)
        self.router.spec = self.spec
        for name, value in (("scale", scale), ("balance", balance)):
            own = None if value is None else nn.Parameter(value.detach().clone(), requires_grad=False)
            setattr(self.router, name, own)

    def trainable(self, wanted: bool) -> None:
        """Let training change the weights, or not; never what the router decides by."""
        self.requires_grad_(wanted)
        if self.router is not None:
            self.router.freeze()

    @property
    def is_int8(self) -> bool:
        """Whether the weights are packed as int8, and so no longer there to look at."""
        return self._packed is not None and self._packed.ffn.precision == "int8"

    def packed_bytes(self) -> int:
        """Bytes of packed memory, the packed router's copy included; 0 when not packed."""
        return self._packed.nbytes if self._packed is not None else 0

    def train(self, mode: bool = True) -> MoEFFN:
        if mode and not self.is_int8:  # which has no gradients
            self.unpack()
        return super().train(mode)

    # What reads or replaces parameters holds the lock, or a thread that infers would pack them in between.

    def _apply(self, fn: Any, recurse: bool = True) -> MoEFFN:
        with LOCK:
            if not (self.is_int8 and keeps(fn, self.experts_up.dtype)):  # type: ignore[arg-type]
                self.unpack()
            return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with LOCK:
            self.unpack()
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with LOCK:
            self.unpack()
            super()._load_from_state_dict(*args, **kwargs)

    def __copy__(self) -> MoEFFN:
        return self.__deepcopy__(None)  # of the same parameters

    def __deepcopy__(self, memo: dict[int, Any] | None) -> MoEFFN:
        with LOCK:
            self.unpack()
            made, state = type(self).__new__(type(self)), self.__dict__.copy()
            if memo is not None:
                memo[id(self)] = made
                state = copy.deepcopy(state, memo)
            made.__setstate__(state)
            return made

    def __getstate__(self) -> dict[str, Any]:
        """For pickle, which reads it later: what is packed in between empties the parameters and not these."""
        with LOCK:
            self.unpack()  # packed memory is the extension's own and does not pickle
            own = {
                name: p if p is None else nn.Parameter(p.data, p.requires_grad) for name, p in self._parameters.items()
            }
            return {**self.__dict__, "_parameters": own}

    @property
    def routes(self) -> bool:
        return 0 < self.top_k < self.spec.experts  # it chooses some of its routed experts, not none and not all

    def active_fraction(self, experts: float | None = None) -> float:
        """Multiply-adds a token over the dense FFN's, the router's included.

        `experts` is how many run for a token on average; by default what the layer was made for.
        """
        spec = self.spec
        active = spec.shared + (min(self.top_k, spec.experts) if experts is None else experts) * spec.expert_size
        routing = self.router.multiply_adds() if self.router is not None and self.routes else 0
        return (active * spec.width * spec.matrices + routing) / spec.multiply_adds

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in asdict(self.spec).items() if v is not None and v is not False)


def pack(model: nn.Module, precision: str | None = None) -> None:
    """Pack every converted FFN of `model` for the native kernel now; `precision` and errors as of `MoEFFN.pack`.

    None is packed if one of them would be refused.
    """
    layers = moe_layers(model)
    if not layers:
        raise MoefyError("The model has no experts to pack; convert it first.")
    for layer in layers.values():
        layer.check_packs(precision)
    for layer in layers.values():
        layer.pack(precision)


def moe_layers(model: nn.Module) -> dict[str, MoEFFN]:
    """The converted FFNs of a model by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoEFFN)}
