"""What layers lose and what they get: the elimination, the metric of an error, and the division of a budget."""

import copy
import errno

import pytest
import torch
import transformers as tf

import moefy
import tiny
from moefy.calibrate import real_tokens
from moefy.construct.elimination import eliminate
from moefy.conversion import sensitivity
from moefy.conversion.budgets import GRID, Curve, Sensitivity, allocate, loss_curve
from moefy.conversion.sensitivity import Metrics, output_metrics
from moefy.conversion.work import layer_work, measure_work, tokens_in
from moefy.sites import find_sites, join_experts
from moefy.stats import NeuronStats
from moefy.usage import realised_fraction, usage
from test_construct import make_stats


def best_loss(stats, x, kept):
    """The weighted squared error that is left when only `kept` neurons and a constant may be fitted."""
    h, y = stats.ffn.hidden(x).double(), stats.ffn.forward(x).double()
    w = stats.token_weight(y.float()).double().sqrt()[:, None]
    some = torch.cat([h[:, kept], torch.ones(len(x), 1, dtype=torch.float64)], dim=1) * w
    left = y * w - some @ torch.linalg.lstsq(some, y * w, driver="gelsd").solution
    if stats.metric is None:
        return left.square().sum()
    return ((left @ stats.metric.double()) * left).sum()


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_the_cost_of_an_elimination_is_that_of_a_least_squares_fit(metric, bias):
    stats, x = make_stats(gated=True, activation="silu", bias=bias, tokens=800)
    if metric:
        root = torch.randn(stats.ffn.width, stats.ffn.width)
        stats = NeuronStats(stats.ffn, stats.batches, metric=root @ root.t())
    found = eliminate(stats)
    assert torch.equal(found.order.sort().values, torch.arange(stats.ffn.neurons))
    assert (found.cost.diff() >= -1e-9 * found.cost[-1]).all()
    for gone in (8, 24, 40):
        exact = best_loss(stats, x, found.order[gone:].sort().values)
        # The damping of 1e-4 adds a little to the cost.
        assert float(found.cost[gone - 1]) == pytest.approx(float(exact), rel=0.02)


def test_neurons_that_others_repeat_go_first():
    stats, _ = make_stats(activation="gelu", tokens=600)
    ffn, half = stats.ffn, stats.ffn.neurons // 2
    twins = moefy.FFNWeights(up=ffn.up[:half].repeat(2, 1), gate=ffn.gate[:half].repeat(2, 1), down=ffn.down)
    found = eliminate(NeuronStats(twins, stats.batches))
    assert len(set((found.order[:half] % half).tolist())) == half  # one of each pair
    assert found.cost[half - 1] < 1e-3 * found.cost[-1]


def test_a_budget_is_divided_where_it_costs_least():
    grid = torch.linspace(0, 1, GRID, dtype=torch.float64)
    curves = {name: Curve(scale * (1 - grid) ** 2, 100) for name, scale in (("a", 1.0), ("b", 4.0), ("c", 0.01))}
    shares = allocate(curves, 0.5)
    assert sum(shares.values()) / 3 == pytest.approx(0.5, abs=0.01)
    assert shares["c"] < shares["a"] < shares["b"]
    # Equal slopes where nothing binds: a (1 - a) * 1 = (1 - b) * 4.
    assert (1 - shares["a"]) == pytest.approx(4 * (1 - shares["b"]), abs=0.02)
    uniform = dict.fromkeys(curves, 0.5)
    assert Sensitivity(Metrics({}, {}), curves).predicted_loss(shares) < Sensitivity(
        Metrics({}, {}), curves
    ).predicted_loss(uniform)
    assert set(allocate(curves, 1.0).values()) == {1.0}


def test_what_no_layer_needs_of_a_budget_is_given_to_those_with_least():
    grid = torch.linspace(0, 1, GRID, dtype=torch.float64)
    dead = Curve((0.4 - grid).clamp_min(0), 100)  # the other neurons never fire
    assert list(allocate({"a": dead, "b": dead}, 0.75).values()) == pytest.approx([0.75, 0.75])
    assert allocate({"a": dead, "b": Curve((1 - grid) ** 2, 100)}, 0.75) == {"a": pytest.approx(0.5), "b": 1.0}


