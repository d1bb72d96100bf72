"""A small training loop on the CPU: length-bucketed batches, AdamW, and a state on disk to go on from.

A step's batch and dropout follow from the seed and the step's number alone, so a run that was cut off ends
with the weights of one that was not.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moefy.tasks.base import collate
from moefy.types import MoefyError

Progress = Callable[[int, int], None]
# Batches among whose examples those of like length are put together: 5 % of SST-2's tokens are then padding.
BUCKET = 50


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: `examples` are seen in all; the rate rises over `warmup` and then falls to 0.

    With `relative` the rate counts in root mean squares of each parameter as it starts (Adafactor's way, which
    T5's initialisation is made for: its embeddings start at 1 and its queries at 0.02).
    """

    examples: int
    batch_size: int = 32
    rate: float = 1e-4
    warmup: float = 0.06
    weight_decay: float = 0.01
    seed: int = 0
    relative: bool = False

    @property
    def steps(self) -> int:
        return max(1, self.examples // self.batch_size)

    def rate_at(self, step: int) -> float:
        done, warm = step / self.steps, max(self.warmup, 1e-9)
        return self.rate * min((done + 1 / self.steps) / warm, (1 - done) / (1 - self.warmup))


@dataclass(frozen=True)
class Trained:
    """`step` of `steps` done; `loss` is the mean of this run's last hundred steps (None if it made none)."""

    step: int
    steps: int
    loss: float | None

    @property
    def done(self) -> bool:
        return self.step >= self.steps


def finetune(
    model: nn.Module,
    features: Sequence[dict[str, Any]],
    pad: int,
    schedule: Schedule,
    *,
    state: Path,
    save_every: float = 60.0,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train `model` in place on features (see `Task.encode`); its own loss decides.

    `state` is a file: if it is there training goes on from it, and it is rewritten every `save_every` seconds
    and at the end. With `seconds`, stop after that long; call again to go on. Raises MoefyError if the state
    belongs to another model or schedule, or the loss is not finite.
    """
    if not features:
        raise MoefyError("There is nothing to train on; give data with some examples.")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [{"params": [p], "scale": _size(p) if schedule.relative else 1.0} for p in trained.values()]
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=schedule.weight_decay, fused=True)
    step = _restore(state, trained, optimizer, schedule, len(features))
    start = saved = time.monotonic()
    losses: list[float] = []
    model.train()
    order: list[list[int]] = []
    per_epoch = -(-len(features) // schedule.batch_size)
    while step < schedule.steps and (seconds is None or time.monotonic() - start < seconds):
        epoch, place = divmod(step, per_epoch)
        if place == 0 or not order:
            order = _epoch(features, schedule, epoch)
        batch = collate([features[i] for i in order[place]], pad)
        losses.append(_step(model, trained, optimizer, batch, schedule, step))
        step += 1
        if progress:
            progress(step, schedule.steps)
        if time.monotonic() - saved > save_every:
            _save(state, trained, optimizer, schedule, len(features), step)
            saved = time.monotonic()
    if losses:
        _save(state, trained, optimizer, schedule, len(features), step)
    model.eval()
    last = losses[-100:]
    return Trained(step, schedule.steps, sum(last) / len(last) if last else None)


def _step(
    model: nn.Module,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    schedule: Schedule,
    step: int,
) -> float:
    torch.manual_seed(schedule.seed * 1_000_003 + step)  # dropout
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate_at(step) * group["scale"]
    with torch.enable_grad():
        loss = model(**batch).loss
        value = float(loss.detach())
        if value != value or value in (float("inf"), -float("inf")):
            raise MoefyError(f"The loss is not finite at step {step + 1}; use a lower learning rate.")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
    nn.utils.clip_grad_norm_(trained.values(), 1.0)
    optimizer.step()
    return value


def _size(parameter: Tensor) -> float:
    """The root mean square, at least 1e-3 so that what starts at 0 can move."""
    return max(1e-3, float(parameter.detach().square().mean().sqrt()))


def _epoch(features: Sequence[dict[str, Any]], schedule: Schedule, epoch: int) -> list[list[int]]:
    """The epoch's batches of indices: shuffled, those of like length together."""
    generator = random.Random(schedule.seed * 1_000_003 + epoch)
    order = list(range(len(features)))
    generator.shuffle(order)
    size, batches = schedule.batch_size, []
    for start in range(0, len(order), size * BUCKET):
        near = sorted(order[start : start + size * BUCKET], key=lambda i: _length(features[i]))
        batches += [near[i : i + size] for i in range(0, len(near), size)]
    generator.shuffle(batches)
    return batches


def _length(feature: dict[str, Any]) -> int:
    labels = feature.get("labels")
    return len(feature["input_ids"]) + (len(labels) if isinstance(labels, list) else 0)


def _identity(schedule: Schedule, examples: int) -> dict[str, Any]:
    return {**vars(schedule), "features": examples}


def _save(
    state: Path,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    examples: int,
    step: int,
) -> None:
    tensors = {f"weight.{name}": p.detach().contiguous() for name, p in trained.items()}
    for name, p in trained.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in optimizer.state[p]:
                tensors[f"{moment}.{name}"] = optimizer.state[p][moment]
    metadata = {"moefy": json.dumps({"step": step, **_identity(schedule, examples)})}
    state.parent.mkdir(parents=True, exist_ok=True)
    partial = state.with_name(f".{state.name}.partial")
    save_file(tensors, partial, metadata=metadata)
    os.replace(partial, state)


def _restore(
    state: Path,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    examples: int,
) -> int:
    """Load the state, if there is one, and return the step that it had come to."""
    if not state.exists():
        return 0
    try:
        with safe_open(state, framework="pt") as stored:
            known = json.loads((stored.metadata() or {}).get("moefy", "{}"))
            step = known.pop("step", None)
            if known != _identity(schedule, examples) or not _fits(stored, trained):
                raise MoefyError(f"{state} is the state of another training; remove it to start anew.")
            with torch.no_grad():
                for name, p in trained.items():
                    p.copy_(stored.get_tensor(f"weight.{name}"))
                    if f"exp_avg.{name}" in stored.keys():  # noqa: SIM118 - no mapping
                        moments = {m: stored.get_tensor(f"{m}.{name}") for m in ("exp_avg", "exp_avg_sq")}
                        optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
    except (SafetensorError, OSError) as error:
        raise MoefyError(f"The training state {state} cannot be read ({error}); remove it to start anew.") from None
    return int(step)


def _fits(stored: Any, trained: dict[str, nn.Parameter]) -> bool:
    names = {key.removeprefix("weight.") for key in stored.keys() if key.startswith("weight.")}  # noqa: SIM118
    return names == set(trained) and all(
        stored.get_slice(f"weight.{name}").get_shape() == list(p.shape) for name, p in trained.items()
    )
