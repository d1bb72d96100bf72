"""A small training loop on the CPU: AdamW, a falling rate, and a state on disk to go on from.

`train` takes any loss; `finetune` is it on a task's features, in length-bucketed batches, with the model's own loss.

A step's batch and dropout follow from the seed and the step's number alone, so a run that was cut off ends
with the weights of one that was not. The state names what it started from, so no other training goes on from it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moefy.conversion.resume import fingerprint
from moefy.errors import MoefyError
from moefy.files import claimed_folder, parse_json, put_in_place
from moefy.tasks.base import by_answers, collate, longest_of

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

    def __post_init__(self) -> None:
        check_positive({"The batch size": self.batch_size, "The rate": self.rate})

    @property
    def steps(self) -> int:
        return max(1, self.examples // self.batch_size)

    def rate_at(self, step: int) -> float:
        done, warm = step / self.steps, max(self.warmup, 1e-9)
        return self.rate * min(1.0, (done + 1 / self.steps) / warm, (1 - done) / max(1 - self.warmup, 1e-9))


@dataclass(frozen=True)
class Trained:
    """`step` of `steps` done; `loss` is the mean of this run's last hundred steps (None if it made none)."""

    step: int
    steps: int
    loss: float | None

    @property
    def done(self) -> bool:
        return self.step >= self.steps


def check_positive(numbers: Mapping[str, float | None]) -> None:
    """MoefyError for the first of the named numbers that is not above 0 and finite; None passes."""
    for name, value in numbers.items():
        if value is not None and not 0 < value < 1e9:
            raise MoefyError(f"{name} must be above 0 and below a billion; {value} is not.")


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

    `state` is a file: if it is there training goes on from it, and it is rewritten every `save_every` seconds,
    at the end and on Ctrl-C. With `seconds`, stop after that long, and at least one step; call again to go on. Raises
    MoefyError if the state belongs to another start (model, data or schedule) or cannot be written, or if the loss or
    a weight is not finite; the state is then what it was before.
    """
    if not features:
        raise MoefyError("There is nothing to train on; give data with some examples.")
    per_epoch = sum(-(-len(alike) // schedule.batch_size) for alike in by_answers(features))

    @lru_cache(maxsize=1)
    def order(epoch: int) -> list[list[int]]:
        return _epoch(features, schedule, epoch)

    def loss(step: int) -> Tensor:
        epoch, place = divmod(step, per_epoch)
        return model(**collate([features[i] for i in order(epoch)[place]], pad)).loss

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    scales = {name: _size(p) for name, p in trained.items()} if schedule.relative else {}
    start = {"features": len(features), "weights": fingerprint(model), "data": _fingerprint_of(features)}
    return train(
        model,
        trained,
        loss,
        schedule,
        identity=start,
        scales=scales,
        state=state,
        save_every=save_every,
        seconds=seconds,
        progress=progress,
    )


def train(
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    loss: Callable[[int], Tensor],
    schedule: Schedule,
    *,
    identity: Mapping[str, Any],
    scales: Mapping[str, float] | None = None,
    kept: Mapping[str, Tensor] | None = None,
    after: Callable[[], None] | None = None,
    state: Path | None = None,
    save_every: float = 60.0,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train parameters of `model` in place on `loss(step)`, a scalar that follows from the step's number alone.

    `scales` multiply the schedule's rate for some parameters. `after` is called after each step; what it changes, the
    tensors in `kept`, is a part of the state. `identity` says what the training starts from, as JSON. Without a
    `state` nothing is stored. Otherwise as `finetune`.
    """
    check_positive({"The number of seconds": seconds})
    groups = [{"params": [p], "scale": (scales or {}).get(name, 1.0)} for name, p in trained.items()]
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=schedule.weight_decay, fused=True)
    run = _Run(state, dict(trained), optimizer, {**vars(schedule), **identity}, dict(kept or {}))
    losses: list[float] = []
    with run.claimed():
        begun = run.restore()
        start = saved = time.monotonic()
        model.train()
        try:
            while run.step < schedule.steps:
                losses.append(_step(loss, run, schedule, after))
                if progress:
                    progress(run.step, schedule.steps)
                if time.monotonic() - saved > save_every:
                    run.save()
                    saved = time.monotonic()
                if seconds is not None and time.monotonic() - start >= seconds:
                    break
        except KeyboardInterrupt:
            if run.step > begun:
                run.save()
            raise
        if run.step > begun:
            run.save()
        model.eval()
    last = losses[-100:]
    return Trained(run.step, schedule.steps, sum(last) / len(last) if last else None)


