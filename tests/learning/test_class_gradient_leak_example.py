"""The example shows what it says: a class gradient is its only image's feature, until it is noised."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
from by_file import load

from fedsecure.privacy import accounting


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load("examples/class_gradient_leak.py", monkeypatch)
    monkeypatch.setattr(module, "COUNTS", (1, 1000))
    return module


def test_one_image_leaks_until_the_sum_is_noised(example: ModuleType) -> None:
    noise = accounting.calibrate(8.0, 1e-5, steps=1)
    found = example.run(None, noise_multiplier=noise, repeats=10)
    for protection in ("as published", "summed", "bounded, summed"):
        assert found[protection, 1].right == 1.0
        assert found[protection, 1].cosine > 0.999999
    # Its noise is 20 times as long as the image's gradient: the cosine is 0.05 ± 0.05 a draw, and the right candidate
    # wins about one draw in fifty, so that more than five of ten have a chance of about 1e-8.
    assert found["bounded, noised, summed", 1].cosine < 0.4
    assert found["bounded, noised, summed", 1].right <= 0.5
    # The noise that hides one image leaves a class of a thousand: here its gradient is 40 times as long as the noise.
    assert found["bounded, noised, summed", 1000].mean > 0.95


def test_without_a_bias_the_row_is_the_feature_too(example: ModuleType) -> None:
    from fedsecure.learning.class_gradients import ClassGradients, class_gradient_sum
    from fedsecure.learning.classifier import Classifier

    row = np.random.default_rng(1).normal(size=(1, 8))
    units = example.records(row, 0)
    layout = ClassGradients(3, 8, bias=False)
    found = class_gradient_sum(units.features, units, Classifier.zero(3, 8, bias=False), layout).reshape(3, 8)[0]
    assert abs(example.cosines(row, found)[0]) > 0.999999


def test_the_program_prints_its_table(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "COUNTS", (1,))
    monkeypatch.setattr(sys, "argv", ["class_gradient_leak.py", "--repeats", "1"])
    example.main()
    shown = capsys.readouterr().out
    assert "bounded, noised, summed" in shown
    assert "noise multiplier 0.60" in shown
