"""Tasks: reading their data, scoring models with and without heads, calibrating on them."""

import json

import pytest
import torch
import transformers as tf

import moefy
import tiny
import words
from moefy.measure import harness
from moefy.tasks import TASKS, evaluate_task, task_calibration, task_examples
from moefy.tasks.likelihood import log_likelihoods
from moefy.tasks.qa import normal, word_f1
from moefy.tasks.text_to_text import generate
from task_data import SMALL, randomised, write

EXPECTED = {
    "sst2": lambda e: [x.label for x in e] == [1, 0, 1] and e[0].texts == ('a "good film',),
    "mnli": lambda e: e[0].label == 1 and e[0].texts == ("w1 w2", "w3"),
    "mrpc": lambda e: [x.label for x in e] == [1, 0] and e[1].texts == ("w1", "w3"),
    "rte": lambda e: e[0].label == 1 and e[0].texts == ("w1, w2", "w3"),
    "piqa": lambda e: e[0].answers == ("w2", "w3 w4") and e[0].right == 1,
    "arc": lambda e: e[0].answers == ("w2", "w3") and e[0].right == 1,
    "race": lambda e: e[0].right == 2 and e[0].prompt.startswith("Article: w5 w6"),
    "squad": lambda e: e[0].answers == ("w8",) and e[0].start == 7,
    "t2t": lambda e: e == [("w1 w2", "jump jump"), ("w3", "jump")],
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_reads_its_data(task, data):
    examples = task_examples(task, data[task])
    assert EXPECTED[task](examples)
    assert task_examples(task, [data[task], data[task]]) == examples * 2
    assert len(task_examples(task, data[task], limit=1)) == 1


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", ["t5-v1.0", "llama", "llava"])
def test_language_models_do_every_task(task, family, data):
    model = randomised(tiny.tiny(family))
    tokenizer = words.tokenizer("t5" if family.startswith("t5") else "bert")
    figures = evaluate_task(model, tokenizer, task, data[task])
    assert all(0 <= value <= 1 for value in figures.values())
    assert next(iter(figures)) in ("accuracy", "exact_match")
    recipe = moefy.Recipe(construction="weights", router="mlp", expert_size=8, shared=0, active=0.5)
    moefy.convert(model, recipe, task_calibration(model, tokenizer, task, data[task], tokens=40))
    assert evaluate_task(model, tokenizer, task, data[task]).keys() == figures.keys()


@pytest.mark.parametrize(
    ("task", "head"),
    [("sst2", "SequenceClassification"), ("squad", "QuestionAnswering"), ("race", "MultipleChoice")],
)
def test_heads_do_their_task(task, head, data):
    model = randomised(getattr(tf, f"BertFor{head}")(tf.BertConfig(**SMALL)))
    figures = evaluate_task(model, words.tokenizer(), task, data[task])
    assert all(0 <= value <= 1 for value in figures.values())
    wrong = next(t for t in ("squad", "sst2") if t != task)
    with pytest.raises(moefy.MoefyError, match=f"The task {wrong} needs .* this is a BertFor{head}"):
        evaluate_task(model, words.tokenizer(), wrong, data[wrong])


def test_classification_equals_one_sentence_at_a_time(data):
    model, tokenizer = randomised(tiny.tiny("bert")), words.tokenizer()
    examples = task_examples("sst2", data["sst2"])
    right = sum(int(model(**tokenizer(*e.texts, return_tensors="pt")).logits.argmax()) == e.label for e in examples)
    assert evaluate_task(model, tokenizer, "sst2", data["sst2"]) == {"accuracy": right / 3}
    gpt2 = tf.GPT2Config(vocab_size=tiny.VOCAB, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    for pad in (None, 5):  # whether the config names a padding token or not, each row is read at its last real one
        gpt2.pad_token_id = pad
        head = randomised(tf.GPT2ForSequenceClassification(gpt2))
        alone = [int(head(**tokenizer(*e.texts, return_tensors="pt")).logits.argmax()) for e in examples]
        same = sum(a == e.label for a, e in zip(alone, examples, strict=True))
        assert evaluate_task(head, tokenizer, "sst2", data["sst2"]) == {"accuracy": same / 3}
        batches = task_calibration(head, tokenizer, "sst2", data["sst2"], tokens=40)
        assert all(head(**b).logits.isfinite().all() for b in batches)
        wanted = tokenizer.pad_token_id if pad is None else pad
        assert {int(i) for b in batches for i in b["input_ids"][b["attention_mask"] == 0]} == {wanted}
    model.config.label2id = {"POSITIVE": 0, "NEGATIVE": 1}
    assert evaluate_task(model, tokenizer, "sst2", data["sst2"]) == {"accuracy": pytest.approx(1 - right / 3)}


@pytest.mark.parametrize("family", ["t5-v1.0", "gpt2"])
def test_likelihoods_equal_one_pair_at_a_time(family):
    model = randomised(tiny.tiny(family))
    tokenizer = words.tokenizer("t5" if family.startswith("t5") else "bert")
    pairs = [("w1 w2 w3", " w4"), ("w5", " w6 w7 w8"), ("w1", " w1")]
    together = log_likelihoods(model, tokenizer, pairs)
    alone = [log_likelihoods(model, tokenizer, [pair])[0] for pair in pairs]
    assert together == pytest.approx(alone, rel=1e-4)
    if family == "gpt2":
        whole = tokenizer("w5 w6 w7 w8", return_tensors="pt")["input_ids"][:, :-1]  # without the [SEP]
        logp = model(whole).logits[0].detach().log_softmax(-1)
        alone = sum(float(logp[i - 1, whole[0, i]]) for i in range(2, whole.shape[1]))
        assert together[1] == pytest.approx(alone, rel=1e-4)


def test_generation_in_batches_equals_alone():
    model, tokenizer = randomised(tiny.tiny("t5-v1.0")), words.tokenizer("t5")
    prompts = ["w1 w2 w3 w4", "w5", "w6 w7"]
    assert generate(model, tokenizer, prompts, 6) == [generate(model, tokenizer, [p], 6)[0] for p in prompts]


@pytest.mark.parametrize("text", ["The cat, sat!", "cat sat", "  A CAT sat  "])
def test_answers_are_compared_as_squad_does(text):
    assert normal(text) == "cat sat"
    assert word_f1(text, "the cat ran off") == pytest.approx(2 / 5)
    assert word_f1(text, "dog") == 0


def test_span_head_can_only_point_into_the_context(data):
    model = randomised(tf.BertForQuestionAnswering(tf.BertConfig(**SMALL)))
    from moefy.tasks.qa import SQUAD, _span, _span_features

    example = SQUAD.examples(json.loads(data["squad"].read_text())["data"])[0]
    feature = _span_features(model, words.tokenizer(), example)[0]
    assert words.tokenizer().decode(feature["input_ids"][feature["start_positions"]]) == "w8"
    assert feature["start_positions"] == feature["end_positions"]
    assert _span(model, words.tokenizer(), example) in example.context
    assert _span(model, words.tokenizer(), example)


def test_calibration_is_padded_masked_and_bounded(tmp_path):
    text = "sentence\tlabel\n" + "".join(
        f"{' '.join(f'w{j}' for j in range(i % 9 + 1))}\t{i % 2}\n" for i in range(200)
    )
    path, tokenizer = write(tmp_path / "a.tsv", text), words.tokenizer()
    batches = task_calibration(tiny.tiny("bert"), tokenizer, "sst2", path, tokens=300, batch_tokens=64)
    assert sum(int(b["attention_mask"].sum()) for b in batches) == pytest.approx(300, rel=0.15)
    assert all(b["input_ids"].numel() <= 64 for b in batches)
    assert all(torch.equal(b["input_ids"] != 0, b["attention_mask"].bool()) for b in batches)
    seq2seq = task_calibration(tiny.tiny("t5-v1.0"), words.tokenizer("t5"), "sst2", path, tokens=100)
    assert set(seq2seq[0]) == {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}
    widths = [b["input_ids"].shape[1] for b in batches]
    assert len(set(widths)) > 3
    assert all(widths != sorted(widths, reverse=r) for r in (False, True)), "the first tokens are of all lengths"
    again = task_calibration(tiny.tiny("bert"), tokenizer, "sst2", path, tokens=300, batch_tokens=64)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))


