"""A converted model in use: generation with a cache, padding, compile, gradients, peft-style training mode."""

import math

import pytest
import torch

import moefy
import tiny
from moefy.measure import evaluate
from moefy.measure.evaluate import agreement, evaluate_model, perplexity, routing
from moefy.moe import moe_layers
from moefy.sites import find_sites
from test_families import close
from words import pydoc_tokenizer

RECIPE = moefy.Recipe(experts=6, shared=1, active=2, top_activated=4, router="linear")


def converted(family="llama", **changes):
    model = tiny.tiny(family)
    recipe = moefy.Recipe(**{**RECIPE.model_dump(), **changes})
    moefy.convert(model, recipe, [tiny.inputs(family, seed=s) for s in range(4)])
    return model


def test_generation_with_and_without_cache_is_the_same():
    model = converted()
    ids = tiny.inputs("llama", batch=1)["input_ids"]
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))


def test_padding_does_not_change_real_tokens():
    model = converted()
    ids = tiny.inputs("llama", batch=1, length=9)["input_ids"]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(ids)], dim=1)
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        with_padding = model(input_ids=padded, attention_mask=mask).logits[:, 4:]
    torch.testing.assert_close(with_padding, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mixtral", "t5-v1.0"])
def test_every_neuron_kept_needs_one_batch_and_is_the_dense_model(family):
    dense, model = tiny.tiny(family), tiny.tiny(family)
    batches = [tiny.inputs(family, seed=s) for s in range(4)]
    report = moefy.convert(model, moefy.Recipe.of("shared-only", budget=1.0), batches)
    assert report.calibration.batches == 1
    assert all(layer.active_fraction == 1 and layer.error < 1e-10 for layer in report.layers)
    layers = moe_layers(model)
    assert len(layers) == len(report.layers)
    for name, site in ((site.entry_name, site) for site in find_sites(dense)):
        assert torch.equal(layers[name].shared_up, site.read().up)
    assert close(tiny.output(model, batches[3]), tiny.output(dense, batches[3]))
    report = moefy.convert(tiny.tiny(family), moefy.Recipe.of("shared-only", budget=0.5), batches)
    assert report.calibration.batches == 4


def test_encoder_decoder_generates():
    model = converted("t5-v1.1")
    out = model.generate(tiny.inputs("t5-v1.1")["input_ids"], max_new_tokens=5, do_sample=False)
    assert out.shape[0] == 2


def test_compiles_with_a_graph_break():
    model, feed = converted(), tiny.inputs("llama")
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(tiny.output(compiled, feed), tiny.output(model, feed))


def test_gradients_reach_every_expert_that_ran():
    model = converted().train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(**tiny.inputs("llama"), labels=tiny.inputs("llama")["input_ids"]).loss.backward()
    for layer in moe_layers(model).values():
        assert layer.shared_up.grad.abs().sum() > 0
        assert layer.experts_down.grad.abs().sum() > 0


def test_perplexity_counts_and_matches_the_definition():
    model = tiny.tiny("llama")
    windows = torch.randint(3, tiny.VOCAB, (3, 16))
    result = perplexity(model, windows, prefix=1)
    with torch.no_grad():
        logp = model(windows).logits.double().log_softmax(-1)
    nll = -logp[:, :-1].gather(2, windows[:, 1:, None])
    assert result.tokens == 3 * 15
    assert abs(result.perplexity - nll.mean().exp().item()) < 1e-3 * result.perplexity
    assert "3 windows of 16 tokens" in result.protocol()


def test_agreement_of_a_model_with_itself_and_another():
    model, feed = tiny.tiny("llama"), tiny.inputs("llama")
    same = agreement(model, tiny.tiny("llama"), [feed])
    assert (same.error, same.top1) == (0.0, 1.0)
    assert same.rows == 21  # padding left out
    other = agreement(converted(), model, [feed])
    assert other.error > 0
    assert other.kl > 0


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -torch.inf, torch.finfo(torch.float16).min])
def test_logits_that_a_model_rules_out_are_no_outputs(lowest, monkeypatch):
    model, dense, feed = converted(), tiny.tiny("llama"), tiny.inputs("llama")
    output = evaluate._output

    def without_images(each, batch):
        logits, are_logits = output(each, batch)
        return logits[..., :-2], are_logits

    def ruled_out(each, batch):
        logits, are_logits = output(each, batch)
        logits[..., -2:] = lowest
        return logits, are_logits

    monkeypatch.setattr(evaluate, "_output", without_images)
    expected = agreement(model, dense, [feed])
    monkeypatch.setattr(evaluate, "_output", ruled_out)
    found = agreement(model, dense, [feed])
    assert found.top1 == expected.top1
    assert (found.error, found.kl) == pytest.approx((expected.error, expected.kl), rel=1e-5)


