"""What a conversion has done so far, on disk: one that was cut off goes on, and memory does not add up over layers.

A forward pass over the same inputs through the same layers gives the same bits, so a layer that is read back from
here leaves all that come after it as they would have been. Tensors that come from here are mapped from their files:
the system can drop their pages and read them again, as with the weights that transformers has loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moefy.calibrate import CalibrationInfo, add_tensor
from moefy.errors import MoefyWarning
from moefy.files import parse_json, put_in_place
from moefy.moe import moe_layers
from moefy.version import __version__

Found = tuple[dict[str, Tensor], dict[str, Any]]


class Store:
    """Results by name, each tensors and a JSON object in a file in `folder`; without a folder nothing is kept.

    Keeping is not what anybody asked for, so it stops nothing: where it fails, that is said once, and what is put comes
    back as it came.
    """

    def __init__(self, folder: Path | None, failed: list[Exception] | None = None):
        self.folder = folder
        self._failed: list[Exception] = [] if failed is None else failed  # one for all stores below a root
        self._known: set[str] = set()  # to hold what was put there: once in a run it is looked at

    @classmethod
    def of(cls, root: str | os.PathLike[str] | None, model: Any, batches: Sequence[Mapping[str, Any]]) -> Store:
        """The store below `root` of what is made from this model and this calibration, by this moefy."""
        if root is None:
            return cls(None)
        return cls(Path(root)).below(
            {
                "weights": fingerprint(model),
                "config": model.config.to_json_string(),
                "calibration": CalibrationInfo.of(batches).fingerprint,
                "moefy": f"{__version__} 3",  # and the number of the format
            }
        )

    def below(self, identity: Mapping[str, Any]) -> Store:
        """The store of what depends on `identity` as well, which is anything that JSON can say."""
        if self.folder is None:
            return self
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode())
        return Store(self.folder / digest.hexdigest()[:16], self._failed)

    def holds(self, name: str) -> bool:
        return self.folder is not None and self._file(name).exists()

    def get(self, name: str) -> Found | None:
        """What was put under this name, mapped; None if nothing was, or if its file is damaged."""
        if not self.holds(name):
            return None
        try:
            with safe_open(self._file(name), framework="pt") as stored:
                known = stored.metadata() or {}
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
            if name not in self._known and known["digest"] != _seal(tensors, known["moefy"]):
                return None
            self._known.add(name)
            return tensors, parse_json(known["moefy"])
        except (SafetensorError, OSError, ValueError, KeyError):
            return None

    def put(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> Found:
        """Keep this, and give it back mapped; as it came without a folder, or if it cannot be written."""
        came = dict(tensors), dict(about or {})
        if self.folder is None or self._failed:
            return came
        file = self._file(name)
        partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            whole = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
            said = json.dumps(came[1])
            save_file(whole, partial, metadata={"moefy": said, "digest": _seal(whole, said)})
            put_in_place(partial, file)
            self._known.add(name)
        except (SafetensorError, OSError) as error:
            self._failed.append(error)
            why = getattr(error, "strerror", None) or error
            warnings.warn(
                f"moefy cannot keep more of what is done in {self.folder.parent} ({why}): stopped, it would start anew "
                f"from here on.",
                MoefyWarning,
                stacklevel=2,
            )
        finally:
            with suppress(OSError):
                partial.unlink()
        return self.get(name) or came  # another process may have cleared the folder away

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"


def _seal(tensors: Mapping[str, Tensor], about: str) -> str:
    """What shows that a file holds what was put there: a layer with a bit turned over would be used without a word."""
    return hashlib.sha256(f"{digest(tensors)} {about}".encode()).hexdigest()[:16]


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits that follow from the names, types and values of a model's parameters and buffers.

    Buffers too: the experts that DeepSeek-V3 chooses depend on one.
    """
    for moe in moe_layers(model).values():
        moe.unpack()  # a packed layer's parameters are empty
    return digest({**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if not b.is_meta}})


def digest(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits that follow from the names, types and values of tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        add_tensor(found, name, tensor)
    return found.hexdigest()[:16]
