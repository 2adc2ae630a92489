"""Federated features: gradients in the features against autograd's double backward, the contrast's closed forms, and
re-training against a plain torch loop."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedsecure.errors import ModelError
from fedsecure.learning import federated_features as module
from fedsecure.learning.class_gradients import ClassGradients, class_gradient_sum, span_basis
from fedsecure.learning.classifier import Classifier, Retraining, fresh_classifier, retrain
from fedsecure.learning.federated_features import (
    Matching,
    PrototypeContrast,
    contrast_loss,
    find_features,
    fresh_features,
    matching_loss,
)
from fedsecure.learning.units import UnitFeatures

K, M, D = 4, 5, 6


def setting(seed: int, layout: ClassGradients) -> tuple[np.ndarray, Classifier, np.ndarray]:
    rng = np.random.default_rng(seed)
    bias = rng.normal(size=K) if layout.bias else None
    classifier = Classifier(rng.normal(size=(K, D)) / 2, bias)
    return rng.normal(size=(K, M, D)), classifier, rng.normal(size=layout.shape)


def by_double_backward(features, classifier, target, *, rows, cosine, basis=None) -> tuple[float, np.ndarray]:
    """The published procedure: autograd's gradient in the head, one graph a class, and a backward through it."""
    values = torch.tensor(features, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64)
    for label in range(K):
        weight = torch.tensor(np.asarray(classifier.weight), requires_grad=True)
        parameters = [weight]
        logits = values[label] @ weight.T
        if classifier.bias is not None:
            bias = torch.tensor(np.asarray(classifier.bias), requires_grad=True)
            parameters.append(bias)
            logits = logits + bias
        loss = functional.cross_entropy(logits, torch.full((M,), label))
        found = torch.autograd.grad(loss, parameters, create_graph=True)
        weights = found[0] if basis is None else found[0] @ torch.tensor(basis).T
        matrix = torch.cat([weights, found[1][:, None]], dim=1) if len(found) == 2 else weights
        matrix = matrix if rows == "full" else matrix[label : label + 1]
        aim = torch.tensor(target[label])
        width = weights.shape[1]
        if cosine == "matrix":
            pairs = [(matrix.flatten(), aim.flatten())]
        else:
            pairs = list(zip(matrix[:, :width], aim[:, :width], strict=True))
            pairs += [(matrix[:, width], aim[:, width])] if len(found) == 2 else []
        for ours, theirs in pairs:
            total = total + 1 - (ours @ theirs) / (ours.norm() * theirs.norm() + 1e-6)
    total.backward()
    return float(total.detach()), values.grad.numpy()


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cosine", ["rows", "matrix"])
@pytest.mark.parametrize("rows", ["full", "diagonal"])
def test_matching_equals_the_double_backward(rows, cosine, bias, projected):
    basis = span_basis(np.random.default_rng(9).normal(size=(K, D))) if projected else None
    layout = ClassGradients(K, K if projected else D, rows, bias)
    features, classifier, target = setting(1, layout)
    loss, slope = matching_loss(features, classifier, target, layout, cosine=cosine, basis=basis)
    expected, gradient = by_double_backward(features, classifier, target, rows=rows, cosine=cosine, basis=basis)
    assert loss == pytest.approx(expected, rel=1e-10)
    np.testing.assert_allclose(slope, gradient, rtol=1e-8, atol=1e-11)


def test_matching_looks_at_directions_only_and_at_clear_classes_only():
    layout = ClassGradients(K, D)
    features, classifier, target = setting(2, layout)
    loss, slope = matching_loss(features, classifier, target, layout)
    larger, same = matching_loss(features, classifier, 1000 * target, layout)
    assert larger == pytest.approx(loss, rel=1e-4)
    np.testing.assert_allclose(same, slope, rtol=1e-3, atol=2e-5)
    clear = np.array([True, False, True, True])
    _, gated = matching_loss(features, classifier, target, layout, clear=clear)
    assert not gated[1].any()
    np.testing.assert_array_equal(gated[clear], slope[clear])


def test_a_class_held_by_nobody_pulls_nowhere():
    layout = ClassGradients(K, D, "full")
    features, classifier, target = setting(3, layout)
    target[2] = 0.0
    loss, slope = matching_loss(features, classifier, target, layout)
    assert np.isfinite(loss)
    assert not slope[2].any()


