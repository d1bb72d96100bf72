"""The study: its figures on data with a known answer, its tests' error rates, the page it makes."""

import errno
import importlib
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

import moefy
import tiny
import words
from moefy import report
from moefy.cli.app import app
from moefy.moe import moe_layers
from moefy.report.html import write_together
from moefy.study import measures, study
from moefy.study.collect import collect
from moefy.study.preferences import over_sequences, preferences, turned
from native_problem import needs_native


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
    chance = preferences(torch.randint(12, (1200, 1)), classes, list("abcd"), None, 12)
    assert chance["significant"] <= 0.05
    p = torch.tensor(chance["p"])
    assert 0.35 < p.mean() < 0.7
    drawn = torch.randint(12, (1200, 1))
    drawn[(classes == 2) & (torch.rand(1200) < 0.5)] = 7
    real = preferences(drawn, classes, list("abcd"), None, 12)
    assert real["q"][7][2] < 0.05
    assert real["lift"][7][2] > 2
    label = torch.randint(2, (60,))[sequences]
    by_sequence = torch.randint(12, (60,))[sequences][:, None]
    # Tokens of one sequence go together: shuffled one by one they look significant, as sequences they do not.
    assert preferences(by_sequence, label, ["n", "p"], None, 12)["significant"] > 0.3
    assert preferences(by_sequence, label, ["n", "p"], over_sequences(sequences), 12)["significant"] < 0.1


def test_an_expert_that_sees_some_sequences_is_shuffled_among_those():
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(40):
        sequences = torch.arange(60).repeat_interleave(20)[torch.rand(1200, generator=generator) < 0.5]
        sequences = sequences[sequences % 2 == 1]  # the others have no token here
        label = torch.randint(2, (60,), generator=generator)[sequences]
        chosen = torch.randint(6, (60,), generator=generator)[sequences][:, None]
        found.append(torch.tensor(preferences(chosen, label, ["n", "p"], over_sequences(sequences), 6)["p"]) < 0.05)
    assert torch.stack(found).float().mean() < 0.1


def test_tokens_with_others_between_them_are_no_neighbours():
    chosen, sequences = (torch.arange(400) // 2 % 7)[:, None], torch.arange(400) // 100
    near = measures.between_inputs(chosen, sequences, 7, places=torch.arange(400))["neighbours"]
    assert near == measures.between_inputs(chosen, sequences, 7)["neighbours"] > 0.4
    places = torch.arange(0, 4000, 10)
    assert measures.between_inputs(chosen, sequences, 7, places=places)["neighbours"] == 0


def test_a_decoder_is_studied_on_labels_too():
    model, feed = tiny.tiny("t5-v1.0"), tiny.inputs("t5-v1.0")
    feed["labels"] = feed.pop("decoder_input_ids")
    feed.pop("decoder_attention_mask", None)
    layers, streams = collect(model, [feed])
    shifted = model.prepare_decoder_input_ids_from_labels(labels=feed["labels"])
    assert torch.equal(torch.cat(streams["decoder"].ids), shifted.flatten())
    assert {layer.stream for layer in layers.values()} == {"encoder", "decoder"}
    del feed["labels"]
    with pytest.raises(moefy.MoefyError, match="decoder_input_ids, or labels"):
        collect(model, [feed])
    for family in ("vit", "whisper"):
        with pytest.raises(moefy.MoefyError, match="has no input_ids"):
            collect(tiny.tiny(family), [tiny.inputs(family)])


def sequences_of(generator, rho, experts=24, top_k=4, count=60, longest=40):
    """Choices (T, K) by scores that are autoregressive within a sequence, sequence numbers (T,), and quarters (T,)."""
    lengths = torch.randint(5, longest, (count, 1), generator=generator)
    scores = torch.randn(count, longest, experts, generator=generator)
    for i in range(1, longest):
        scores[:, i] = rho * scores[:, i - 1] + (1 - rho**2) ** 0.5 * scores[:, i]
    real = torch.arange(longest) < lengths
    parts = torch.arange(longest) * 4 // lengths
    return scores[real].topk(top_k, 1).indices, torch.arange(count)[:, None].expand_as(real)[real], parts[real]


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.8])
def test_p_values_are_uniform_where_neighbours_choose_alike_and_nothing_is_preferred(rho, monkeypatch):
    monkeypatch.setattr(importlib.import_module("moefy.study.preferences"), "SHUFFLES", 200)
    found = {"part": [], "label": []}
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        chosen, sequences, parts = sequences_of(generator, rho)
        labels = torch.randint(2, (60,), generator=generator)[sequences]
        found["part"].append(preferences(chosen, parts, list("abcd"), turned(sequences), 24)["p"])
        found["label"].append(preferences(chosen, labels, list("np"), over_sequences(sequences), 24)["p"])
    for p in map(torch.tensor, found.values()):
        assert 0.02 < (p < 0.05).float().mean() < 0.075
        assert 0.4 < (p < 0.5).float().mean() < 0.6
        assert (p < 0.01).float().mean() < 0.02


