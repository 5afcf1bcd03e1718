import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from capi.evaluate import classification, knn, probes
from capi.evaluate.features import Features
from capi.evaluate.intervals import bootstrap_interval
from capi.evaluate.knn import knn_predict, nearest
from capi.evaluate.logistic import fit_logistic
from capi.evaluate.probes import Grid, attentive_logits, attentive_parameters, linear_logits, predict, train_probes


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("distance", ["cosine", "L2"])
@pytest.mark.parametrize("k", [1, 5, 200])
def test_nearest_are_those_of_the_definition_in_float64(distance, k, monkeypatch):
    monkeypatch.setattr(knn, "_QUERIES", 7)
    monkeypatch.setattr(knn, "_BANK", 40)
    bank, queries = draw(100, 6, seed=1), draw(30, 6, seed=2)
    if distance == "cosine":
        far = 1 - F.cosine_similarity(queries[:, None].double(), bank[None].double(), dim=-1)
    else:
        far = (queries[:, None].double() - bank[None].double()).norm(dim=-1)
    similarities, places = nearest(bank, queries, k, distance)
    assert torch.equal(places, far.argsort(dim=1)[:, :k])
    if distance == "cosine":
        torch.testing.assert_close(similarities.double(), 1 - far.gather(1, places), rtol=0, atol=1e-6)


def test_the_vote_does_not_depend_on_the_chunks(monkeypatch):
    bank, queries, labels = draw(100, 6, seed=1), draw(30, 6, seed=2), torch.arange(100) % 4
    whole = knn_predict(bank, labels, queries, 4)
    monkeypatch.setattr(knn, "_QUERIES", 7)
    monkeypatch.setattr(knn, "_BANK", 9)
    assert torch.equal(knn_predict(bank, labels, queries, 4), whole)


def test_a_low_temperature_leaves_the_nearest_alone():
    bank, labels = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]]), torch.tensor([0, 1, 1])
    # exp((0.5 - 1) / 1e-4) is zero in float32 for all three.
    assert knn_predict(bank, labels, torch.tensor([[-0.1, 0.0]]), 2, k=2, temperature=1e-4).item() == 1


def test_attention_is_that_of_one_query_over_keys_and_values():
    dim, n_probes = 128, 3
    parameters = attentive_parameters(dim, 5, n_probes, torch.Generator().manual_seed(0))
    parameters = {name: tensor.double() + 0.1 * draw(*tensor.shape, seed=3) for name, tensor in parameters.items()}
    x = draw(4, 9, dim).double()
    logits = attentive_logits(parameters, x)
    assert logits.shape == (n_probes, 4, 5)
    key_bias = draw(dim, seed=4).double()  # Which makes no difference.
    for probe in range(n_probes):
        p = {name: tensor[probe] for name, tensor in parameters.items()}
        query, key, value = p["query"].expand(4, 1, -1), x @ p["key"] + key_bias, x @ p["value"] + p["value_bias"]
        heads = [t.unflatten(-1, (2, 64)).transpose(1, 2) for t in (query, key, value)]
        pooled = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(1)
        torch.testing.assert_close(logits[probe], pooled @ p["weight"] + p["bias"])


@pytest.mark.parametrize("dim", [48, 1])
def test_attention_of_a_width_that_has_no_heads_of_64(dim):
    parameters = attentive_parameters(dim, 3, 2, torch.Generator().manual_seed(0))
    assert attentive_logits(parameters, draw(4, 9, dim)).shape == (2, 4, 3)


