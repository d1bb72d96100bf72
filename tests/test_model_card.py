"""The card of a converted checkpoint: names are shown as they are, whatever they hold."""

import pytest
import yaml

import moefy
import tiny
from moefy.model_card import model_card

ODD = {
    "a`b`c": r"a\`b\`c",
    "two\nlines\n# of it": r"two lines \# of it",
    "<img src=x onerror=alert(1)>": r"\<img src=x onerror=alert(1)\>",
    "---\nlicense: other/x": "--- license: other/x",
    "a|b [c](d) *e* _f_ &lt;": r"a\|b \[c\](d) \*e\* \_f\_ \&lt;",
    "caf\udce9": "caf?",
    "x" * 5000: "x" * 5000,
}


@pytest.fixture(scope="module")
def model():
    made = tiny.tiny("llama")
    recipe = moefy.Recipe(name="``` <b>", experts=6, shared=1, active=2, top_activated=4)
    moefy.convert(made, recipe, [tiny.inputs("llama")])
    return made


@pytest.mark.parametrize("name", ODD, ids=lambda name: repr(name[:12]))
def test_odd_names_are_shown_as_they_are(name, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = model_card(model, name, {name: 0.5})
    assert f"# {ODD[name]} as a mixture of experts\n" in card
    assert f"Base model: {ODD[name]}.\n" in card
    assert f"\n| {ODD[name]} | 0.5 |\n" in card
    assert set(yaml.safe_load(card.split("---\n")[1])) == {"library_name", "tags"}
    card.encode()


def test_a_recipe_s_name_does_not_end_its_block(model):
    block = model_card(model, None, {}).split("````")
    assert len(block) == 3
    assert yaml.safe_load(block[1].removeprefix("yaml"))["name"] == "``` <b>"


def test_a_base_model_is_a_name_of_the_hub_or_a_folder_s_last_name(model, tmp_path, monkeypatch):
    assert "\nbase_model: acme/tiny-llama_1.0\n" in model_card(model, "acme/tiny-llama_1.0", {})
    (tmp_path / "dense" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "dense")
    for source in (".", "../dense", str(tmp_path / "dense")):
        assert "Base model: dense." in model_card(model, source, {})
    assert "base_model" not in model_card(model, "../dense/deep", {})
