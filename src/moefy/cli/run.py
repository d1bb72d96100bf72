"""The commands that run a model: generate and bench."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from moefy.cli.common import Dtype, Int8, RemoteCode, load_any
from moefy.errors import MoefyError

# A short text is repeated to so many characters, enough for 1,024 tokens of any tokenizer.
_CHARACTERS = 12_288


def generate(
    model: Annotated[str, typer.Argument(help="A converted directory, or any dense model that convert takes.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the model's chat template.")] = False,
    int8: Int8 = False,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
) -> None:
    """Continue a prompt, token by token as they come (greedy); with --chat, print the answer alone."""
    from transformers import TextStreamer

    from moefy.calibrate import check_ids
    from moefy.sources.texts import is_text
    from moefy.tasks.base import greedy, pad_id

    if not is_text(prompt):
        raise MoefyError("The prompt is no valid text (it is not UTF-8, or holds half a character); write it in UTF-8.")
    loaded, tokenizer = load_any(model, dtype, trust_remote_code, int8)
    if tokenizer is None:
        raise MoefyError(f"{model} has no tokenizer, so it cannot read a prompt; put its tokenizer files beside it.")
    if not loaded.can_generate():
        raise MoefyError(f"{model} is a {type(loaded).__name__}, which does not generate text.")
    if chat:
        if not tokenizer.chat_template:
            raise MoefyError(f"{model} has no chat template; leave out --chat.")
        message = [{"role": "user", "content": prompt}]
        prompt = _in_template(model, tokenizer, message)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    if inputs["input_ids"].shape[1] == 0:
        raise MoefyError("The prompt is empty; give some text to continue.")
    check_ids(loaded, inputs["input_ids"])
    tokens = _room(loaded, inputs["input_ids"].shape[1], tokens)
    streamer = None if loaded.config.is_encoder_decoder else TextStreamer(tokenizer, chat, skip_special_tokens=True)
    ids = greedy(
        loaded,
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=tokens,
        streamer=streamer,
        pad_token_id=pad_id(tokenizer),
    )
    if streamer is None:
        print(tokenizer.decode(ids[0], skip_special_tokens=True))


def _in_template(model: str, tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The messages in a model's chat template, which is a program in Jinja and can fail in any way."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise MoefyError(f"The chat template of {model} fails ({said.rstrip('.')}); leave out --chat.") from None


def bench(
    model: Annotated[str, typer.Argument(help="A converted directory, or any dense model that convert takes.")],
    against: Annotated[str | None, typer.Option(help="A model to time beside it: the dense one, say.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved runs; medians are printed.")] = 5,
    text: Annotated[str, typer.Option(help="Text to run on; see convert --calibration.")] = "pydoc",
    int8: Annotated[bool, typer.Option(help="Also time the model with int8 expert weights.")] = False,
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Time a model end to end: decode, prefill, batches, memory."""
    from moefy.calibrate import check_ids, token_windows
    from moefy.cli import console
    from moefy.measure.bench import cases, compare
    from moefy.measure.evaluate import check_comparable
    from moefy.moe import moe_layers
    from moefy.sources.texts import read_text

    body = read_text(text)  # a wrong name is refused before anything is loaded
    whole = [body] * -(-_CHARACTERS // len(body))
    rounded = load_any(model, dtype, trust_remote_code, int8)[0] if int8 else None  # first: it may be refused
    models: dict[str, Any] = {}
    if against is not None:
        other = load_any(against, dtype, trust_remote_code)[0]
        models["against" if moe_layers(other) else "dense"] = other
    models["model"], tokenizer = load_any(model, dtype, trust_remote_code)
    if against is not None:
        check_comparable(models["model"], other)
    if rounded is not None:
        models["model int8"] = rounded
    tokens = token_windows(tokenizer, whole, 128, 8).flatten() if tokenizer is not None else None
    if tokens is not None:
        check_ids(models["model"], tokens)
    with console.progress("Timing") as update:
        figures = compare(models, rounds, update, cases(models["model"], text=tokens))
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    rows = [
        [case, name, f"{of['tokens_per_second']:.1f}", f"{of['speedup']:.2f}x", _share(of["active"])]
        for case, by_model in figures["cases"].items()
        for name, of in by_model.items()
    ]
    console.table(f"{model}", ["case", "model", "tokens/s", "speedup", "of the FFNs ran"], rows)
    if tokens is None:
        console.out.print(
            "On random tokens, for the model has no tokenizer; a threshold may run another share on text."
        )
    weights = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in figures["weight_bytes"].items())
    console.out.print(f"Weights: {weights}. {', '.join(f'{k} {v}' for k, v in figures['machine'].items())}.")


def _room(model: Any, prompt: int, tokens: int) -> int:
    """How many tokens may follow a prompt of so many; MoefyError if none."""
    from moefy.calibrate import positions

    longest = positions(model)
    if longest is None or model.config.is_encoder_decoder:
        return tokens
    if prompt >= longest:
        raise MoefyError(f"The prompt has {prompt} tokens, and this model has positions for {longest}; shorten it.")
    return min(tokens, longest - prompt)


def _share(active: float | None) -> str:
    return "all" if active is None else f"{active:.1%}"