def one_by_one(kind, batch, labels, n_classes, grid):
    """Every probe alone, by PyTorch's own optimiser and schedule, with the same start and the same batches."""
    make, logits_of = probes.KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    starts = make(batch(torch.zeros(1, dtype=torch.int64), 0).shape[-1], n_classes, len(grid.pairs()), generator)
    order = probes._orders(len(labels), grid.batch_size, generator)
    batches = [next(order) for _ in range(grid.iterations)]
    warmup = grid.iterations // 10
    cosine = np.cos(np.linspace(0, np.pi, grid.iterations - warmup))
    schedule = np.concatenate([np.linspace(0, 1, warmup), (cosine + 1) / 2])
    trained = []
    for i, (rate, decay) in enumerate(grid.pairs()):
        own = {name: tensor[i : i + 1].clone().requires_grad_() for name, tensor in starts.items()}
        groups = [{"params": [p], "weight_decay": 0.0 if "bias" in name else decay} for name, p in own.items()]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        for (indices, epoch), factor in zip(batches, schedule, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * grid.batch_size / 256 * factor
            optimizer.zero_grad()
            F.cross_entropy(logits_of(own, batch(indices, epoch))[0], labels[indices]).backward()
            optimizer.step()
        trained.append({name: p.detach() for name, p in own.items()})
    return {name: torch.cat([own[name] for own in trained]) for name in starts}


GRID = Grid((1e-2, 0.3), (0.0, 5.0), iterations=40, batch_size=16)


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_probes_trained_at_once_are_those_trained_one_by_one(kind):
    x = draw(30, 2, 5, 8) if kind == "attentive" else draw(30, 2, 8)
    labels = torch.arange(30) % 3

    def batch(indices, epoch):
        return x[indices, epoch % 2]

    together, alone = train_probes(kind, batch, labels, 3, GRID), one_by_one(kind, batch, labels, 3, GRID)
    for name in together:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-4, atol=1e-5)
    again = train_probes(kind, batch, labels, 3, GRID)
    assert all(torch.equal(together[name], again[name]) for name in together)


def test_probes_learn_and_predict():
    centres = 4 * draw(3, 8, seed=5)
    labels = torch.arange(90) % 3
    x = centres[labels] + draw(90, 8)
    trained = train_probes("linear", lambda i, _: x[i], labels, 3, Grid((1e-5, 1e-1), (0.0,), 200, 32))
    guesses = predict("linear", trained, lambda i, _: x[i], 90)
    assert (guesses[1] == labels).float().mean() > 0.95
    assert (guesses[0] == labels).float().mean() < 0.8  # Its learning rate is too low.
    torch.testing.assert_close(linear_logits(trained, x)[1], x @ trained["weight"][1] + trained["bias"][1])


def test_an_epoch_takes_every_image_once():
    order = probes._orders(10, 4, torch.Generator().manual_seed(0))
    taken = [next(order) for _ in range(5)]
    places = torch.cat([indices for indices, _ in taken])
    for epoch in (places[:10], places[10:]):
        assert epoch.sort().values.tolist() == list(range(10))
    assert [epoch for _, epoch in taken] == [0, 0, 1, 1, 1]
    assert len(next(probes._orders(3, 8, torch.Generator()))[0]) == 8


def test_the_schedule_is_the_authors():
    values = [probes._schedule(step, 100) for step in range(100)]
    expected = np.concatenate([np.linspace(0, 1, 10), (np.cos(np.linspace(0, np.pi, 90)) + 1) / 2])
    np.testing.assert_allclose(values, expected, atol=1e-12)


