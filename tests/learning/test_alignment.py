"""LMMD against its hand-worked vector; the witness form against LMMD and against autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from fedsecure.errors import ModelError
from fedsecure.learning.alignment import (
    FourierFeatures,
    Witness,
    bandwidths,
    lmmd,
    mean_square_distance,
    witness,
)

SOURCE = normalize(torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1]], dtype=torch.float64), dim=-1)
TARGET = normalize(torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 1, 1], [2, 1, 0]], dtype=torch.float64), dim=-1)
SOFT = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.4, 0.3], [0.6, 0.3, 0.1]], dtype=torch.float64)


def test_the_vector_of_the_specification() -> None:
    both = torch.cat([SOURCE, TARGET])
    assert float(mean_square_distance(both)) == pytest.approx(1.004443907906, abs=1e-11)
    assert float(lmmd(SOURCE, torch.tensor([0, 0, 1, 1]), TARGET, SOFT)) == pytest.approx(2.032821324663, abs=1e-11)


def test_no_class_in_common_is_zero_and_can_be_differentiated() -> None:
    source = SOURCE.clone().requires_grad_()
    value = lmmd(source, torch.tensor([2, 2, 2, 2]), TARGET, SOFT)
    value.backward()
    assert float(value.detach()) == 0
    assert not source.grad.any()


def test_identical_sides_do_not_differ() -> None:
    hard = torch.eye(3, dtype=torch.float64)[torch.tensor([0, 0, 1, 2])]
    assert float(lmmd(SOURCE, hard.argmax(-1), SOURCE, hard)) == pytest.approx(0, abs=1e-12)


def test_a_kernel_that_is_not_a_number_counts_as_zero() -> None:
    broken = TARGET.clone()
    broken[0, 0] = torch.nan
    assert float(lmmd(SOURCE, torch.tensor([0, 0, 1, 1]), broken, SOFT)) == 0


def test_the_soft_labels_carry_no_gradient() -> None:
    soft = SOFT.clone().requires_grad_()
    source = SOURCE.clone().requires_grad_()
    lmmd(source, torch.tensor([0, 0, 1, 1]), TARGET, soft).backward()
    assert soft.grad is None
    assert source.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("labels", "soft"), [(torch.tensor([0, 1]), SOFT), (torch.tensor([0, 0, 1, 1]), SOFT[:2])], ids=["labels", "soft"]
)
def test_shapes_that_do_not_fit_are_refused(labels: torch.Tensor, soft: torch.Tensor) -> None:
    with pytest.raises(ModelError, match="FS-1661"):
        lmmd(SOURCE, labels, TARGET, soft)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_bandwidths_need_features_that_differ(value: float) -> None:
    with pytest.raises(ModelError, match="FS-1661"):
        bandwidths(value)
    with pytest.raises(ModelError, match="FS-1661"):
        FourierFeatures.draw((value,), dimension=3, count=4, seed=0)


def test_one_row_has_no_bandwidth() -> None:
    with pytest.raises(ModelError, match="FS-1661"):
        mean_square_distance(SOURCE[:1])


def test_fourier_features_have_unit_length_and_approach_the_kernel() -> None:
    widths = bandwidths(1.0)
    features = FourierFeatures.draw(widths, dimension=3, count=200_000, seed=7)
    rows = features.of(torch.cat([SOURCE, TARGET]).numpy())
    assert np.linalg.norm(rows, axis=1) == pytest.approx(np.ones(8), abs=1e-12)
    squares = torch.cdist(torch.cat([SOURCE, TARGET]), torch.cat([SOURCE, TARGET])).square().numpy()
    kernel = sum(np.exp(-squares / width) for width in widths) / len(widths)
    # An entry averages 200,000 terms of variance at most 1, so 0.02 is eight standard deviations; the seed is fixed.
    assert rows @ rows.T == pytest.approx(kernel, abs=0.02)


def test_the_witness_is_the_gradient_of_lmmd_in_its_features() -> None:
    """At the source's own mean embedding, the mean of ∂ℓ(i) is ∂LMMD of the linear kernel ⟨φ, φ⟩·5."""
    labels = torch.tensor([0, 0, 1, 1])
    features = FourierFeatures.draw(bandwidths(1.0), dimension=3, count=64, seed=1)
    shares = np.array([0.5, 0.5])
    soft = SOFT[:, :2] / SOFT[:, :2].sum(1, keepdim=True)
    hot = np.eye(2)[labels.numpy()]
    means = (hot / hot.sum(0)).T @ features.of(SOURCE.numpy())
    found = witness(features, source=means, target=TARGET.numpy(), probabilities=soft.numpy(), shares=shares)

    source = SOURCE.clone().requires_grad_()
    omega = torch.as_tensor(features.frequencies)
    angles = source @ omega.T
    embedded = torch.cat([angles.cos(), angles.sin()], -1) / len(omega) ** 0.5
    ours = torch.as_tensor(hot / hot.sum(0)).T @ embedded
    theirs = torch.as_tensor((soft / soft.sum(0)).numpy()).T @ torch.as_tensor(features.of(TARGET.numpy()))
    (5 * (ours - theirs).square().sum() / 2).backward()
    assert found.slope(SOURCE, labels).numpy() / 4 == pytest.approx(source.grad.numpy(), abs=1e-12)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000))
def test_slope_is_the_autograd_of_loss_row_by_row(seed: int) -> None:
    generator = np.random.default_rng(seed)
    features = FourierFeatures.draw(bandwidths(1.0), dimension=5, count=16, seed=seed)
    found = Witness(
        features=features, difference=generator.standard_normal((3, 32)), weights=generator.uniform(0.1, 3, 3)
    )
    rows = torch.from_numpy(generator.standard_normal((6, 5))).requires_grad_()
    labels = torch.from_numpy(generator.integers(0, 3, 6))
    losses = found.loss(rows, labels)
    losses.sum().backward()
    assert found.slope(rows.detach(), labels).numpy() == pytest.approx(rows.grad.numpy(), abs=1e-10)
    other = rows.detach().clone()
    other[1:] = 0
    assert float(found.loss(other, labels)[0]) == pytest.approx(float(losses[0].detach()), abs=1e-15)


def test_rare_classes_weigh_at_most_three_times_the_mean() -> None:
    features = FourierFeatures.draw((1.0,), dimension=3, count=4, seed=0)
    shares = np.array([0.98, 0.01, 0.01])
    found = witness(features, source=None, target=TARGET.numpy(), probabilities=SOFT.numpy(), shares=shares)
    assert found.weights == pytest.approx(10 * np.array([1 / (3 * 0.98), 3.0, 3.0]))


def test_a_witness_that_does_not_fit_is_refused() -> None:
    features = FourierFeatures.draw((1.0,), dimension=3, count=4, seed=0)
    with pytest.raises(ModelError, match="FS-1661"):
        Witness(features=features, difference=np.zeros((2, 7)), weights=np.ones(2))
    with pytest.raises(ModelError, match="FS-1661"):
        witness(features, source=None, target=TARGET.numpy(), probabilities=SOFT.numpy(), shares=np.zeros(3))
