"""One forward pass that stops at every FFN: the machinery under `convert`.

Each calibration batch runs the model in a greenlet of its own. Every site's `forward` is wrapped to park the
batch when it arrives there; when all batches are parked, the site's inputs are complete, the caller converts
the FFN, and the batches go on through the converted layer. So one pass over the model is enough, every
layer is calibrated on what it will really see, and no code knows how a model strings its layers together.

Parked batches keep their activations alive. Those beyond `hold_bytes` move to a temporary directory and
come back when their batch runs, so memory is bounded by the setting and not by the calibration length.
Greenlets rather than threads: one OpenMP pool, one autograd state, and the order of work is fixed.

Where it is asked for, every batch has a twin that goes through the dense FFNs only. What separates the two
when they park at an FFN is what the conversion of the layers before it has cost.
"""

from __future__ import annotations

import ctypes
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import greenlet
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moefy.calibrate import input_of, token_mask, without_cache
from moefy.conversion.residuals import first_tensor
from moefy.conversion.runs import count_runs
from moefy.errors import MoefyError
from moefy.sites import ExpertList, Site, token_rows

# Below this a tensor is not worth a file: norms, masks and rotary tables of a window.
SMALLEST_SPILLED = 1 << 18
# Tokens that an expert of a mixture must see. Not measured: with fewer a held-out part has a dozen.
EXPERT_TOKENS = 64


class _Batch:
    """One calibration batch: its greenlet, what it waits for, and the storages it keeps alive."""

    def __init__(self, number: int, run: Callable[[], object], runs: Mapping[str, int], dense: bool = False):
        self.number, self.runs, self.dense = number, runs, dense
        self.greenlet = greenlet.greenlet(run)
        self.waiting_at: str | None = None
        self.inputs: Tensor | None = None
        self.residual: Tensor | None = None
        self.output: Tensor | None = None
        self.earlier: dict[str, list[Tensor]] = {}
        self.rows: tuple[Tensor, int] | None = None
        self.held = 0
        self.storages: dict[int, weakref.ref] = {}
        self.spilled: list[tuple[torch.UntypedStorage, Path, int]] = []

    def live_storages(self, but: Set[int] = frozenset()) -> list[torch.UntypedStorage]:
        """The storages that this batch made and keeps alive, without those at the addresses in `but`.

        With nothing in `but` there may be weights among them, of which the batch made views.
        """
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


Rows = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class Arrival:
    """All batches at one site. `inputs()` iterates over their inputs and `targets()` over what brings the converted
    model's residual stream back to the dense one's: FFN(x') + r' - r with the twin's x' and r' (None without twins,
    and where no residual stream is known). One (tokens, D) tensor a batch, without padding, as often as is asked.
    Of the layer's `layer_tokens` an expert of a mixture gets `tokens`; every other FFN gets all. An FFN that layers
    share has each token's input to all of them, `runs` a token.
    """

    name: str
    inputs: Rows
    targets: Rows | None = None
    tokens: int = 0
    layer_tokens: int = 0
    runs: int = 1

    @property
    def suffices(self) -> bool:
        """Whether there is enough to convert it by; an expert that fewer tokens choose stays as it is."""
        return not self.layer_tokens or self.tokens >= EXPERT_TOKENS


