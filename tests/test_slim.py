"""Slim models: ordinary checkpoints with narrower FFNs, for every family, that plain transformers loads."""

import json
import subprocess
import sys

import pytest
import torch
import transformers as tf
from typer.testing import CliRunner

import moefy
import tiny
from moefy import slim
from moefy.cli.app import app
from moefy.moe import moe_layers
from moefy.sites import find_sites
from moefy.sources.models import load_source
from test_families import close
from words import pydoc_tokenizer

KEPT = 32  # of 48: a budget of 0.75 is 36, and whole blocks of 32 are kept
RECIPE = moefy.Recipe.of("slim", budget=0.75)
AUTO = {
    "ForCausalLM": tf.AutoModelForCausalLM,
    "LMHeadModel": tf.AutoModelForCausalLM,
    "T5ForConditionalGeneration": tf.AutoModelForSeq2SeqLM,
    "WhisperForConditionalGeneration": tf.AutoModelForSpeechSeq2Seq,
    "ForSequenceClassification": tf.AutoModelForSequenceClassification,
    "ForMaskedLM": tf.AutoModelForMaskedLM,
    "ForImageClassification": tf.AutoModelForImageClassification,
}


def converted(family, recipe=RECIPE):
    model = tiny.tiny(family)
    moefy.convert(model, recipe, [tiny.inputs(family, batch=8)])
    return model