def masked_form(features: np.ndarray, text: np.ndarray, temperature: float) -> tuple[float, np.ndarray]:
    """The published text contrast: (K·m)² logits against the texts repeated m times, the anchor's own place masked."""
    values = torch.tensor(features, requires_grad=True)
    rows = values.reshape(-1, D)
    repeated = torch.tensor(text).repeat_interleave(M, dim=0)
    logits = rows @ repeated.T / temperature
    apart = ~torch.eye(len(rows), dtype=torch.bool)
    own = torch.arange(K).repeat_interleave(M)
    log_likelihood = logits - torch.logsumexp(logits.masked_fill(~apart, -torch.inf), dim=1, keepdim=True)
    positives = (own[:, None] == own[None]) & apart
    loss = -((log_likelihood * positives).sum(1) / positives.sum(1)).mean()
    loss.backward()
    return float(loss.detach()), values.grad.numpy()


def against_features(features: np.ndarray, text: np.ndarray, temperature: float) -> tuple[float, np.ndarray]:
    """The paper's equation 7: other federated features as negatives, summed over the anchors."""
    values = torch.tensor(features, requires_grad=True)
    rows = values.reshape(-1, D)
    positive = (rows * torch.tensor(text).repeat_interleave(M, dim=0)).sum(1) / temperature
    logits = (rows @ rows.T / temperature).masked_fill(torch.eye(len(rows), dtype=torch.bool), -torch.inf)
    loss = (torch.logsumexp(logits, dim=1) - positive).sum()
    loss.backward()
    return float(loss.detach()), values.grad.numpy()


def unit_text(seed: int) -> np.ndarray:
    text = np.random.default_rng(seed).normal(size=(K, D))
    return text / np.linalg.norm(text, axis=1, keepdims=True)


def test_contrast_with_texts_equals_the_masked_form():
    features, text = np.random.default_rng(4).normal(size=(K, M, D)), unit_text(5)
    how = PrototypeContrast(strength=0.3, temperature=0.1)
    loss, slope = contrast_loss(features, text, how)
    expected, gradient = masked_form(features, text, 0.1)
    assert loss == pytest.approx(0.3 * expected, rel=1e-12)
    np.testing.assert_allclose(slope, 0.3 * gradient, rtol=1e-9, atol=1e-13)
    summed, _ = contrast_loss(features, text, PrototypeContrast(strength=0.3, temperature=0.1, reduction="sum"))
    assert summed == pytest.approx(K * M * loss)


def test_contrast_with_features_equals_the_papers_form(monkeypatch):
    features, text = np.random.default_rng(6).normal(size=(K, M, D)), unit_text(7)
    expected, gradient = against_features(features, text, 0.5)
    how = PrototypeContrast(strength=1.0, temperature=0.5, negatives="features", reduction="sum")
    for chunk in (3, 1000):
        monkeypatch.setattr("fedsecure.learning.federated_features._CHUNK", chunk)
        loss, slope = contrast_loss(features, text, how)
        assert loss == pytest.approx(expected, rel=1e-12)
        np.testing.assert_allclose(slope, gradient, rtol=1e-9, atol=1e-12)


def test_one_feature_a_class_has_no_positive_among_its_negatives():
    features, text = np.random.default_rng(8).normal(size=(K, 1, D)), unit_text(9)
    loss, slope = contrast_loss(features, text, PrototypeContrast(strength=1.0, temperature=1.0))
    logits = features[:, 0] @ text.T
    others = np.where(np.eye(K, dtype=bool), -np.inf, logits)
    expected = np.mean(np.log(np.exp(others).sum(axis=1)) - np.diag(logits))
    assert loss == pytest.approx(expected)
    assert np.isfinite(slope).all()


