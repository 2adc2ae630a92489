"""Public shares of the classes: in the loss of a record, not in prediction, and refused by who would ignore them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from fedsecure.config import RunSettings
from fedsecure.errors import ConfigError
from fedsecure.learning.evaluation import balanced_accuracy, counts
from fedsecure.learning.features import SiteFeatures, load_site_features
from fedsecure.learning.units import UnitFeatures
from fedsecure.messages import Aggregate
from fedsecure.methods.base import Ask
from fedsecure.methods.cohorts import cohort_of
from fedsecure.methods.registry import load_training_method
from tests.federation_world import World

SHARES = (0.9, 0.08, 0.02)
ALIKE = (2.0, 2.0, 2.0)


def settings_of(folder: Path, prior: tuple[float, ...], **options: Any) -> tuple[RunSettings, SiteFeatures]:
    folder.mkdir()
    world = World(folder, privacy={"no_privacy": "a test", "max_grad_norm": 1.0}, **options)
    facts = world.settings.model_dump()
    facts["method"]["class_prior"] = prior
    settings = RunSettings.model_validate(facts)
    return settings, load_site_features(settings.encoder, settings.classes, file=world.features)


def long_tailed(features: SiteFeatures, sizes: tuple[int, ...], *, seed: int) -> UnitFeatures:
    """Records around their class's text, so many of each class."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    rows = features.text[labels] + 0.4 * rng.normal(size=(len(labels), features.dimension))
    ones = np.ones((len(labels), 1), np.bool_)
    return UnitFeatures(rows[:, None].astype(np.float32), labels[:, None].astype(np.int64), ones)


class _Release:
    """Stands in for a door: all units, no noise."""

    def __init__(self, settings: RunSettings, features: SiteFeatures, units: UnitFeatures, query: Ask) -> None:
        self.settings, self.features, self.site, self.query = settings, features, "site-1", query
        self.engine, self.device, self._units = "auto", "cpu", units

    def units(self, population: str) -> UnitFeatures:
        return self._units


def trained(
    settings: RunSettings, features: SiteFeatures, units: UnitFeatures
) -> tuple[list[np.ndarray], Mapping[str, Any]]:
    """The sums of all rounds, and the adapter at the end."""
    method = load_training_method(settings.method.name)
    _, cohort = cohort_of(settings, trainers_only=True)
    state, sums = method.start(settings, cohort), []
    while (ask := method.ask(settings, cohort, state)) is not None:
        answer, _ = method.answer(ask.inputs, state, _Release(settings, features, units, ask))  # type: ignore[arg-type]
        sums.append(answer.values["gradient"])
        state = method.absorb(settings, cohort, state, Aggregate(dict(answer.values), 3))
    return sums, state.tensors


# The module can only reweigh what CLIP sees, so it unlearns little.
@pytest.mark.parametrize(("name", "gain"), [("linear", 0.02), ("facmic", 0.0)])
def test_rare_classes_are_not_unlearnt(tmp_path: Path, name: str, gain: float) -> None:
    recalls = {}
    for prior in (SHARES, ALIKE, ()):
        settings, features = settings_of(tmp_path / str(len(recalls)), prior, adapter=name, rounds=15)
        sums, tensors = trained(settings, features, long_tailed(features, (180, 16, 4), seed=0))
        task = load_training_method(name).task(settings, features)
        assert task.log_prior is None
        scores = counts(task, tensors, long_tailed(features, (200, 200, 200), seed=1))
        recalls[prior] = balanced_accuracy(*scores), sums
    # The logarithm of equal shares is the same number at every class: a softmax does not see it.
    for with_equal, without in zip(recalls[ALIKE][1], recalls[()][1], strict=True):
        assert np.allclose(with_equal, without, atol=1e-4)
    assert not np.allclose(recalls[SHARES][1][0], recalls[()][1][0], atol=1e-2)
    assert recalls[SHARES][0] > recalls[()][0] + gain


def test_who_would_ignore_the_shares_refuses_them(tmp_path: Path) -> None:
    for name, rounds in (("ridge", 1), ("prototypes", 1), ("clip2fl", 4)):
        settings, _ = settings_of(tmp_path / name, SHARES, adapter=name, rounds=rounds)
        _, cohort = cohort_of(settings, trainers_only=True)
        with pytest.raises(ConfigError, match="class_prior") as caught:
            load_training_method(name).plan(settings, cohort)
        assert caught.value.code == "FS-1018"
    assert not load_training_method("promptfl").weighs
    assert not load_training_method("lora").weighs


@pytest.mark.parametrize("prior", [(0.5, 0.5), (0.5, 0.5, 0.0), (0.5, 0.5, -1.0), (0.5, 0.5, float("inf"))])
def test_shares_that_are_none(tmp_path: Path, prior: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="class_prior"):
        settings_of(tmp_path / "world", prior)