def test_p_values_of_independent_tokens_are_exact(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    chosen, classes = (torch.randint(n, (300,), generator=generator) for n in (12, 10))
    chosen[classes == 3] = chosen[classes == 3] // 3
    exact = preferences(chosen[:, None], classes, list("abcdefghij"), None, 12)["p"]

    def shuffled(classes, generator):
        return classes[torch.randperm(len(classes), generator=generator)]

    monkeypatch.setattr(importlib.import_module("moefy.study.preferences"), "SHUFFLES", 4000)
    drawn = preferences(chosen[:, None], classes, list("abcdefghij"), shuffled, 12)["p"]
    torch.testing.assert_close(torch.tensor(drawn), torch.tensor(exact), atol=0.06, rtol=0)
    p = []
    for _ in range(20):
        chosen, classes = (torch.randint(n, (8000,), generator=generator) for n in (12, 10))
        p += preferences(chosen[:, None], classes, list("abcdefghij"), None, 12)["p"]
    for level in (0.5, 0.05, 0.01):  # counts are whole, so levels are reached from below
        assert level / 3 < (torch.tensor(p) <= level).float().mean() <= 1.1 * level


def test_strong_preferences_are_significant_among_thousands_of_pairs():
    generator = torch.Generator().manual_seed(0)
    tokens, scores = torch.randint(150, (8000,), generator=generator), torch.randn(8000, 48, generator=generator)
    wanted = torch.zeros(48, 150, dtype=torch.bool)
    wanted[torch.arange(48), torch.arange(48) * 3] = True
    scores += 4 * wanted.t()[tokens]
    found = preferences(scores.topk(10, 1).indices, tokens, list(map(str, range(150))), None, 48)
    q = torch.tensor(found["q"])
    assert (q[wanted] < 1e-6).all()
    assert (q[~wanted] < 0.05).float().mean() < 0.01
    sequences = torch.arange(400).repeat_interleave(15)
    label = torch.randint(2, (400,), generator=generator)[sequences]
    scores = torch.randn(6000, 200, generator=generator)
    scores[:, 7] += 2 * label - 1
    found = preferences(scores.topk(20, 1).indices, label, ["n", "p"], over_sequences(sequences), 200)
    q = torch.tensor(found["q"])
    assert (q[7] < 1e-6).all()
    assert (q[torch.arange(200) != 7] < 0.05).float().mean() < 0.05
    # Few sequences cannot show much, whatever the shape of the draws.
    few = torch.arange(6).repeat_interleave(50)
    found = preferences((few >= 3).long()[:, None], (few >= 3).long(), ["n", "p"], over_sequences(few), 2)
    assert torch.tensor(found["p"]).min() > 0.05


def test_shuffles_keep_what_they_should():
    generator = torch.Generator().manual_seed(0)
    sequences, classes = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([5, 6, 7, 8, 9, 4])
    for _ in range(20):
        moved = turned(sequences)(classes, generator)
        first = moved[:3].tolist()
        assert first in ([5, 6, 7], [6, 7, 5], [7, 5, 6])
        assert [sorted(moved[sequences == s].tolist()) for s in (1, 2)] == [[8, 9], [4]]
        labels = over_sequences(sequences)(sequences * 10, generator)
        assert all(len(set(labels[sequences == s].tolist())) == 1 for s in range(3))
        assert sorted({int(v) for v in labels}) == [0, 10, 20]


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
    assert "every token chooses for itself" in page  # what chance is
    assert page.count("<details") == page.count("</details>")


def test_a_model_of_many_layers_has_a_page(tmp_path):
    model, feed = converted("bert")
    result = study(model, words.tokenizer("bert"), [feed], [torch.arange(24) % 2], ["negative", "positive"])
    layers = list(result["layers"].values())
    result["layers"] = {f"layer.{i}": layers[i % len(layers)] for i in range(30)}
    assert report.write(result, tmp_path / "out", "A model")[1].is_file()


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


def test_inspect_refuses_before_it_runs_what_it_could_not_write(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    (tmp_path / "file").write_text("a file")
    for output, hidden, message in (("file", None, "is a file"), ("out", "matplotlib", "Plots need matplotlib")):
        with monkeypatch.context() as patch:
            if hidden:
                patch.setitem(sys.modules, hidden, None)
            done = CliRunner().invoke(app, ["inspect", str(tmp_path / "no-model"), str(tmp_path / output)])
        assert isinstance(done.exception, moefy.MoefyError)
        assert message in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for output in ("/proc", "/proc/nothing/here", "x" * 300):  # where nobody may write
        with pytest.raises(moefy.MoefyError, match=r"cannot be written: .*; choose another output"):
            report.check(tmp_path / output)
    report.check(tmp_path / "new" / "deep")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk_leaves_neither_file_of_a_study(exists, tmp_path, monkeypatch):
    written = Path.write_text
    if exists:
        write_together({tmp_path / "a": "old", tmp_path / "b": "old"})

    def full(path, text, **options):
        written(path, text[:1], **options)
        if "b" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    left = "what was there before is unchanged" if exists else "nothing is left of it"
    with pytest.raises(moefy.MoefyError, match=f"disk is full: .*/b was not written, and {left}; free some space"):
        write_together({tmp_path / "a": "new", tmp_path / "b": "new"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == ({"a": "old", "b": "old"} if exists else {})


@pytest.mark.parametrize("routed", [True, False])
def test_a_study_tells_how_far_it_is(routed):
    model, feed = converted() if routed else (tiny.tiny("llama"), tiny.inputs("llama"))
    steps = []
    study(model, None, [feed] * 5, progress=lambda done, total: steps.append((done, total)))
    layers = 2
    total = layers * (7 if routed else 5)
    assert {of for _, of in steps} == {total}
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[0][0] == 1
    assert steps[-1][0] == total


@pytest.mark.parametrize("active", [0, 6])
def test_a_model_that_chooses_nothing_is_still_converted(active):
    model, feed = converted(active=2)
    for moe in moe_layers(model).values():
        moe.top_k = active
    result = study(model, None, [feed])
    assert result["converted"]
    assert "nothing is chosen" in report.page(result, "A model")


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=needs_native)])
def test_weights_that_are_not_finite_are_one_sentence(packed):
    model, feed = converted()
    moe = next(iter(moe_layers(model).values()))
    moe.unpack()
    with torch.no_grad():
        moe.experts_up[0, 0, 0] = float("nan")
    if packed:
        moe.pack()  # where the parameters are empty
    with pytest.raises(moefy.MoefyError, match="holds NaN or infinite values"):
        study(model, None, [feed])


@pytest.mark.parametrize("norm", ["layers.0.post_attention_layernorm", "norm"])
def test_what_a_model_computes_that_is_not_finite_is_one_sentence(norm):
    model, feed = tiny.tiny("llama"), tiny.inputs("llama")
    with torch.no_grad():
        model.model.get_submodule(norm).weight.fill_(3e38)  # finite, and what it is multiplied with is above 1
    with pytest.raises(moefy.MoefyError, match="computes NaN or infinite values"):
        study(model, None, [feed])


def test_thresholds_may_leave_every_expert_out():
    none = torch.full((20, 2), -1)
    assert measures.load(none, 4)["never_chosen"] == 4
    found = measures.between_inputs(none, torch.arange(4).repeat_interleave(5), 4)
    assert set(found.values()) == {0.0}
    assert preferences(none, torch.arange(20) % 2, ["a", "b"], None, 4)["significant"] == 0


def test_a_page_with_a_name_that_is_no_text_is_written(tmp_path):
    write_together({tmp_path / "page.html": "b\udcff.txt"})
    assert (tmp_path / "page.html").read_text() == "b\\udcff.txt"
