"""One forward pass that stops at every FFN: the machinery under `convert`.

Each calibration batch runs the model in a greenlet of its own. Every site's `forward` is wrapped to park the
batch when it arrives there; when all batches are parked, the site's inputs are complete, the caller converts
the FFN, and the batches go on through the converted layer. So one pass over the model is enough, every
layer is calibrated on what it will really see, and no code knows how a model strings its layers together.

Parked batches keep their activations alive. Those beyond `hold_bytes` move to a temporary directory and
come back when their batch runs, so memory is bounded by the setting and not by the calibration length.
Greenlets rather than threads: one OpenMP pool, one autograd state, and the order of work is fixed.
"""

from __future__ import annotations

import ctypes
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any

import greenlet
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moefy.types import MoefyError

# Below this a tensor is not worth a file: norms, masks and rotary tables of a window.
SMALLEST_SPILLED = 1 << 18


class _Batch:
    """One calibration batch: its greenlet, what it waits for, and the storages it keeps alive."""

    def __init__(self, number: int, run: Callable[[], object]):
        self.number = number
        self.greenlet = greenlet.greenlet(run)
        self.waiting_at: str | None = None
        self.inputs: Tensor | None = None
        self.storages: dict[int, weakref.ref] = {}
        self.spilled: list[tuple[torch.UntypedStorage, Path, int]] = []

    def live_storages(self, but: Set[int]) -> list[torch.UntypedStorage]:
        """The storages that this batch made and keeps alive, without those at the addresses in `but`."""
        self.storages = {key: ref for key, ref in self.storages.items() if ref() is not None}
        tensors = [t for t in (ref() for ref in self.storages.values()) if t is not None]
        found = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
        return [s for s in found.values() if s.nbytes() >= SMALLEST_SPILLED and s.data_ptr() not in but]