def auto(architecture):
    return next(cls for end, cls in AUTO.items() if architecture.endswith(end))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_is_saved_as_an_ordinary_model(family, tmp_path):
    dense, model, feed = tiny.tiny(family), converted(family), tiny.inputs(family)
    moefy.save(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == dense.config.model_type
    assert config["architectures"] == [type(dense).__name__]
    assert "moefy" not in json.dumps(config).lower()
    again = auto(type(dense).__name__).from_pretrained(tmp_path / "out").eval()
    assert type(again) is type(dense)
    assert not moe_layers(again)
    out = tiny.output(again, feed)
    assert close(out, tiny.output(model, feed))
    assert not close(out, tiny.output(dense, feed))
    layers = moe_layers(model)
    for was, now in zip(find_sites(dense), find_sites(again), strict=True):
        rows = layers[was.entry_name].neurons[:KEPT].long()
        assert torch.equal(rows, rows.sort().values)
        assert torch.equal(now.read().up, was.read().up[rows])
        assert not torch.equal(now.read().down, was.read().down[rows])  # refitted
    saved = {name for name, _ in again.named_parameters()}
    assert saved == {name for name, _ in dense.named_parameters()}


LOADS = """
import sys, torch, transformers
torch.set_grad_enabled(False)
for family, name, feed in torch.load(sys.argv[1] + "/feeds.pt"):
    model = getattr(transformers, name).from_pretrained(f"{sys.argv[1]}/{family}").eval()
    torch.save(model(**feed).logits, f"{sys.argv[1]}/{family}/logits.pt")
assert not any(module.split(".")[0] == "moefy" for module in sys.modules)
"""


def test_a_process_without_moefy_loads_them(tmp_path):
    plain = [family for family in tiny.FAMILIES if family != "bamboo"]  # which transformers does not have
    feeds, expected = [], {}
    for family in plain:
        model, feed = converted(family), tiny.inputs(family)
        architecture = model.config.architectures[0]
        moefy.save(model, tmp_path / family)
        feeds.append((family, auto(architecture).__name__, feed))
        with torch.no_grad():
            expected[family] = model(**feed).logits
    torch.save(feeds, tmp_path / "feeds.pt")
    done = subprocess.run([sys.executable, "-c", LOADS, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for family in plain:
        logits = torch.load(tmp_path / family / "logits.pt")
        assert close(logits, expected[family]), family


@pytest.mark.parametrize(
    ("neurons", "budget", "kept"),
    [(1536, 0.5, 768), (1000, 0.5, 480), (48, 0.5, 24), (100, 0.99, 96), (100, 1.0, 100), (8960, 0.3, 2688)],
)
def test_whole_blocks_within_the_budget(neurons, budget, kept):
    ffn = moefy.FFNWeights(up=torch.zeros(neurons, 4), down=torch.zeros(neurons, 4))
    spec = moefy.Recipe.of("slim", budget=budget).layer_spec(ffn, "here")
    assert spec.shared == kept <= budget * neurons
    assert spec.neurons == neurons
    assert spec.top_k == 0
    assert spec.router is None


def test_a_budget_that_keeps_nothing_is_refused():
    ffn = moefy.FFNWeights(up=torch.zeros(48, 4), down=torch.zeros(48, 4))
    with pytest.raises(moefy.MoefyError, match="keeps no neuron of here"):
        moefy.Recipe.of("slim", budget=0.01).layer_spec(ffn, "here")


def test_a_slim_recipe_routes_nothing_and_has_one_width():
    with pytest.raises(moefy.MoefyError, match="routes nothing"):
        moefy.Recipe.of("reconstructed", slim=True)
    with pytest.raises(moefy.MoefyError, match="one width"):
        moefy.Recipe.of("slim", allocation="sensitivity")
    model = tiny.tiny("llama")
    moefy.convert(model, moefy.Recipe(experts=6, shared=1, active=2, top_activated=4), [tiny.inputs("llama")])
    with pytest.raises(moefy.MoefyError, match="has routed experts"):
        slim.ordinary(model)


def test_encoder_and_decoder_may_have_different_widths(tmp_path):
    config = tiny.tiny("whisper").config
    config.decoder_ffn_dim = 80
    torch.manual_seed(0)
    model, feed = tf.WhisperForConditionalGeneration(config).eval(), tiny.inputs("whisper")
    moefy.convert(model, RECIPE, [feed])
    moefy.save(model, tmp_path / "out")
    again = tf.AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "out")
    assert (again.config.encoder_ffn_dim, again.config.decoder_ffn_dim) == (KEPT, 32)
    assert close(tiny.output(again, feed), tiny.output(model, feed))


def test_widths_that_the_config_cannot_say_are_refused_before_anything_changes():
    model = tiny.tiny("llama")
    wider = tf.LlamaConfig(**{**model.config.to_dict(), "intermediate_size": 96})
    model.model.layers[1].mlp = tf.models.llama.modeling_llama.LlamaMLP(wider)
    with pytest.raises(moefy.MoefyError, match=r"intermediate_size does not give the width of model\.layers\.1\.mlp"):
        moefy.convert(model, RECIPE, [tiny.inputs("llama")])
    assert not moe_layers(model)


def test_gpt2_without_a_width_in_its_config(tmp_path):
    config = tiny.tiny("gpt2").config
    config.n_inner = None  # four times the width: 128
    torch.manual_seed(0)
    model, feed = tf.GPT2LMHeadModel(config).eval(), tiny.inputs("gpt2")
    moefy.convert(model, RECIPE, [feed])
    moefy.save(model, tmp_path / "out")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.n_inner == 96
    assert close(tiny.output(again, feed), tiny.output(model, feed))


def test_bfloat16_has_the_bits_of_the_model_in_memory(tmp_path):
    tiny.tiny("llama").save_pretrained(tmp_path / "dense")
    model, _ = load_source(tmp_path / "dense", dtype="bfloat16")
    feed = tiny.inputs("llama")
    moefy.convert(model, RECIPE, [feed])
    moefy.save(model, tmp_path / "out")
    again, _ = load_source(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    # Everything that is not a weight, such as the rotary frequencies, is in the type that transformers gives it.
    for name, buffer in slim.ordinary(model).named_buffers():
        assert torch.equal(buffer, again.get_buffer(name)), name
    for name, parameter in slim.ordinary(model).named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_moefy_loads_it_too(tmp_path):
    model, feed = converted("opt"), tiny.inputs("opt")
    moefy.save(model, tmp_path / "out")
    again = moefy.load(tmp_path / "out")
    assert type(again) is tf.OPTForCausalLM
    assert close(tiny.output(again, feed), tiny.output(model, feed))
    assert moefy.load(tmp_path / "out", dtype=torch.bfloat16).dtype == torch.bfloat16
    for broken in ("{", "[]", "{}", '{"recipe": 3}'):
        (tmp_path / "out" / "report.json").write_text(broken)
        with pytest.raises(moefy.MoefyError, match="model type is opt"):
            moefy.load(tmp_path / "out")


def test_the_card_and_the_report_say_what_it_is(tmp_path):
    for family, sentence in (("llama", "is not folded in"), ("opt", "is folded into the output bias")):
        moefy.save(converted(family), tmp_path / family, source="acme/tiny")
        card = (tmp_path / family / "README.md").read_text()
        for part in ("base_model: acme/tiny", "library_name: transformers", "keep 32 of 48 neurons", sentence):
            assert part in card
        assert "import moefy" not in card
        assert "mixture" not in card
        report = json.loads((tmp_path / family / "report.json").read_text())
        assert report["recipe"]["name"] == "slim"
        assert all(n == {"dense": 48, "kept": KEPT} for n in report["slim"]["neurons"].values())
        assert sentence in report["slim"]["output_bias"]


def test_the_output_bias_takes_the_constant_part():
    model, dense = converted("opt"), tiny.tiny("opt")
    for was, now in zip(find_sites(dense), find_sites(slim.ordinary(model)), strict=True):
        assert not torch.equal(was.read().down_bias, now.read().down_bias)


def test_a_slim_model_takes_memory_for_its_ffns_alone():
    model = converted("opt")
    plain = slim.ordinary(model)
    ffns = {f"{site.name}.{part}" for site in find_sites(plain) for part in ("fc1.", "fc2.")}
    mine, theirs = dict(plain.named_parameters()), dict(model.named_parameters())
    for name, parameter in mine.items():
        if any(name.startswith(ffn) for ffn in ffns):
            parameter.data.zero_()
        else:
            assert parameter.data_ptr() == theirs[name].data_ptr(), name
    for name, parameter in model.named_parameters():
        assert parameter.any(), name


def test_on_the_command_line_and_again(tmp_path):
    tiny.tiny("llama").save_pretrained(tmp_path / "dense")
    pydoc_tokenizer().save_pretrained(tmp_path / "dense")

    def run(*arguments):
        done = CliRunner().invoke(app, [*map(str, arguments), "--window", "32", "--windows", "4"])
        assert done.exit_code == 0, done.output
        return done.stdout

    out, twice = tmp_path / "out", tmp_path / "twice"
    shown = run("convert", tmp_path / "dense", out, "--recipe", "slim", "--active", "0.75")
    assert "ordinary model" in " ".join(shown.split())
    figures = json.loads(run("eval", out, "--against", tmp_path / "dense", "--json"))
    assert figures["perplexity"] > 0
    assert "active_fraction" not in figures
    run("convert", out, twice, "--recipe", "cmoe")  # it is a dense model, so it can be converted like one
    assert json.loads((twice / "config.json").read_text())["intermediate_size"] == KEPT