def test_routing_reports_recall_and_load():
    oracle = routing(converted(router="oracle"), [tiny.inputs("llama")])
    assert all(r.recall == 1.0 for r in oracle.values())
    linear = routing(converted(), [tiny.inputs("llama")])
    for r in linear.values():
        assert 0 < r.recall < 1
        assert abs(r.load.sum().item() - 1) < 1e-6
        assert 1 <= r.imbalance <= 5


def test_rows_of_logits_are_looked_at_in_pieces(monkeypatch):
    model, other = tiny.tiny("llama"), tiny.tiny("llama")
    for parameter in other.parameters():
        parameter.data += 0.01
    windows = torch.randint(3, tiny.VOCAB, (3, 24))
    found = []
    for rows in (1000, 5):
        monkeypatch.setattr("moefy.measure.evaluate._ROWS", rows)
        near = agreement(model, other, [{"input_ids": windows}])
        found.append((perplexity(model, windows).perplexity, near.error, near.top1, near.kl))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_evaluation_of_models_without_perplexity():
    model, dense = converted("bert"), tiny.tiny("bert")
    figures = evaluate_model(model, dense, [tiny.inputs("bert")], None)
    assert {"output_error", "top1_agreement", "active_fraction", "router_recall"} <= set(figures)
    assert "perplexity" not in figures


@pytest.mark.parametrize(
    ("name", "is_converted", "against"),
    [(n, c, a) for n in ("llama", "bert") for c in (True, False) for a in (True, False) if n == "llama" or c or a],
)
def test_an_evaluation_counts_its_passes_to_the_last(name, is_converted, against):
    model = converted(name) if is_converted else tiny.tiny(name)
    batches = [{"input_ids": torch.randint(3, tiny.VOCAB, (2, 16))} for _ in range(3)]
    steps = []
    dense = tiny.tiny(name) if against else None
    figures = evaluate_model(model, dense, batches, pydoc_tokenizer(), lambda *step: steps.append(step))
    assert steps == [(i + 1, len(steps)) for i in range(len(steps))]
    if name == "llama" and against:
        windows = torch.cat([batch["input_ids"] for batch in batches])
        near = agreement(model, dense, [{"input_ids": ids[None]} for ids in windows[:4]])
        assert figures["perplexity"] == perplexity(model, windows).perplexity
        assert figures["dense_perplexity"] == perplexity(dense, windows).perplexity
        assert (figures["output_error"], figures["kl_nats"]) == (near.error, near.kl)
        assert len(steps) == 6 * 2 + (3 if is_converted else 0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_evaluation_leaves_padding_out(side):
    model, dense = converted("llama"), tiny.tiny("llama")
    rows = [torch.randint(3, tiny.VOCAB, (length,)) for length in (16, 9, 2)]
    ids, mask = torch.zeros(3, 16, dtype=torch.long), torch.zeros(3, 16, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(16 - len(row), None) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = row, 1
    figures = evaluate_model(model, dense, [{"input_ids": ids, "attention_mask": mask}], pydoc_tokenizer())
    losses = [(perplexity(dense, row[None]).perplexity, len(row) - 1) for row in rows]
    expected = math.exp(sum(math.log(each) * count for each, count in losses) / sum(count for _, count in losses))
    near = agreement(model, dense, [{"input_ids": row[None]} for row in rows])
    assert figures["dense_perplexity"] == pytest.approx(expected, rel=1e-5)
    assert f"{15 + 8 + 1} tokens predicted" in figures["protocol"]
    assert figures["output_error"] == pytest.approx(near.error, rel=1e-4)
    with pytest.raises(moefy.MoefyError, match="only padding"):
        evaluate_model(model, None, [{"input_ids": ids, "attention_mask": 0 * mask}], pydoc_tokenizer())
    for batches in ([], [{"input_ids": ids}, {"input_ids": ids[:, :5]}]):
        with pytest.raises(moefy.MoefyError, match="windows of one width"):
            evaluate_model(model, None, batches, pydoc_tokenizer())


def test_report_is_of_the_run():
    model = tiny.tiny("llama")
    report = moefy.convert(model, RECIPE, [tiny.inputs("llama")])
    assert report.seconds > 0
    assert report.peak_bytes > 1 << 20
    size = tiny.NEURONS // 6
    expected = (3 * size * 3 * tiny.WIDTH + 5 * tiny.WIDTH) / (tiny.NEURONS * 3 * tiny.WIDTH)
    assert abs(report.active_fraction - expected) < 1e-9


def test_every_neuron_kept_is_no_excuse_for_an_overflow():
    model = tiny.tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e30)
        model.model.layers[0].mlp.up_proj.weight.mul_(1e30)
    with pytest.raises(moefy.MoefyError, match=r"model\.layers\.0\.mlp computes on the calibration is too large"):
        moefy.convert(model, moefy.Recipe.of("shared-only", budget=1.0), [tiny.inputs("llama")])
