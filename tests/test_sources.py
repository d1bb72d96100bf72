"""Dense sources that are damaged or unusual: what is incomplete is refused in a sentence, what is merely bare loads."""

import copy
import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor

import gguf
import peft
import pytest
import torch
import transformers as tf
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

import moefy
import tiny
from moefy.quiet import loading
from moefy.sources import gguf_file
from moefy.sources.models import _check_rope, _load_pretrained, load_source
from words import pydoc_tokenizer


def saved(folder, family="llama", model=None):
    (tiny.tiny(family) if model is None else model).save_pretrained(folder)
    return folder


def with_config(folder, **changes):
    """Other values in config.json; None takes one out."""
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def with_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def drop(*names):
    return lambda weights: [weights.pop(name) for name in names]


def without(part):
    return lambda weights: [weights.pop(name) for name in list(weights) if part in name]


INCOMPLETE = {
    "a tensor": ("llama", {}, drop("model.layers.1.mlp.up_proj.weight"), "lacks the weight model.layers.1.mlp.up_proj"),
    "a head": ("llama", {}, drop("lm_head.weight"), "lacks the weight lm_head.weight"),
    "a classifier": ("bert", {}, drop("classifier.weight"), "lacks the weight classifier.weight"),
    "a head's pooler": ("bert", {}, drop("bert.pooler.dense.weight"), "lacks the weight bert.pooler.dense.weight"),
    "a layer": ("llama", {"num_hidden_layers": 3}, None, "model.layers.2.mlp.gate_proj.weight and 6 more, which its"),
    "room": ("llama", {"num_hidden_layers": 1}, None, "holds the weights model.layers.1.input_layernorm.weight, "),
    "room in gpt2": ("gpt2", {"n_layer": 1}, without("masked"), "holds the weights transformer.h.1.attn"),
    "room in t5": ("t5-v1.0", {"num_layers": 1}, None, "holds the weights encoder.block.1."),
    "biases": ("llama-mlp-bias", {"mlp_bias": False}, None, "holds the weights model.layers.0.mlp.down_proj.bias, "),
    "width": (
        "llama",
        {"intermediate_size": 64},
        None,
        "shape (32, 48), and its config.json asks for (32, 64)",
    ),
}


@pytest.mark.parametrize("what", INCOMPLETE)
def test_weights_and_config_that_differ_are_refused(what, tmp_path):
    family, config, change, message = INCOMPLETE[what]
    folder = saved(tmp_path / "source", family)
    with_config(folder, **config)
    if change:
        with_weights(folder, change)
    with pytest.raises(moefy.MoefyError) as refused:
        load_source(folder)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def quantised(**config):
    return lambda folder: with_config(folder, quantization_config=config)


