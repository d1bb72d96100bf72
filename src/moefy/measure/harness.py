"""EleutherAI's lm-evaluation-harness on a moefy model, or any dense one: an extra, `pip install '.[tasks]'`.

The harness's own Hugging Face adapter is given the loaded model, so every kind of task that it has works. With
task files and data on disk (`include`) it needs no network.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moefy.errors import MoefyError
from moefy.heads import head_of


def check_installed() -> None:
    """MoefyError if the harness is not there."""
    try:
        import lm_eval.models.huggingface  # noqa: F401 - whether it is there, with what it needs
    except ImportError:
        raise MoefyError("lm-evaluation-harness is not installed: pip install lm-eval datasets.") from None


def run(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
    """The harness's figures by task, for the tasks it ships or those in the folder `include`.

    Raises MoefyError if the harness is not installed, the model writes no text, or the harness does not know a
    task or cannot read its data.
    """
    if head_of(model) not in ("causal", "seq2seq"):
        raise MoefyError(f"lm-evaluation-harness needs a language model; this is a {type(model).__name__}.")
    check_installed()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if tokenizer is None:
        raise MoefyError("This model has no tokenizer, so a task's text cannot be fed to it.")
    if include is not None and not Path(include).is_dir():
        raise MoefyError(f"There is no folder {os.fspath(include)!r} with task files.")
    manager = TaskManager(include_path=None if include is None else os.fspath(include))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise MoefyError(f"lm-evaluation-harness knows no task {', '.join(map(repr, unknown))}; see lm_eval ls tasks.")
    kind = "seq2seq" if model.config.is_encoder_decoder else "causal"
    adapter = HFLM(pretrained=model, tokenizer=tokenizer, backend=kind, batch_size=batch_size)
    try:
        found = simple_evaluate(
            adapter, tasks=list(tasks), task_manager=manager, limit=limit, num_fewshot=shots, bootstrap_iters=0
        )
    except MoefyError:
        raise
    except Exception as error:  # a task file is a program: Jinja, metrics by name, data of any kind
        why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '').rstrip('.')}"
        raise MoefyError(f"lm-evaluation-harness cannot run {', '.join(tasks)} ({why}).") from None
    return {
        task: {k: v for k, v in values.items() if isinstance(v, float)} for task, values in found["results"].items()
    }