def rows_of(*rows):
    return "\n".join(map(json.dumps, rows))


def arc(choices, answer="B", question="w1"):
    return rows_of({"question": question, "choices": choices, "answerKey": answer})


def squad(answers, **more):
    return rows_of({"question": "w1", "context": "the w7 w8", "answers": answers, **more})


RACE_FILE = {"article": "w5", "questions": ["w1", "w2"], "options": [["w3", "w4"], ["w6", "w7"]], "answers": ["B", "A"]}
INSIDE = {"stem": "w1", "choices": [{"text": "w2", "label": "A"}, {"text": "w3", "label": "B"}]}
SAME_AS = [
    # quoting, newlines and line ends
    ("sst2", "a.csv", 'sentence,label\n"good\nfilm",1\n\n"w1\n\nw2",0\n', [("good\nfilm", 1), ("w1\n\nw2", 0)]),
    ("sst2", "a.csv", 'sentence,label\r\n"a ""b""",1\r\n', [('a "b"', 1)]),
    ("sst2", "a.csv", "sentence,label\rgood,1\rbad,0\r", [("good", 1), ("bad", 0)]),
    ("sst2", "a.csv", f"sentence,label\n{'good ' * 30000},1\n", [("good " * 30000, 1)]),
    ("sst2", "a.tsv", f"sentence\tlabel\n{'good ' * 30000}\t1\n", [("good " * 30000, 1)]),
    ("sst2", "a.tsv", "sentence\tlabel\rgood\t1\rbad\t0\r", [("good", 1), ("bad", 0)]),
    ("sst2", "a.tsv", 'sentence\tlabel\n"good\rfilm\t1\n', [('"good\rfilm', 1)]),
    # labels and texts
    ("sst2", "a.jsonl", rows_of({"text": "x", "label": 1.0}, {"text": 7, "label": "0.0"}), [("x", 1), ("7", 0)]),
    ("sst2", "a.jsonl", rows_of({"text": "x", "label": "Positive"}, {"text": "y", "label": 0}), [("x", 1), ("y", 0)]),
    # multiple choice
    ("arc", "a.jsonl", arc(INSIDE["choices"]), [("Question: w1\nAnswer:", ("w2", "w3"), 1)]),
    ("arc", "a.jsonl", rows_of({"question": INSIDE, "answerKey": "A"}), [("Question: w1\nAnswer:", ("w2", "w3"), 0)]),
    ("arc", "a.jsonl", arc(["w2", 3.5], 1.0), [("Question: w1\nAnswer:", ("w2", "3.5"), 1)]),
    *(
        ("race", name, json.dumps(RACE_FILE), [
            ("Article: w5\n\nQuestion: w1\nAnswer:", ("w3", "w4"), 1),
            ("Article: w5\n\nQuestion: w2\nAnswer:", ("w6", "w7"), 0),
        ])
        for name in ("a.txt", "a.json", "a.jsonl")
    ),
    # answers in a passage: (texts, place)
    ("squad", "a.jsonl", squad({"text": "w8", "answer_start": 7}), [(("w8",), 7)]),
    ("squad", "a.jsonl", squad({"text": ["w8"]}), [(("w8",), 7)]),
    ("squad", "a.jsonl", squad({"text": ["w8"], "answer_start": [None]}), [(("w8",), 7)]),
    ("squad", "a.jsonl", squad({"text": ["w8"], "answer_start": [0]}), [(("w8",), 7)]),
    ("squad", "a.jsonl", squad([{"text": "w8", "answer_start": None}, {"text": "w7"}]), [(("w8", "w7"), 7)]),
    ("squad", "a.jsonl", squad(["w8"]), [(("w8",), 7)]),
    ("squad", "a.jsonl", squad("w8"), [(("w8",), 7)]),
]  # fmt: skip


