"""A stock model as a directory of transformers: what vLLM and SGLang serve too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moefy.checkpoint import mend_generation, written
from moefy.export.base import Exporter
from moefy.older import say_for_older
from moefy.quiet import quiet_transformers

_CARD = """---
library_name: transformers
tags:
- mixture-of-experts
- moefy
---

# {architecture}: a dense model as a mixture of experts

A dense language model whose feed-forward networks were converted to mixtures of experts by moefy, written as
{architecture}: {shared} shared and {active} of {experts} routed experts of {size} neurons run for a token. It needs no
moefy to run; its routers' weights have to stay in float32.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
```
"""


def write(made: PreTrainedModel, out: Path, tokenizer: Any, *, progress: Any = None) -> None:
    """Write safetensors shards, config, tokenizer and a card; transformers shows how far it is."""
    config = made.config
    mend_generation(made)
    with written(out) as folder, quiet_transformers():
        made.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        say_for_older(folder)
        card = _CARD.format(
            architecture=type(made).__name__,
            shared=config.n_shared_experts,
            active=config.num_experts_per_tok,
            experts=config.n_routed_experts,
            size=config.moe_intermediate_size,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")


EXPORTER = Exporter(write)