def test_features_come_to_look_like_the_sites_and_a_gated_class_like_its_text():
    rng = np.random.default_rng(10)
    true = np.linalg.qr(rng.normal(size=(D, D)))[0][:K]
    labels = np.arange(80) % K
    rows = (2 * true[labels] + 0.1 * rng.normal(size=(80, D))).astype(np.float32)[:, None]
    units = UnitFeatures(rows, labels[:, None], np.ones((80, 1), bool))
    layout, start = ClassGradients(K, D, bias=False), Classifier.zero(K, D, bias=False)
    target = class_gradient_sum(rows, units, start, layout, clip_norm=1.0)
    clear = np.array([True, True, True, False])
    found = find_features(
        fresh_features(K, M, D, seed=0), start, target, layout, matching=Matching(steps=200, rate=0.5),
        contrast=PrototypeContrast(strength=0.5, temperature=0.5), text=true, clear=clear,
    )  # fmt: skip
    means = found.features.mean(axis=1)
    cosines = (means / np.linalg.norm(means, axis=1, keepdims=True)) @ true.T
    assert (np.diag(cosines)[:3] > 0.9).all()
    assert cosines[3].argmax() == 3
    assert found.matching[1] < 0.2 * found.matching[0]
    assert min(found.moved_by_matching, found.moved_by_contrast) > 0
    classifier = retrain(found.features, start, Retraining(epochs=50, batch=8, rate=0.1), seed=0)
    assert (classifier.probabilities(rows[:, 0]).argmax(axis=1) == labels).mean() > 0.95


@pytest.mark.parametrize("bias", [True, False])
def test_retraining_takes_the_steps_of_plain_sgd(bias):
    features = fresh_features(K, M, D, seed=1)
    start = fresh_classifier(K, D, bias=bias, seed=2)
    how = Retraining(epochs=3, batch=8, rate=0.1)
    found = retrain(features, start, how, seed=3)
    head = torch.nn.Linear(D, K, bias=bias)
    with torch.no_grad():
        head.weight.copy_(torch.tensor(start.weight))
        if bias:
            head.bias.copy_(torch.tensor(start.bias))
    optimiser = torch.optim.SGD(head.parameters(), lr=0.1)
    order, rows = np.random.default_rng(3), torch.tensor(features.reshape(-1, D))
    labels = torch.arange(K).repeat_interleave(M)
    for _ in range(3):
        shuffled = torch.tensor(order.permutation(K * M))
        for batch in torch.split(shuffled, 8):
            optimiser.zero_grad()
            functional.cross_entropy(head(rows[batch]), labels[batch]).backward()
            optimiser.step()
    np.testing.assert_allclose(found.weight, head.weight.detach().numpy(), atol=1e-5)
    if bias:
        np.testing.assert_allclose(found.bias, head.bias.detach().numpy(), atol=1e-5)
    else:
        assert found.bias is None
    assert start.weight is not found.weight


@pytest.mark.parametrize("rows", ["full", "diagonal"])
def test_the_result_depends_neither_on_cores_nor_on_how_many_classes_are_taken_at_a_time(monkeypatch, rows):
    classes, each, dimension = 60, 3, 8
    rng, layout = np.random.default_rng(5), ClassGradients(classes, dimension, rows)
    features = fresh_features(classes, each, dimension, seed=6)
    classifier = fresh_classifier(classes, dimension, seed=7)
    target, clear = rng.normal(size=layout.length), rng.random(classes) < 0.5
    text = rng.normal(size=(classes, dimension))
    text /= np.linalg.norm(text, axis=1, keepdims=True)

    def found() -> list:
        loss, slope = matching_loss(features, classifier, target, layout, clear=clear)
        second, pulled = contrast_loss(features, text, PrototypeContrast(strength=1.0))
        return [loss, slope, second, pulled]

    with monkeypatch.context() as patch:
        patch.setattr(module, "_BLOCK", classes)
        whole = found()
    on_more = []
    for count in (1, 2, 7):
        with monkeypatch.context() as patch:
            patch.setattr(module, "cores", lambda count=count: count)
            on_more.append(found())
    on_one = on_more.pop(0)
    for value, alone in zip(on_one, whole, strict=True):
        np.testing.assert_allclose(value, alone, rtol=1e-4, atol=1e-6)
    for several in on_more:
        for value, alone in zip(several, on_one, strict=True):
            np.testing.assert_array_equal(value, alone)


