"""What people try first and in odd ways: outputs in odd places, little text, no tokenizer, float16, wrong kinds of
models. Each is right or refused in a sentence, and nothing is lost."""

import shutil
import threading

import pytest
import torch
from torch import nn

import moefy
import tiny
from command import moefy as command
from moefy import kernels
from moefy.calibrate import output_mask, real_tokens
from moefy.checkpoint import check_output
from moefy.cli.common import number
from moefy.construct.elimination import eliminate
from moefy.conversion.sensitivity import output_metrics
from moefy.export.glm4_moe import check
from moefy.hf import auto_class
from moefy.measure import compare as comparison
from moefy.measure.evaluate import agreement
from moefy.moe import moe_layers
from moefy.routers import ROUTERS
from moefy.sites import find_sites
from moefy.sources.models import load_source
from moefy.stats import NeuronStats
from moefy.tuning.finetune import Schedule, finetune
from moefy.types import linear
from native_problem import needs_native
from test_compare import data as windows
from test_sources import saved

RECIPE = moefy.Recipe(experts=6, shared=1, active=2, top_activated=4)


def converted(family="llama", **changes):
    model = tiny.tiny(family)
    moefy.convert(model, moefy.Recipe.of(RECIPE, **changes), [tiny.inputs(family)])
    return model


def test_the_folder_that_the_shell_is_in_stays(tmp_path, monkeypatch):
    here = tmp_path / "outer" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    for place in (".", here, "..", tmp_path):
        with pytest.raises(moefy.MoefyError, match="is the current directory, or holds it"):
            check_output(place, overwrite=True)
    assert check_output("new") == here / "new"


def test_an_empty_folder_needs_no_overwrite(tmp_path):
    (tmp_path / "empty").mkdir()
    out = moefy.save(converted(), tmp_path / "empty")
    assert moe_layers(moefy.load(out))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("family", ["bert", "t5-v1.0", "llama"])
def test_no_tokenizer_is_made_up(family, tmp_path):
    assert load_source(saved(tmp_path / "source", family))[1] is None


