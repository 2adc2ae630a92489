"""Public shares of the classes: in the loss of a record, not in prediction, and refused by who would ignore them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from pydantic import ValidationError

from fedsecure.config import MethodConfig, RunSettings
from fedsecure.errors import ConfigError, ModelError
from fedsecure.learning.evaluation import balanced_accuracy, counts
from fedsecure.learning.features import SiteFeatures, load_site_features
from fedsecure.learning.units import UnitFeatures
from fedsecure.messages import Aggregate
from fedsecure.methods.base import Ask
from fedsecure.methods.class_counts import PURPOSE, class_counts, shares_of
from fedsecure.methods.cohorts import cohort_of
from fedsecure.methods.registry import load_training_method
from tests.federation_world import World

SHARES = (0.9, 0.08, 0.02)
ALIKE = (2.0, 2.0, 2.0)


def settings_of(folder: Path, prior: str | tuple[float, ...], **options: Any) -> tuple[RunSettings, SiteFeatures]:
    folder.mkdir()
    world = World(folder, privacy={"no_privacy": "a test", "max_grad_norm": 1.0}, prior=prior, **options)
    settings = world.settings
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
        sums.append(next(iter(answer.values.values())))
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


# --- shares that the first round releases --------------------------------------------------------------------------


@given(
    labels=st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=1, max_size=6),
    more=st.lists(st.integers(0, 3), max_size=5),
)
def test_a_whole_patient_moves_the_counts_by_one_at_most(labels: list[list[int]], more: list[int]) -> None:
    def units(patients: list[list[int]]) -> UnitFeatures:
        mask = np.array([[i < len(one) for i in range(5)] for one in patients])
        padded = np.array([[*one, *([0] * (5 - len(one)))] for one in patients], np.int64)
        return UnitFeatures(np.zeros((len(patients), 5, 2), np.float32), padded, mask)

    moved = class_counts(units([*labels, more]), 4) - class_counts(units(labels), 4)
    assert np.linalg.norm(moved) <= 1 + 1e-12
    assert moved.sum() == pytest.approx(1.0 if more else 0.0)
    assert class_counts(units(labels), 4).sum() == pytest.approx(sum(bool(one) for one in labels))


@given(counts=st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=8), noise=st.floats(0.0, 1e5))
def test_shares_are_shares_whatever_the_noise_made_of_the_counts(counts: list[float], noise: float) -> None:
    shares = shares_of(np.array(counts), noise=noise)
    assert shares.dtype == np.float32
    assert shares.sum() == pytest.approx(1.0, abs=1e-5)
    assert (shares > 0).all()


def test_shares_are_believed_as_far_as_the_noise_allows() -> None:
    counts = np.array([900.0, 80.0, 20.0, 0.0])
    assert shares_of(counts, noise=0.0) == pytest.approx(np.array([900, 80, 20, 0.5]) / 1000.5, rel=1e-5)
    spread = [float(np.ptp(shares_of(counts, noise=noise))) for noise in (0.0, 100.0, 300.0, 1e4)]
    assert spread == sorted(spread, reverse=True)
    assert spread[1] > 0.5
    assert spread[3] == 0.0, "counts that noise buries say nothing"
    assert shares_of(np.full(3, -5.0), noise=1.0) == pytest.approx(np.full(3, 1 / 3))


def test_released_shares_keep_rare_classes_as_public_ones_do(tmp_path: Path) -> None:
    tail, even = (180, 16, 4), (200, 200, 200)
    ended = {}
    for name, prior in (("public", (180.0, 16.0, 4.0)), ("released", "released"), ("none", ())):
        # One round more, since the first trains nothing.
        rounds = 15 + (name == "released")
        settings, features = settings_of(tmp_path / name, prior, rounds=rounds)
        sums, tensors = trained(settings, features, long_tailed(features, tail, seed=0))
        assert set(tensors) == set(load_training_method("linear").spec(settings).shapes)
        assert len(sums) == rounds
        task = load_training_method("linear").task(settings, features)
        ended[name] = balanced_accuracy(*counts(task, tensors, long_tailed(features, even, seed=1)))
    assert ended["released"] > ended["none"]
    assert ended["released"] == pytest.approx(ended["public"], abs=0.02)


@pytest.mark.parametrize(
    ("adapter", "noise"),
    [
        ("linear", "distributed"),
        pytest.param("facmic", "local", marks=pytest.mark.slow),
        pytest.param("moon", "local", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_releases_its_counts(tmp_path: Path, adapter: str, noise: str) -> None:
    steps = 2 if noise == "local" else 1
    world = World(tmp_path, rounds=3, adapter=adapter, noise=noise, local_steps=steps, prior="released")
    (tmp_path / "plain").mkdir()
    plain = World(tmp_path / "plain", rounds=3, adapter=adapter, noise=noise, local_steps=steps)
    core = world.start()
    world.run(*(world.take_part(name) for name in world.names))
    assert not world.errors
    assert core.outcome is not None
    assert core.outcome["complete"]
    for report in world.reports.values():
        purposes = {row["purpose"]: row["releases"] for row in report["budgets"]["train"]["shares"]["purposes"]}
        assert purposes == {PURPOSE: 1, "training": 2}
    # A round is a round: the plan is that of a run without.
    _, cohort = cohort_of(world.settings, trainers_only=True)
    method = load_training_method(adapter)
    planned, without = (method.plan(one.settings, cohort) for one in (world, plain))
    assert planned.epsilon == without.epsilon


def test_labels_outside_the_class_list_are_refused_as_in_a_gradient(tmp_path: Path) -> None:
    settings, features = settings_of(tmp_path / "world", "released")
    units = long_tailed(features, (4, 4, 4), seed=0)
    units.labels[0, 0] = 3
    with pytest.raises(ModelError, match="FS-1638"):
        trained(settings, features, units)


def test_what_cannot_be_released_is_refused(tmp_path: Path) -> None:
    refused: tuple[dict[str, Any], ...] = ({"rounds": 1}, {"privacy": {"ring_bits": 16}})
    for number, changes in enumerate(refused):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(ValidationError, match='class_prior = "released"'):
            World(folder, prior="released", **changes)
    (tmp_path / "drawn").mkdir()
    drawn = World(tmp_path / "drawn", sites=5, prior="released", waits={"cohort": 3, "prepared_rounds": 0}).settings
    _, cohort = cohort_of(drawn, trainers_only=True)
    with pytest.raises(ConfigError, match="FS-1050"):
        load_training_method("linear").start(drawn, cohort)
    both = {"class_prior": "released", "alignment": {"target": "0" * 64, "weight": 1.0, "prototypes": True}}
    with pytest.raises(ValidationError, match="both take the first round"):
        MethodConfig.model_validate({"name": "facmic", **both})
