"""Focal loss, alignment and contrast: three ways to the same clipped sums, one record's own, and bounded by C."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedsecure.errors import ModelError
from fedsecure.learning.adapters import FORMS, AdapterSpec
from fedsecure.learning.alignment import FourierFeatures, bandwidths, witness
from fedsecure.learning.engines import clipped_sum
from fedsecure.learning.losses import classification_loss, classification_slope, contrast_loss, contrast_slope
from fedsecure.learning.modules import build_trained, record_loss
from fedsecure.learning.objective import TEACHER_SCALE, Contrast, Distillation, Objective
from fedsecure.learning.task import HeadTask, unit_rows
from fedsecure.learning.units import UnitFeatures

CPU = torch.device("cpu")
D, K = 10, 4
OF_FEATURES = tuple(kind for kind in FORMS if kind not in ("linear", "affine"))


def moved(spec: AdapterSpec, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: value + 0.3 * rng.normal(size=value.shape) for name, value in spec.initial(b"start").items()}


def objective(name: str, spec: AdapterSpec, seed: int = 5) -> Objective:
    rng = np.random.default_rng(seed)
    if name == "focal":
        return Objective(focal=1.0, smoothing=0.1)
    if name == "smooth":
        return Objective(smoothing=0.2)
    if name == "distillation":
        return Objective(distillation=Distillation(strength=0.8, temperature=3.0))
    if name == "taught contrast":
        return Objective(contrast=Contrast(moved(spec, 20), moved(spec, 21)), distillation=Distillation())
    if name == "contrast":
        return Objective(contrast=Contrast(moved(spec, 20), moved(spec, 21)))
    target = unit_rows(rng.normal(size=(30, D)))
    soft = rng.dirichlet(np.ones(K), size=30)
    fourier = FourierFeatures.draw(bandwidths(1.9), dimension=D, count=32, seed=1)
    shares = np.array([0.4, 0.3, 0.2, 0.1])
    kept = witness(fourier, source=None, target=target, probabilities=soft, shares=shares, strength=0.7)
    return Objective(focal=2.0 if name == "both" else 0.0, alignment=kept)


def case(kind: str, name: str, *, units: int = 9, records: int = 3) -> tuple[HeadTask, dict[str, Any], UnitFeatures]:
    rng = np.random.default_rng(7)
    spec = AdapterSpec(kind, D, K)  # type: ignore[arg-type]
    task = HeadTask(
        spec,
        rng.normal(size=(K, D)).astype(np.float32),
        (0.1 * rng.normal(size=D)).astype(np.float32),
        temperature=8.0,
        log_prior=rng.normal(size=K).astype(np.float32),
        objective=objective(name, spec),
    )
    mask = rng.random((units, records)) < 0.8
    mask[:, 0] = True
    features = rng.normal(size=(units, records, D)).astype(np.float32)
    return task, moved(spec, 3), UnitFeatures(features, rng.integers(0, K, (units, records)), mask)


CASES = [(kind, name) for kind in FORMS for name in ("focal", "smooth", "distillation")]
CASES += [(kind, name) for kind in OF_FEATURES for name in ("alignment", "both", "contrast", "taught contrast")]


@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.parametrize("clip", [0.01, 100.0])
def test_closed_form_opacus_and_autograd_agree(kind: str, name: str, clip: float) -> None:
    task, tensors, rows = case(kind, name)
    module = build_trained(task, tensors, device=CPU, dtype=torch.float64)
    loss, total = record_loss(task, CPU), torch.zeros(task.spec.parameters, dtype=torch.float64)
    for row in range(len(rows)):
        kept = rows.mask[row]
        features = torch.from_numpy(rows.features[row][kept][None]).double()
        mean = loss(module(features), torch.from_numpy(rows.labels[row][kept][None])).mean()
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(mean, list(module.parameters()))])
        total += flat * min(1.0, clip * (1 - 1e-5) / float(flat.norm()))
    expected = total.numpy()
    assert np.linalg.norm(expected) > 1e-3
    for engine in ("closed-form", "opacus"):
        found = clipped_sum(task, tensors, rows, max_grad_norm=clip, engine=engine, device="cpu", chunk=6)  # type: ignore[arg-type]
        assert np.linalg.norm(found - expected) <= 1e-10 * np.linalg.norm(expected), engine


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_units_gradient_does_not_notice_the_others(kind: str, name: str) -> None:
    """Bit for bit: one unit among different others, in a block of the same size."""
    task, tensors, rows = case(kind, name, units=8, records=1)
    first = clipped_sum(task, tensors, rows.select([0]), max_grad_norm=0.1, device="cpu")  # type: ignore[arg-type]
    rng = np.random.default_rng(1)
    others = UnitFeatures(rows.features.copy(), rows.labels.copy(), rows.mask.copy())
    others.features[1:] = rng.normal(size=others.features[1:].shape)
    others.labels[1:] = (others.labels[1:] + 1) % K
    for units in (rows, others):
        # A unit that is not finite counts for nothing and yet stands in the block.
        units.features[1:, 0, 0] = np.nan
    kept = [clipped_sum(task, tensors, u, max_grad_norm=0.1, device="cpu") for u in (rows, others)]
    assert np.array_equal(*kept)
    assert np.linalg.norm(kept[0] - first) <= 1e-12 * np.linalg.norm(first)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_one_unit_moves_the_sum_by_at_most_c(kind: str, name: str) -> None:
    task, tensors, rows = case(kind, name, units=20, records=2)
    rows.features[0] *= 1e6
    clip = 1e-3
    whole = clipped_sum(task, tensors, rows, max_grad_norm=clip, device="cpu")
    moves = [
        np.linalg.norm(whole - clipped_sum(task, tensors, rows.select(np.arange(20) != i), max_grad_norm=clip))
        for i in range(20)
    ]
    assert max(moves) <= clip
    assert max(moves) >= clip * (1 - 2e-5)


@pytest.mark.parametrize(("focal", "smoothing"), [(0.0, 0.0), (0.0, 0.1), (1.0, 0.1), (2.0, 0.0), (2.5, 0.3)])
def test_slopes_are_the_derivatives_of_the_losses(focal: float, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (20 * torch.randn(50, 6, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.arange(50) % 6
    kept = Objective(focal=focal, smoothing=smoothing)
    (expected,) = torch.autograd.grad(classification_loss(kept, logits, labels).sum(), logits)
    assert torch.allclose(classification_slope(kept, logits.detach(), labels), expected, rtol=1e-9, atol=1e-12)


def test_contrast_is_the_formula_of_moon() -> None:
    generator = torch.Generator().manual_seed(0)
    z, near, far = (torch.nn.functional.normalize(torch.randn(9, 5, generator=generator).double()) for _ in range(3))
    z.requires_grad_()
    value = contrast_loss(z, near, far, temperature=0.5)
    one, two = ((z * other).sum(-1).div(0.5).exp() for other in (near, far))
    assert torch.allclose(value, -(one / (one + two)).log())
    (expected,) = torch.autograd.grad(value.sum(), z)
    assert torch.allclose(contrast_slope(z.detach(), near, far, temperature=0.5), expected)


def test_distillation_is_hintons_loss_against_zero_shot_at_clips_own_scale() -> None:
    task, tensors, rows = case("linear", "distillation", units=5, records=1)
    module = build_trained(task, tensors, device=CPU, dtype=torch.float64)
    outputs, labels = module(torch.from_numpy(rows.features).double()), torch.from_numpy(rows.labels)
    plain = HeadTask(task.spec, task.text, task.centre, task.temperature, task.log_prior)
    apart = record_loss(task, CPU)(outputs, labels) - record_loss(plain, CPU)(outputs[..., :K], labels)
    inputs = unit_rows(unit_rows(rows.features.astype(np.float64)) - task.centre)
    teacher = torch.softmax(torch.from_numpy(TEACHER_SCALE * inputs @ task.prior.T) / 3, dim=-1)
    student = torch.log_softmax(outputs[..., :K] / 3, dim=-1)
    expected = 0.8 * 9 * torch.nn.functional.kl_div(student, teacher, reduction="none").sum(-1)
    assert torch.allclose(apart, expected)
    assert float(apart.detach().min()) > 0


def test_focal_loss_counts_a_sure_record_less() -> None:
    logits = torch.tensor([[6.0, 0.0, 0.0], [0.5, 0.0, 0.0]], dtype=torch.float64)
    labels = torch.zeros(2, dtype=torch.int64)
    plain, focal = (classification_loss(Objective(focal=g), logits, labels) for g in (0.0, 1.0))
    assert torch.allclose(plain, torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    assert float(focal[0] / plain[0]) < 0.01 < 0.4 < float(focal[1] / plain[1])


def test_objectives_that_make_no_sense_are_refused() -> None:
    for values in ({"focal": 0.5}, {"focal": -1.0}, {"focal": float("inf")}, {"smoothing": 1.0}, {"smoothing": -0.1}):
        with pytest.raises(ModelError, match="FS-1646"):
            Objective(**values)
    for name in ("alignment", "contrast"):
        with pytest.raises(ModelError, match="FS-1647"):
            case("linear", name)
