"""What a user's words mean: options of the command line as a recipe, or a sentence."""

import numpy as np
import pytest
import torch
import transformers as tf

import moefy
import tiny
from moefy.measure.compare import recipe_at
from moefy.recipe import DEFAULT, RECIPES, Recipe
from moefy.routers import ROUTERS
from moefy.types import FFNWeights
from moefy.wanted import chosen

MEANT = [
    # recipe, options, fields of what is meant
    (None, {}, {"name": DEFAULT, "budget": 0.75}),
    (None, {"seed": 3}, {"name": DEFAULT, "seed": 3}),
    (None, {"active": 0.6}, {"name": DEFAULT, "budget": 0.6}),
    (None, {"active": 1}, {"name": DEFAULT, "budget": 1.0}),
    (None, {"active": 1, "expert_size": 16}, {"name": DEFAULT, "budget": 1.0, "expert_size": 16}),
    (None, {"refit": False}, {"name": DEFAULT, "refit": False, "repair": 0.0}),
    ("slim", {"active": 0.25}, {"budget": 0.25}),
    ("slim", {"active": 1}, {"budget": 1.0}),
    (None, {"active": 2}, {"name": "cmoe", "active": 2, "shared": 3}),
    (None, {"router": "linear"}, {"name": "cmoe", "router": "linear"}),
    (None, {"experts": 16, "shared": 2, "active": 2}, {"name": "cmoe", "experts": 16, "shared": 2, "active": 2}),
    (None, {"experts": 4, "active": 1}, {"experts": 4, "shared": 3, "active": 1}),
    ("cmoe", {"active": 1}, {"experts": 8, "shared": 3, "active": 1}),
    ("cmoe", {"active": 1.0}, {"experts": 8, "shared": 4, "active": 4}),
    ("cmoe", {"active": 0.5}, {"experts": 8, "shared": 2, "active": 2}),
    ("cmoe", {"active": 0.5, "experts": 6}, {"experts": 6, "shared": 1, "active": 2}),
    ("cmoe", {"active": 0.5, "expert_size": 16}, {"expert_size": 16, "shared": 0.25, "active": 0.25}),
    ("cmoe", {"active": 0.5, "experts": 16, "shared": 2}, {"experts": 16, "shared": 2, "active": 0.375}),
    ("cmoe", {"active": 0.5, "shared": 0.25}, {"experts": 8, "shared": 0.25, "active": 0.25}),
    ("moefication", {"active": 0.3}, {"active": 0.3, "shared": 0, "expert_size": 32}),
    ("moefication", {"active": 3}, {"active": 3, "shared": 0}),
    ("shared-only", {"active": 0.5}, {"budget": 0.5, "expert_size": 8}),
    ("shared-only", {"active": 0.5, "experts": 4}, {"budget": 0.5, "experts": 4}),
    ("shared-only", {"active": 1}, {"budget": 1.0}),
    ("cmoe", {"active": 1, "construction": "shared_only"}, {"budget": 1.0}),
    ("shared-only", {"active": 2, "shared": 1}, {"active": 2, "shared": 1, "budget": None}),
]


@pytest.mark.parametrize(("recipe", "options", "fields"), MEANT)
def test_what_words_mean(recipe, options, fields):
    made = chosen(recipe, **options)
    assert {name: getattr(made, name) for name in fields} == fields


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_a_share_is_of_the_multiply_adds_by_every_recipe_as_in_a_comparison(recipe, share):
    made = chosen(recipe, active=share)
    assert made == Recipe.of(recipe_at(recipe, share), name=recipe)
    spec = made.layer_spec(moefy.FFNWeights(up=torch.zeros(1536, 64), down=torch.zeros(1536, 64)), "here")
    assert (spec.shared + spec.top_k * spec.expert_size) / 1536 == pytest.approx(share, abs=0.13)