def _step(loss_at: Callable[[int], Tensor], run: _Run, schedule: Schedule, after: Callable[[], None] | None) -> float:
    torch.manual_seed((schedule.seed * 1_000_003 + run.step) % 2**63)  # dropout
    for group in run.optimizer.param_groups:
        group["lr"] = schedule.rate_at(run.step) * group["scale"]
    with torch.enable_grad():
        loss = loss_at(run.step)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise MoefyError(f"The loss is not finite at step {run.step + 1}; use a lower learning rate.")
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()
    nn.utils.clip_grad_norm_(run.trained.values(), 1.0)
    with _uninterrupted():  # half a step could not be gone on from
        run.optimizer.step()
        if after:
            after()
        run.step += 1
    return value


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """What stops a command (Ctrl-C, SIGTERM, a closed terminal) comes after the block."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals do not come here
        return
    caught: list[int] = []
    before = {n: signal.signal(n, lambda number, _: caught.append(number)) for n in _STOPS}
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, signal.SIG_DFL if handler is None else handler)
    if caught:
        signal.raise_signal(caught[0])


def _size(parameter: Tensor) -> float:
    """The root mean square, at least 1e-3 so that what starts at 0 can move."""
    return max(1e-3, float(parameter.detach().square().mean().sqrt()))


def _epoch(features: Sequence[dict[str, Any]], schedule: Schedule, epoch: int) -> list[list[int]]:
    """The epoch's batches of indices: shuffled, those of like length together."""
    generator = random.Random(schedule.seed * 1_000_003 + epoch)
    size, batches = schedule.batch_size, []
    for order in by_answers(features):
        generator.shuffle(order)
        for start in range(0, len(order), size * BUCKET):
            near = sorted(order[start : start + size * BUCKET], key=lambda i: _length(features[i]))
            batches += [near[i : i + size] for i in range(0, len(near), size)]
    generator.shuffle(batches)
    return batches


def _length(feature: dict[str, Any]) -> int:
    labels = feature.get("labels")
    return longest_of(feature) + (len(labels) if isinstance(labels, list) else 0)


def _fingerprint_of(features: Sequence[dict[str, Any]]) -> str:
    data = hashlib.sha256()
    for feature in features:
        data.update(json.dumps(feature, sort_keys=True).encode())
    return data.hexdigest()[:16]


@dataclass
class _Run:
    """A training on its way: `step` steps of it are in the weights, and `state` is the file to keep it in.

    `kept` are the tensors beside the weights that steps change.
    """

    state: Path | None
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    identity: dict[str, Any]
    kept: dict[str, Tensor]
    step: int = 0

    def save(self) -> None:
        """Write the state: beside its place first, then renamed into it."""
        tensors = {f"weight.{name}": p.detach().contiguous() for name, p in self.trained.items()}
        if not all(bool(weight.isfinite().all()) for weight in tensors.values()):
            raise MoefyError(f"A weight is not finite after step {self.step}; use a lower learning rate.")
        if self.state is None:
            return
        tensors |= {f"kept.{name}": tensor.contiguous() for name, tensor in self.kept.items()}
        for name, p in self.trained.items():
            for moment in _MOMENTS:
                if moment in self.optimizer.state[p]:
                    tensors[f"{moment}.{name}"] = self.optimizer.state[p][moment]
        metadata = {"moefy": json.dumps({"step": self.step, **self.identity})}
        with self._beside(self.state) as partial:
            save_file(tensors, partial, metadata=metadata)
            put_in_place(partial, self.state)

    @contextmanager
    def _beside(self, state: Path) -> Iterator[Path]:
        """Where to write before it is renamed to `state`; MoefyError if that cannot be written."""
        partial = state.with_name(f".{state.name}.partial")
        try:
            state.parent.mkdir(parents=True, exist_ok=True)
            yield partial
        except (SafetensorError, OSError) as error:
            kept = "; the one before it is kept" if os.path.exists(state) else ""
            raise MoefyError(
                f"The training state {state} cannot be written ({error}){kept}. Repeat the command when it can."
            ) from None
        finally:
            with suppress(OSError):
                partial.unlink()

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """The state for this process alone; MoefyError, before hours of training and not after them, if another one has
        it or if it cannot be written."""
        if self.state is None:
            yield
            return
        lock = self.state.with_name(f".{self.state.name}.lock")
        with claimed_folder(lock, f"Another process keeps its training in {self.state}"):
            with self._beside(self.state) as partial:
                partial.touch()
            yield

    def restore(self) -> int:
        """Load the state, if there is one, and return the step that it had come to."""
        if self.state is None or not self.state.exists():
            return 0
        try:
            with safe_open(self.state, framework="pt") as stored:
                known = parse_json((stored.metadata() or {}).get("moefy", "{}"))
                step = known.pop("step", None)
                if known != self.identity or not _fits(stored, self.trained):
                    raise MoefyError(
                        f"{self.state} is the state of another training (its model, data or schedule differ); "
                        f"repeat that one's command, or remove the file to start anew."
                    )
                self._load(stored, int(step))
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
            raise MoefyError(
                f"The training state {self.state} cannot be read ({error}); remove it to start anew."
            ) from None
        return self.step

    @torch.no_grad()
    def _load(self, stored: Any, step: int) -> None:
        names = set(stored.keys())
        for name, p in self.trained.items():
            p.copy_(stored.get_tensor(f"weight.{name}"))
            if f"exp_avg.{name}" in names:
                self.optimizer.state[p] = {m: stored.get_tensor(f"{m}.{name}") for m in _MOMENTS}
        for name, tensor in self.kept.items():
            tensor.copy_(stored.get_tensor(f"kept.{name}"))
        self.step = step


# What AdamW keeps of a parameter. Its own count of steps too: an expert that no token chose has no gradient in a step.
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the command heeds the same
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def _fits(stored: Any, trained: dict[str, nn.Parameter]) -> bool:
    names = {key.removeprefix("weight.") for key in stored.keys() if key.startswith("weight.")}  # noqa: SIM118
    return names == set(trained) and all(
        stored.get_slice(f"weight.{name}").get_shape() == list(p.shape) for name, p in trained.items()
    )
