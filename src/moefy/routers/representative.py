"""CMoE's analytical router (arXiv 2502.04416, section 4.2): one real neuron stands for each expert.

The representative of an expert is its neuron whose marker column is nearest (L1) to the expert's mean
marker column; the score of the expert is |h| of that neuron, with its weight rows at unit length.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from moefy.kernels.native import PackedRouter, supports
from moefy.routers.base import Router
from moefy.stats import NeuronStats, normalised_rows
from moefy.types import LayerSpec, MoEWeights, Partition


class RepresentativeRouter(Router):
    """Scores (T, E): |h| of one neuron an expert, its rows up and gate (E, D) at unit length (CMoE, section 4.2)."""

    def __init__(self, spec: LayerSpec):
        super().__init__(spec)
        self.up = self._weight(spec.experts, spec.width)
        self.up_bias = self._weight(spec.experts) if spec.up_bias else None
        self.gate = self._weight(spec.experts, spec.width) if spec.gated else None
        self.gate_bias = self._weight(spec.experts) if spec.gate_bias else None
        self.act: nn.Module = ACT2FN[spec.activation].requires_grad_(False)

    @classmethod
    def build(cls, spec: LayerSpec, partition: Partition, stats: NeuronStats, seed: int) -> RepresentativeRouter:
        chosen = representatives(partition, stats)
        ffn, norms = stats.ffn, normalised_rows(stats.ffn)
        router = cls(spec)
        if ffn.activation_state:
            router.act = ffn.act()
        for name, norm in (("up", norms.up_norm), ("gate", norms.gate_norm)):
            rows, bias = getattr(ffn, name), getattr(ffn, f"{name}_bias")
            if rows is not None:
                getattr(router, name).copy_(rows[chosen] / norm[chosen, None])  # type: ignore[index]
            if bias is not None:
                getattr(router, f"{name}_bias").copy_(bias[chosen] / norm[chosen])  # type: ignore[index]
        return router

    def forward(self, x: Tensor, weights: MoEWeights | None) -> Tensor:
        x = x.float()
        up = F.linear(x, self.up.float(), None if self.up_bias is None else self.up_bias.float())
        if self.gate is None:
            return self.act(up).abs()
        gate = F.linear(x, self.gate.float(), None if self.gate_bias is None else self.gate_bias.float())
        return (self.act(gate) * (self.act(up) if self.spec.activate_up else up)).abs()

    def packed(self) -> PackedRouter | None:
        plain = self.up_bias is None and self.gate_bias is None and not self.spec.activate_up
        if not plain or not supports(self.spec.activation):
            return None
        return PackedRouter.representative(self.up, self.gate, activation=self.spec.activation)


def representatives(partition: Partition, stats: NeuronStats) -> Tensor:
    """The neuron (E,) of each expert whose markers are nearest to the expert's mean markers.

    With mean markers c and 0/1 markers m the L1 distance is Σm + Σc - 2 m·c; scaled by M it is a sum of
    integers, so ties are real ties and go to the lowest index, as in the published code.
    """
    experts, size = partition.experts.shape
    near = torch.zeros(experts, size, dtype=torch.float64)
    for marks in stats.marker_chunks():
        members = marks[:, partition.experts.flatten()].view(-1, experts, size)
        near += torch.einsum("te,tem->em", members.sum(-1), members)
    counts = torch.bincount(stats.markers.flatten().long(), minlength=partition.neurons)
    distance = size * counts[partition.experts] - 2 * near
    return partition.experts.gather(1, distance.argmin(dim=1, keepdim=True)).squeeze(1)