def test_a_layer_that_is_dear_stays_dense_and_sizes_weigh():
    grid = torch.linspace(0, 1, GRID, dtype=torch.float64)
    curves = {"dear": Curve(1e3 * (1 - grid) ** 2, 100), "big": Curve((1 - grid) ** 2, 900)}
    shares = allocate(curves, 0.5)
    assert shares["dear"] == 1.0
    assert 0.1 * shares["dear"] + 0.9 * shares["big"] == pytest.approx(0.5, abs=0.01)


def test_the_curve_starts_at_no_loss_and_ends_at_the_whole_output():
    stats, x = make_stats(tokens=500)
    curve = loss_curve(stats)
    assert len(curve.loss) == GRID
    assert curve.loss[-1] == 0
    assert (curve.loss.diff() <= 1e-12).all()
    weight = stats.token_weight(stats.ffn.forward(x)).sum()
    assert float(curve.loss[0]) == pytest.approx(float(best_loss(stats, x, []) / (2 * weight)), rel=0.02)


@pytest.mark.parametrize("family", ["llama", "bert", "t5-v1.0", "opt", "gpt2"])
def test_the_metric_predicts_the_loss_of_a_small_error(family):
    """½ eᵀGe is the expected divergence from the unperturbed prediction, for a small error e in one FFN's output."""
    model, batches = tiny.tiny(family), [tiny.inputs(family, seed=i) for i in range(4)]
    sites = {site.entry_name: site for site in find_sites(model)}
    before = copy.deepcopy(model.state_dict())
    grads = [p.requires_grad for p in model.parameters()]
    found = [output_metrics(model, sites, batches, seed=s) for s in range(60)]
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert set(found[0]) == set(sites)
    if "logits" not in model(**batches[0]):
        return
    name = next(iter(sites))
    metric = torch.stack([f[name] for f in found]).mean(0)
    site = sites[name]
    down = site.owner.get_submodule(site.family.down)
    size, draws, lost, tokens = 1e-2, 40, 0.0, 0
    for batch in batches:
        dense = tiny.output(model, batch).double().log_softmax(-1)
        handle = down.register_forward_hook(lambda m, a, out: out + size * torch.randn_like(out))
        for _ in range(draws):
            moved = tiny.output(model, batch).double().log_softmax(-1)
            lost += float((dense.exp() * (dense - moved)).sum()) / draws
        handle.remove()
        keep = real_tokens(model, name, batch)
        tokens += int(keep.sum()) if keep is not None else batch["input_ids"].numel()
    # Errors of unit variance in every direction: half the trace. The labels are drawn, 60 times.
    assert lost / tokens == pytest.approx(size**2 * float(metric.trace()) / 2, rel=0.35)


@pytest.mark.parametrize("family", ["llama", "t5-v1.0", "bert"])
@pytest.mark.parametrize("budget", [0.3, 0.75])
def test_a_budget_for_the_whole_model_is_kept(family, budget):
    model, batches = tiny.tiny(family), [tiny.inputs(family, seed=i) for i in range(4)]
    report = moefy.convert(model, moefy.Recipe.of("reconstructed", budget=budget, expert_size=2), batches)
    assert report.active_fraction <= budget + 1e-6
    assert report.predicted_loss >= 0


@pytest.mark.parametrize("family", ["t5-v1.1", "swin", "clip", "whisper"])
def test_a_budget_counts_the_tokens_and_the_width_of_every_layer(family):
    feeds = [tiny.inputs(family, seed=seed, batch=4) for seed in range(8)]
    if family == "t5-v1.1":  # long inputs, short answers
        ids = torch.randint(3, 90, (8, 4, 72), generator=torch.Generator().manual_seed(0))
        feeds = [{"input_ids": x[:, :64], "decoder_input_ids": x[:, 64:]} for x in ids]
    feeds = [{name: x for name, x in feed.items() if name != "attention_mask"} for feed in feeds]  # every token counts
    model = tiny.tiny(family)
    work = {site.entry_name: site.read().multiply_adds for site in find_sites(model)}
    rows = dict.fromkeys(work, 0)
    hooks = [
        site.entry.register_forward_pre_hook(
            lambda _, args, n=site.entry_name: rows.update({n: rows[n] + count(args[0])})
        )
        for site in find_sites(model)
    ]
    for feed in feeds:
        tiny.output(model, feed)
    for hook in hooks:
        hook.remove()
    report = moefy.convert(model, moefy.Recipe.of(moefy.recipe.DEFAULT, budget=0.6, expert_size=2), feeds)
    assert {layer.name: layer.work for layer in report.layers} == {name: work[name] * rows[name] for name in work}
    with usage(model) as counted:
        for feed in feeds:
            tiny.output(model, feed)
    realised = realised_fraction(model, counted)
    assert realised == pytest.approx(report.active_fraction, abs=0.05)
    assert 0.45 < realised < 0.63


