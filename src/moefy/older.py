"""What engines on transformers 4 read in a saved directory, beside what transformers 5 writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def say_for_older(folder: Path) -> None:
    """Repeat rotary positions as transformers 4 reads them, which would rotate by 10,000 without, and name the class of
    a plain fast tokenizer as it is called there (transformers 5 knows that name too)."""
    _change(folder / "config.json", _repeat_rope)
    _change(folder / "tokenizer_config.json", _name_tokenizer)


def _change(file: Path, change: Any) -> None:
    if file.is_file():
        entries = json.loads(file.read_text(encoding="utf-8"))
        change(entries)
        file.write_text(json.dumps(entries, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _repeat_rope(config: dict[str, Any]) -> None:
    for part in (config, config.get("text_config")):
        rope = part.get("rope_parameters") if isinstance(part, dict) else None
        if part is None or not isinstance(rope, dict) or not isinstance(rope.get("rope_theta"), (int, float)):
            continue  # a rope for each kind of layer: transformers 4 had names for those by architecture
        apart = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        part.update(apart)
        if rope.get("rope_type", "default") != "default":
            part["rope_scaling"] = {name: value for name, value in rope.items() if name not in apart}


def _name_tokenizer(config: dict[str, Any]) -> None:
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