@pytest.mark.parametrize(("task", "name", "text", "expected"), SAME_AS)
def test_other_layouts_that_are_understood(task, name, text, expected, tmp_path):
    plain = {
        "sst2": lambda e: (e.texts[0], e.label),
        "squad": lambda e: (e.answers, e.start),
        "arc": lambda e: (e.prompt, e.answers, e.right),
        "race": lambda e: (e.prompt, e.answers, e.right),
    }[task]
    assert [plain(e) for e in task_examples(task, write(tmp_path / name, text))] == expected


@pytest.mark.parametrize(
    ("task", "name", "text", "sentence"),
    [
        ("sst2", "a.tsv", "text_a\tlabel\nx\t1\n", "needs a column sentence or text; the data has text_a, label"),
        ("sst2", "a.tsv", "sentence\tlabel\nx\t2\n", "label '2'; the task sst2 knows negative, positive or 0 to 1"),
        ("sst2", "a.tsv", "sentence\tlabel\nx\n", "Line 2 of .* has 1 fields, and its header has 2"),
        ("sst2", "a.tsv", "sentence\tlabel\n", "There are no rows"),
        *(("sst2", f"a{end}", " \n", "a.* is empty; give one") for end in (".json", ".jsonl", ".tsv", ".csv", ".txt")),
        ("sst2", "a.json", "[" * 100_000, "nests its JSON too deeply"),
        ("sst2", "a.jsonl", '{"sentence": ' + "9" * 6000 + ', "label": 1}', "holds a number of thousands of digits"),
        (
            "sst2",
            "a.jsonl",
            '{"sentence": "\\ud83d\\ude00", "label": 1}\n{"a": ["\\ud83d"]}',
            "Line 2 of .* half a character",
        ),
        ("sst2", "a.csv", "sentence,label,label\nx,1,0\n", "has two columns 'label'; rename one"),
        ("sst2", "a.csv", "sentence,label\ngood\rfilm,1\n", "Line 2 of .* has 1 fields"),
        ("sst2", "a.csv", 'sentence,label\n1,"good\n0,bad\n', "is not valid CSV .*see whether a quotation mark"),
        ("sst2", "a.tsv", "sentence\tlabel\nx\t\u00b2\n", "the label '\u00b2'; the task sst2 knows"),
        ("sst2", "a.tsv", "sentence\tlabel\nx\t\u0661\n", "the label '\u0661'; the task sst2 knows"),
        (
            "sst2",
            "a.jsonl",
            '{"sentence": null, "label": 1}',
            "has nothing in 'sentence', where there must be text",
        ),
        ("sst2", "a.jsonl", '{"sentence": NaN, "label": 1}', "has nothing in 'sentence'"),
        ("sst2", "a.jsonl", '{"sentence": ["x"], "label": 1}', "has a list in 'sentence'"),
        ("t2t", "a.jsonl", '{"input": "x", "target": null}', "has nothing in 'target'"),
        ("arc", "a.jsonl", arc({"text": ["x", "y"], "label": ["A", "B", "C"]}), "has 2 answers and 3 labels"),
        ("arc", "a.jsonl", arc({"text": ["x", "y"], "label": 5}), "has no list of answers in 'choices'"),
        ("arc", "a.jsonl", arc({"text": None, "label": None}), "has no list of answers in 'choices'"),
        ("arc", "a.jsonl", arc(["x", None]), "has nothing in 'choices'"),
        ("arc", "a.jsonl", arc(["x", ""]), "has an empty answer in 'choices'"),
        ("arc", "a.jsonl", arc(["x", "y"], question=None), "has nothing in 'question'"),
        (
            "race",
            "a.json",
            json.dumps({**RACE_FILE, "answers": ["A"]}),
            "needs lists of one length in 'questions'",
        ),
        ("squad", "a.jsonl", squad([{"text": "w8"}], context=None), "has nothing in 'context'"),
        ("squad", "a.jsonl", squad({"text": ["w7", "w8"], "answer_start": [1]}), "has 2 answers and 1 starts"),
        (
            "squad",
            "a.jsonl",
            squad([{"text": "w8", "answer_start": "x"}]),
            "has an answer_start that is no whole",
        ),
        ("squad", "a.jsonl", squad({"answer_start": [1]}), "has no answers with a text"),
        ("squad", "a.jsonl", squad("{'text': ['w8']}"), "has no answers with a text"),
        ("squad", "a.json", '{"data": [{"paragraphs": []}]}', "There are no questions in"),
        (
            "race",
            "a.json",
            '{"article": "x", "questions": [], "options": [], "answers": []}',
            "There are no questions in",
        ),
        (
            "sst2",
            "a.jsonl",
            '{"sentence": "x", "label": 1}\n{"label": 1}\n',
            "Line 2 of .* lacks the column sentence, which the task sst2 needs",
        ),
        ("sst2", "a.jsonl", "{", "Line 1 of .* is not valid JSON .*: character 2"),
        ("sst2", "a.jsonl", '{"sentence": "x", "label": 1}\n\n{"sentence": }', "Line 3 of .* is not valid JSON"),
        ("sst2", "a.jsonl", '\n{"sentence": "x", "label": 5}', "Line 2 of .*a.jsonl has the label '5'"),
        ("sst2", "a.tsv", "sentence\tlabel\nx\t1\n\ny\t2\n", "Line 4 of .*a.tsv has the label '2'"),
        ("sst2", "a.csv", 'sentence,label\n\n"two\nlines",1\ny,2\n', "Line 5 of .*a.csv has the label '2'"),
        ("t2t", "a.txt", "IN: a OUT: b\n\njump\n", "Line 3 of .* is not of the form"),
        ("sst2", "a.json", '[{"sentence": "x",\n "label": }]', "a.json is not valid JSON .*: line 2, character 11"),
        ("sst2", "a.json", '[{"sentence": "x", "label": 5}]', "Row 1 of .*a.json has the label"),
        ("race", "a.json", json.dumps([RACE_FILE, {**RACE_FILE, "answers": ["A"]}]), "Row 2 of .*a.json needs lists"),
        ("sst2", "a.json", "[1]", "must hold objects"),
        ("sst2", "a.parquet", "x", "has none of the endings"),
        ("sst2", "missing", None, "There is no data file"),
        ("piqa", "a.jsonl", '{"goal": "x", "sol1": "y", "sol2": "z", "label": 5}', "says that '5' is right"),
        ("arc", "a.jsonl", '{"question": "x", "choices": "y", "answer": 0}', "no list of answers in 'choices'"),
        ("squad", "a.jsonl", '{"question": "x", "context": "y", "answers": []}', "has no answers with a text"),
        ("squad", "a.json", '{"data": [{"paragraphs": [{}]}]}', "needs paragraphs with a context and qas"),
        ("t2t", "a.txt", "jump\n", "Line 1 of .* is not of the form"),
        ("unheard", "a.txt", "jump\n", "There is no task 'unheard'; choose one of sst2"),
    ],
)
def test_bad_data_is_one_sentence(task, name, text, sentence, tmp_path):
    path = write(tmp_path / name, text) if text is not None else tmp_path / name
    with pytest.raises(moefy.MoefyError, match=sentence):
        task_examples(task, path)


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["POSITIVE", "NEGATIVE"], [1, 0]),
        (["pos", "Neg"], [1, 0]),
        (["LABEL_0", "LABEL_1"], [0, 1]),
        (["0", "1"], [0, 1]),
        (["LABEL_1", "LABEL_0"], [1, 0]),
        (["5 stars", "1 star"], None),
        (["positive", "other"], None),
        (["", "negative"], None),
    ],
)
def test_a_head_is_read_by_the_names_of_its_outputs(names, order, data):
    model = randomised(tiny.tiny("bert"))
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    if order is None:
        with pytest.raises(
            moefy.MoefyError, match=f"names its outputs {', '.join(names)}, .* negative, positive; name"
        ):
            evaluate_task(model, words.tokenizer(), "sst2", data["sst2"])
        return
    features = TASKS["sst2"].encode(model, words.tokenizer(), task_examples("sst2", data["sst2"]))
    assert [f["labels"] for f in features] == [order[i] for i in (1, 0, 1)]
    assert evaluate_task(model, words.tokenizer(), "sst2", data["sst2"])