@pytest.mark.parametrize("negatives", ["text", "features", None])
def test_blocks_of_classes_descend_as_all_together_do(monkeypatch, negatives):
    classes, each, dimension = 12, 3, 8
    rng, layout = np.random.default_rng(15), ClassGradients(classes, dimension, "full")
    classifier, start = (fresh_classifier(classes, dimension, seed=1), fresh_features(classes, each, dimension, seed=2))
    target, text = rng.normal(size=layout.length), rng.normal(size=(classes, dimension))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    contrast = None if negatives is None else PrototypeContrast(strength=0.5, negatives=negatives, reduction="sum")
    monkeypatch.setattr(module, "_BLOCK", 5)
    found = find_features(
        start, classifier, target, layout, matching=Matching(steps=4), contrast=contrast, text=text,
    )  # fmt: skip
    features, moves = np.array(start), np.zeros((2, *start.shape))
    for _ in range(4):
        slopes = [matching_loss(features, classifier, target, layout)[1]]
        slopes += [] if contrast is None else [contrast_loss(features, text, contrast)[1]]
        for move, slope in zip(moves, slopes, strict=False):
            move -= 0.1 * slope
            features -= 0.1 * slope
    np.testing.assert_allclose(found.features, features, rtol=1e-4, atol=1e-5)
    assert found.matching[1] == pytest.approx(matching_loss(features, classifier, target, layout)[0], rel=1e-5)
    moved = (found.moved_by_matching, found.moved_by_contrast)
    assert moved == pytest.approx(np.linalg.norm(moves.reshape(2, -1), axis=1), rel=1e-4)
    last = 0.0 if contrast is None else contrast_loss(features, text, contrast)[0]
    assert found.contrast[1] == pytest.approx(last, rel=1e-4)


@pytest.mark.parametrize("negatives", ["text", "features", None])
def test_features_that_go_to_infinity_are_refused(negatives):
    layout, start = ClassGradients(K, D), np.full((K, M, D), 1e38, np.float32)
    contrast = None if negatives is None else PrototypeContrast(strength=1.0, negatives=negatives)
    with pytest.raises(ModelError, match="FS-1681"):
        find_features(
            start, Classifier.zero(K, D), np.full(layout.length, 1.0), layout,
            matching=Matching(steps=3, rate=1e38), contrast=contrast, text=np.eye(K, D),
        )  # fmt: skip


def test_memory_does_not_grow_with_the_square_of_the_features():
    classes, each, dimension = 20, 200, 32
    features = fresh_features(classes, each, dimension, seed=0)
    layout = ClassGradients(classes, dimension)
    target = np.random.default_rng(1).normal(size=layout.length)
    text = np.eye(classes, dimension, dtype=np.float32)
    square = (classes * each) ** 2 * 4
    tracemalloc.start()
    try:
        matching_loss(features, Classifier.zero(classes, dimension), target, layout)
        contrast_loss(features, text, PrototypeContrast(negatives="text"))
        contrast_loss(features, text, PrototypeContrast(negatives="features"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A (K·m)² matrix of float32 would take 64 MB; its rows are taken 256 at a time.
    assert peak < square / 3


def test_sizes_and_settings_that_make_no_sense():
    layout, classifier = ClassGradients(K, D), Classifier.zero(K, D)
    features, target = fresh_features(K, M, D, seed=0), np.ones(layout.length)
    for wrong in (
        lambda: fresh_features(K, 0, D, seed=0),
        lambda: PrototypeContrast(temperature=0.0),
        lambda: PrototypeContrast(temperature=-1.0),
        lambda: Matching(rate=0.0),
        lambda: Retraining(epochs=0),
        lambda: Classifier(np.ones((1, D))),
        lambda: Classifier(np.full((K, D), np.nan)),
        lambda: matching_loss(features, classifier, target[:-1], layout),
        lambda: matching_loss(features, classifier, np.full(layout.length, np.inf), layout),
        lambda: matching_loss(features, Classifier.zero(K, D, bias=False), target, layout),
        lambda: contrast_loss(features, np.ones((K + 1, D)), PrototypeContrast()),
        lambda: retrain(features[:-1], classifier, Retraining(), seed=0),
        lambda: find_features(
            features, classifier, target, layout, matching=Matching(), contrast=PrototypeContrast()
        ),
        lambda: contrast_loss(
            np.ones((1, 1, D)), np.ones((1, D)), PrototypeContrast(negatives="features")
        ),
    ):  # fmt: skip
        with pytest.raises(ModelError, match="FS-1681"):
            wrong()
