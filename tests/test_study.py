"""The study: its figures on data with a known answer, its tests' error rates, the page it makes."""

import json
import re

import pytest
import torch

import moefy
import tiny
import words
from moefy import report
from moefy.cli import app
from moefy.study import measures, study
from moefy.study.collect import collect
from moefy.study.preferences import benjamini_hochberg, over_sequences, over_tokens, preferences, within


def converted(family="bert", **changes):
    model = tiny.tiny(family)
    feed = tiny.inputs(family, batch=24, length=16)
    recipe = {"construction": "weights", "router": "similarity", "expert_size": 8, "shared": 0, "active": 2, **changes}
    moefy.convert(model, recipe, [feed])
    return model, feed


def test_sparsity_and_rates_of_known_distributions():
    found = measures.sparsity(torch.tensor([0.01, 0.02, 0.5, 0.03]))
    assert found["tokens_under_5_percent"] == 0.75
    assert sum(found["histogram"]) == pytest.approx(1)
    two = torch.cat([torch.full((500,), 0.05), torch.full((500,), 0.95)]) + 0.02 * torch.randn(1000)
    one = 0.5 + 0.1 * torch.randn(1000)
    assert measures.rates(two.clamp(0, 1))["bimodality"] > 0.9
    assert measures.rates(one.clamp(0, 1))["bimodality"] < 0.45
    assert measures.rates(two.clamp(0, 1))["valley"] < 0.1


def test_load_of_even_and_of_one_sided_choices():
    even = measures.load(torch.arange(6).repeat(4).view(-1, 2), 6)
    assert (even["imbalance"], even["gini"], even["evenness"]) == pytest.approx((1, 0, 1), abs=1e-9)
    single = measures.load(torch.zeros(10, 1), 6)
    assert (single["imbalance"], single["gini"], single["never_chosen"]) == pytest.approx((6, 5 / 6, 5))


def test_overlaps_between_inputs_and_layers():
    sequences = torch.arange(40).repeat_interleave(10)
    by_sequence = (sequences % 6)[:, None]
    same = measures.between_inputs(by_sequence, sequences, 6)
    assert same["neighbours"] == 1
    assert same["other_sequences"] == pytest.approx(1 / 6, abs=0.03)
    assert measures.between_layers(by_sequence, (by_sequence + 1) % 6, (6, 6))["strongest"] == pytest.approx(
        1, abs=1e-4
    )
    chance = torch.randint(6, (4000, 1))
    assert measures.between_layers(chance, torch.randint(6, (4000, 1)), (6, 6))["strongest"] < 0.1


def test_chance_is_rarely_significant_and_a_real_preference_is():
    classes, sequences = torch.randint(4, (1200,)), torch.arange(60).repeat_interleave(20)
    chance = preferences(torch.randint(12, (1200, 1)), classes, list("abcd"), over_tokens, 12)
    assert chance["significant"] <= 0.05
    p = torch.tensor(chance["p"])
    assert 0.35 < p.mean() < 0.7
    drawn = torch.randint(12, (1200, 1))
    drawn[(classes == 2) & (torch.rand(1200) < 0.5)] = 7
    real = preferences(drawn, classes, list("abcd"), over_tokens, 12)
    assert real["q"][7][2] < 0.05
    assert real["lift"][7][2] > 2
    label = torch.randint(2, (60,))[sequences]
    by_sequence = torch.randint(12, (60,))[sequences][:, None]
    # Tokens of one sequence go together: shuffled one by one they look significant, as sequences they do not.
    assert preferences(by_sequence, label, ["n", "p"], over_tokens, 12)["significant"] > 0.3
    assert preferences(by_sequence, label, ["n", "p"], over_sequences(sequences), 12)["significant"] < 0.1


def test_shuffles_keep_what_they_should():
    generator = torch.Generator().manual_seed(0)
    sequences, classes = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([5, 6, 7, 8, 9, 4])
    for _ in range(20):
        moved = within(sequences)(classes, generator)
        assert [sorted(moved[sequences == s].tolist()) for s in range(3)] == [[5, 6, 7], [8, 9], [4]]
        labels = over_sequences(sequences)(sequences * 10, generator)
        assert all(len(set(labels[sequences == s].tolist())) == 1 for s in range(3))
        assert sorted({int(v) for v in labels}) == [0, 10, 20]


