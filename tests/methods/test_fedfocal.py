"""The focal loss goes as far as cross-entropy at the same rate; with smoothed labels it would not.

Generated features that share a common direction, as CLIP's do, and no noise: nothing here is left to chance.
"""

from __future__ import annotations

import numpy as np

from fedsecure.learning.adapters import AdapterSpec
from fedsecure.learning.evaluation import accuracy, counts
from fedsecure.learning.objective import CROSS_ENTROPY, Objective
from fedsecure.learning.task import HeadTask
from fedsecure.learning.training import suggest, train_locally
from fedsecure.learning.units import UnitFeatures
from fedsecure.methods.fedfocal import METHOD

K, D, TRAIN, TESTS, STEPS, CLIP = 40, 64, 1200, 2000, 20, 0.1
TRUTH = np.linalg.qr(np.random.default_rng(9).normal(size=(D, D)))[0][:K] + 3 / np.sqrt(D)
PRIOR = (TRUTH + 0.9 * np.roll(TRUTH, 1, axis=0)).astype(np.float32)


def records(count: int, seed: int) -> UnitFeatures:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, (count, 1))
    features = (TRUTH[labels] + 0.12 * rng.normal(size=(count, 1, D))).astype(np.float32)
    return UnitFeatures(features, labels, np.ones((count, 1), np.bool_))


def reached(objective: Objective) -> tuple[float, float]:
    """Accuracy before and after, at the rule's rate without noise."""
    units, held_out = records(TRAIN, 1), records(TESTS, 2)
    rate, temperature = suggest(
        METHOD.kind, mu_total=1e9, units=TRAIN, classes=K, dimension=D, steps=STEPS, max_grad_norm=CLIP
    )
    task = HeadTask(AdapterSpec(METHOD.kind, D, K), PRIOR, np.zeros(D, np.float32), temperature, objective=objective)
    start = task.spec.initial(b"public")
    change = train_locally(
        task, start, units, steps=STEPS, learning_rate=rate, max_grad_norm=CLIP, normaliser=TRAIN,
        privatise=lambda total, norm: total, sample=lambda n: np.ones(n, np.bool_), device="cpu",
    )  # fmt: skip
    ended = {name: start[name] + change[name] for name in start}
    return tuple(accuracy(*counts(task, at, held_out, device="cpu")) for at in (start, ended))  # type: ignore[return-value]


def test_the_focal_loss_learns_what_cross_entropy_learns() -> None:
    before, focal = reached(METHOD.objective)
    _, plain = reached(CROSS_ENTROPY)
    assert focal >= before + 0.05
    assert focal >= plain - 0.02


def test_smoothed_labels_would_overshoot() -> None:
    """The control: why the method smooths no labels."""
    _, focal = reached(METHOD.objective)
    _, smoothed = reached(Objective(focal=METHOD.objective.focal, smoothing=0.1))
    assert smoothed <= focal - 0.1