@contextmanager
def _changed(changes: Sequence[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Modules with other attributes for the length of a with block; what a module itself had comes back."""
    own = [vars(module).get(name, _changed) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), before in zip(changes, own, strict=True):
            delattr(module, name) if before is _changed else setattr(module, name, before)


def in_one_piece(model: nn.Module) -> AbstractContextManager[None]:
    """For a with block: an FFN gets its input at once, not in chunks, of which only the first would arrive."""
    return _changed(
        [(m, "chunk_size_feed_forward", 0) for m in model.modules() if getattr(m, "chunk_size_feed_forward", 0)]
    )


class OnePass:
    """Iterate over the sites of `model`, as Arrivals, in the order in which the calibration batches reach them.

    A site's name is that of the module whose first input is the FFN's input. Before asking for the next
    site the caller replaces the module; the pass then goes on through the replacement. With
    `residuals`, the modules that `find_residuals` found, the batches have twins.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, Site],
        batches: Sequence[Mapping[str, Any]],
        keep: Callable[[str, Mapping[str, Any]], Tensor | None],
        hold_bytes: int = 1 << 30,
        residuals: Mapping[str, str] | None = None,
    ):
        self.model, self.sites, self.batches = model, dict(sites), list(batches)
        self.keep, self.hold_bytes, self.residuals = keep, hold_bytes, dict(residuals or {})
        self._track = _Track()

    def __iter__(self) -> Iterator[Arrival]:
        self._root = greenlet.getcurrent()
        self._done: set[str] = set()
        self._dense: dict[str, Callable[[Tensor], Tensor]] = {}
        todo = set(self.sites)
        running = self._running()
        entries = [(name, site.entry) for name, site in self.sites.items()]  # first: it takes layers of experts apart
        lists = [(m, "visit_all", True) for m in self.model.modules() if isinstance(m, ExpertList)]
        with spill_folder() as self._folder, torch.no_grad(), in_one_piece(self.model), _changed(lists):
            parking = {name: self._park_at(name, entry) for name, entry in entries}
            del entries
            hooks = [self._watch(site, self.model.get_submodule(name)) for site, name in self.residuals.items()]
            try:
                while todo:
                    for batch in running:
                        if batch.waiting_at is None and not batch.greenlet.dead:
                            self._resume(batch)
                            batch.held = sum(s.nbytes() for s in batch.live_storages())
                            self._spill(running)
                    parked = [b for b in running if b.waiting_at is not None]
                    if not parked:
                        break
                    site = str(parked[0].waiting_at)
                    here = [b for b in parked if b.waiting_at == site]
                    yield self._arrival(site, here)
                    todo.discard(site)
                    self._done.add(site)
                    parking.pop(site).close()  # or the dense weights would be held until the pass ends
                    for batch in here:
                        batch.waiting_at = batch.inputs = batch.residual = None  # a twin's output is still to come
                # What is left of the forward pass (the head and its logits) is of no use here.
            finally:
                for hook in hooks:
                    hook.remove()
                for stack in parking.values():
                    stack.close()
                for batch in running:
                    if not batch.greenlet.dead:
                        batch.greenlet.throw(greenlet.GreenletExit)
        if todo:
            first = ", ".join(sorted(todo)[:3])
            raise MoefyError(
                f"The calibration never reached {len(todo)} of the model's {len(self.sites)} FFNs ({first}); "
                f"give inputs that run the whole model (an encoder-decoder needs decoder_input_ids)."
            )

    def _running(self) -> list[_Batch]:
        """The batches, and where there are residuals their twins, at the start of the pass."""
        kinds = {frozenset(b): b for b in self.batches}  # those with the same inputs come by the same FFNs
        with in_one_piece(self.model):
            runs = {keys: count_runs(self.model, self.sites, self._runner(b)) for keys, b in kinds.items()}
        # What the layers before an FFN have lost is another thing for each layer that shares it.
        shared = {name for found in runs.values() for name, count in found.items() if count > 1}
        self.residuals = {name: stream for name, stream in self.residuals.items() if name not in shared}
        return [
            _Batch(i, self._runner(b), runs[frozenset(b)], dense)
            for dense in (False, True)[: 1 + bool(self.residuals)]
            for i, b in enumerate(self.batches)
        ]

    def _runner(self, batch: Mapping[str, Any]) -> Callable[[], object]:
        return lambda: self.model(**without_cache(self.model, batch))

    def _park_at(self, name: str, module: nn.Module) -> ExitStack:
        """Park the batches that come to a module until the stack is closed."""
        stack = ExitStack()
        stack.enter_context(_changed([(module, "forward", self._parking_forward(name, module))]))
        return stack

    def _parking_forward(self, name: str, module: nn.Module) -> Callable[..., Any]:
        dense_forward = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            batch = self._track.batch
            if batch is not None and name not in self._done:
                x, earlier = input_of(args, kwargs), batch.earlier.setdefault(name, [])
                if len(earlier) + 1 < batch.runs[name]:  # other layers that share it are still to come
                    earlier.append(x.reshape(-1, x.shape[-1]).clone())
                    return dense_forward(*args, **kwargs)
                batch.inputs = torch.cat([*earlier, x.reshape(-1, x.shape[-1])]) if earlier else x
                earlier.clear()
                batch.rows, batch.waiting_at = self._untracked(token_rows(self.model, name)), name
                self._root.switch()
            if batch is not None and batch.dense:
                output, batch.output = batch.output, None
                return self._dense[name](input_of(args, kwargs)) if output is None else output
            mounted = self.model.get_submodule(name)
            return dense_forward(*args, **kwargs) if mounted is module else mounted(*args, **kwargs)

        return forward

    def _untracked(self, rows: tuple[Tensor, int] | None) -> tuple[Tensor, int] | None:
        """A copy that is not spilled: it is read while the batch waits, wherever its activations are then."""
        if rows is None:
            return None
        batch, self._track.batch = self._track.batch, None
        copy, self._track.batch = rows[0].clone(), batch
        return copy, rows[1]

    def _resume(self, batch: _Batch) -> None:
        self._restore(batch)
        self._track.batch = batch
        try:
            with self._track:  # not around the caller's own work, which would pay for it at every operator
                batch.greenlet.switch()
        finally:
            self._track.batch = None

    def _watch(self, site: str, module: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._track.batch is not None and site not in self._done:
                self._track.batch.residual = first_tensor((*args, *kwargs.values()))

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    def _arrival(self, name: str, here: list[_Batch]) -> Arrival:
        batches, twins = [b for b in here if not b.dense], [b for b in here if b.dense]
        if twins:
            ffn = self.sites[name].read()  # before the caller replaces it; the twins of one site need no other
            self._dense = {name: lambda x: ffn.forward(x.reshape(-1, x.shape[-1])).view(x.shape)}
        known = twins and name in self.residuals
        self._spare = self.hold_bytes - sum(b.held for b in here if not b.spilled)
        inputs = partial(self._inputs, batches, name)
        targets = partial(self._targets, batches, twins, name) if known else None
        if all(batch.rows is None for batch in batches):
            return Arrival(name, inputs, targets, runs=max(batch.runs[name] for batch in batches))
        kept = [(self._kept(name, batch, 0), *batch.rows) for batch in batches if batch.rows is not None]
        tokens = sum(len(rows) if keep is None else int(keep[rows].sum()) for keep, rows, _ in kept)
        return Arrival(
            name, inputs, targets, tokens, sum(n if keep is None else int(keep.sum()) for keep, _, n in kept)
        )

    def _inputs(self, batches: list[_Batch], name: str) -> Iterator[Tensor]:
        for batch in batches:
            yield self._real(name, batch, batch.inputs)

    def _targets(self, batches: list[_Batch], twins: list[_Batch], name: str) -> Iterator[Tensor]:
        for batch, twin in zip(batches, twins, strict=True):
            assert twin.inputs is not None
            output = self._dense[name](_parked(twin, twin.inputs)) if twin.output is None else twin.output
            if self._spare >= output.nbytes and twin.output is None:  # or it is computed again
                twin.output, self._spare = output, self._spare - output.nbytes
            added = self._real(name, twin, output).float()
            lost = self._real(name, twin, twin.residual).float() - self._real(name, batch, batch.residual).float()
            yield added + lost

    def _real(self, name: str, batch: _Batch, tensor: Tensor | None) -> Tensor:
        """The rows (tokens, D) of real tokens of what a parked batch holds."""
        assert tensor is not None
        whole = _parked(batch, tensor)
        rows = whole.reshape(-1, whole.shape[-1])
        keep = self._kept(name, batch, len(rows))
        if keep is not None and batch.rows is not None:
            keep = keep[batch.rows[0]]
        return rows if keep is None else rows[keep.to(rows.device)]

    def _kept(self, name: str, batch: _Batch, tokens: int) -> Tensor | None:
        """The mask (tokens,) of a batch's real tokens, None if all of them are or the mask is of other tokens."""
        runs = max(1, batch.runs[name])
        one = token_mask(self.keep(name, self.batches[batch.number]), batch.rows[1] if batch.rows else tokens // runs)
        return one if one is None or runs == 1 else one.repeat(runs)

    def _spill(self, batches: list[_Batch]) -> None:
        """Move the activations of parked batches to disk, the longest parked first, until the rest fits."""
        parked = [b for b in batches if b.waiting_at is not None and not b.spilled]
        if sum(b.held for b in parked) <= self.hold_bytes:
            return
        # Walks all modules: 1.7 ms for SmolLM2, 18 for a mixture of 1,024 experts, and each of them is a stop.
        common = self._common_addresses()
        for batch in parked:
            batch.held = sum(s.nbytes() for s in batch.live_storages(common))
        held = sum(b.held for b in parked)
        for batch in parked:
            if held <= self.hold_bytes:
                return
            self._spill_one(batch, common)
            held -= batch.held

    def _common_addresses(self) -> set[int]:
        """Memory that batches share and that must stay: weights, buffers, tensors cached on modules, inputs."""
        held: list[object] = [v for m in self.model.modules() for v in vars(m).values()]
        held += [*self.model.parameters(), *self.model.buffers(), *(v for b in self.batches for v in b.values())]
        return {t.untyped_storage().data_ptr() for t in held if isinstance(t, Tensor)}

    def _spill_one(self, batch: _Batch, common: Set[int]) -> None:
        for i, storage in enumerate(batch.live_storages(common)):
            path = self._folder / f"{batch.number}{'-dense' * batch.dense}-{i}"
            size = storage.nbytes()
            try:
                path.write_bytes(_bytes_of(storage))
            except OSError as error:
                raise not_spilled(self._folder.parent, error) from None
            storage.resize_(0)
            batch.spilled.append((storage, path, size))

    def _restore(self, batch: _Batch) -> None:
        for storage, path, size in batch.spilled:
            storage.resize_(size)
            _read(path, storage)
            path.unlink()
        batch.spilled.clear()


@contextmanager
def spill_folder() -> Iterator[Path]:
    """A temporary directory for activations; MoefyError if there can be none."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="moefy-")
    except OSError as error:
        raise not_spilled(tempfile.tempdir or "a temporary directory", error) from None
    with folder as name:
        yield Path(name)


def not_spilled(folder: Path | str, error: Exception) -> MoefyError:
    """The sentence for activations that cannot be written below `folder`."""
    why = getattr(error, "strerror", None) or error
    return MoefyError(
        f"Activations that wait for their turn cannot be written to {folder} ({why}); set TMPDIR to a disk with room, "
        f"or give more --memory."
    )


def _parked(batch: _Batch, tensor: Tensor) -> Tensor:
    """A tensor of a parked batch; a copy read from disk if it is there."""
    storage = tensor.untyped_storage()
    for spilled, path, size in batch.spilled:
        if spilled._cdata == storage._cdata:
            copy = torch.UntypedStorage(size)
            _read(path, copy)
            view = (tensor.storage_offset(), tensor.shape, tensor.stride())
            return torch.empty(0, dtype=tensor.dtype).set_(copy, *view)
    return tensor


def _read(path: Path, storage: torch.UntypedStorage) -> None:
    with path.open("rb") as file:
        file.readinto(_bytes_of(storage))


def _bytes_of(storage: torch.UntypedStorage) -> memoryview:
    """The storage's memory itself. Not through numpy: a numpy view would pin the storage at its size."""
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