def test_the_harness_refuses_a_model_that_writes_no_text():
    with pytest.raises(moefy.MoefyError, match="needs a language model; this is a BertForSequenceClassification"):
        harness.run(tiny.tiny("bert"), words.tokenizer(), ["piqa"])


def test_a_label_set_that_does_not_fit_the_head_is_one_sentence(data):
    model = tf.BertForSequenceClassification(tf.BertConfig(**SMALL, num_labels=5))
    with pytest.raises(moefy.MoefyError, match=r"mnli has 3 labels \(entailment.*the model's head has 5"):
        evaluate_task(model, words.tokenizer(), "mnli", data["mnli"])
    with pytest.raises(moefy.MoefyError, match="no tokenizer"):
        evaluate_task(model, None, "mnli", data["mnli"])


@pytest.mark.parametrize(
    ("task", "head"),
    [
        ("sst2", "SequenceClassification"),
        ("squad", "QuestionAnswering"),
        ("race", "MultipleChoice"),
        *((task, None) for task in ("sst2", "squad", "race")),
    ],
)
def test_a_model_that_computes_nan_is_not_measured(task, head, data):
    model = getattr(tf, f"BertFor{head}")(tf.BertConfig(**SMALL)).eval() if head else tiny.tiny("llama")
    with torch.no_grad():
        next(reversed(list(model.parameters()))).fill_(torch.nan)
    with pytest.raises(moefy.MoefyError, match="computes NaN or infinite values"):
        evaluate_task(model, words.tokenizer(), task, data[task])