def count(x):
    return x.numel() // x.shape[-1]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_a_budget_is_kept_whatever_the_loss_is_measured_in(scale):
    grid = torch.linspace(0, 1, GRID, dtype=torch.float64)
    curves = {name: Curve(scale * dear * (1 - grid) ** 2, 100) for name, dear in (("a", 1.0), ("b", 4.0))}
    shares = allocate(curves, 0.5)
    assert sum(shares.values()) / 2 == pytest.approx(0.5, abs=0.01)
    assert shares["b"] > shares["a"]


@pytest.mark.parametrize(("experts", "budget"), [(8, 0.5), (8, 0.3), (4, 0.5)])
def test_a_layer_that_matters_little_gets_one_expert_at_least(experts, budget):
    model, batches = tiny.tiny("llama"), [tiny.inputs("llama", seed=i) for i in range(2)]
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(0.1)
    report = moefy.convert(model, moefy.Recipe.of("reconstructed", budget=budget, experts=experts), batches)
    assert report.active_fraction <= budget + 1e-6


def test_a_model_whose_logits_are_not_finite_is_a_sentence():
    model, batch = tiny.tiny("llama"), tiny.inputs("llama")
    model.lm_head.weight.data[3] = float("inf")
    sites = {site.entry_name: site for site in find_sites(model)}
    with pytest.raises(moefy.MoefyError, match="NaN or infinite logits"):
        output_metrics(model, sites, [batch])
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "bert", "t5-v1.1", "gpt2", "mixtral", "whisper"])
def test_what_the_backward_pass_needs_may_lie_on_disk(family, monkeypatch):
    monkeypatch.setattr("moefy.conversion.sensitivity.SMALLEST_SPILLED", 0)
    files, real = [], sensitivity.save_file
    monkeypatch.setattr(sensitivity, "save_file", lambda tensors, file: (files.append(file), real(tensors, file)))
    model, batches = tiny.tiny(family), [tiny.inputs(family, seed=i) for i in range(2)]
    sites = {site.entry_name: site for site in find_sites(model)}
    held = output_metrics(model, sites, batches)
    assert not files
    for hold_bytes in (4096, 0):
        written = output_metrics(model, sites, batches, hold_bytes=hold_bytes)
        assert files
        assert not any(file.exists() for file in files)
        for name, metric in held.items():  # from other memory products may round differently
            torch.testing.assert_close(written[name], metric)
    join_experts(model)


def test_any_tensor_may_be_spilled(monkeypatch):
    monkeypatch.setattr("moefy.conversion.sensitivity.SMALLEST_SPILLED", 0)
    x = torch.randn(6, 4, 5, requires_grad=True)
    c = torch.randn(7, dtype=torch.complex64, requires_grad=True)

    def gradients():
        y = (x.transpose(0, 2).exp() * x.permute(2, 1, 0)).pow(2).sum() + x[:0].exp().sum() + x.sum().exp() * 1e-3
        y = y + (c * c.conj()).abs().sum() + torch.sparse.mm(torch.eye(6).to_sparse(), x[:, 0]).pow(2).sum()
        return torch.autograd.grad(y + x[..., :1].expand(6, 4, 9).exp().sum(), (x, c))

    expected = gradients()
    with sensitivity.spilled(0, []):
        found = gradients()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_full_disk_while_measuring_is_a_sentence(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("moefy.conversion.sensitivity.SMALLEST_SPILLED", 0)
    monkeypatch.setattr(sensitivity, "save_file", full)
    model = tiny.tiny("llama")
    sites = {site.entry_name: site for site in find_sites(model)}
    with pytest.raises(moefy.MoefyError, match=r"No space left on device.*set TMPDIR"):
        output_metrics(model, sites, [tiny.inputs("llama")], hold_bytes=0)
    assert not any(module._forward_hooks for module in model.modules())


def test_allocation_needs_a_budget():
    with pytest.raises(moefy.MoefyError, match="give one"):
        moefy.Recipe.of("cmoe", allocation="sensitivity")


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e8])
def test_a_metric_that_is_singular_or_rounded_below_zero_still_gives_an_order(scale):
    stats, _ = make_stats(activation="gelu", tokens=400)
    direction = torch.randn(stats.ffn.width, 1)
    metric = scale * (direction @ direction.t())
    metric -= 1e-4 * metric.diagonal().mean() * torch.eye(stats.ffn.width)  # rounding, writ large
    found = eliminate(NeuronStats(stats.ffn, stats.batches, metric=metric))
    assert torch.equal(found.order.sort().values, torch.arange(stats.ffn.neurons))
    assert found.cost.isfinite().all()


