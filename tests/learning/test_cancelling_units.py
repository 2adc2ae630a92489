"""Records of one unit that cancel: whatever tensors the aggregator broadcasts, a unit adds at most the clip norm."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from fedsecure.learning.adapters import AdapterSpec
from fedsecure.learning.engines import clipped_sum
from fedsecure.learning.task import HeadTask
from fedsecure.learning.units import UnitFeatures

CLIP, WIDTH = 0.1, 16


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["closed-form", "opacus"])
def test_two_almost_equal_scans_with_two_labels_are_clipped_under_hostile_tensors(
    engine: Literal["closed-form", "opacus"],
) -> None:
    rng = np.random.default_rng(3)
    spec = AdapterSpec("facmic", WIDTH, 2)
    longest = 0.0
    for _ in range(400):
        text = rng.normal(size=(2, WIDTH)).astype(np.float32)
        unit = text / np.linalg.norm(text, axis=1, keepdims=True)
        between = unit[0] - unit[1]
        scan = rng.normal(size=WIDTH)
        scan -= between * (scan @ between) / (between @ between)
        first = scan.astype(np.float32)
        second = first.copy()
        at = rng.integers(WIDTH)
        second[at] = np.nextafter(second[at], np.float32(9e9))
        tensors = spec.initial(b"x")
        tensors["gamma"] = np.full(WIDTH, 10 ** rng.uniform(8, 16), np.float32)
        tensors["W2"] = (rng.normal(size=(WIDTH, WIDTH)) * 10 ** rng.uniform(-26, -14)).astype(np.float32)
        units = UnitFeatures(np.stack([first, second])[None], np.array([[0, 1]]), np.ones((1, 2), np.bool_))
        task = HeadTask(spec, text, np.zeros(WIDTH, np.float32), 30.0)
        total = clipped_sum(task, tensors, units, max_grad_norm=CLIP, engine=engine, device="cpu")
        longest = max(longest, float(np.linalg.norm(total)))
    assert longest > CLIP / 2, "the control: some of these units are clipped"
    assert longest <= CLIP
