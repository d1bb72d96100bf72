"""Comparing recipes: the fractions asked for, lines that survive an interruption, a page that loads nothing."""

import json
import math
import re
import sys

import pytest
import torch
import transformers as tf
from typer.testing import CliRunner

import moefy
import tiny
from moefy.cli.app import app, main
from moefy.cli.compare import _bodies
from moefy.conversion import budgets
from moefy.measure import compare as comparison
from moefy.measure.compare import DEFAULT_RECIPES, Data, Run, compare, plan, recipe_at
from moefy.report import compare_page, plots
from moefy.usage import realised_fraction, usage

FFN = moefy.FFNWeights(up=torch.zeros(1536, 576), down=torch.zeros(1536, 576), gate=torch.zeros(1536, 576))
# Their experts divide the 48 neurons of the tiny models; no timing, no training.
RECIPES = ("shared-only", "slim", "reconstructed", "reconstructed:oracle")


def data(seed=0, texts=("known", "other")):
    generator = torch.Generator().manual_seed(seed)

    def windows(count):
        return torch.randint(3, tiny.VOCAB, (count, 24), generator=generator)

    return Data(pool=windows(10), take=4, texts={name: windows(2) for name in texts})


def names(lines):
    return [(line["recipe"], line["active"], line["seed"]) for line in lines]


@pytest.mark.parametrize(
    ("active", "shape"),
    [(0.75, (3, 3, 8)), (0.5, (2, 2, 8)), (0.25, (2, 2, 16)), (0.6, (19, 19, 64)), (1.0, (4, 4, 8))],
)
def test_cmoe_at_a_fraction_has_as_many_shared_as_active_experts(active, shape):
    recipe = recipe_at("cmoe", active)
    assert (recipe.shared, recipe.active, recipe.experts) == shape
    assert recipe.construction == "activation"
    assert not recipe.refit


def test_other_recipes_at_a_fraction():
    published = recipe_at("moefication", 0.25, seed=3)
    assert (published.active, published.shared, published.seed) == (0.25, 0, 3)
    assert (published.construction, published.router) == ("weights", "mlp")
    assert recipe_at("reconstructed", 0.25).budget == 0.25
    oracle = recipe_at("reconstructed:oracle", 0.25)
    assert oracle == moefy.Recipe.of("reconstructed", name="reconstructed:oracle", budget=0.25, router="oracle")
    for name in ("shared-only", "slim", "reconstructed:control"):
        assert recipe_at(name, 0.25).layer_spec(FFN, "here").shared == 384
    assert not recipe_at("shared-only", 0.25).refit


@pytest.mark.parametrize("name", DEFAULT_RECIPES)
@pytest.mark.parametrize("active", [0.75, 0.5, 0.25])
def test_default_recipes_keep_to_the_fraction(name, active):
    spec = recipe_at(name, active).layer_spec(FFN, "here")
    assert abs((spec.shared + spec.top_k * spec.expert_size) / 1536 - active) < 0.08
    assert spec.shared + spec.top_k * spec.expert_size <= active * 1536