def test_a_broken_metric_is_a_sentence():
    stats, _ = make_stats(activation="gelu", tokens=400)
    metric = torch.full((stats.ffn.width, stats.ffn.width), torch.nan)
    with pytest.raises(moefy.MoefyError, match="metric"):
        eliminate(NeuronStats(stats.ffn, stats.batches, metric=metric))


@pytest.mark.parametrize("recipe", ["reconstructed", "slim"])
def test_progress_counts_work_and_ends_at_the_total(recipe):
    model, batches, seen = tiny.tiny("llama"), [tiny.inputs("llama", seed=i) for i in range(4)], []
    sites = {site.entry_name: site for site in find_sites(model)}
    measured = measure_work(sites, batches) if recipe == "reconstructed" else 0
    (layer,) = {layer_work(site, tokens_in(batches)) for site in sites.values()}
    recipe = moefy.Recipe.of(recipe, budget=0.75)
    moefy.convert(model, recipe, batches, progress=lambda done, total, name: seen.append((done, total)))
    total = measured + 2 * layer
    assert {of for _, of in seen} == {total}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert [done for done, _ in seen][-2:] == [total - layer, total]
    assert (seen[-3][0] if measured else 0) == measured


def test_the_experts_of_a_layer_share_a_metric_and_are_weighted_by_their_own():
    model, feed = tiny.tiny("mixtral"), tiny.inputs("mixtral")
    sites = {site.entry_name: site for site in find_sites(model)}
    found = output_metrics(model, sites, [feed])
    assert len(found.matrices) == 2
    assert len(found) == len(sites)
    gradients = {name: [] for name in sites}
    hooks = []
    for name, site in sites.items():
        down = site.owner.get_submodule(site.family.down)

        def watch(_, __, out, name=name):
            asking = out + out.new_zeros(()).requires_grad_()
            asking.register_hook(lambda g: gradients[name].append(g.clone()))
            return asking

        hooks.append(down.register_forward_hook(watch))
    from moefy.conversion.sensitivity import _loss

    with torch.enable_grad():
        _loss(model, model.requires_grad_(False)(**feed), feed, torch.Generator().manual_seed(0)).backward()
    for hook in hooks:
        hook.remove()
    mask = int(feed["attention_mask"].sum())
    for layer, matrix in found.matrices.items():
        names = [name for name in sites if name.startswith(layer)]
        rows = torch.cat([torch.cat(gradients[name]) for name in names])
        expected = rows.t() @ rows / (2 * mask)  # two experts a token
        # Entries are sums of products that cancel: they are as exact as the largest ones.
        torch.testing.assert_close(matrix, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        traces = torch.tensor([float(found[name].trace()) for name in names])
        mine = torch.tensor([float(torch.cat(gradients[name]).square().sum()) for name in names])
        counts = torch.tensor([sum(int(g.abs().sum(1).gt(0).sum()) for g in gradients[name]) for name in names])
        torch.testing.assert_close(traces * counts, mine, rtol=0.02, atol=0)


def metrics_of(model, batches, seeds=20):
    sites = {site.entry_name: site for site in find_sites(model)}
    found = [output_metrics(model, sites, batches, seed=seed) for seed in range(seeds)]
    return {name: torch.stack([f[name] for f in found]).mean(0) for name in sites}


@pytest.mark.parametrize("head", ["BertModel", "BertForQuestionAnswering", "BertForTokenClassification"])
def test_padding_does_not_change_the_metric(head):
    torch.manual_seed(0)
    model = getattr(tf, head)(tiny.tiny("bert").config).eval()
    ids = torch.randint(3, 60, (16, 8))
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {name: torch.nn.functional.pad(rows, (0, 24)) for name, rows in plain.items()}
    for name, metric in metrics_of(model, [plain]).items():
        ratio = metrics_of(model, [padded])[name].trace() / metric.trace()
        assert 0.8 < ratio < 1.25, name  # labels are drawn; 4 with padding counted


@pytest.mark.parametrize("problem", [None, "regression", "multi_label_classification", "single_label_classification"])
@pytest.mark.parametrize("labels", [1, 3])
def test_heads_that_are_no_choice_among_labels_have_a_metric(problem, labels):
    """A reranker's single logit: a softmax of one is constant, so that nothing would matter."""
    torch.manual_seed(0)
    config = copy.deepcopy(tiny.tiny("bert").config)
    config.num_labels, config.problem_type = labels, problem
    model, feed = tf.BertForSequenceClassification(config).eval(), tiny.inputs("bert")
    assert all(metric.trace() > 0 for metric in metrics_of(model, [feed], seeds=4).values())


def test_the_least_share_is_no_more_than_the_budget():
    curves = {name: Curve(torch.linspace(1, 0, GRID, dtype=torch.float64) ** 2, 1000) for name in "ab"}
    for budget in (0.0801, 0.051, 0.0825, 0.5):
        assert sum(allocate(curves, budget).values()) / 2 <= budget + 1e-9


def test_layers_outside_of_autograd_have_no_metric():
    model, feed = tiny.tiny("reformer"), tiny.inputs("reformer")
    with pytest.raises(moefy.MoefyError, match="outside of autograd; use a recipe whose allocation is uniform"):
        moefy.convert(model, "reconstructed", [feed])
    moefy.convert(model, "cmoe", [feed])


def test_the_predicted_loss_is_of_models_with_logits_whatever_their_output_is_called_with():
    recipe = moefy.Recipe.of("reconstructed", budget=0.5)
    model, feed = tiny.tiny("llama"), tiny.inputs("llama")
    found = [moefy.convert(copy.deepcopy(model), recipe, [f]) for f in (feed, {**feed, "return_dict": False})]
    assert found[0].predicted_loss == found[1].predicted_loss > 0
    assert moefy.convert(tf.BertModel(tiny.tiny("bert").config), recipe, [tiny.inputs("bert")]).predicted_loss is None


def test_an_allocated_share_of_nothing_is_no_other_share():
    ffn = moefy.FFNWeights(up=torch.zeros(512, 8), down=torch.zeros(512, 8), gate=torch.zeros(512, 8))
    recipe = moefy.Recipe.of("reconstructed", expert_size=1, budget=0.5)
    with pytest.raises(moefy.MoefyError, match=r"a budget of 0\.0 is less than one of 512 experts"):
        recipe.layer_spec(ffn, "mlp", budget=0.0)
    one = moefy.FFNWeights(up=torch.zeros(7, 8), down=torch.zeros(7, 8))
    with pytest.raises(moefy.MoefyError, match=r"its 7 neurons are one expert; give smaller ones \(--expert-size 1\)"):
        moefy.Recipe.of("reconstructed", expert_size=7, budget=0.5).layer_spec(one, "mlp")


def test_spilled_tensors_come_back_as_they_lay(monkeypatch):
    monkeypatch.setattr(sensitivity, "SMALLEST_SPILLED", 0)
    whole = torch.randn(4, 6, 8)
    expanded, windows = whole[:1, :, ::2].expand(5, -1, -1), whole.flatten().unfold(0, 6, 2)
    for tensor in (whole, whole.mT, whole[:, ::2], whole[:1].expand(5, -1, -1), expanded, windows):
        x = tensor.clone().requires_grad_()
        with sensitivity.spilled(0, []):
            y = tensor * x.square()
            saved = y.grad_fn._saved_self
        assert saved.stride() == tensor.stride()
        assert torch.equal(saved, tensor)
    for tensor in (torch.randn(50, 40)[:, 3], whole[:, :0], torch.tensor(2.0)):
        x = tensor.clone().requires_grad_()  # a column does not come back with the matrix's memory
        with sensitivity.spilled(0, []):
            y = tensor * x.square()
            assert torch.equal(y.grad_fn._saved_self, tensor)