REFUSED = [
    *(
        (recipe, {"active": active}, "neither a share")
        for recipe in (None, *RECIPES)
        for active in (0, -1, 0.0, 1.5, 2.0)
    ),
    (None, {"active": float("nan")}, "neither a share"),
    ("reconstructed", {"active": 3}, "takes a share"),
    ("reconstructed", {"shared": 3}, "leave out --shared"),
    ("slim", {"shared": 0.2}, "leave out --shared"),
    ("shared-only", {"shared": 3, "active": 0.5}, "leave out --shared"),
    ("shared-only", {"shared": 3, "active": 1}, "leave out --shared"),
    ("cmoe", {"shared": 4, "active": 0.5}, "--shared 4 alone is 50.0%"),
    ("moefication", {"shared": 2, "active": 0.5}, "give --shared a share"),
    ("slim", {"router": "mlp"}, "leave out --router"),
    ("shared-only", {"router": "mlp"}, "leave out --router"),
    ("reconstructed", {"construction": "shared_only", "router": "mlp"}, "leave out --router"),
    (None, {"experts": 8, "expert_size": 8}, "give one of them"),
    (None, {"seed": 99999999999999999999}, "seed: Input should be less"),
]


@pytest.mark.parametrize(("recipe", "options", "sentence"), REFUSED)
def test_what_would_mean_nothing_or_be_ignored_is_refused(recipe, options, sentence):
    with pytest.raises(moefy.MoefyError, match=sentence):
        chosen(recipe, **options)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("shared: x", "shared: give a count such as 3 or a share such as 0.5, and not 'x'."),
        ("active: [1]", "active: give a count such as 3 or a share such as 0.5, and not '[1]'."),
        ("shared_budget: x", "shared_budget: give a share such as 0.5 or a list of them, and not 'x'."),
        ("shared_budget: [x]", "shared_budget: give a share such as 0.5 or a list of them, and not \"['x']\"."),
        ("shared: -1", "shared: Input should be greater than or equal to 0."),
        ("shared: true", "shared: give a count such as 3 or a share such as 0.5, and not 'True'."),
        ("experts: false", "experts: Input should be a valid integer."),
        ("shared_budget: [true]", "shared_budget: give a share such as 0.5 or a list of them, and not '[True]'."),
        ("most_active: .inf", "most_active: Input should be a finite number."),
        ("1: 2", "1: Keys should be strings."),
        ("routr: mlp", "routr: there is no such field, the nearest is router."),
        ("x: 1", f"x: there is no such field, use one of {', '.join(Recipe.model_fields)}."),
        (
            "most_active: 1",
            "most_active bounds a selection by threshold; name the recipe reconstructed, or set that.",
        ),
        ("shared: 0\nactive: 0", "no expert is shared and none active, so nothing would run; give more."),
    ],
)
def test_a_field_of_several_types_is_one_sentence(text, sentence):
    with pytest.raises(moefy.MoefyError) as error:
        Recipe.from_yaml(text)
    assert str(error.value) == f"The recipe is not valid: {sentence}"


@pytest.mark.parametrize("text", ["[" * 100_000, f"experts: {'9' * 6000}", "name: 2024-99-99", "experts: !!int ''"])
def test_what_yaml_cannot_read_is_one_sentence(text):
    with pytest.raises(moefy.MoefyError, match=r"recipe (nests its YAML too deeply|has a date or a number)"):
        Recipe.from_yaml(text)


def test_a_field_that_is_given_twice_is_one_sentence():
    with pytest.raises(moefy.MoefyError, match=r"^The recipe gives budget twice; keep one of the two\.$"):
        Recipe.from_yaml("name: reconstructed\nbudget: 0.5\nseed: 1\nbudget: 0.25\n")


@pytest.mark.parametrize("name", RECIPES)
def test_a_mapping_holds_what_differs_from_the_recipe_that_it_names(name):
    assert Recipe.from_yaml(f"name: {name}\nseed: 3") == Recipe.of(name, seed=3)
    assert Recipe.of({"name": name}) == RECIPES[name]
    whole = Recipe(name=name, experts=6, shared=1, active=2)
    assert Recipe.from_yaml(whole.to_yaml()) == whole