def adapter(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


def no_object(text):
    return lambda folder: (folder / "config.json").write_bytes(text)


def sharded(index):
    """The folder's weights in a shard, with an index that is `index`."""

    def damage(folder):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(index)

    return damage


UNFIT = {
    "cut index": (sharded('{"weight_map": {"a": '), "model.safetensors.index.json is damaged; copy"),
    "index without shards": (sharded('{"metadata": {}}'), "model.safetensors.index.json is damaged; copy"),
    "missing shard": (
        sharded('{"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}'),
        "lacks model-00002-of-00002.safetensors, which model.safetensors.index.json names; copy",
    ),
    "far too many layers": (lambda f: with_config(f, num_hidden_layers=100_000), "describes 100,000 layers and its"),
    "bitsandbytes": (quantised(quant_method="bitsandbytes", load_in_4bit=True), "are quantised (bitsandbytes), and"),
    "gptq": (quantised(quant_method="gptq", bits=4), "are quantised (gptq), and"),
    "awq": (quantised(quant_method="awq", bits=4), "are quantised (awq), and"),
    "unknown quantisation": (quantised(quant_method="zork"), "are quantised (zork), and"),
    "unnamed quantisation": (quantised(bits=4), "are quantised (by an unnamed method), and"),
    "adapter": (adapter, "merge it into its base model"),
    "cut config": (no_object(b'{"model_type": "lla'), "config.json is damaged"),
    "binary config": (no_object(bytes(range(128, 256))), "config.json is damaged"),
    "config that is a list": (no_object(b"[]"), "config.json is damaged"),
    "no class of a model": (lambda f: with_config(f, architectures=["Trainer"]), "is a Trainer, which is no model"),
    "width that is no number": (lambda f: with_config(f, hidden_size="x"), "Field 'hidden_size' expected int, got str"),
    "no heads": (lambda f: with_config(f, num_attention_heads=0), "config.json says num_attention_heads: 0, which no"),
    "negative width": (lambda f: with_config(f, hidden_size=-32), "config.json says hidden_size: -32, which no"),
    "no layers": (lambda f: with_config(f, num_hidden_layers=0), "config.json says num_hidden_layers: 0, which no"),
    "a part's size": (lambda f: with_config(f, text_config={"vocab_size": -1}), "config.json says vocab_size: -1, "),
    "type that is none": (lambda f: with_config(f, dtype="zork"), "cannot be loaded as its config.json describes it: "),
    "activation": (
        lambda f: with_config(f, hidden_act="zork"),
        "its config.json names 'zork', which this transformers",
    ),
}


@pytest.mark.parametrize("what", UNFIT)
def test_sources_that_do_not_fit_are_a_sentence(what, tmp_path):
    damage, message = UNFIT[what]
    folder = saved(tmp_path / "source")
    damage(folder)
    with pytest.raises(moefy.MoefyError) as refused:
        load_source(folder)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def bare(family, name, **options):
    return getattr(tf, name)(tiny.tiny(family).config, **options)


def extra(weights):
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["other_head.weight"] = torch.ones(4, 4)


# Model, changes of its config and weights, and the class it loads as.
COMPLETE = {
    "bare bert": (lambda: bare("bert", "BertModel"), {}, None, "BertModel"),
    "bert without pooler": (lambda: bare("bert", "BertModel", add_pooling_layer=False), {}, None, "BertModel"),
    "bare, of no class": (lambda: bare("bert", "BertModel"), {"architectures": None}, None, "BertModel"),
    "bare llama, of no class": (lambda: bare("llama", "LlamaModel"), {"architectures": None}, None, "LlamaModel"),
    "llama of no class": (lambda: tiny.tiny("llama"), {"architectures": None}, None, "LlamaForCausalLM"),
    "another class": (lambda: tiny.tiny("llama"), {"architectures": ["XForCausalLM"]}, None, "LlamaForCausalLM"),
    "encoder of a headed bert": (lambda: tiny.tiny("bert"), {"architectures": ["BertModel"]}, None, "BertModel"),
    "bare vit of a classifier": (lambda: tiny.tiny("vit"), {"architectures": ["ViTModel"]}, None, "ViTModel"),
    "tied head": (lambda: tiny.tiny("gpt2"), {}, None, "GPT2LMHeadModel"),
    "t5's encoder": (lambda: tiny.tiny("t5-v1.0"), {"architectures": ["T5EncoderModel"]}, None, "T5EncoderModel"),
    "old buffers and other heads": (lambda: tiny.tiny("llama"), {}, extra, "LlamaForCausalLM"),
}


@pytest.mark.parametrize("what", COMPLETE)
def test_what_is_whole_still_loads(what, tmp_path):
    make, config, change, expected = COMPLETE[what]
    folder = saved(tmp_path / "source", model=make())
    with_config(folder, **config)
    if change:
        with_weights(folder, change)
    assert type(load_source(folder)[0]).__name__ == expected


def write_gguf(path, leave_out=(), layers=2, merges=None):
    """The tiny llama and a tokenizer of single letters as GGUF, less some tensors."""
    model, writer = tiny.tiny("llama"), GGUFWriter(path, "llama")
    config = model.config
    writer.add_block_count(layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2" if merges else "llama")
    if merges:
        writer.add_token_merges(merges)
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", *(chr(33 + i).encode() for i in range(config.vocab_size - 3))])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([2, 3, 3, *[1] * (config.vocab_size - 3)])
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "model.layers.": "blk.", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        if name not in leave_out:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_must_be_complete_too(tmp_path):
    assert type(load_source(write_gguf(tmp_path / "whole.gguf"))[0]).__name__ == "LlamaForCausalLM"
    cases = {
        "lacks the weight model.layers.1.mlp.up_proj.weight": {"leave_out": ("blk.1.ffn_up.weight",)},
        "model.layers.2.mlp.gate_proj.weight and 6 more": {"layers": 3},
        "holds 2 layers, and its metadata says 1": {"layers": 1},
        "describes 100,000 layers, and it holds 21 tensors": {"layers": 100_000},
    }
    for message, changes in cases.items():
        with pytest.raises(moefy.MoefyError, match=message):
            load_source(write_gguf(tmp_path / "damaged.gguf", **changes))


def test_a_gguf_is_read_once_and_as_transformers_reads_it(tmp_path, monkeypatch):
    whole, other = write_gguf(tmp_path / "whole.gguf"), write_gguf(tmp_path / "other.gguf", layers=1)
    expected = tf.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=whole.name, dtype=torch.float32).state_dict()
    read = []
    monkeypatch.setattr(gguf.GGUFReader, "_build_fields", counting(gguf.GGUFReader._build_fields, read))
    originals = gguf.GGUFReader, gguf.get_tensor_name_map
    model, tokenizer = load_source(whole)
    assert len(read) == 1
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == originals
    found = model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert tokenizer("A").input_ids == tf.AutoTokenizer.from_pretrained(tmp_path, gguf_file=whole.name)("A").input_ids
    with gguf_file.read_once(whole, gguf_file.read_gguf(whole)):
        assert gguf.GGUFReader(other).fields["llama.block_count"].contents() == 1
        assert gguf.GGUFReader(whole, "c").data.flags.writeable  # another mode is another reader


def counting(function, calls):
    def counted(*args):
        calls.append(args)
        return function(*args)

    return counted


def test_ggufs_load_in_threads(tmp_path):
    files = [write_gguf(tmp_path / f"{i}.gguf", layers=2) for i in range(4)]
    originals = gguf.GGUFReader, gguf.get_tensor_name_map
    with ThreadPoolExecutor(4) as pool:
        models = [model for model, _ in pool.map(load_source, files)]
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == originals
    first = models[0].state_dict()
    assert all(torch.equal(tensor, first[name]) for m in models for name, tensor in m.state_dict().items())


def test_a_model_is_counted_while_it_loads_and_nobody_elses_bar_is_shown(tmp_path, capsys):
    tiny.tiny("llama").save_pretrained(tmp_path / "source")
    capsys.readouterr()  # the bar of saving
    for source in (tmp_path / "source", write_gguf(tmp_path / "source.gguf")):
        steps = []
        with loading(lambda done, total, steps=steps: steps.append((done, total))):
            load_source(source)
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert len(steps) > 10
        assert steps[-1][0] == steps[-1][1]
    assert not capsys.readouterr().err


DAMAGE = [
    *(("tokenizer.json", junk) for junk in (b"", b'{"version": "1.0", "trunc', b"{}", b"\xff\xfe")),
    *(("tokenizer_config.json", junk) for junk in (b"junk", b"[]", b'{"tokenizer_class": 3}')),
]


@pytest.mark.parametrize(("file", "junk"), DAMAGE)
def test_a_damaged_tokenizer_is_a_sentence(file, junk, tmp_path):
    folder = saved(tmp_path / "source")
    pydoc_tokenizer().save_pretrained(folder)
    (folder / file).write_bytes(junk)
    with pytest.raises(moefy.MoefyError) as refused:
        load_source(folder)
    assert str(refused.value).startswith(f"The tokenizer of {folder} cannot be loaded (")
    assert str(refused.value).endswith("copy or download tokenizer.json and tokenizer_config.json again.")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("file", ["tokenizer.model", "spiece.model"])
def test_a_tokenizer_that_takes_a_package_says_which(file, tmp_path, monkeypatch):
    folder = saved(tmp_path / "source")
    (folder / file).write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "sentencepiece" else find(name, *a)
    )
    with pytest.raises(moefy.MoefyError) as refused:
        load_source(folder)
    assert f"({file}), which takes a package to read: pip install sentencepiece" in str(refused.value)


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_a_model_needs_no_tokenizer(family, tmp_path):
    folder = saved(tmp_path / "source", family)
    (folder / "preprocessor_config.json").write_text("{}")
    assert load_source(folder)[1] is None


