"""Exports: the same experts, chosen and weighted alike, in architectures and engines that know nothing of moefy."""

import copy
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import gguf
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import command
import moefy
import tiny
from moefy.errors import MoefyError
from moefy.export import EXPORTERS, export
from moefy.export.gguf import TYPES, _check_room
from moefy.export.glm4_moe import SOURCES, stock
from moefy.moe import MoEFFN, moe_layers
from moefy.sources.models import load_source, smollm2_gguf
from moefy.types import Partition
from words import pydoc_tokenizer

ENGINE = moefy.Recipe.of("engine", experts=6, budget=0.8, shared_budget=0.5)
IDS = torch.arange(3, 67).reshape(2, 32)


def converted(family, recipe=ENGINE, **changes):
    """A converted tiny model whose experts matter: random weights of FFNs are small beside the residual stream."""
    model = tiny.tiny(family)
    if family == "qwen2":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    for name, value in changes.items():
        setattr(model.config, name, value)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." in name:
                parameter.mul_(4)
    moefy.convert(model, recipe, [{"input_ids": IDS}])
    return model


def spreads(model):
    return dict.fromkeys(moe_layers(model), 1.0)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Exported directories of every source, their logits and those of the converted models."""
    folder = tmp_path_factory.mktemp("exported")
    expected = {}
    for family in SOURCES:
        model = converted(family)
        export(model, folder / family, pydoc_tokenizer(), IDS)
        with torch.no_grad():
            expected[family] = model(input_ids=IDS).logits
    code = (
        "import sys, torch, transformers\n"
        "ids = torch.arange(3, 67).reshape(2, 32)\n"
        "for family in sys.argv[2:]:\n"
        "    model = transformers.AutoModelForCausalLM.from_pretrained(f'{sys.argv[1]}/{family}')\n"
        "    assert type(model).__name__ == 'Glm4MoeForCausalLM' and 'moefy' not in sys.modules\n"
        "    with torch.no_grad():\n"
        "        torch.save(model(input_ids=ids).logits, f'{sys.argv[1]}/{family}.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code, folder, *SOURCES], check=True, capture_output=True)
    return folder, expected


@pytest.mark.parametrize("family", SOURCES)
def test_stock_transformers_computes_the_same(family, written):
    folder, expected = written
    got, wanted = torch.load(folder / f"{family}.pt"), expected[family]
    # Experts are weighted with 1 up to half a scaled logit: 2^-11 of what they add, and at most a few times that.
    assert (got - wanted).norm() < 2**-9 * wanted.norm()
    with torch.no_grad():
        dense = moefy.to_dense(converted(family))(input_ids=IDS).logits
    assert (dense - wanted).norm() > 2**-6 * wanted.norm()
    config = json.loads((folder / family / "config.json").read_text())
    assert config["partial_rotary_factor"] == 1.0  # for engines on transformers 4
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert tf.AutoTokenizer.from_pretrained(folder / family)("the")["input_ids"]


@pytest.mark.parametrize("option", [{}, {"balance": 0.05}])  # a linear router takes the bias into its own
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_what_was_tuned_is_exported(family, option, tmp_path):
    model = converted(family)
    before = model(input_ids=IDS).logits
    # At 5e-3 two experts of one token score 3e-5 apart (of a spread of 2), too near for a sigmoid in float32.
    moefy.tune(model, [{"input_ids": IDS[i : i + 1]} for i in (0, 1)] * 6, rate=4e-3, **option)
    moefy.save(model, tmp_path / "tuned")
    tuned = moefy.load(tmp_path / "tuned")
    done = export(tuned, tmp_path / "out", pydoc_tokenizer(), IDS)
    got = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=IDS).logits
    wanted = model(input_ids=IDS).logits
    assert done.difference < 2**-9
    assert (got - wanted).norm() < 2**-9 * wanted.norm()
    assert (before - wanted).norm() > 2**-6 * wanted.norm()


def test_a_tuned_gate_is_refused(tmp_path):
    model = converted("llama")
    moefy.tune(model, [{"input_ids": IDS}] * 4, gate_scale=True, balance=0.05)
    with pytest.raises(MoefyError, match=r"gate scale or a load-balancing bias.*tune without them"):
        export(model, tmp_path / "out", pydoc_tokenizer(), IDS)


def test_the_same_experts_are_chosen():
    model = converted("llama")
    for moe in moe_layers(model).values():
        moe.router.bias.add_(torch.randn(moe.spec.experts))  # one that decides
    made = stock(model, spreads(model))
    x = torch.randn(512, tiny.WIDTH)
    for i, moe in enumerate(moe_layers(model).values()):
        with torch.no_grad():
            ours = moe.route(x).sort(-1).values
            _, weights, theirs = made.model.layers[i].mlp.gate(x)
        same = (theirs.sort(-1).values == ours).all(-1).float().mean()
        assert same > 0.99  # near ties may fall the other way
        assert (weights - 1).abs().max() < 0.01


def test_layers_that_stay_dense_lead():
    model = converted("llama")
    site = "model.layers.0.mlp"
    moe = moe_layers(model)[site]
    ffn = moe.to_dense()
    every = Partition(torch.arange(ffn.neurons), torch.empty(0, 0, dtype=torch.long))
    spec = moefy.LayerSpec(
        width=ffn.width, shared=ffn.neurons, experts=0, expert_size=0, top_k=0, router=None,
        activation=ffn.activation, gated=True,
    )  # fmt: skip
    model.model.layers[0].mlp = MoEFFN.from_dense(ffn, every, spec, None)
    made = stock(model, spreads(model))
    assert made.config.first_k_dense_replace == 1
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        assert (made(input_ids=IDS).logits - wanted).norm() < 2**-9 * wanted.norm()
    model.model.layers[0].mlp, model.model.layers[1].mlp = moe, model.model.layers[0].mlp
    with pytest.raises(MoefyError, match="not followed by such layers only"):
        stock(model, spreads(model))


def test_bfloat16_keeps_its_router_in_float32(tmp_path):
    tiny.tiny("llama").save_pretrained(tmp_path / "dense")
    model, _ = load_source(tmp_path / "dense", dtype="bfloat16")
    moefy.convert(model, ENGINE, [{"input_ids": IDS}])
    export(model, tmp_path / "out", None, IDS)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    gate = stored["model.layers.0.mlp.gate.weight"]
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert gate.dtype == stored["model.layers.0.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    router = moe_layers(model)["model.layers.0.mlp"].router.weight
    assert (gate / router).unique().numel() == 1  # scaled by a power of two
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    if "gate.weight" in again._keep_in_fp32_modules_strict:  # transformers 5.24 and newer; docs/engines.md
        assert again.model.layers[0].mlp.gate.weight.equal(gate)


REFUSED = {
    "another family": ("gpt2", ENGINE, {}, "GPT2LMHeadModel.*--recipe slim"),
    "thresholds": ("llama", moefy.Recipe.of(ENGINE, selection="threshold"), {}, "differs from token to token"),
    "another router": ("llama", moefy.Recipe(experts=6, shared=2, active=2), {}, "router is representative"),
    "an output bias": ("llama", moefy.Recipe.of(ENGINE, output_bias=True), {}, "have biases"),
    "biases": ("llama-mlp-bias", ENGINE, {}, "have biases"),
    "nothing shared": ("llama", moefy.Recipe.of(ENGINE, budget=None, shared=0, active=3), {}, "0 shared neurons"),
    "nothing routed": ("llama", moefy.Recipe(experts=6, shared=3, construction="shared_only"), {}, "nothing is routed"),
    "another activation": ("llama", ENGINE, {"hidden_act": "gelu"}, "activation is gelu"),
    "a window": ("mistral", ENGINE, {"sliding_window": 8}, "looks 8 tokens back"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_engines_lack_is_refused(case, tmp_path):
    family, recipe, changes, message = REFUSED[case]
    model = converted(family, recipe, **changes)
    with pytest.raises(MoefyError, match=message):
        export(model, tmp_path / "out", None, IDS)
    assert not list(tmp_path.iterdir())


def test_a_model_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    model = converted("llama")
    monkeypatch.setattr(moefy.export, "FARTHEST", 1e-9)
    with pytest.raises(MoefyError, match="computes something else"):
        export(model, tmp_path / "out", None, IDS)
    with pytest.raises(MoefyError, match=f"one of {', '.join(EXPORTERS)}"):
        export(model, tmp_path / "out", None, IDS, form="onnx")
    assert not list(tmp_path.iterdir())


def with_vocabulary_of_smollm2(family):
    base = type(tiny.tiny(family).config)
    config = base(
        vocab_size=49152, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, rope_theta=5000.0, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=family == "llama",
    )  # fmt: skip
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if ".mlp." in name else 0.1))
    moefy.convert(model, ENGINE, [{"input_ids": torch.randint(3, 49152, (2, 64))}])
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_llama_cpp_computes_the_same(family, tmp_path):
    model = with_vocabulary_of_smollm2(family)
    ids = torch.randint(3, 49152, (1, 48))
    export(model, tmp_path / "m.gguf", None, ids, form="gguf", like=smollm2_gguf(), weights="f32")
    with torch.no_grad():
        wanted = model(input_ids=ids).logits[0, -1].log_softmax(-1)
    code = (
        "import json, sys, xllamacpp\n"
        "options = xllamacpp.CommonParams()\n"
        "options.model.path, options.n_ctx, options.warmup, options.cpuparams.n_threads = sys.argv[1], 128, False, 2\n"
        "ask = {'prompt': json.loads(sys.argv[2]), 'n_predict': 1, 'logprobs': 10, 'temperature': -1}\n"
        "answer = xllamacpp.Server(options).handle_completions(ask)\n"
        "answer = answer if isinstance(answer, dict) else json.loads(answer)\n"
        "print('ANSWER' + json.dumps(answer['choices'][0]['logprobs']['content'][0]['top_logprobs']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "m.gguf", json.dumps(ids[0].tolist())],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    top = json.loads(done.stdout.partition("ANSWER")[2].splitlines()[0])
    assert len(top) == 10
    for token in top:
        assert abs(token["logprob"] - wanted[token["id"]].item()) < 0.02
    assert top[0]["logprob"] > wanted.max().item() - 0.02


@pytest.fixture(scope="module")
def like(tmp_path_factory):
    """A GGUF with a tokenizer of the tiny models' size, and a weight."""
    path = tmp_path_factory.mktemp("like") / "dense.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(tiny.VOCAB)])
    writer.add_token_types([gguf.TokenType.NORMAL] * tiny.VOCAB)
    writer.add_tensor("token_embd.weight", torch.zeros(tiny.VOCAB, tiny.WIDTH).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("weights", TYPES)
def test_a_gguf_holds_what_was_asked_for(weights, like, tmp_path):
    model, (kind, _) = converted("llama"), TYPES[weights]
    done = []
    options = {"like": like, "weights": weights, "progress": lambda *of: done.append(of)}
    export(model, tmp_path / "m.gguf", None, IDS, form="gguf", **options)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tensors = {t.name: t for t in reader.tensors}
    assert len(tensors) == len(done)
    assert done[-1][0] == done[-1][1] == sum(t.n_bytes for t in reader.tensors)
    assert reader.fields["tokenizer.ggml.tokens"].contents() == [f"t{i}" for i in range(tiny.VOCAB)]
    moe = moe_layers(model)["model.layers.1.mlp"]
    routed = moe.weights().routed
    for name, rows in {"gate": routed.gate, "up": routed.up, "down": routed.down}.items():
        found = tensors[f"blk.1.ffn_{name}_exps.weight"]
        # Eight neurons an expert: rows of the down-projections are no whole blocks.
        short = name == "down" and weights in ("q8_0", "q4_0")
        assert found.tensor_type == (gguf.GGMLQuantizationType.F16 if short else kind)
        wanted = rows.detach().unflatten(0, (moe.spec.experts, -1))
        wanted = (wanted.mT if name == "down" else wanted).numpy()
        got = gguf.dequantize(found.data, found.tensor_type).reshape(wanted.shape)
        step = 2**-11 if short else {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 2**-7, "q4_0": 2**-2}[weights]
        assert abs(got - wanted).max() <= step * abs(wanted).max()
    router = tensors["blk.1.ffn_gate_inp.weight"]
    assert router.tensor_type == gguf.GGMLQuantizationType.F32
    assert (torch.tensor(router.data) / moe.router.weight).unique().numel() == 1
    assert tensors["blk.1.exp_probs_b.bias"].data.shape == (moe.spec.experts,)
    assert "output.weight" in tensors  # not the embedding


def test_a_gguf_that_cannot_be_is_not_written(like, tmp_path):
    scaled = converted("llama")
    scaled.config.rope_parameters = {**scaled.config.rope_parameters, "rope_type": "yarn", "factor": 2.0}
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(like.read_bytes()[:-64])
    cases = [
        (converted("llama"), smollm2_gguf(), "tokenizer of 49152 tokens, and the model 97"),
        (converted("llama"), cut, "cut short"),
        (scaled, like, "Rotary positions of the type yarn"),
    ]
    for model, file, message in cases:
        with pytest.raises(MoefyError, match=message):
            export(model, tmp_path / "out.gguf", None, IDS, form="gguf", like=file)
    assert list(tmp_path.iterdir()) == [cut]


def test_the_command(tmp_path, monkeypatch, capsys):
    def run(*args):
        return command.run(monkeypatch, *map(str, args))

    model = converted("llama")
    moefy.save(model, tmp_path / "moe", pydoc_tokenizer())
    (tmp_path / "other.gguf").write_bytes(b"GG")
    mistakes = {
        ("moe", "moe", "--overwrite"): "would be lost",
        ("moe", "other.gguf", "--like", smollm2_gguf()): "exists already",
        ("moe", "out", "--like", "other.gguf"): "is for outputs whose name ends in .gguf",
        ("moe", "out", "--weights", "q4_0"): "is for outputs whose name ends in .gguf",
        ("moe", smollm2_gguf(), "--like", smollm2_gguf(), "--overwrite"): "would be lost",
        ("moe", "out.gguf"): "with --like",
        ("moe", "out.gguf", "--like", "other.gguf"): "is no GGUF file",
        ("moe", "out.gguf", "--like", smollm2_gguf(), "--weights", "q9"): "There is no type 'q9'",
        ("moe", "other.gguf", "--like", smollm2_gguf(), "--overwrite"): "is not a GGUF file",
    }
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    for args, message in mistakes.items():
        assert run("export", *args) == 2, args
        assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / f".out.partial-{os.getpid()}").write_text("of an export that was killed")
    assert run("export", "moe", "out") == 0
    assert not list(tmp_path.glob(".out.partial-*"))
    assert "needs no moefy to run" in " ".join(capsys.readouterr().out.split())
    assert run("export", "moe", "out", "--overwrite") == 0
    assert (tmp_path / "out" / "README.md").read_text().count("Glm4Moe")