def test_yaml_files_are_recipes_too(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("construction: random\nrouter: similarity\nexperts: 16\nshared: 0\nactive: 4\n")
    recipe = recipe_at(str(path), 0.5)
    assert (recipe.construction, recipe.active, recipe.name) == ("random", 0.5, str(path))
    assert recipe_at(f"{path}:random", 0.5).router == "random"


def test_seeds_draw_their_own_windows():
    found = data()
    first, again, other = (torch.cat([b["input_ids"] for b in found.calibration(s)]) for s in (0, 0, 1))
    assert first.shape == (4, 24)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    rows = {tuple(row) for row in found.pool.tolist()}
    assert all(tuple(row) in rows for row in first.tolist())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished comparison without timing: the file, the dense line, the lines."""
    path = tmp_path_factory.mktemp("compare") / "out" / "compare.jsonl"
    runs = plan(RECIPES, (0.75, 0.02), 2)
    base, lines = compare(tiny.tiny("llama"), runs, data(), path, rounds=0, model_name="tiny")
    return path, base, lines


def test_every_run_has_a_line_with_figures_or_a_sentence(done):
    path, base, lines = done
    assert len(lines) == 16
    assert names(lines[:4]) == [(name, 0.75, 0) for name in RECIPES]
    stored = [json.loads(line) for line in path.read_text().splitlines()]
    assert stored == [{"settings": stored[0]["settings"]}, base, *lines]
    for line in lines:
        if line["active"] == 0.02:
            assert line["skipped"].endswith(".")
            assert "ratio" not in line
        else:
            assert set(line["ratio"]) == {"known", "other"}
            for text, ratio in line["ratio"].items():
                assert math.isclose(ratio, line["perplexity"][text] / base["perplexity"][text])
            assert line["speed"] is None
            assert all(0 < share < 1 for share in line["realised"].values())
            assert line["calibration_tokens"] == 96


def test_a_line_is_what_converting_by_hand_gives(done):
    _, _, lines = done
    line = next(x for x in lines if x["recipe"] == "slim" and x["seed"] == 1 and x["active"] == 0.75)
    model, found = tiny.tiny("llama"), data()
    report = moefy.convert(model, moefy.Recipe.of("slim", budget=0.75, seed=1), found.calibration(1))
    assert set(line["realised"].values()) == {report.active_fraction}
    ours = comparison.perplexity(model, found.texts["other"]).perplexity
    assert math.isclose(ours, line["perplexity"]["other"], rel_tol=1e-4)


def test_seeds_change_the_figures(done):
    _, _, lines = done
    for name in RECIPES:
        ratios = {line["ratio"]["known"] for line in lines if line["recipe"] == name and "ratio" in line}
        assert len(ratios) == 2


def test_what_is_measured_once_for_a_seed_changes_no_figure(done, monkeypatch, tmp_path):
    _, _, lines = done
    seeds = []

    def measure(model, sites, batches, *options):
        seeds.append(len(batches))
        return budgets.measure(model, sites, batches, *options)

    monkeypatch.setattr(comparison, "measure", measure)
    runs = plan(("reconstructed", "reconstructed:oracle"), (0.75, 0.7), 2)
    _, found = compare(tiny.tiny("llama"), runs, data(), tmp_path / "x.jsonl", rounds=0)
    assert len(seeds) == 2
    line = next(x for x in lines if x["recipe"] == "reconstructed" and x["seed"] == 1 and x["active"] == 0.75)
    mine = next(x for x in found if x["recipe"] == "reconstructed" and x["seed"] == 1 and x["active"] == 0.75)
    assert {**mine, "convert_seconds": 0} == {**line, "convert_seconds": 0}
    model, own = tiny.tiny("llama"), data()
    moefy.convert(model, recipe_at("reconstructed", 0.75, 1), own.calibration(1))
    with usage(model) as ran:
        ours = comparison.perplexity(model, own.texts["other"]).perplexity
    assert math.isclose(ours, line["perplexity"]["other"], rel_tol=1e-6)
    assert math.isclose(realised_fraction(model, ran), line["realised"]["other"], rel_tol=1e-6)


@pytest.fixture
def counted(monkeypatch):
    """Conversions made."""
    made = []

    def convert(model, recipe, batches, **options):
        made.append(recipe)
        return moefy.convert(model, recipe, batches, **options)

    monkeypatch.setattr(comparison, "convert", convert)
    return made


def test_a_finished_comparison_computes_nothing(done, counted, monkeypatch):
    path, base, lines = done
    monkeypatch.setattr(comparison, "perplexity", None)
    before = path.read_bytes()
    again = compare(tiny.tiny("llama"), plan(RECIPES, (0.75, 0.02), 2), data(), path, rounds=0, model_name="tiny")
    assert again == (base, lines)
    assert not counted
    assert path.read_bytes() == before


def test_an_interrupted_comparison_goes_on(done, counted, tmp_path):
    _, _, lines = done
    path = tmp_path / "compare.jsonl"
    kept = done[0].read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(kept[:4]) + kept[4][:50])  # cut off within the third run's line
    compare(tiny.tiny("llama"), plan(RECIPES, (0.75,), 1), data(), path, rounds=0, model_name="tiny")
    assert [recipe.name for recipe in counted] == list(RECIPES[2:])
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert names(again[2:]) == names(lines[:4])
    assert [line["ratio"] for line in again[2:]] == [line["ratio"] for line in lines[:4]]


def test_more_recipes_and_seeds_are_added(done, counted, tmp_path):
    path = tmp_path / "compare.jsonl"
    path.write_bytes(done[0].read_bytes())
    compare(tiny.tiny("llama"), plan(("slim",), (0.75,), 3), data(), path, rounds=0, model_name="tiny")
    assert [(recipe.name, recipe.seed) for recipe in counted] == [("slim", 2)]


def test_a_recipe_file_that_changed_is_run_again(counted, tmp_path):
    path = tmp_path / "mine.yaml"
    for active in (2, 2, 3):
        path.write_text(f"router: similarity\nexperts: 6\nshared: 0\nactive: 2\ntop_activated: {active}\n")
        runs = plan((str(path),), (0.5,), 1)
        compare(tiny.tiny("llama"), runs, data(), tmp_path / "x.jsonl", rounds=0)
    assert [recipe.top_activated for recipe in counted] == [2, 3]


@pytest.mark.parametrize("other", ["texts", "weights", "rounds", "calibration"])
def test_lines_of_other_settings_are_not_mixed(other, done, tmp_path):
    path, model, found = tmp_path / "compare.jsonl", tiny.tiny("llama", seed=int(other == "weights")), data()
    path.write_bytes(done[0].read_bytes())
    if other == "texts":
        found = Data(found.pool, found.take, {"known": found.texts["known"]})
    if other == "calibration":
        found = Data(found.pool, 3, found.texts)
    with pytest.raises(moefy.MoefyError, match=rf"other settings \({other}\)"):
        compare(model, plan(("slim",), (0.75,), 1), found, path, rounds=int(other == "rounds"), model_name="tiny")
    assert path.read_bytes() == done[0].read_bytes()


@pytest.mark.parametrize("content", [b"diary\n", b"diary", b"\xff\xfe\n", b'{"a": 1}\n', b'["settings"]\n'])
def test_another_file_is_not_touched(content, tmp_path):
    path = tmp_path / "compare.jsonl"
    path.write_bytes(content)
    with pytest.raises(moefy.MoefyError, match="not a comparison"):
        compare(tiny.tiny("llama"), plan(("slim",), (0.75,), 1), data(), path, rounds=0)
    assert path.read_bytes() == content


def test_only_dense_causal_models(tmp_path):
    with pytest.raises(moefy.MoefyError, match="BertForMaskedLM has none"):
        compare(tiny.tiny("bert-mlm"), [Run("slim", 0.5, 0)], data(), tmp_path / "out" / "x.jsonl")
    model = tiny.tiny("llama")
    moefy.convert(model, "slim", data().calibration(0))
    with pytest.raises(moefy.MoefyError, match="converted already"):
        compare(model, [Run("slim", 0.5, 0)], data(), tmp_path / "out" / "x.jsonl")
    assert not list(tmp_path.iterdir())


def test_timing_is_beside_the_dense_model_and_not_of_oracles(tmp_path):
    runs = plan(("slim", "reconstructed:oracle"), (0.75,), 1)
    model = tiny._decoder(tf.LlamaConfig, tf.LlamaForCausalLM, max_position_embeddings=256).eval()
    base, lines = compare(model, runs, data(), tmp_path / "x.jsonl", rounds=1)
    slim, oracle = lines
    assert oracle["speed"] is None
    for by_model in (slim["speed"]["decode"], slim["speed"]["prefill"]):
        assert set(by_model) == {"dense", "model"}
        assert all(v["tokens_per_second"] > 0 for v in by_model.values())
    assert slim["speed"]["weight_bytes"]["model"] < slim["speed"]["weight_bytes"]["dense"]
    head, rows = compare_page.cells(base, lines)
    for case in ("decode, tokens/s", "prefill, tokens/s"):
        assert float(rows[0][head.index(case)]) > 0
        assert rows[1][head.index(case)].endswith("x)")
        assert rows[2][head.index(case)] == "–"


def _line(recipe, seed, ratio, speed=None, text="t"):
    return {
        "recipe": recipe,
        "active": 0.5,
        "seed": seed,
        "realised": {text: 0.5},
        "ratio": {text: ratio},
        "speed": speed,
    }


def test_mean_and_spread_over_seeds():
    lines = [
        _line("a", 0, 1.0),
        _line("a", 1, 2.0),
        _line("b", 0, 3.0),
        {"recipe": "c", "active": 0.5, "skipped": "No."},
    ]
    a, b = compare_page.summarise(lines)
    assert a["ratio"]["t"] == (1.5, pytest.approx(0.5**0.5))
    assert a["seeds"] == 2
    assert b["ratio"]["t"] == (3.0, None)
    shown = compare_page.markdown({"perplexity": {"t": 8.0}}, lines)
    assert "| a | 50% | 50.0% | 1.500 ± 0.707 |" in shown
    assert "| b | 50% | 50.0% | 3.000 |" in shown
    assert "- c at 50%: No." in shown
    assert all(line.count("|") == 9 for line in shown.splitlines() if line.startswith("|"))


SETTINGS = {
    "model": "m",
    "calibration": {"pool": [8, 24], "taken": 4},
    "texts": {},
    "prefix": 1,
    "rounds": 0,
    "versions": {"moefy": "0"},
    "machine": {"threads": 1},
}


def test_the_page_escapes_names_and_loads_nothing():
    evil = '<script src="http://x">$\\frac{$</script>|'
    lines = [_line(evil, 0, 1.2, text=evil), {"recipe": evil, "active": 0.2, "seed": 0, "skipped": evil}]
    settings = {**SETTINGS, "model": evil, "texts": {evil: {"windows": [2, 24]}}}
    page = compare_page.page(settings, {"perplexity": {evil: 8.0}}, lines)
    assert "<script" not in page
    assert page.count("&lt;script") >= 6
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert page.count('src="data:image/png;base64,') == 1
    shown = compare_page.markdown({"perplexity": {evil: 8.0}}, lines)
    assert "</script>\\|" in shown


def test_a_page_of_skipped_runs_or_infinite_ratios_is_drawn():
    for line in ({"recipe": "a", "active": 0.5, "skipped": "No."}, _line("a", 0, math.inf)):
        assert "data:image/png" in compare_page.page(SETTINGS, {"perplexity": {"t": 8.0}}, [line])


def test_on_the_command_line(dense, tmp_path):
    other = tmp_path / "other text.txt"
    other.write_text("the value of the object is a string " * 40)
    arguments = ["compare", str(dense), str(tmp_path / "out"), "--text", "pydoc", "--text", str(other)]
    arguments += ["--recipes", "slim, reconstructed", "--active", "0.75", "--seeds", "2", "--rounds", "0"]
    arguments += ["--window", "32", "--windows", "2", "--calibration-windows", "4"]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    assert "| recipe | active | realised | pydoc | other text.txt |" in first.stdout
    assert "| slim | 75% | 66.7% |" in first.stdout
    made = tmp_path / "out" / "compare.jsonl"
    assert len(made.read_text().splitlines()) == 6
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count("data:image/png") == 2
    assert "http" not in page.replace("http-equiv", "")
    before = made.stat().st_mtime_ns
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    assert made.stat().st_mtime_ns == before
    assert again.stdout == first.stdout


def test_what_is_left_out_is_said_once(dense, tmp_path):
    arguments = ["compare", str(dense), str(tmp_path / "out"), "--recipes", "cmoe", "--active", "0.6", "--seeds", "2"]
    done = CliRunner().invoke(app, [*arguments, "--rounds", "0", "--window", "32", "--windows", "2"])
    assert done.exit_code == 0, done.output
    assert " ".join(done.stderr.split()).count("cmoe at 60% is left out: 64 experts do not divide") == 1


def test_calibration_and_measurement_share_no_words(dense, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one\n\ntwo\n\nthree\n\nfour")
    calibrated, measured = _bodies(str(text), None)
    assert calibrated + measured["a.txt"] == text.read_text()
    (tmp_path / "again.txt").symlink_to(text)
    calibrated, measured = _bodies(str(text), [str(tmp_path / "again.txt")])
    assert calibrated + measured["again.txt"] == text.read_text()
    (tmp_path / "b.txt").write_text("five")
    calibrated, measured = _bodies(str(text), [str(tmp_path / "b.txt")])
    assert calibrated == text.read_text()
    assert measured == {"b.txt": "five"}


MISTAKES = {
    "recipe": (["--recipes", "dish"], "no recipe 'dish'"),
    "router": (["--recipes", "slim:dice"], "no router 'dice'"),
    "no recipe": (["--recipes", ","], "nothing to compare"),
    "fraction": (["--active", "0.5,1.5"], "1.5 is not a share"),
    "not a fraction": (["--active", "half"], "takes numbers"),
    "not finite": (["--active", "nan"], "nan is not a share"),
    "text": (["--text", "nowhere.txt"], "no text file 'nowhere.txt'"),
    "seeds": (["--seeds", "0"], "--seeds"),
    "window": (["--window", "-1"], "--window"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_a_sentence_and_leave_nothing(mistake, dense, tmp_path, monkeypatch, capsys):
    extra, message = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moefy", "compare", str(dense), "out", *extra])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_default_recipe_has_a_colour_of_its_own():
    assert len(set(plots._COLORS)) >= len(DEFAULT_RECIPES)


@pytest.mark.parametrize(
    ("ratios", "shown"),
    [
        ([1.2345], "1.234"),
        ([1.2, 1.3], "1.250 ± 0.071"),
        ([50.0, 60.0], "55.0 ± 7.1"),
        ([1000.4, 3000.4], "2,000 ± 1,414"),
        ([math.inf], "inf"),
    ],
)
def test_a_ratio_is_as_long_as_it_means_something(ratios, shown):
    lines = [_line("a", seed, ratio) for seed, ratio in enumerate(ratios)]
    assert f"| {shown} |" in compare_page.markdown({"perplexity": {"t": 8.0}}, lines)