def test_the_documented_way_to_make_the_mean_a_bound():
    recipe = Recipe.from_yaml("name: reconstructed\nmost_active: 1")
    assert recipe == Recipe.of("reconstructed", most_active=1)
    spec = recipe.layer_spec(FFNWeights(torch.zeros(480, 64), torch.zeros(480, 64)), "ffn")
    assert spec.most == spec.top_k > 0


def test_most_active_may_be_any_number():
    ffn = FFNWeights(torch.zeros(48, 8), torch.zeros(48, 8))
    recipe = Recipe(experts=6, shared=0, active=2, selection="threshold", most_active=1e308)
    assert recipe.layer_spec(ffn, "ffn").most == 6


@pytest.mark.parametrize("router", [name for name, router in ROUTERS.items() if router.ships])
@pytest.mark.parametrize("allocation", ["uniform", "sensitivity"])
def test_a_budget_holds_the_router_whichever_it_is(router, allocation):
    model, feed = tiny.tiny("llama"), [tiny.inputs("llama")]
    recipe = Recipe.of(DEFAULT, router=router, budget=0.75, expert_size=2, allocation=allocation)
    report = moefy.convert(model, recipe, feed)
    biases = sum(x.experts + 1 for x in report.layers) / (2 * 48 * 32 * 3)
    assert report.active_fraction <= 0.75 + biases


SIZES = [
    # neurons of the FFNs, recipe, expert size that is taken or what the sentence says
    (48, Recipe.of(DEFAULT), 8),
    (100, Recipe.of(DEFAULT), 10),
    (100, Recipe.of(DEFAULT).control(), 10),
    (100, recipe_at(f"{DEFAULT}:oracle", 0.5), 10),
    (100, Recipe.of("moefication"), 25),
    (100, recipe_at("shared-only", 0.5), 10),
    (127, recipe_at("shared-only", 0.5), 1),
    (127, Recipe.of("slim"), 1),
    (
        100,
        Recipe.of(DEFAULT, expert_size=7),
        "7 neurons an expert .* give --expert-size a count that does, such as 4, 5, 10",
    ),
    (122, Recipe.of(DEFAULT), "give --expert-size a count that does, such as 1, 2, 61, 122"),
    (100, Recipe.of("cmoe"), "8 experts .* give --experts a count that does, such as 4, 5, 10, 20"),
    (127, Recipe.of(DEFAULT), "a prime number; use --recipe slim"),
    (127, Recipe.of("cmoe"), "a prime number; use --recipe slim"),
]


@pytest.mark.parametrize(("neurons", "recipe", "expected"), SIZES)
def test_a_recipe_s_own_expert_size_gives_way_to_one_that_fits(neurons, recipe, expected):
    model = tiny._decoder(tf.LlamaConfig, tf.LlamaForCausalLM, intermediate_size=neurons).eval()
    if isinstance(expected, str):
        with pytest.raises(moefy.MoefyError, match=expected):
            moefy.convert(model, recipe, [tiny.inputs("llama")])
        return
    report = moefy.convert(model, recipe, [tiny.inputs("llama")])
    assert report.recipe == Recipe.of(recipe, expert_size=expected)
    assert {x.neurons for x in report.layers} == {neurons}


@pytest.mark.parametrize("name", ["cmoe", "moefication", "reconstructed", "slim"])
def test_a_share_from_python_is_that_of_the_command_line(name):
    assert moefy.at_share(name, 0.5) == chosen(name, active=0.5) == moefy.at_share(name, np.float32(0.5))
    for share in (0, 1.5, float("nan"), "half"):
        with pytest.raises(moefy.MoefyError, match="above 0 and at most 1"):
            moefy.at_share(name, share)