def test_the_default_grid_is_the_authors():
    grid = Grid()
    assert grid.learning_rates == (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
    assert grid.weight_decays == (5e-4, 1e-3, 5e-2)
    assert (grid.iterations, grid.batch_size, probes.BETAS) == (12_500, 128, (0.9, 0.95))


def test_logistic_regression_is_at_the_optimum_of_its_convex_problem():
    x, y = draw(300, 6).double(), torch.arange(300) % 4
    x[:, 0] += y
    penalties = (1e-3, 1.0, 100.0)
    solutions = fit_logistic(x, y, 4, penalties)
    for inverse, (weight, intercept) in zip(penalties, solutions, strict=True):
        weight, intercept = weight.requires_grad_(), intercept.requires_grad_()
        loss = F.cross_entropy(x @ weight + intercept, y, reduction="sum")
        ((weight**2).sum() / 2 + inverse * loss).backward()
        # In units of C times the number of items, in which the fit itself counts.
        assert max(weight.grad.abs().max(), intercept.grad.abs().max()) / (inverse * len(x)) < 2e-6
    assert solutions[0][0].norm() < solutions[1][0].norm()
    again = fit_logistic(x, y, 4, penalties)
    assert all(torch.equal(a, b) for a, b in zip(solutions[2], again[2], strict=True))


def test_logistic_regression_by_chunks(monkeypatch):
    x, y = draw(100, 4), torch.arange(100) % 2
    (weight, _), *_ = fit_logistic(x, y, 2, (1.0,))
    monkeypatch.setattr("capi.evaluate.logistic._CHUNK", 7)
    torch.testing.assert_close(fit_logistic(x, y, 2, (1.0,))[0][0], weight, rtol=1e-3, atol=1e-4)


def test_the_interval_is_that_of_a_mean():
    right = np.arange(400) % 4 == 0
    counts = np.stack([right, np.ones(400)], axis=1)
    low, high = bootstrap_interval(counts, lambda sums: sums[0] / sums[1])
    spread = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert low == pytest.approx(0.25 - spread, abs=0.004)
    assert high == pytest.approx(0.25 + spread, abs=0.004)
    assert bootstrap_interval(counts, lambda sums: sums[0] / sums[1]) == (low, high)


def test_probes_see_crop_after_crop_and_the_middle_where_nothing_is_trained():
    vectors = torch.arange(12.0).view(4, 3, 1)  # Of four images the middle and two crops.
    features = Features(vectors, 100 + vectors, None, ["a"] * 4, 0)
    batch = classification._batches(features, "global", torch.device("cpu"))
    images = torch.tensor([3, 0])
    assert [batch(images, epoch).flatten().tolist() for epoch in range(3)] == [[10, 1], [11, 2], [10, 1]]
    assert batch(images, -1).flatten().tolist() == [9, 0]
    both = classification._batches(features, "global + patch mean", torch.device("cpu"))
    assert both(images, 0).tolist() == [[10, 110], [1, 101]]
    alone = Features(vectors[:, :1], vectors[:, :1], None, ["a"] * 4, 0)
    assert classification._batches(alone, "global", torch.device("cpu"))(images, 5).flatten().tolist() == [9, 0]


def test_a_probe_is_chosen_by_images_that_no_probe_is_trained_on(monkeypatch):
    """Of its rightness on them and, of those that are right as often, of their loss."""
    seen, asked = [], []
    found = torch.tensor([0.5, 0.9, 0.9]), torch.tensor([1, 3, 2.0])
    monkeypatch.setattr(classification, "train_probes", lambda name, batch, y, *_: seen.append((batch, y)) or {})
    monkeypatch.setattr(classification, "validate", lambda name, _, batch, y: asked.append((batch, y)) or found)
    monkeypatch.setattr(classification, "predict", lambda *_: torch.zeros(1, 5, dtype=torch.int64))
    y = torch.arange(30)
    grid = Grid((1.0, 2.0, 3.0), (0.5,))
    _, chosen = classification.fit_and_predict("linear", lambda i, _: i, lambda i, _: i, y, 5, 30, grid)
    assert chosen == {"learning_rate": 3.0, "weight_decay": 0.5, "validation_accuracy": pytest.approx(0.9)}
    (trained, of_trained), (held_out, of_held_out) = seen[0], asked[0]
    order = np.random.default_rng(42).permutation(30)  # As the authors split.
    assert of_trained.tolist() == trained(torch.arange(27), 0).tolist() == order[:27].tolist()
    assert of_held_out.tolist() == held_out(torch.arange(3), -1).tolist() == order[27:].tolist()
