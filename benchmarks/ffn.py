"""How fast a conditional FFN is, routing included, against the dense FFN in torch.

    python benchmarks/ffn.py                      # every shape, the fastest instruction set
    python benchmarks/ffn.py --quick              # a minute: one shape, fewer rounds
    python benchmarks/ffn.py --isa avx2 --json out.jsonl
    python benchmarks/ffn.py --shapes ReLU --zeros 0.8    # biases that make 80 % of the hidden values 0

All contenders take turns in every round and walk over layers that do not fit any cache (200 MB of fp32
weights); the figures are medians over rounds. Columns:
  F.linear   dense, fp32, ms                 best dense   the fastest dense path in torch, and which
  ms, x      native, speedup over F.linear   x best       over the best dense path
  share      time of the active share of the native kernel run densely, over the time it takes
  floor      time the active weights need from DRAM, or the multiply-adds at full rate, over the time it takes
             (of all active neurons: with ReLU the down phase leaves those out whose value is 0, so it can be beaten)
  route      what router, selection and sorting take of the threads' time in a call, by clocks around the kernel's jobs
The calls of `ms` are prepared, as a layer's are (kernels/bound.py); those of `share` and `route` check their arguments
(`PackedFFN.forward`).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import NormalDist

import torch
from limits import limits, machine
from torch import Tensor
from torch.nn import functional as F

from moefy.kernels import native
from moefy.kernels.bound import Bound


@dataclass(frozen=True)
class Shape:
    name: str
    D: int
    E: int
    M: int
    K: int
    S: int
    gated: bool

    @property
    def neurons(self) -> int:
        return self.E * self.M + self.S

    @property
    def matrices(self) -> int:
        return 3 if self.gated else 2

    @property
    def active(self) -> float:
        return (self.K * self.M + self.S) / self.neurons

    def touched(self, tokens: int) -> float:
        """The share of the weights that some token needs, when experts are chosen evenly."""
        experts = 1 - (1 - self.K / self.E) ** tokens
        return (experts * self.E * self.M + self.S) / self.neurons


SHAPES = [
    Shape("ReLU D1024 F4096, 128 x 32, 25%", 1024, 128, 32, 32, 0, False),
    Shape("ReLU D1024 F4096, 128 x 32, 20%", 1024, 128, 32, 26, 0, False),
    Shape("ReLU D768 F3072, 96 x 32, 20%", 768, 96, 32, 19, 0, False),
    Shape("GLU D576 F1536, S2A2E16", 576, 14, 96, 2, 192, True),
    Shape("GLU D576 F1536, S3A3E8", 576, 5, 192, 3, 576, True),
    Shape("GLU D2048 F8192, S2A2E16", 2048, 14, 512, 2, 1024, True),
    Shape("GLU D2048 F8192, S3A3E8", 2048, 5, 1024, 3, 3072, True),
    Shape("ReLU D1024 F4096, 512 x 8, 25%", 1024, 512, 8, 128, 0, False),
    Shape("GLU D576 F1536, 144 x 8 + 384, 50%", 576, 144, 8, 48, 384, True),
]
ROTATE = 200e6  # bytes of fp32 weights; L3 caches hold 16-100 MB, and 300 shared with other machines no more
NATIVE = {  # contender: weights, dtype of x
    "fp32": ("fp32", torch.float32),
    "bf16 weights": ("bf16", torch.float32),
    "bf16": ("bf16", torch.bfloat16),
    "fp16 weights": ("fp16", torch.float32),
    "int8": ("int8", torch.float32),
}


def packed(name: str, weights: dict[str, Tensor], **options: str) -> native.PackedFFN:
    precision, dtype = NATIVE[name]  # before it is packed, a model's weights have the type of x
    return native.PackedFFN(**{part: w.to(dtype) for part, w in weights.items()}, precision=precision, **options)


class Layer:
    """One FFN in every form; random weights, since only their number matters."""

    def __init__(self, shape: Shape, tokens: int, isa: str, contenders: list[str], args: argparse.Namespace) -> None:
        self.shape, self.isa = shape, isa
        F_, D = shape.neurons, shape.D
        up, down = torch.randn(F_, D) / D**0.5, torch.randn(F_, D) / F_**0.5
        gate = torch.randn(F_, D) / D**0.5 if shape.gated else None
        self.linear = [w for w in (gate, up) if w is not None], down.T.contiguous()
        self.router = native.PackedRouter.linear(torch.randn(shape.E, D))
        self.packed, self.native_dense = {}, {}
        activation = "silu" if shape.gated else "relu"
        parts = {"up": up, "down": down} | ({} if gate is None else {"gate": gate})
        S = shape.S
        experts = {f"experts_{n}": w[S:].view(shape.E, shape.M, D) for n, w in parts.items()}
        shared = {f"shared_{n}": w[:S] for n, w in parts.items()} if S else {}
        none = {f"experts_{n}": w[:0].view(0, 1, D) for n, w in parts.items()}
        every = {f"shared_{n}": w for n, w in parts.items()}
        bias = None
        if args.zeros is not None and not shape.gated:  # x . up has the standard normal distribution
            bias = torch.full((F_,), NormalDist().inv_cdf(1 - args.zeros))
            experts["experts_up_bias"], every["shared_up_bias"] = bias[S:].view(shape.E, shape.M), bias
            shared |= {"shared_up_bias": bias[:S]} if S else {}
        for name in contenders:
            options = {"activation": activation, "isa": isa}
            self.packed[name] = packed(name, experts | shared, **options)
            self.native_dense[name] = packed(name, none | every, **options)
        self.calls = {
            name: Bound(self.packed[name], self.router, NATIVE[name][1], top_k=shape.K) for name in contenders
        }
        self.paths = {} if args.no_dense else dense_paths(self.linear, bias, tokens)

    def routed(self, name: str, x: Tensor, phases: list[Tensor]) -> Tensor:
        phases.append(torch.zeros(len(native.PHASES), dtype=torch.int64))
        return self.packed[name].forward(x, router=self.router, top_k=self.shape.K, phases=phases[-1])


def dense_paths(
    weights: tuple[list[Tensor], Tensor], bias: Tensor | None, tokens: int
) -> dict[str, Callable[[Tensor], Tensor]]:
    """The dense FFN by every means that torch has, each a function of x in fp32 or bf16."""
    ups, down = weights

    def ffn(linear: Callable[..., Tensor], ups: list[Tensor], down: Tensor) -> Callable[[Tensor], Tensor]:
        if len(ups) == 2:
            return lambda x: linear(F.silu(linear(x, ups[0])) * linear(x, ups[1]), down)
        b = None if bias is None else bias.to(down.dtype)
        return lambda x: linear(F.relu(linear(x, ups[0], b)), down)

    half = [w.bfloat16() for w in ups], down.bfloat16()
    paths = {"F.linear": ffn(F.linear, ups, down), "F.linear bf16": ffn(F.linear, *half)}

    def prepacked(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")

    for name, (many, one) in {"oneDNN": (ups, down), "oneDNN bf16": half}.items():
        try:
            packed = [torch.ops.mkldnn._reorder_linear_weight(w, tokens) for w in (*many, one)]
            path = ffn(prepacked, packed[:-1], packed[-1])
            path(torch.zeros(tokens, one.shape[0], dtype=one.dtype))
            paths[name] = path
        except (RuntimeError, AttributeError):
            continue  # a private operator: not in every build
    return paths


def measure(
    contenders: dict[str, list[Callable[[], object]]], rounds: int, budget: float, quantile: float
) -> dict[str, float]:
    """Seconds of each contender; its functions are the layers it walks over."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    every, order = list(contenders.items()), random.Random(0)
    end = time.perf_counter() + budget
    for i in range(rounds + 2):
        # Whoever follows a dense path finds colder caches, so the order changes from round to round.
        for turn in order.sample(range(len(contenders)), len(contenders)):
            name, layers = every[turn]
            layer = layers[(i + turn) % len(layers)]  # none finds in the cache what the one before it has read
            start = time.perf_counter()
            layer()
            times[name].append(time.perf_counter() - start)
        if time.perf_counter() > end and i >= 6:
            break
    return {name: sorted(found[2:])[round(quantile * (len(found) - 3))] for name, found in times.items()}


