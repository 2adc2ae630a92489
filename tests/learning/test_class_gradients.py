"""Class gradients in closed form: equal to autograd, bounded a unit, and clear where there is nothing to tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsecure.errors import ModelError
from fedsecure.learning.class_gradients import ClassGradients, class_gradient_sum, clear_classes, span_basis
from fedsecure.learning.classifier import Classifier
from fedsecure.learning.units import UnitFeatures

K, D = 4, 6


def some_units(seed: int, *, count: int = 12, records: int = 3) -> UnitFeatures:
    rng = np.random.default_rng(seed)
    mask = rng.random((count, records)) < 0.7
    mask[:, 0] = True
    features = rng.normal(size=(count, records, D)).astype(np.float32)
    return UnitFeatures(features, rng.integers(0, K, (count, records)), mask)


def some_classifier(seed: int, *, bias: bool = True) -> Classifier:
    rng = np.random.default_rng(seed)
    return Classifier(rng.normal(size=(K, D)), rng.normal(size=K) if bias else None)


def by_autograd(units: UnitFeatures, classifier: Classifier, *, class_: int) -> tuple[np.ndarray, np.ndarray]:
    """Σ over the records of one class of w·∇ cross-entropy in (W, b)."""
    weight = torch.tensor(np.asarray(classifier.weight), requires_grad=True)
    bias = torch.tensor(np.zeros(K) if classifier.bias is None else np.asarray(classifier.bias), requires_grad=True)
    kept = units.mask & (units.labels == class_)
    rows, labels = torch.tensor(units.features[kept]).double(), torch.tensor(units.labels[kept])
    losses = torch.nn.functional.cross_entropy(rows @ weight.T + bias, labels, reduction="none")
    (losses * torch.tensor(units.weights[kept])).sum().backward()
    return weight.grad.numpy(), bias.grad.numpy()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", ["full", "diagonal"])
def test_sums_equal_autograd(rows, bias):
    units, classifier = some_units(1), some_classifier(2, bias=bias)
    layout = ClassGradients(K, D, rows, bias)
    found = class_gradient_sum(units.features, units, classifier, layout).reshape(layout.shape)
    for label in range(K):
        weight, biases = by_autograd(units, classifier, class_=label)
        expected = np.concatenate([weight, biases[:, None]], axis=1) if bias else weight
        kept = expected if rows == "full" else expected[label : label + 1]
        np.testing.assert_allclose(found[label], kept, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", ["full", "diagonal"])
def test_one_record_has_the_norm_of_the_formula(rows):
    units, classifier = some_units(3, count=1, records=1), some_classifier(4)
    layout = ClassGradients(K, D, rows)
    found = class_gradient_sum(units.features, units, classifier, layout)
    row, label = units.features[0, 0].astype(np.float64), int(units.labels[0, 0])
    error = classifier.probabilities(row)
    error[label] -= 1
    length = np.linalg.norm(error) if rows == "full" else abs(error[label])
    assert np.linalg.norm(found) == pytest.approx(length * np.sqrt(row @ row + 1), rel=1e-12)


@pytest.mark.parametrize("rows", ["full", "diagonal"])
def test_removing_any_unit_moves_the_whole_tensor_by_at_most_the_clip_norm(rows):
    # Some units lie far beyond the clip and some within it; each is also replaced by nothing in place.
    base = some_units(5, count=20)
    scale = np.logspace(-2, 4, 20)[:, None, None].astype(np.float32)
    units = UnitFeatures(base.features * scale, base.labels, base.mask)
    classifier, layout, bound = some_classifier(6), ClassGradients(K, D, rows), 0.7
    whole = class_gradient_sum(units.features, units, classifier, layout, clip_norm=bound)
    moved = []
    for row in range(len(units)):
        others = units.select(np.arange(len(units)) != row)
        rest = class_gradient_sum(others.features, others, classifier, layout, clip_norm=bound)
        moved.append(np.linalg.norm(whole - rest))
    assert max(moved) <= bound * (1 + 1e-12)
    # The bound is reached, so it is the clip that holds it and no accident.
    assert max(moved) >= bound * (1 - 1e-6)
    assert min(moved) < 0.9 * bound


def test_a_unit_over_several_classes_pays_once_for_all_of_them():
    features = np.full((1, 4, D), 50.0, np.float32)
    units = UnitFeatures(features, np.arange(4)[None], np.ones((1, 4), bool))
    layout = ClassGradients(K, D)
    found = class_gradient_sum(features, units, Classifier.zero(K, D), layout, clip_norm=1.0)
    assert np.linalg.norm(found) <= 1.0
    assert (np.abs(found.reshape(K, -1)).max(axis=1) > 0.1).all()


def test_records_that_are_not_finite_count_for_nothing():
    units, classifier = some_units(7), some_classifier(8)
    broken = units.features.copy()
    broken[3, 0, 0] = np.nan
    layout = ClassGradients(K, D)
    found = class_gradient_sum(broken, units, classifier, layout, clip_norm=1.0)
    others = units.select(np.arange(len(units)) != 3)
    expected = class_gradient_sum(others.features, others, classifier, layout, clip_norm=1.0)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_class_nobody_holds_and_no_units_at_all_give_zeros():
    units = some_units(9)
    alone = UnitFeatures(units.features, np.minimum(units.labels, K - 2), units.mask)
    layout, classifier = ClassGradients(K, D, "full"), some_classifier(10)
    found = class_gradient_sum(alone.features, alone, classifier, layout).reshape(layout.shape)
    assert not found[K - 1].any()
    assert found[0].any()
    nobody = units.select(slice(0, 0))
    assert not class_gradient_sum(nobody.features, nobody, classifier, layout).any()


def test_at_the_zero_classifier_the_diagonal_is_a_class_sum_of_features():
    units = some_units(11, records=1)
    layout = ClassGradients(K, D, bias=False)
    found = class_gradient_sum(units.features, units, Classifier.zero(K, D, bias=False), layout).reshape(K, D)
    sums = np.zeros((K, D))
    np.add.at(sums, units.labels[:, 0], units.features[:, 0].astype(np.float64))
    np.testing.assert_allclose(found, (1 / K - 1) * sums, atol=1e-12)


def test_a_projected_gradient_is_that_of_the_projected_features():
    rng = np.random.default_rng(12)
    text = rng.normal(size=(K, D))
    text -= text.mean(axis=0)  # of rank K − 1, as centred texts are
    basis = span_basis(text)
    row = rng.normal(size=D)
    inside = np.linalg.lstsq(text.T, row, rcond=None)[0] @ text
    np.testing.assert_allclose(basis.T @ (basis @ row), inside, atol=1e-10)
    assert np.linalg.norm(basis @ row) == pytest.approx(np.linalg.norm(inside))
    # Turned or reordered rows of the same texts keep the basis's rows in their places: nothing hangs on signs.
    np.testing.assert_allclose(span_basis(text[::-1]), basis[::-1], atol=1e-10)
    units, classifier = some_units(13), some_classifier(14)
    layout = ClassGradients(K, K)
    found = class_gradient_sum(units.features, units, classifier, layout, outer=units.features @ basis.T)
    plain = class_gradient_sum(units.features, units, classifier, ClassGradients(K, D)).reshape(K, -1)
    np.testing.assert_allclose(found.reshape(K, -1)[:, :K], plain[:, :D] @ basis.T, atol=1e-6)


def test_the_gate_passes_signal_and_stops_noise():
    rng = np.random.default_rng(15)
    layout = ClassGradients(3, 200, bias=False)
    noisy = rng.normal(size=layout.shape)
    noisy[0] += 3.0
    noisy[2] = 0.0
    assert clear_classes(noisy.ravel(), layout, noise_std=1.0).tolist() == [True, False, False]
    assert clear_classes(noisy.ravel(), layout, noise_std=0.0).tolist() == [True, True, False]


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan")])
def test_a_clip_norm_that_is_none(bound):
    units = some_units(16)
    with pytest.raises(ModelError, match="FS-1681"):
        class_gradient_sum(units.features, units, some_classifier(1), ClassGradients(K, D), clip_norm=bound)


def test_shapes_and_labels_that_do_not_fit():
    units = some_units(17)
    with pytest.raises(ModelError, match="FS-1681"):
        class_gradient_sum(units.features[..., :3], units, some_classifier(1), ClassGradients(K, D))
    with pytest.raises(ModelError, match="FS-1681"):
        class_gradient_sum(units.features, units, some_classifier(1), ClassGradients(K + 1, D))
    beyond = UnitFeatures(units.features, units.labels + 2, units.mask)
    with pytest.raises(ModelError, match="FS-1681"):
        class_gradient_sum(beyond.features, beyond, some_classifier(1), ClassGradients(K, D))
    with pytest.raises(ModelError, match="FS-1681"):
        ClassGradients(1, D)
    with pytest.raises(ModelError, match="FS-1681"):
        span_basis(np.ones((D, D)))
