"""Light fine-tuning of a converted model: CMoE's optional last step (arXiv 2502.04416).

Low-rank adapters on the experts, the shared neurons and the attention, a gate scale and a load-balancing bias, all of
which end up in the checkpoint's own weights. Routers and thresholds stay as they are: which experts run is a hard
choice without a gradient, and what the gate scale's softmax could teach a router is how much an expert should weigh,
not whether it should run.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefy.calibrate import CalibrationInfo, check_batches, lookups_told, spread, tokens_of
from moefy.conversion.resume import fingerprint
from moefy.convert import check_no_adapters
from moefy.errors import MoefyError
from moefy.moe import moe_layers
from moefy.tuning.adapters import Adapters
from moefy.tuning.balance import Gates
from moefy.tuning.finetune import Progress, Schedule, Trained, check_positive, train
from moefy.tuning.losses import teacher_loss, text_loss

Loss = Callable[[Any, Mapping[str, Any]], Tensor]
# Batches at most that the loss is measured on before and after, and one in how many; they are not trained on.
HELD_OUT, ONE_IN = 16, 10
# The highest learning rates of the adapters and, as published, of the gate scale.
RATE, GATE_RATE = 2e-3, 1e-3


@dataclass(frozen=True)
class TuneOptions:
    """What is trained and how, see `tune`."""

    rank: int = 8
    rate: float = RATE
    attention: bool = True
    gate_scale: bool = False
    balance: float = 0.0
    epochs: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            number = isinstance(value, (int, float)) and name in ("rate", "balance")
            if not number and type(value) is not type(getattr(TuneOptions, name)):
                raise MoefyError(f"The option {name} of a tuning cannot be {value!r}.")
        check_positive({"The rate": self.rate, "The number of epochs": self.epochs})
        if self.rank < 0 or not 0 <= self.balance < math.inf:
            raise MoefyError(f"The rank ({self.rank}) and the balance ({self.balance}) are 0 or more.")
        if not self.rank and not self.gate_scale:
            raise MoefyError("There is nothing to train: give a rank of 1 or more, or a gate scale.")


@dataclass(frozen=True)
class Tuned:
    """What a fine-tuning did: `step` of `steps`, on `tokens` tokens, training `trained` numbers.

    `loss` is "cross-entropy" or "distillation"; before and after in nats, means over held-out batches. `loss_after` is
    None until all steps are done.
    """

    options: TuneOptions
    loss: str
    step: int
    steps: int
    tokens: int
    trained: int
    data: str
    loss_before: float
    loss_after: float | None
    seconds: float

    @property
    def done(self) -> bool:
        return self.step >= self.steps

    def stored(self) -> dict[str, Any]:
        """What the checkpoint keeps: everything but the seconds."""
        return {name: value for name, value in asdict(self).items() if name != "seconds"}


@lookups_told("training data")
@torch.inference_mode(False)
def tune(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    *,
    teacher: Any = None,
    state: Path | None = None,
    seconds: float | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Tuned:
    """Fine-tune a converted model in place on model inputs, each batch a step, in an order drawn from the seed.

    The loss is the cross-entropy of the text (or to `labels`); with a `teacher`, the dense model, the divergence from
    its predictions. Options: `rank` of the adapters (0: none) and their highest `rate`; whether `attention`, the linear
    layers outside the FFNs, has any; `gate_scale`, a trained weight for each expert; `balance`, the step of the
    load-balancing bias, in standard deviations of the layer's scores (padding counts as load); `epochs`, `seed`. One
    batch in ten, 16 at most, is held out to measure on.

    `state` is a file to go on from, see `finetune`; with `seconds` it stops after that long. Until all steps are done
    the model stays what it was. Raises MoefyError if the model is not converted, there is nothing to train, peft is
    missing, or a loss or a weight is not finite.
    """
    begun, chosen, batches = time.monotonic(), TuneOptions(**options), check_batches(batches, "training data")
    _check(model, batches, chosen)
    # Counted from the end: a conversion is likely to have been calibrated on the beginning of the same text.
    held = spread(range(len(batches))[::-1], max(1, min(HELD_OUT, len(batches) // ONE_IN)))
    seen, held_out = [b for i, b in enumerate(batches) if i not in held], [batches[i] for i in held]
    loss: Loss = text_loss if teacher is None else partial(teacher_loss, teacher=teacher.eval())
    was_training = model.training
    try:
        before = _measured(model, held_out, loss)
        trained, count, after = _train(model, teacher, seen, held_out, loss, chosen, state, seconds, progress)
    finally:
        model.train(was_training)
    tuned = Tuned(
        options=chosen,
        loss="cross-entropy" if teacher is None else "distillation",
        step=trained.step,
        steps=trained.steps,
        tokens=sum(tokens_of(seen[i]) for i in _order(len(seen), chosen)[: trained.step]),
        trained=count,
        data=CalibrationInfo.of(seen).fingerprint,
        loss_before=before,
        loss_after=after,
        seconds=time.monotonic() - begun,
    )
    if tuned.done:
        _record(model, tuned)
    return tuned


def _check(model: Any, batches: Sequence[Mapping[str, Any]], options: TuneOptions) -> None:
    """MoefyError, before anything is changed, for what cannot be tuned."""
    if not getattr(model.config, "moefy", None) or not moe_layers(model):
        raise MoefyError(
            "This model has no experts that moefy made; convert it first (what is slim is ordinary: fine-tune it with "
            "transformers or peft)."
        )
    check_no_adapters(model)
    if len(batches) < 2:
        raise MoefyError("Fine-tuning takes at least two batches: one of them is held out; give more or smaller ones.")
    if (options.gate_scale or options.balance) and not Gates.possible(model):
        raise MoefyError("This model routes nothing, so it has no gate scale or balance to train.")


def _train(
    model: Any,
    teacher: Any,
    seen: Sequence[Mapping[str, Any]],
    held_out: Sequence[Mapping[str, Any]],
    loss: Loss,
    options: TuneOptions,
    state: Path | None,
    seconds: float | None,
    progress: Progress | None,
) -> tuple[Trained, int, float | None]:
    """Train, and leave the result in the model if all steps are done; how many numbers, and the loss then."""
    schedule = Schedule(len(seen) * options.epochs, 1, options.rate, weight_decay=0.0, seed=options.seed)
    order = _order(len(seen), options)
    identity = {**asdict(options), "data": CalibrationInfo.of(seen).fingerprint, "weights": fingerprint(model)}
    identity["teacher"] = None if teacher is None else fingerprint(teacher)
    torch.manual_seed(options.seed)  # the adapters' first values
    with ExitStack() as undo:
        adapters = Adapters(model, options.rank, options.attention)
        undo.callback(adapters.discard)
        gates = Gates(model, itertools.chain(held_out, seen), options.gate_scale, options.balance)
        undo.callback(gates.discard)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        trained = train(
            model,
            parameters,
            lambda step: loss(model, seen[order[step]]),
            schedule,
            identity=identity,
            scales={name: GATE_RATE / options.rate for name in parameters if name.endswith("router.scale")},
            kept=gates.kept,
            after=gates.after_step,
            state=state,
            seconds=seconds,
            progress=progress,
        )
        after = None
        if trained.done:
            after = _measured(model, held_out, loss)  # while all can still be undone
            undo.pop_all()
            gates.keep()
            adapters.merge()
            if any(p.dtype != torch.float32 for p in model.parameters()):  # which rounds what is merged
                after = _measured(model, held_out, loss)
    return trained, sum(p.numel() for p in parameters.values()), after


def _order(batches: int, options: TuneOptions) -> list[int]:
    """The batch of each step."""
    order: list[int] = []
    for epoch in range(options.epochs):
        one = list(range(batches))
        random.Random(options.seed * 1_000_003 + epoch).shuffle(one)
        order += one
    return order


@torch.no_grad()
def _measured(model: Any, batches: Sequence[Mapping[str, Any]], loss: Loss) -> float:
    """The mean loss of the batches, without dropout."""
    model.eval()
    mean = math.fsum(loss(model, batch).item() for batch in batches) / len(batches)
    if not math.isfinite(mean):
        raise MoefyError(
            f"The loss of this {type(model).__name__} on held-out batches is {mean}: its weights are broken, or the "
            f"batches have nothing to predict."
        )
    return mean


def _record(model: Any, tuned: Tuned) -> None:
    """Write what was done, and the layers as they are now, to the model's config."""
    record = model.config.moefy
    layers = {name: asdict(moe.spec) for name, moe in moe_layers(model).items()}
    model.config.moefy = {**record, "layers": layers, "tuned": [*record.get("tuned", []), tuned.stored()]}