def routing_share(calls: list[Tensor]) -> float:
    shares = [
        sum(ns for phase, ns in zip(native.PHASES, call.tolist(), strict=True) if phase in ("score", "select", "sort"))
        / int(call.sum())
        for call in calls
    ]
    return statistics.median(shares)


def run(shape: Shape, tokens: int, isa: str, names: list[str], args: argparse.Namespace) -> tuple[dict, dict, dict]:
    """Seconds of each contender, those of the dense paths of torch alone, and the share of routing by contender."""
    layer_bytes = shape.matrices * shape.neurons * shape.D * 4
    read = 1 if args.zeros is None or shape.gated else 1 - args.zeros / 2  # of the weights, where zeros are left out
    count = max(2, round(ROTATE / (layer_bytes * read) + 0.5))
    layers = [Layer(shape, tokens, isa, names, args) for _ in range(count)]
    inputs = {
        dtype: [torch.randn(tokens, shape.D).to(dtype) for _ in layers] for dtype in (torch.float32, torch.bfloat16)
    }
    contenders: dict[str, list[Callable[[], object]]] = {}
    phases: dict[str, list[Tensor]] = {name: [] for name in names}
    for path in layers[0].paths:
        xs = inputs[torch.bfloat16 if "bf16" in path else torch.float32]
        contenders[path] = [lambda l=l, x=x, path=path: l.paths[path](x) for l, x in zip(layers, xs, strict=True)]
    for name in names:
        xs = inputs[NATIVE[name][1]]
        pairs = list(zip(layers, xs, strict=True))
        contenders["native " + name] = [lambda l=l, x=x, n=name: l.calls[n](x) for l, x in pairs]
        contenders["routed " + name] = [
            lambda l=l, x=x, n=name, calls=phases[name]: l.routed(n, x, calls) for l, x in pairs
        ]
        contenders["dense " + name] = [lambda l=l, x=x, n=name: l.native_dense[n].forward(x, top_k=0) for l, x in pairs]
    found = measure(contenders, args.rounds, args.seconds, args.quantile)
    dense = {path: found[path] for path in layers[0].paths}
    return found, dense, {name: routing_share(calls) for name, calls in phases.items()}


