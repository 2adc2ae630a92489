"""Evaluation at a site: where it computes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from federation_world import World

from fedsecure.learning.units import UnitFeatures
from fedsecure.messages import SiteState
from fedsecure.methods import evaluate


def test_a_site_evaluates_on_its_own_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = World(tmp_path).settings
    classes = len(settings.classes)
    rows = UnitFeatures(np.zeros((2, 1, 16), np.float32), np.zeros((2, 1), np.int64), np.ones((2, 1), np.bool_))
    asked: list[str] = []

    def counts(task: object, inputs: object, units: object, *, device: str = "auto") -> tuple[Any, Any]:
        asked.append(device)
        return np.ones(classes), np.full(classes, 2.0)

    def task(*_: object) -> None:
        return None

    monkeypatch.setattr(evaluate, "counts", counts)
    monkeypatch.setattr(evaluate, "load_training_method", lambda name: SimpleNamespace(task=task))
    features = SimpleNamespace(target=None)
    release: Any = SimpleNamespace(settings=settings, features=features, device="cuda:1", units=lambda population: rows)
    inputs: Mapping[str, Any] = {}
    answer, _ = evaluate.METHOD.answer(inputs, SiteState(), release)
    assert asked == ["cuda:1"]
    assert answer.values["counts"].tolist() == [1.0] * classes + [2.0] * classes