def test_little_text_and_another_recipe_are_said(dense, tmp_path):
    (tmp_path / "short.txt").write_text("the value of the name of the object is the type of it and it is not")
    options = ["--calibration", tmp_path / "short.txt", "--window", 4, "--windows", 2, "--experts", 8]
    done = command("convert", dense, tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert "These options mean the recipe cmoe; " in done.stderr
    assert "The calibration has 8 tokens, fewer than the model is wide (32)" in " ".join(done.stderr.split())


def test_tokens_that_are_all_alike_still_order_the_neurons():
    ffn = next(iter(find_sites(tiny.tiny("llama")))).read()
    for x in (torch.ones(64, ffn.width), torch.zeros(64, ffn.width), torch.full((64, ffn.width), 1e-18)):
        found = eliminate(NeuronStats(ffn, lambda x=x: iter([x])))
        assert found.order.sort().values.tolist() == list(range(ffn.neurons))
        assert found.cost.isfinite().all()


@needs_native
def test_int8_is_not_saved_and_leaves_nothing(tmp_path):
    model = converted()
    moefy.pack(model, "int8")
    with pytest.raises(moefy.MoefyError, match="Experts in int8 cannot be saved"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_float16_is_measured_as_float32_is():
    feed = tiny.inputs("llama", batch=16)
    found = []
    for dtype in (torch.float32, torch.float16):
        model = tiny.tiny("llama").to(dtype)
        sites = {site.entry_name: site for site in find_sites(model)}
        with torch.no_grad():
            found.append(output_metrics(model, sites, [feed]))
    for name, exact in found[0].items():
        assert (found[1][name] - exact).norm() < 0.2 * exact.norm()
        assert found[1][name].dtype == torch.float32
        assert float(found[1][name].trace()) == pytest.approx(float(exact.trace()), rel=0.1)


def test_models_of_the_wrong_kind_say_what_to_do(tmp_path):
    moefy.save(converted(construction="shared_only", slim=True), tmp_path / "slim")
    with pytest.raises(moefy.MoefyError, match="has no experts that moefy made; convert it first"):
        moefy.tune(moefy.load(tmp_path / "slim"), [tiny.inputs("llama")] * 3)
    with pytest.raises(moefy.MoefyError, match="it has no experts; they run a slim or a dense one as it is"):
        check(moefy.load(tmp_path / "slim"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(moefy.MoefyError, match=r"model.gguf is a file and no directory of a converted model"):
        moefy.load(tmp_path / "model.gguf")

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny.tiny("llama")
            self.config = self.inner.config

        def forward(self, **feed):
            return self.inner(**feed)

    wrapper = Wrapper()
    with pytest.raises(moefy.MoefyError, match="This Wrapper is no model of transformers"):
        moefy.convert(wrapper, RECIPE, [tiny.inputs("llama")])
    assert not moe_layers(wrapper)


CLASSES = {
    "LlamaForCausalLM": "AutoModelForCausalLM",
    "GPT2LMHeadModel": "AutoModelForCausalLM",
    "BambooForCausalLM": "AutoModelForCausalLM",
    "T5ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "WhisperForConditionalGeneration": "AutoModelForSpeechSeq2Seq",
    "LlavaForConditionalGeneration": "AutoModelForImageTextToText",
    "BertForQuestionAnswering": "AutoModelForQuestionAnswering",
    "BertForMultipleChoice": "AutoModelForMultipleChoice",
    "BertModel": "AutoModel",
    "NoSuchModel": "AutoModel",
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_card_names_the_class_that_keeps_the_head(name):
    assert auto_class(name) == CLASSES[name]


def test_a_decoder_s_rows_are_not_masked_by_the_encoder_s():
    model, feed = tiny.tiny("t5-v1.0"), tiny.inputs("t5-v1.0")
    labels = torch.tensor([[3, 4, 5, 6, -100], [3, 4, -100, -100, -100]])
    batch = {"input_ids": feed["input_ids"][:, :5], "attention_mask": torch.ones(2, 5).long(), "labels": labels}
    batch["attention_mask"][:, 2:] = 0
    for mask in (output_mask(model, batch), real_tokens(model, "decoder.block.0.layer.2", batch)):
        assert torch.equal(mask, labels != -100)
    assert torch.equal(real_tokens(model, "encoder.block.0.layer.1", batch), batch["attention_mask"])
    moved = tiny.tiny("t5-v1.0", seed=1)
    everything = agreement(moved, model, [{**batch, "decoder_attention_mask": torch.ones(2, 5).long()}])
    assert agreement(moved, model, [batch]).error != everything.error


def test_a_field_of_a_mapping_is_not_overridden_by_its_recipe():
    assert moefy.Recipe.of({"name": "reconstructed", "experts": 16}).expert_size is None
    assert moefy.Recipe.of({"name": "moefication", "budget": 0.5}).budget == 0.5
    for fields in ({"shared": 2}, {"active": 0.3}):
        with pytest.raises(moefy.MoefyError, match="a budget decides how many experts are shared and active"):
            moefy.Recipe.of({"name": "reconstructed", **fields})
        with pytest.raises(moefy.MoefyError, match="a budget decides how many experts are shared and active"):
            moefy.Recipe.of("reconstructed", **fields)


def test_a_full_disk_is_no_property_of_a_recipe(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise moefy.MoefyError("No space left on device")

    dense, runs = tiny.tiny("llama"), [comparison.Run("shared-only", 0.5, 0)]
    with monkeypatch.context() as patch:
        patch.setattr(comparison, "convert", full)
        with pytest.raises(moefy.MoefyError, match="No space left"):
            comparison.compare(dense, runs, windows(), tmp_path / "lines", rounds=0)
    assert "perplexity" in comparison.compare(dense, runs, windows(), tmp_path / "lines", rounds=0)[1][0]


def test_asking_what_kernel_to_use_does_not_choose_it(monkeypatch):
    names = iter(["masked"])

    class Choices(tuple):
        def __contains__(self, name):  # another thread, amid the check
            kernels._choice = next(names, kernels._choice)
            return super().__contains__(name)

    monkeypatch.setattr(kernels, "_choice", "reference")
    monkeypatch.setattr(kernels, "_CHOICES", Choices(kernels._CHOICES))
    kernels.check()
    assert kernels._choice == "masked"


def test_autocast_rounds_many_rows_as_few():
    x, weight = torch.randn(80, 32), torch.randn(48, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == linear(x[:8], weight).dtype == torch.bfloat16
        assert torch.equal(linear(x, weight)[:8], linear(x[:8], weight))


@pytest.mark.parametrize("router", ROUTERS)
def test_a_router_costs_what_was_planned(router):
    spec = moefy.Recipe.of(RECIPE, router=router).layer_spec(next(iter(find_sites(tiny.tiny("llama")))).read(), "here")
    assert ROUTERS[router](spec).multiply_adds() == ROUTERS[router].planned_multiply_adds(spec)


def test_one_training_at_a_time_keeps_a_state(tmp_path):
    features = [{"input_ids": [3, 4, 5], "attention_mask": [1, 1, 1], "labels": i % 2} for i in range(8)]
    refused = []

    def train(progress=None):
        model = tiny.tiny("bert-cls") if "bert-cls" in tiny.ALL else tiny.tiny("bert")
        feed = features if hasattr(model, "classifier") else [{**f, "labels": f["input_ids"]} for f in features]
        return finetune(model, feed, 0, Schedule(8, 4), state=tmp_path / "state", progress=progress)

    def second(*_):
        def run():
            try:
                train()
            except moefy.MoefyError as error:
                refused.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    train(second)
    assert refused
    assert all(said.startswith("Another process keeps its training in") for said in refused)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_an_answer_is_printed_without_the_prompt(dense, tmp_path):
    folder = shutil.copytree(dense, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %} of")
    whole = command("generate", folder, "the value", "--tokens", 5).stdout
    answer = command("generate", folder, "the value", "--tokens", 5, "--chat").stdout
    assert "the value" in whole
    assert answer.strip()
    assert "the value" not in answer


@pytest.mark.parametrize(("text", "share"), [("50%", 0.5), ("12.5 %", 0.125), ("100%", 1.0), ("2", 2), ("0.5", 0.5)])
def test_shares_may_be_written_as_percentages(text, share):
    found = number("--active", text)
    assert (found, type(found)) == (share, type(share))
