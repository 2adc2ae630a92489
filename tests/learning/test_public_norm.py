"""A hidden layer normalised by the statistics of public images: BatchNorm's numbers, and nothing of another record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedsecure.errors import ModelError
from fedsecure.learning.adapters import AdapterSpec
from fedsecure.learning.artefact import AdapterMetadata, load_adapter, save_adapter
from fedsecure.learning.closed_form import ClippedSums
from fedsecure.learning.evaluation import predict
from fedsecure.learning.gradients import Outer
from fedsecure.learning.modules import build_module, centred_inputs, record_loss, without_public
from fedsecure.learning.task import HeadTask
from fedsecure.learning.units import UnitFeatures

D, K, CPU = 16, 4, torch.device("cpu")


def case(seed: int = 0, *, images: int = 30) -> tuple[HeadTask, dict[str, Any], np.random.Generator]:
    rng = np.random.default_rng(seed)
    spec = AdapterSpec("facmic_plain", D, K)
    # As CLIP's features do, the images lie in a cone, so that the hidden layer's means are far from 0.
    public = (rng.normal(size=D) + 0.5 * rng.normal(size=(images, D))).astype(np.float32)
    centre = (0.1 * rng.normal(size=D)).astype(np.float32)
    task = HeadTask(spec, rng.normal(size=(K, D)).astype(np.float32), centre, 8.0, public=public)
    return task, {n: v + 0.3 * rng.normal(size=v.shape) for n, v in spec.initial(b"x").items()}, rng


def features_of(rng: np.random.Generator, count: int) -> np.ndarray[Any, Any]:
    return rng.normal(size=(count, D)).astype(np.float32)


def test_the_layer_is_batch_norm_with_the_public_images_as_its_batch() -> None:
    """On those images themselves in training mode, on others with the statistics frozen; γ and β are trained."""
    task, tensors, rng = case()
    module: Any = build_module(task, tensors, device=CPU, dtype=torch.float64)

    def hidden(rows: np.ndarray[Any, Any]) -> torch.Tensor:
        found: torch.Tensor = module.hidden(centred_inputs(task, torch.from_numpy(rows).double()) * D**0.5)
        return found

    affine = {"weight": module.norm.weight, "bias": module.norm.bias}
    assert task.public is not None
    batch = hidden(task.public)
    whole = functional.batch_norm(batch, None, None, **affine, training=True)
    assert torch.allclose(module.normalised(batch), whole, rtol=1e-12, atol=1e-12)
    others = hidden(features_of(rng, 9))
    frozen = functional.batch_norm(others, batch.detach().mean(0), batch.detach().var(0, correction=0), **affine)
    assert torch.allclose(module.normalised(others), frozen, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(module.normalised(others), functional.layer_norm(others, [D], **affine), atol=0.1)


def test_no_gradient_goes_through_the_statistics() -> None:
    """The gradient of W1 is that with μ and σ held fixed, by finite differences; theirs would change it."""
    task, tensors, rng = case(1)
    features, labels = torch.from_numpy(features_of(rng, 3)).double(), torch.tensor([0, 1, 2])
    module: Any = build_module(task, tensors, device=CPU, dtype=torch.float64)
    loss = record_loss(task, CPU)
    (slope,) = torch.autograd.grad(loss(module(features), labels).sum(), module.hidden.weight)
    step = 1e-6 * torch.from_numpy(rng.normal(size=(D, D)))

    def at(scale: float, *, recomputed: bool) -> float:
        moved = {**tensors, "W1": tensors["W1"] + scale * step.numpy()}
        there: Any = build_module(task, moved, device=CPU, dtype=torch.float64)
        if not recomputed:
            there.mean, there.inverse = module.mean, module.inverse
        return float(loss(there(features), labels).sum().detach())

    fixed, through = (at(1, recomputed=again) - at(-1, recomputed=again) for again in (False, True))
    assert 2 * float((slope * step).sum()) == pytest.approx(fixed, rel=1e-4)
    assert abs(through - fixed) > 1e-2 * abs(fixed)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_a_records_gradient_keeps_every_bit_whoever_else_is_there(precision: Any) -> None:
    task, tensors, rng = case(2)
    count = 100
    units = UnitFeatures(
        features_of(rng, count)[:, None], rng.integers(0, K, (count, 1)), np.ones((count, 1), np.bool_)
    )

    def factors_of(kept: UnitFeatures) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []

        def look(factors: Any, labels: torch.Tensor) -> Any:
            for factor in factors:
                seen.extend((factor.left, factor.right) if isinstance(factor, Outer) else (factor,))
            return factors

        sums = ClippedSums(task, kept, device=CPU, chunk=512, precision=precision)
        assert sums.like.dtype == (torch.float32 if precision == "float32" else torch.float64)
        sums.at(tensors, max_grad_norm=0.1, plant=look)
        return seen

    whole = factors_of(units)
    for gone in (0, 41, count - 1):
        left = np.arange(count) != gone
        for one, other in zip(whole, factors_of(units.select(left)), strict=True):
            assert torch.equal(one[torch.from_numpy(left)], other)


def test_the_statistics_follow_the_adapter_and_the_public_images() -> None:
    task, tensors, rng = case(3)
    features = features_of(rng, 20)
    first = predict(task, tensors, features, device="cpu")[1]
    moved = {**tensors, "W1": 3 * tensors["W1"], "b1": 3 * tensors["b1"] + 1}
    # What scales and shifts the hidden layer of all images alike is normalised away.
    np.testing.assert_allclose(predict(task, moved, features, device="cpu")[1], first, rtol=1e-3, atol=1e-6)
    other, _, _ = case(4)
    shifted = predict(replace(task, public=other.public), tensors, features, device="cpu")[1]
    assert np.abs(shifted - first).max() > 1e-3


def test_an_adapter_file_needs_no_public_images(tmp_path: Path) -> None:
    task, exact, rng = case(5)
    tensors = {name: value.astype(np.float32) for name, value in exact.items()}
    metadata = AdapterMetadata(
        model="m", pretrained="p", fingerprint="ab" * 32, prompt="{}", classes=tuple("abcd"), temperature=8.0,
        epsilon=1.0, delta=1e-5, unit="record", rounds=1, preprocessing={}, extra={},
    )  # fmt: skip
    file = tmp_path / "adapter.safetensors"
    save_adapter(file, task, tensors=tensors, metadata=metadata)
    loaded = load_adapter(file)
    assert set(loaded.tensors) == set(task.spec.shapes)
    assert loaded.task.public is None
    features = features_of(rng, 200)
    labels, probabilities = loaded.predict(features, fingerprint="ab" * 32, device="cpu")
    found, expected = predict(task, tensors, features, device="cpu")
    np.testing.assert_array_equal(labels, found)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    assert np.abs(probabilities - predict(loaded.task, tensors, features, device="cpu")[1]).max() > 1e-3
    again, held = without_public(loaded.task, loaded.tensors)
    assert again.public is None
    assert all(np.array_equal(held[name], loaded.tensors[name]) for name in held), "nothing is left to fold"


def test_public_images_that_do_not_fit_are_refused() -> None:
    task, _, rng = case()
    good = features_of(rng, 4)
    for kind, public in (
        ("facmic_plain", good[:1]),
        ("facmic_plain", good[:, :5]),
        ("facmic_plain", good[0]),
        ("facmic_plain", good * np.float32(np.nan)),
        ("facmic", good),
        ("linear", good),
    ):
        spec = AdapterSpec(kind, D, K)  # type: ignore[arg-type]
        with pytest.raises(ModelError, match="FS-1633"):
            HeadTask(spec, task.text, task.centre, 8.0, public=public)
