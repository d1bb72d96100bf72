"""ReLU-fication: swap the activation of a model's FFNs for ReLU and fine-tune it shortly.

MoEfication's own step for BERT (arXiv 2110.01786, section 4.1), and how ReluLLaMA and ReluFalcon came about
(arXiv 2310.04564): with ReLU most neurons are exactly 0 for a token, which is what experts live on.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_MASKED_LM_MAPPING

from moefy.calibrate import check_ids
from moefy.checkpoint import check_output, mend_generation, written
from moefy.convert import check_dense
from moefy.errors import MoefyError
from moefy.heads import head_of
from moefy.older import say_for_older
from moefy.quiet import quiet_transformers
from moefy.sites import find_sites
from moefy.sources.models import LOAD_ERRORS, load_source, local_path, reason
from moefy.tasks import named, task_examples
from moefy.tasks.base import Task, pad_id, padding, refuse_head, sequences_of
from moefy.tuning.finetune import Progress, Schedule, Trained, check_positive, finetune


def with_relu(model: Any) -> Any:
    """The same model with ReLU in its FFNs: a new model with copies of the same weights."""
    sites, config = find_sites(model), copy.deepcopy(model.config)
    for attribute in {site.family.activation for site in sites}:
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            if hasattr(part, attribute):
                setattr(part, attribute, "relu")
    if hasattr(config, "feed_forward_proj"):  # T5 derives the activation from this when it is loaded
        gated = config.feed_forward_proj.startswith("gated")
        config.feed_forward_proj = "gated-relu" if gated else "relu"
        config.dense_act_fn = "relu"
    with quiet_transformers():
        swapped = type(model)(config).to(next(model.parameters()).dtype)
    # Not strict: a learned activation (prelu) is gone with its parameters.
    swapped.load_state_dict(model.state_dict(), strict=False)
    swapped.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        swapped.generation_config = copy.deepcopy(model.generation_config)
    if any(site.activation != "relu" for site in find_sites(swapped)):
        raise MoefyError(f"The activation of this {type(model).__name__} cannot be set to relu.")
    return swapped.eval()


def load_for_task(source: str | os.PathLike[str], task: Task, *, remote_code: bool = False) -> tuple[Any, Any]:
    """A dense model ready to be trained on a task, in float32, and its tokenizer.

    A model without the task's head gets a fresh one. Raises MoefyError if a head that it has does not fit, or the
    model is converted already.
    """
    model, tokenizer = load_source(source, dtype="float32", remote_code=remote_code)
    check_dense(model)
    if tokenizer is None:
        raise MoefyError(f"{os.fspath(source)} has no tokenizer, so it cannot be trained on text.")
    try:
        task.check(model)
        return model, tokenizer
    except MoefyError:
        # A bare encoder or another kind of head can be given this one; one of another size is a mistake.
        if head_of(model) in ("classification", "qa", "choice"):
            raise
    torch.manual_seed(0)
    place = local_path(source) if local_path(source).exists() else os.fspath(source)
    with quiet_transformers():
        try:
            made = task.model_class(model.config).from_pretrained(
                place,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=remote_code,
                **task.head_options(),
            )
        except LOAD_ERRORS as error:
            why = reason(error).rstrip(".")
            raise MoefyError(f"{os.fspath(source)} cannot be given a head for {task.name}: {why}.") from None
    if head_of(made) == "causal" and type(made.config) in MODEL_FOR_MASKED_LM_MAPPING and not made.config.is_decoder:
        raise refuse_head(task.name, model, "a model that writes, and not an encoder, which would see what to write")
    return made, tokenizer


def relufy(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    task: str | Task,
    data: str | Path | Sequence[str | Path],
    *,
    examples: int | None = None,
    epochs: float = 2.0,
    batch_size: int = 32,
    rate: float = 1e-4,
    seed: int = 0,
    seconds: float | None = None,
    overwrite: bool = False,
    remote_code: bool = False,
    progress: Progress | None = None,
) -> Trained:
    """Swap the activation of `source` for ReLU, fine-tune it on a task, and save an ordinary checkpoint.

    `examples` are at most trained on, spread over the data. The state of the training lies beside `output`
    and is removed at its end; a call that was cut off, or stopped by `seconds`, goes on when it is repeated.
    Raises MoefyError, before training where that can be known, if a number, the model, the data or the output
    does not fit, and if the training diverges; what is at `output` is replaced only by a whole model.
    """
    check_positive({"The number of epochs": epochs, "The rate": rate, "The batch size": batch_size})
    check_positive({"The number of seconds": seconds, "The number of examples": examples})
    out, found = check_output(output, overwrite, source), named(task)
    rows = task_examples(found, data, examples)
    model, tokenizer = load_for_task(source, found, remote_code=remote_code)
    model = with_relu(model)
    if head_of(model) == "classification" and not model.config.problem_type:
        # transformers does so in a training step, and a run that is repeated after its last one takes none.
        model.config.problem_type = "single_label_classification"
    schedule = Schedule(round(len(rows) * epochs), batch_size, rate, seed=seed)
    state = out.parent / f".{out.name}.training.safetensors"
    features = found.encode(model, tokenizer, rows)
    check_ids(model, [i for feature in features for row in sequences_of(feature) for i in row])
    pad = padding(model, tokenizer) if head_of(model) == "classification" else pad_id(tokenizer)
    trained = finetune(model, features, pad, schedule, state=state, seconds=seconds, progress=progress)
    if trained.done:
        save_dense(model, tokenizer, out)
        state.unlink(missing_ok=True)
    return trained


def save_dense(model: Any, tokenizer: Any, out: Path) -> None:
    """Write an ordinary checkpoint: beside its place first, then renamed into it. MoefyError if it cannot be."""
    mend_generation(model)
    with written(out) as folder, quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        say_for_older(folder)