def test_benjamini_hochberg_by_hand():
    found = benjamini_hochberg(torch.tensor([[0.01, 0.04], [0.03, 0.5]]))
    torch.testing.assert_close(found, torch.tensor([[0.04, 0.16 / 3], [0.16 / 3, 0.5]]))


def test_collected_counts_are_of_the_real_tokens_and_like_the_dense_model():
    model, feed = converted(active=6)
    dense = tiny.tiny("bert")
    ours, streams = collect(model, [feed])
    theirs, _ = collect(dense, [feed])
    real = int(feed["attention_mask"].sum())
    assert len(streams["tokens"].joined()["ids"]) == real
    for name, layer in theirs.items():
        assert layer.tokens == ours[name].tokens == real
        torch.testing.assert_close(torch.cat(ours[name].active), torch.cat(layer.active), atol=0.03, rtol=0)


@pytest.mark.parametrize("family", ["bert", "t5-v1.0", "llama", "opt"])
def test_study_is_plain_data_and_a_page_without_links(family, tmp_path):
    model, feed = converted(family)
    tokenizer = words.tokenizer("t5" if family.startswith("t5") else "bert")
    result = study(model, tokenizer, [feed], [torch.arange(24) % 2], ["negative", "positive"])
    assert json.loads(json.dumps(result)) == result
    assert result["converted"]
    assert {"part", "frequency", "label"} <= set(next(iter(result["layers"].values()))["preferences"])
    made = report.write(result, tmp_path / "out", "A model")
    assert json.loads(made[0].read_text()) == result
    page = made[1].read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "http://" not in page
    assert "<script" not in page
    assert page.count("<details") == page.count("</details>")


def test_tokens_and_names_are_escaped(tmp_path):
    model, feed = converted()
    evil = '<script>alert("x")</script>'

    class Evil:
        def convert_ids_to_tokens(self, token):
            return evil

    result = study(model, Evil(), [feed], [torch.arange(24) % 2], [evil, "$\\frac{"])
    page = report.page(result, evil)
    assert evil not in page
    assert "&lt;script&gt;" in page


def test_the_page_lists_what_experts_prefer_and_not_what_they_avoid():
    model, feed = converted()
    result = study(model, words.tokenizer("bert"), [feed])
    lifts, qs = [[3.0] + [0.0] * 8, [1.0] * 8 + [5.0], [0.5] * 9], [[0.01] * 9, [0.9] * 9, [0.01] * 9]
    for layer in result["layers"].values():
        names = [f"word{i}" for i in range(9)]
        layer["preferences"] = {"token": {"classes": names, "lift": lifts, "q": qs, "significant": 0.5}}
    page = report.page(result, "A model")
    assert "<code>word0</code> 3.0x" in page
    assert not any(f"<code>word{i}</code>" in page for i in range(1, 9))  # avoided, or preferred by chance
    assert "<th>label</th>" not in page
    for layer in result["layers"].values():
        layer["preferences"]["token"]["q"] = [[1.0] * 9] * 3
    assert "Nothing beyond chance" in report.page(result, "A model")


def test_dense_models_are_studied_without_experts(tmp_path):
    result = study(tiny.tiny("t5-v1.0"), None, [tiny.inputs("t5-v1.0")])
    assert not result["converted"]
    assert set(result["tokens"]) == {"encoder", "decoder"}
    assert "Experts" not in report.page(result, "T5")


def test_inspect_on_the_command_line(tmp_path):
    from typer.testing import CliRunner

    model, _ = converted()
    moefy.save(model, tmp_path / "model", words.tokenizer())
    data = tmp_path / "a.tsv"
    data.write_text("sentence\tlabel\n" + "good film\t1\nthe bad film w1 w2\t0\n" * 20)
    arguments = ["inspect", str(tmp_path / "model"), str(tmp_path / "out"), "--task", "sst2", "--data", str(data)]
    done = CliRunner().invoke(app, [*arguments, "--window", "64", "--windows", "2"])
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "out" / "study.json").read_text())
    label = next(iter(result["layers"].values()))["preferences"]["label"]
    assert label["classes"] == ["negative", "positive"]
    assert (tmp_path / "out" / "study.html").stat().st_size > 10_000
