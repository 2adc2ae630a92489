"""At ε = ∞, no noise and no clip that binds, private training is ordinary descent: a wrong scale would show."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedsecure.learning.adapters import AdapterSpec
from fedsecure.learning.modules import build_module
from fedsecure.learning.task import HeadTask
from fedsecure.learning.training import train_locally
from fedsecure.learning.units import UnitFeatures
from fedsecure.privacy.grid import privatise_on_grid
from fedsecure.privacy.noise import PrivacyRng

UNITS, WIDTH, CLASSES, STEPS, RATE = 70, 24, 4, 6, 0.5
# Longer than any gradient here, and its grid of 2^-24 is far finer than what the test tells apart.
CLIP = 64.0


def case(kind: Literal["linear", "facmic"]) -> tuple[HeadTask, dict[str, Any], UnitFeatures]:
    rng = np.random.default_rng(8)
    spec = AdapterSpec(kind, WIDTH, CLASSES)
    text = rng.normal(size=(CLASSES, WIDTH)).astype(np.float32)
    task = HeadTask(spec, text, (0.02 * rng.normal(size=WIDTH)).astype(np.float32), 5.0)
    start = {n: (v + 0.1 * rng.normal(size=v.shape)).astype(np.float32) for n, v in spec.initial(b"public").items()}
    features = rng.normal(size=(UNITS, 1, WIDTH)).astype(np.float32)
    labels = rng.integers(0, CLASSES, (UNITS, 1))
    return task, start, UnitFeatures(features, labels, np.ones((UNITS, 1), np.bool_))


def ordinary(task: HeadTask, start: dict[str, Any], units: UnitFeatures) -> dict[str, Any]:
    """Autograd, the mean cross-entropy and torch's SGD, in float64."""
    module = build_module(task, start, device=torch.device("cpu"), dtype=torch.float64)
    optimiser = torch.optim.SGD(module.parameters(), lr=RATE)
    features, labels = torch.from_numpy(units.features[:, 0]).double(), torch.from_numpy(units.labels[:, 0])
    for _ in range(STEPS):
        optimiser.zero_grad()
        functional.cross_entropy(module(features), labels).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    ends = (p.detach().numpy() for p in module.parameters())
    return {name: end - start[name] for name, end in zip(task.spec.shapes, ends, strict=True)}


def private(task: HeadTask, start: dict[str, Any], units: UnitFeatures, **options: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "steps": STEPS,
        "learning_rate": RATE,
        "max_grad_norm": CLIP,
        "normaliser": float(UNITS),
        "privatise": lambda total, clip: total,
        "sample": lambda count: np.ones(count, np.bool_),
        "device": "cpu",
    }
    return train_locally(task, start, units, **(usual | options))


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Distance over length."""
    return float(
        np.sqrt(sum(np.square(one[n] - other[n]).sum() for n in one) / sum(np.square(v).sum() for v in other.values()))
    )


# Opacus' engine works in float64; the closed form takes activations in float32, and sums of records.
@pytest.mark.parametrize(
    ("kind", "engine", "bound"),
    [
        ("linear", "closed-form", 1e-6),
        ("linear", "opacus", 1e-13),
        ("facmic", "opacus", 1e-12),
        ("facmic", "closed-form", 1e-5),
    ],
)
def test_without_noise_and_clip_it_is_the_ordinary_trainer(kind: Any, engine: Any, bound: float) -> None:
    task, start, units = case(kind)
    expected = ordinary(task, start, units)
    found = private(task, start, units, engine=engine)
    assert apart(found, private(task, start, units, engine=engine, max_grad_norm=2 * CLIP)) == 0, "no clip binds"
    assert apart(found, expected) <= bound
    wrong = private(task, start, units, engine=engine, normaliser=UNITS * 1.001)
    assert apart(wrong, expected) > 5e-4, "the control: a scale wrong by a thousandth"


@pytest.mark.parametrize("kind", ["linear", "facmic"])
def test_the_grid_alone_changes_nothing_that_matters(kind: Any) -> None:
    task, start, units = case(kind)

    def rounded(total: Any, clip: float) -> Any:
        return privatise_on_grid(total, clip_norm=clip, noise_multiplier=0.0, rng=PrivacyRng())

    assert apart(private(task, start, units, privatise=rounded), ordinary(task, start, units)) <= 1e-4