def test_as_many_experts_as_llama_cpp_has_room_for():
    """Beyond that its process is aborted: Llama-3.2-1B by the recipe's own experts of 32."""
    config = SimpleNamespace(
        num_hidden_layers=16, first_k_dense_replace=0, attention_bias=False, use_qk_norm=False, num_experts_per_tok=29,
        moe_intermediate_size=32, n_routed_experts=160, n_shared_experts=96,
    )  # fmt: skip
    _check_room(config, 227)
    config.num_experts_per_tok = 94
    with pytest.raises(MoefyError, match=r"room for 29 experts a token, and this one runs 94; .*such as 128"):
        _check_room(config, 227)
    config.num_hidden_layers = 2
    _check_room(config, 31)


def test_swish_is_called_silu():
    model = converted("llama", hidden_act="swish")
    assert stock(model, spreads(model)).config.hidden_act == "silu"


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}])
@pytest.mark.parametrize("recipe", [ENGINE, moefy.Recipe.of("slim")], ids=["engine", "slim"])
def test_transformers_4_finds_rotary_positions_and_a_tokenizer(rope, recipe, tmp_path):
    """It would rotate by 10,000, and knows no TokenizersBackend; transformers 5 reads the same as before."""
    rope = {**rope, "rope_theta": 5e5}
    config = copy.deepcopy(tiny.tiny("llama").config)
    config.rope_parameters = dict(rope)
    model = tf.LlamaForCausalLM(config).eval()
    moefy.convert(model, recipe, [{"input_ids": IDS}])
    tokenizer = pydoc_tokenizer()
    if recipe is ENGINE:
        export(model, tmp_path / "out", tokenizer, IDS)
    else:
        moefy.save(model, tmp_path / "out", tokenizer)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 5e5
    assert config.get("rope_scaling", {}).get("factor") == rope.get("factor")
    named = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert named == "PreTrainedTokenizerFast"
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {name: again.config.rope_parameters[name] for name in rope} == rope
    with torch.no_grad():
        wanted, got = (each(input_ids=IDS).logits for each in (model, again))
    assert (got - wanted).norm() < 0.01 * wanted.norm()
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "out")("abs").input_ids == tokenizer("abs").input_ids


def test_what_is_copied_from_is_not_written_over(like, tmp_path):
    file = tmp_path / "dense.gguf"
    file.write_bytes(like.read_bytes())
    before = file.read_bytes()
    with pytest.raises(MoefyError, match="is the source"):
        export(converted("llama"), file, None, IDS, form="gguf", like=file, overwrite=True)
    assert file.read_bytes() == before