class _Track(TorchDispatchMode):
    """Remember, weakly, every large tensor that the running batch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.batch: _Batch | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.batch is not None:
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, Tensor) and t.device.type == "cpu" and t.nbytes >= SMALLEST_SPILLED:
                    self.batch.storages[id(t)] = weakref.ref(t)
        return out


class OnePass:
    """Iterate over the sites of `model` in the order in which the calibration batches reach them.

    `sites` maps a name to the module whose first input is the FFN's input. Iteration yields
    (name, inputs); `inputs()` iterates over that site's inputs, one (tokens, D) tensor a batch with
    padding rows removed, as often as the caller likes. Before asking for the next site the caller
    replaces the module; the pass then goes on through the replacement.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, nn.Module],
        batches: Sequence[Mapping[str, Any]],
        keep: Callable[[str, Mapping[str, Any]], Tensor | None],
        hold_bytes: int = 1 << 30,
    ):
        self.model, self.sites, self.batches = model, dict(sites), list(batches)
        self.keep, self.hold_bytes = keep, hold_bytes
        self._track = _Track()

    def __iter__(self) -> Iterator[tuple[str, Callable[[], Iterator[Tensor]]]]:
        self._root = greenlet.getcurrent()
        self._done: set[str] = set()
        todo = set(self.sites)
        running = [_Batch(i, self._runner(b)) for i, b in enumerate(self.batches)]
        for name, module in self.sites.items():
            module.forward = self._parking_forward(name, module)
        with tempfile.TemporaryDirectory(prefix="moefy-") as folder, torch.no_grad():
            self._folder = Path(folder)
            try:
                while todo:
                    for batch in running:
                        if batch.waiting_at is None and not batch.greenlet.dead:
                            self._resume(batch)
                            self._spill(running)
                    parked = [b for b in running if b.waiting_at is not None]
                    if not parked:
                        break
                    site = str(parked[0].waiting_at)
                    here = [b for b in parked if b.waiting_at == site]
                    yield site, partial(self._inputs, here, site)
                    todo.discard(site)
                    self._done.add(site)
                    for batch in here:
                        batch.waiting_at = batch.inputs = None
                # What is left of the forward pass (the head and its logits) is of no use here.
            finally:
                for module in self.sites.values():
                    del module.forward  # the class's own again
                for batch in running:
                    if not batch.greenlet.dead:
                        batch.greenlet.throw(greenlet.GreenletExit)
        if todo:
            first = ", ".join(sorted(todo)[:3])
            raise MoefyError(
                f"The calibration never reached {len(todo)} of the model's {len(self.sites)} FFNs ({first}); "
                f"give inputs that run the whole model (an encoder-decoder needs decoder_input_ids)."
            )

    def _runner(self, batch: Mapping[str, Any]) -> Callable[[], object]:
        return lambda: self.model(**batch)

    def _parking_forward(self, name: str, module: nn.Module) -> Callable[..., Any]:
        dense_forward = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            batch = self._track.batch
            if batch is not None and name not in self._done:
                batch.inputs = args[0] if args else kwargs["hidden_states"]
                batch.waiting_at = name
                self._root.switch()
            mounted = self.model.get_submodule(name)
            return dense_forward(*args, **kwargs) if mounted is module else mounted(*args, **kwargs)

        return forward

    def _resume(self, batch: _Batch) -> None:
        self._restore(batch)
        self._track.batch = batch
        try:
            with self._track:  # not around the caller's own work, which would pay for it at every operator
                batch.greenlet.switch()
        finally:
            self._track.batch = None

    def _inputs(self, batches: list[_Batch], name: str) -> Iterator[Tensor]:
        for batch in batches:
            inputs = self._parked_inputs(batch)
            rows = inputs.reshape(-1, inputs.shape[-1])
            keep = self.keep(name, self.batches[batch.number])
            if keep is not None and keep.numel() == len(rows):
                rows = rows[keep.reshape(-1).to(rows.device).bool()]
            yield rows

    def _parked_inputs(self, batch: _Batch) -> Tensor:
        """The inputs that a parked batch waits with; a copy read from disk if they are there."""
        inputs = batch.inputs
        assert inputs is not None
        storage = inputs.untyped_storage()
        for spilled, path, size in batch.spilled:
            if spilled._cdata == storage._cdata:
                copy = torch.UntypedStorage(size)
                _read(path, copy)
                view = (inputs.storage_offset(), inputs.shape, inputs.stride())
                return torch.empty(0, dtype=inputs.dtype).set_(copy, *view)
        return inputs

    def _spill(self, batches: list[_Batch]) -> None:
        """Move the activations of parked batches to disk, the longest parked first, until the rest fits."""
        parked = [b for b in batches if b.waiting_at is not None and not b.spilled]
        common = self._common_addresses()
        sizes = {b.number: sum(s.nbytes() for s in b.live_storages(common)) for b in parked}
        for batch in parked:
            if sum(sizes.values()) <= self.hold_bytes:
                return
            self._spill_one(batch)
            del sizes[batch.number]

    def _common_addresses(self) -> set[int]:
        """Memory that batches share and that must stay: weights, buffers, tensors cached on modules, inputs."""
        held: list[object] = [v for m in self.model.modules() for v in vars(m).values()]
        held += [*self.model.parameters(), *self.model.buffers(), *(v for b in self.batches for v in b.values())]
        return {t.untyped_storage().data_ptr() for t in held if isinstance(t, Tensor)}

    def _spill_one(self, batch: _Batch) -> None:
        for i, storage in enumerate(batch.live_storages(self._common_addresses())):
            path = self._folder / f"{batch.number}-{i}"
            size = storage.nbytes()
            path.write_bytes(_bytes_of(storage))
            storage.resize_(0)
            batch.spilled.append((storage, path, size))

    def _restore(self, batch: _Batch) -> None:
        for storage, path, size in batch.spilled:
            storage.resize_(size)
            _read(path, storage)
            path.unlink()
        batch.spilled.clear()


def _read(path: Path, storage: torch.UntypedStorage) -> None:
    with path.open("rb") as file:
        file.readinto(_bytes_of(storage))


def _bytes_of(storage: torch.UntypedStorage) -> memoryview:
    """The storage's memory itself. Not through numpy: a numpy view would pin the storage at its size."""
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
