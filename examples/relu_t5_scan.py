"""A small T5 (v1.0 layout: ReLU, no gate) that learns SCAN, text to text, from nothing.

    pip install .
    python examples/relu_t5_scan.py --train tasks_train_simple.txt --dev tasks_test_simple.txt --output t5-scan

The files are SCAN's (`IN: jump twice OUT: I_JUMP I_JUMP`; .gz is fine). The vocabulary is the words of the
training file; 3,920 steps, 0.15 s each on one core of a Zen 5 virtual machine. Cut it off whenever you like,
the same command goes on. The output is an ordinary Hugging Face checkpoint:

    moefy eval t5-scan --task t2t --data tasks_test_simple.txt --limit 1000
    moefy convert t5-scan t5-moe --recipe moefication --task t2t --calibration tasks_train_simple.txt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from moefy.checkpoint import check_output
from moefy.cli import console
from moefy.errors import MoefyError
from moefy.sources.models import load_source
from moefy.tasks import TASKS, evaluate_examples, task_examples
from moefy.tuning.finetune import Schedule, check_positive, finetune
from moefy.tuning.relufy import save_dense

# Of the development data, spread over it.
LINES = 1000


def word_tokenizer(pairs: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """One token a word, and T5's closing </s>."""
    words = sorted({word for pair in pairs for text in pair for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def small_t5(tokenizer: Any) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=128,
            d_kv=32,
            num_heads=4,
            d_ff=768,
            num_layers=2,
            num_decoder_layers=2,
            dropout_rate=0.0,
            feed_forward_proj="relu",
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def train(args: argparse.Namespace) -> bool:
    check_positive({"The number of epochs": args.epochs, "The number of seconds": args.seconds})
    out = check_output(args.output)
    task, pairs = TASKS["t2t"], task_examples("t2t", args.train)
    tokenizer = word_tokenizer(pairs)
    model = small_t5(tokenizer)
    state = out.parent / f".{out.name}.training.safetensors"
    schedule = Schedule(
        round(len(pairs) * args.epochs), batch_size=64, rate=1e-2, warmup=0.03, weight_decay=0.0, relative=True
    )
    features = task.encode(model, tokenizer, pairs)
    with console.progress("Training") as update:
        trained = finetune(model, features, 0, schedule, state=state, seconds=args.seconds, progress=update)
    print(f"step {trained.step} of {trained.steps}, loss {trained.loss}")
    if trained.done:
        save_dense(model, tokenizer, out)
        state.unlink(missing_ok=True)
    return trained.done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="SCAN's training lines")
    parser.add_argument("--dev", required=True, help="lines to measure on")
    parser.add_argument("--output", default="t5-scan", help="the checkpoint to write")
    parser.add_argument("--epochs", type=float, default=15.0)
    parser.add_argument("--seconds", type=float, help="stop after so long; the same command goes on later")
    args = parser.parse_args()
    measured_on = task_examples("t2t", args.dev, LINES)  # a mistake in it is told before the training
    if not Path(args.output).exists() and not train(args):
        return
    model, tokenizer = load_source(args.output)
    figures = evaluate_examples(model, tokenizer, "t2t", measured_on)
    print(f"exact match on {len(measured_on):,} lines: {figures['exact_match']:.4f}")


if __name__ == "__main__":
    try:
        main()
    except MoefyError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on.", file=sys.stderr)
        sys.exit(130)
