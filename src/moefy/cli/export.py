"""The export command: a converted model for engines that know nothing of moefy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moefy.cli.common import Dtype, load_any, text_batches
from moefy.errors import MoefyError

# Tokens on which the written model is compared with the converted one.
_PROBED = 256
# Share of the logits' norm; SmolLM2 in float32 comes to 0.014 at most.
_SMALL = 0.02


def export(
    model: Annotated[str, typer.Argument(help="A converted directory (convert it with --recipe engine).")],
    output: Annotated[Path, typer.Argument(help="The directory to write, or a name that ends in .gguf.")],
    like: Annotated[
        Path | None, typer.Option(help="A GGUF needs it: a GGUF of the dense model, whose tokenizer is copied.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="For a GGUF: the type of its matrices, f32, f16, bf16, q8_0 (the default) or q4_0; rows that are no "
            "whole blocks are f16."
        ),
    ] = None,
    text: Annotated[str, typer.Option(help="Text to compare the two models on; see convert --calibration.")] = "pydoc",
    dtype: Dtype = "auto",
    overwrite: Annotated[bool, typer.Option(help="Replace the output if it is a model.")] = False,
) -> None:
    """Write a converted model for transformers, vLLM, SGLang (a directory) or llama.cpp (a GGUF), without moefy."""
    from moefy.cli import console
    from moefy.export import EXPORTERS, check_place, form_of
    from moefy.export import export as export_model
    from moefy.sources import texts

    form = form_of(output)
    options = {name: value for name, value in {"like": like, "weights": weights}.items() if value is not None}
    if other := [name for name in options if name not in EXPORTERS[form].options]:
        ends = ", ".join(e.suffix for e in EXPORTERS.values() if {*other} <= {*e.options})
        named = " and ".join(f"--{name}" for name in other)
        verb = "is" if len(other) == 1 else "are"
        raise MoefyError(f"{named} {verb} for outputs whose name ends in {ends}; give one, or leave it out.")
    check_place(output, form, overwrite, EXPORTERS[form].check(**options), model)
    body = texts.read_text(text)
    loaded, tokenizer = load_any(model, dtype, False)
    ids = text_batches(loaded, tokenizer, body, _PROBED, 1)[0]["input_ids"]
    with console.progress(f"Writing {output}", counted=False) as update:
        done = export_model(loaded, output, tokenizer, ids, form=form, overwrite=overwrite, progress=update, **options)
    console.out.print(
        f"{done.path} needs no moefy to run. Its logits are {done.difference:.2%} away from the converted model's, on "
        f"{done.tokens} tokens."
    )
    if done.difference > _SMALL:
        console.out.print(
            "That is more than rounding: where two experts score nearly the same, another type or order of sums picks "
            "the other one. Compare both by perplexity on your text before you serve it."
        )
