"""Layer C of the audit: a likelihood-ratio membership attack on linear heads, with shadow models (privacy.md §4 C)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fedsecure.learning.adapters import AdapterSpec, Vector
from fedsecure.learning.audit_material import CLIP, Material
from fedsecure.learning.evaluation import predict
from fedsecure.learning.task import HeadTask
from fedsecure.learning.training import suggest, train_locally
from fedsecure.learning.units import UnitFeatures
from fedsecure.privacy import accounting
from fedsecure.privacy.audit import Membership, membership_attack
from fedsecure.privacy.grid import privatise_on_grid
from fedsecure.privacy.noise import PrivacyRng

STEPS = 20
_MOST_MODELS = 200
_FEWEST_MODELS = 20


def attack_heads(material: Material, *, epsilon: float, delta: float, seconds: float) -> tuple[Membership, ...]:
    """Attack linear heads trained without any protection, and at ε with local noise.

    Args:
        material: at most 300 of its units are used, each in a model with probability ½.
        epsilon, delta: of the second kind of heads.
        seconds: as many models as fit, at most 200 of a kind; none where fewer than 20 do.
    """
    units = material.units.limit_units(300)
    multiplier = accounting.calibrate(epsilon, delta, steps=STEPS)
    silent: Callable[[Vector, float], Vector] = lambda total, clip: total  # noqa: E731
    rng = PrivacyRng()

    def noisy(total: Vector, clip: float) -> Vector:
        return privatise_on_grid(total, clip_norm=clip, noise_multiplier=multiplier, rng=rng)

    found = []
    cases = (
        # No gradient of a linear head is longer than √2: nothing is clipped.
        ("no clipping, no noise", silent, 1.5, math.inf),
        (f"ε = {epsilon:g}", noisy, CLIP, math.sqrt(STEPS) / multiplier),
    )
    for subject, privatise, clip, mu in cases:
        began = time.monotonic()
        confidence: list[Vector] = []
        included: list[npt.NDArray[np.bool_]] = []
        while len(confidence) < _MOST_MODELS:
            mask = rng.poisson_mask(len(units), 0.5)
            confidence.append(_head_confidence(material, units, mask, privatise=privatise, clip=clip, mu=mu))
            included.append(mask)
            spent = time.monotonic() - began
            if spent * (1 + 1 / len(confidence)) > seconds / len(cases):
                break
        if len(confidence) >= _FEWEST_MODELS:
            targets = max(4, len(confidence) // 5)
            found.append(membership_attack(subject, np.stack(confidence), np.stack(included), targets=targets))
    return tuple(found)


def _head_confidence(
    material: Material,
    units: UnitFeatures,
    mask: npt.NDArray[np.bool_],
    *,
    privatise: Callable[[Vector, float], Vector],
    clip: float,
    mu: float,
) -> Vector:
    """Logit of the probability that a head trained on ``mask`` gives each unit's first record its own label."""
    classes, d = material.text.shape
    rate, temperature = suggest(
        "linear",
        mu_total=mu,
        units=len(units) / 2,
        classes=classes,
        dimension=d,
        steps=STEPS,
        max_grad_norm=clip,
    )
    task = HeadTask(AdapterSpec("linear", d, classes), material.text, material.centre, temperature)
    change = train_locally(
        task,
        task.spec.initial(b"audit"),
        units.select(mask),
        steps=STEPS,
        learning_rate=rate,
        max_grad_norm=clip,
        normaliser=len(units) / 2,
        privatise=privatise,
        sample=lambda count: np.ones(count, np.bool_),
        device="cpu",
    )
    _, probability = predict(task, change, units.features[:, 0], device="cpu")
    own = probability[np.arange(len(units)), units.labels[:, 0]]
    rest = probability.sum(axis=1) - own
    return np.asarray(np.log(np.maximum(own, 1e-30)) - np.log(np.maximum(rest, 1e-30)), np.float64)