def report(shape: Shape, tokens: int, isa: str, args: argparse.Namespace, peak: dict | None) -> None:
    names = args.precision
    found, dense, routing = run(shape, tokens, isa, names, args)
    best = min(dense, key=dense.__getitem__) if dense else None
    for name in names:
        seconds = found["native " + name]
        record = {
            "shape": asdict(shape), "tokens": tokens, "isa": isa, "contender": name, "seconds": seconds,
            "quantile": args.quantile, "zeros": None if shape.gated else args.zeros,
            "active": shape.active, "dense_seconds": dense, "native_dense_seconds": found["dense " + name],
            "share_of_own_dense": shape.active * found["dense " + name] / found["routed " + name],
            "routing_share": routing[name],
        }  # fmt: skip
        cells = [f"{shape.name:36}", f"{tokens:5}", f"{name:13}"]
        if best:
            record |= {
                "speedup": dense["F.linear"] / seconds,
                "best_dense": best,
                "speedup_best": dense[best] / seconds,
            }
            cells += [
                f"{dense['F.linear'] * 1e3:9.3f}",
                f"{dense[best] * 1e3:9.3f} {best:13}",
                f"{seconds * 1e3:9.3f}",
            ]
            cells += [f"{record['speedup']:6.2f}x", f"{record['speedup_best']:6.2f}x"]
        else:
            cells += [f"{seconds * 1e3:9.3f}"]
        cells += [f"{record['share_of_own_dense']:6.0%}"]
        if peak:
            values = shape.matrices * shape.neurons * shape.D
            width = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}[NATIVE[name][0]]
            memory = shape.touched(tokens) * values * width / peak["gbps"] / 1e9
            unit, rate = "FMA", peak["gflops"]
            if isa == "amx" and NATIVE[name][0] == "bf16":  # fp32 x is a sum of three bf16 values there
                unit, rate = "AMX", peak["tile_gflops"] / (1 if NATIVE[name][1] == torch.bfloat16 else 3)
            compute = shape.active * values * tokens * 2 / rate / 1e9
            record |= {"floor_memory": memory, "floor_compute": compute, "limits": peak}
            cells += [f"{max(memory, compute) / seconds:6.0%} {'of DRAM' if memory > compute else f'of {unit} '}"]
        cells += [f"{record['routing_share']:6.1%}"]
        print(" ".join(cells), flush=True)
        if args.json:
            with open(args.json, "a") as file:
                file.write(json.dumps(record | machine()) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", default=native.instruction_sets()[-1], choices=native.instruction_sets())
    parser.add_argument("--shapes", nargs="*", default=None, help="words that the name of a shape must contain")
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 16, 256, 1024])
    parser.add_argument("--precision", nargs="*", default=["fp32", "bf16 weights", "bf16", "int8"], choices=NATIVE)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=20, help="most time for one line")
    parser.add_argument("--quantile", type=float, default=0.5, help="0.5: medians; 0.1 where other work disturbs")
    parser.add_argument("--zeros", type=float, help="share of hidden values that ReLU makes 0; without it, half")
    parser.add_argument("--no-dense", action="store_true", help="leave torch out")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", help="append one line per measurement to this file")
    args = parser.parse_args()
    if args.zeros is not None and not 0 < args.zeros < 1:
        parser.error("--zeros is a share above 0 and below 1")
    if args.quick:
        args.rounds, args.seconds, args.tokens, args.shapes = 12, 4, [1, 16, 256], ["D576 F1536, S2A2E16"]
    peak = limits(args.isa, torch.get_num_threads())
    shapes = [s for s in SHAPES if args.shapes is None or any(word in s.name for word in args.shapes)]
    print(json.dumps({"isa": args.isa, "limits": peak} | machine()))
    with torch.no_grad():
        for shape in shapes:
            for tokens in args.tokens:
                report(shape, tokens, args.isa, args, peak)


if __name__ == "__main__":
    main()
