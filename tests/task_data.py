"""A small file of every task, and models for the tiny vocabulary of words.py."""

import gzip
import json

import torch

import tiny

SMALL = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": tiny.WIDTH,
    "intermediate_size": tiny.NEURONS,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def write(path, text):
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


ANSWER = {"text": "w8", "answer_start": 7}
PARAGRAPH = {"context": "the w7 w8 film", "qas": [{"question": "w1", "answers": [ANSWER]}]}
DATA = {
    "sst2": ("a.tsv", 'sentence\tlabel\na "good film\t1\nbad\t0\nthe film\t1\n'),
    "mnli": ("a.jsonl.gz", '{"premise": "w1 w2", "hypothesis": "w3", "label": "neutral"}\n' * 3),
    "mrpc": ("a.tsv.gz", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\tw1\tw2\r\n0\t7\t8\tw1\tw3\r\n"),
    "rte": ("a.csv", 'index,sentence1,sentence2,label\n0,"w1, w2",w3,not_entailment\n'),
    "piqa": ("a.jsonl", '{"goal": "w1", "sol1": "w2", "sol2": "w3 w4", "label": 1}\n'),
    "arc": (
        "a.json",
        json.dumps([{"question": "w1", "choices": {"text": ["w2", "w3"], "label": ["3", "4"]}, "answerKey": "4"}]),
    ),
    "race": ("a.jsonl", '{"article": "w5 w6", "question": "w1", "options": ["w2", "w3", "w4"], "answer": "C"}\n'),
    "squad": ("a.json", json.dumps({"data": [{"paragraphs": [PARAGRAPH]}]})),
    "t2t": ("a.txt", "IN: w1 w2 OUT: jump jump\nIN: w3 OUT: jump\n"),
}