def test_an_adapter_beside_a_model_is_not_applied_unasked(tmp_path):
    folder, model = saved(tmp_path / "m"), tiny.tiny("llama")
    model.name_or_path = str(folder)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    for load in (load_source, lambda name: _load_pretrained(str(name), "auto", False)):  # the second as from the hub
        with pytest.raises(moefy.MoefyError, match="an adapter beside its model"):
            load(folder)


def test_a_shard_elsewhere_is_not_read(tmp_path):
    folder = saved(tmp_path / "m")
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(tmp_path / "stray.safetensors")
    save_file({}, folder / "other.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../stray.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(moefy.MoefyError, match=r"stray.safetensors, which model.safetensors.index.json names"):
        load_source(folder)


@pytest.mark.parametrize("scaled", ["linear", "freqs", "", "ones"])
def test_a_gguf_with_scaled_positions_is_not_taken_for_one_without(scaled, tmp_path):
    """llama.cpp's converter writes Llama 3.1's scaling as a tensor, which transformers does not look at."""
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    if scaled == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    elif scaled:
        writer.add_tensor("rope_freqs.weight", torch.tensor([1.0, 1, 1, 1 if scaled == "ones" else 8]).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader, config = gguf.GGUFReader(tmp_path / "m.gguf"), copy.deepcopy(tiny.tiny("llama").config)
    if scaled in ("linear", "freqs"):
        with pytest.raises(moefy.MoefyError, match="scales its rotary positions"):
            _check_rope(tmp_path / "m.gguf", reader, config)
        config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    _check_rope(tmp_path / "m.gguf", reader, config)
