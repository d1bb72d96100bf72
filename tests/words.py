"""Tokenizers of whole words for the tiny models: 90 made-up ones, or the commonest of the built-in text."""

from collections import Counter

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import tiny
from moefy.sources.texts import builtin_text

WORDS = [f"w{i}" for i in range(60)] + [
    "negative",
    "positive",
    "good",
    "bad",
    "film",
    "A",
    "the",
    "question",
    "context",
    ":",
    "sentence",
    "sst2",
    "jump",
]


def tokenizer(kind: str = "bert") -> PreTrainedTokenizerFast:
    special = {"bert": ["[PAD]", "[CLS]", "[SEP]", "[UNK]"], "t5": ["<pad>", "</s>", "<unk>"]}[kind]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=special[-1]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kind == "t5":
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        eos_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind of tokenizer: a word and the blank before it are one token, and no text starts with another."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet)
    text = [" ".join(["Answer: question", *WORDS[60:]])] * 20
    made.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def pydoc_tokenizer() -> PreTrainedTokenizerFast:
    """The commonest words of the built-in text, as many as a tiny model has rows for."""
    words = [word for word, _ in Counter(builtin_text().split()).most_common(tiny.VOCAB - 3)]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "<unk>", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", unk_token="<unk>")
