"""The audit on the real kernels: sound ones pass in every mode, and a bug put into them is caught."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsecure.errors import DataError, ModelError, PrivacyError
from fedsecure.learning import audit_attack, audit_run, closed_form, opacus_engine
from fedsecure.learning.adapters import AdapterSpec
from fedsecure.learning.audit_material import CLIP, adversarial_units, generate_material, load_material
from fedsecure.learning.audit_run import Mechanism, run_audit
from fedsecure.learning.canaries import audited_sum, make_canaries
from fedsecure.learning.engines import clipped_sum
from fedsecure.learning.task import HeadTask
from fedsecure.learning.units import UnitFeatures
from fedsecure.messages import Answer, Query
from fedsecure.privacy import audit
from fedsecure.privacy.audit import AuditResult
from fedsecure.privacy.noise import PrivacyRng, SeededRng
from fedsecure.release import Door


class Clock:
    """Half a second a look: the number of steps and models does not depend on the machine."""

    now = 0.0

    def monotonic(self) -> float:
        self.now += 0.5
        return self.now


@pytest.fixture(autouse=True)
def repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams and times that are the same in every run: a sound mechanism fails one audit in 10,000 by chance."""
    streams = itertools.count()
    for module in (audit_run, audit_attack, audit):
        monkeypatch.setattr(module, "PrivacyRng", lambda: SeededRng(f"stream {next(streams)}".encode()))
    monkeypatch.setattr(audit_run, "time", Clock())
    monkeypatch.setattr(audit_attack, "time", Clock())


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 wide and 8 classes in place of 512 and 10; at most 8 steps."""

    def load(features: Any, *, unit: Any) -> Any:
        return generate_material(unit=unit, units=120, classes=8, dimension=64)

    monkeypatch.setattr(audit_run, "load_material", load)
    monkeypatch.setattr(audit_run, "_MOST_STEPS", 8)


def quick(**options: Any) -> AuditResult:
    return run_audit(**{"seconds": 20.0, "canaries": 512, "membership": False, "epsilon": 4.0, **options})


@pytest.mark.parametrize("kind", ["linear", "facmic"])
@pytest.mark.parametrize("engine", ["closed-form", "opacus"])
@pytest.mark.parametrize("centred", [False, True])
def test_a_canary_is_c_in_one_coordinate(kind: Any, engine: Any, centred: bool) -> None:
    rng = np.random.default_rng(0)
    centre = rng.normal(size=12) * 0.1 * centred
    text = rng.normal(size=(4, 12)).astype(np.float32)
    task = HeadTask(AdapterSpec(kind, 12, 4), text, centre.astype(np.float32), 10.0)
    start = {n: v + rng.normal(size=v.shape) * 0.1 for n, v in task.spec.initial(b"x").items()}
    planted = make_canaries(task, 30, records=2)
    first = next(iter(task.spec.shapes.values()))
    for row in (0, 7, 29):
        one = audited_sum(task, start, planted.units.select([row]), max_grad_norm=0.1, engine=engine)  # type: ignore[arg-type]
        weight = one[: first[0] * first[1]]
        assert weight[planted.coordinates[row]] == pytest.approx(0.1 * planted.amplitude, rel=1e-6)
        assert np.linalg.norm(np.delete(weight, planted.coordinates[row])) < 1e-6
        assert np.linalg.norm(one) <= 0.1
    assert len(set(planted.coordinates)) == 30


@pytest.mark.parametrize("kind", ["linear", "facmic"])
@pytest.mark.parametrize("engine", ["closed-form", "opacus"])
def test_canaries_leave_the_other_units_alone(kind: Any, engine: Any) -> None:
    material = generate_material(unit="patient", units=9, classes=4, dimension=12)
    task = HeadTask(AdapterSpec(kind, 12, 4), material.text, material.centre, 10.0)
    start = task.spec.initial(b"x")
    planted = make_canaries(task, 20, records=4).units
    both = UnitFeatures(
        *(np.concatenate([getattr(material.units, n), getattr(planted, n)]) for n in ("features", "labels", "mask"))
    )

    def total(units: UnitFeatures) -> Any:
        return audited_sum(task, start, units, max_grad_norm=0.1, engine=engine)

    plain = clipped_sum(task, start, material.units, max_grad_norm=0.1, engine=engine, device="cpu")
    assert np.allclose(total(material.units), plain, rtol=1e-12, atol=1e-15)
    assert np.allclose(total(both), plain + total(planted), rtol=1e-9, atol=1e-12)


def test_no_canary_where_the_mean_is_as_long_as_a_feature() -> None:
    task = HeadTask(AdapterSpec("linear", 4, 2), np.eye(2, 4, dtype=np.float32), np.ones(4, np.float32), 10.0)
    with pytest.raises(ModelError, match="FS-1643"):
        make_canaries(task, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"noise": "local"},
        {"adapter": "facmic", "unit": "patient"},
        pytest.param({"unit": "patient", "sampling_rate": 0.5}, marks=pytest.mark.slow),
        pytest.param({"noise": "local", "engine": "opacus", "sampling_rate": 0.5}, marks=pytest.mark.slow),
        pytest.param(
            {"adapter": "facmic", "engine": "opacus", "noise": "local", "unit": "patient"}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_sound_mechanisms_pass_in_every_mode(options: dict[str, Any]) -> None:
    result = quick(**options)
    assert result.passed, result.failures
    layers = {check.layer for check in result.checks}
    assert layers == {"A", "B"}
    assert len(result.bounds) == 3
    assert all(bound.claimed == 4.0 for bound in result.bounds)
    reached = [c.found for c in result.checks if c.name.startswith("sensitivity: ")]
    assert min(reached) > 0.99 * CLIP, "rows that never reach the clip would prove nothing"


def scaled_clip(module: Any, factor: float) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(module, "SAFETY", factor)


def weak_discrete(patch: pytest.MonkeyPatch) -> None:
    sound = PrivacyRng.discrete_gaussian
    patch.setattr(
        PrivacyRng, "discrete_gaussian", lambda self, n, variance: np.rint(0.9 * sound(self, n, variance)).astype(int)
    )


def weak_gaussian(patch: pytest.MonkeyPatch) -> None:
    sound = PrivacyRng.gaussian
    patch.setattr(PrivacyRng, "gaussian", lambda self, n, std=1.0: 0.9 * sound(self, n, std))


def one_seed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(audit_run, "PrivacyRng", lambda: SeededRng(7))


def seed_every_step(patch: pytest.MonkeyPatch) -> None:
    sound = Mechanism.release

    def release(self: Mechanism, total: Any) -> Any:
        self.rngs = tuple(SeededRng(site) for site in range(len(self.rngs)))
        return sound(self, total)

    patch.setattr(Mechanism, "release", release)


def shuffled(patch: pytest.MonkeyPatch) -> None:
    def sample(self: Mechanism, count: int, rate: float) -> Any:
        return np.argsort(self.rngs[0].uniform(count)) < round(count * rate)

    patch.setattr(Mechanism, "sample", sample)


def doubled_rate(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Mechanism, "sample", lambda self, count, rate: self.rngs[0].poisson_mask(count, min(1, 2 * rate)))


def realised_normaliser(patch: pytest.MonkeyPatch) -> None:
    sound = audit_run.train_locally

    def naive(task: Any, start: Any, units: Any, **options: Any) -> Any:
        return sound(task, start, units, **{**options, "normaliser": float(len(units))})

    patch.setattr(audit_run, "train_locally", naive)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bug", "options", "caught"),
    [
        (scaled_clip(closed_form, 1.01), {}, "sensitivity: record, closed-form"),
        (scaled_clip(opacus_engine, 1.01), {}, "sensitivity: patient, opacus"),
        (weak_discrete, {}, "noise: standard deviation, z"),
        (weak_gaussian, {"noise": "local"}, "noise: standard deviation, z"),
        (one_seed, {"noise": "local"}, "noise: correlation of sites, z"),
        (seed_every_step, {}, "noise: correlation of steps, z"),
        pytest.param(
            shuffled, {"sampling_rate": 0.25}, "sampler: variance of the batch size, z", marks=pytest.mark.slow
        ),
        pytest.param(doubled_rate, {"sampling_rate": 0.25}, "canaries in: mean, z", marks=pytest.mark.slow),
        (realised_normaliser, {}, "rate and normaliser: record"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_bugs_in_the_real_kernels_are_caught(
    bug: Callable[[pytest.MonkeyPatch], None], options: dict[str, Any], caught: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bug(monkeypatch)
    result = quick(**options)
    assert not result.passed
    assert caught in result.failures


def test_an_engine_that_does_not_clip_is_refuted_by_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = closed_form._clip_and_sum
    monkeypatch.setattr(
        closed_form, "_clip_and_sum", lambda factors, mask, norm, onto: sound(factors, mask, 1e9, onto=onto)
    )
    # The door's clamp would hide part of it; local noise has none.
    result = quick(noise="local")
    assert {
        "sensitivity: record, closed-form",
        "engines agree: record",
        "canaries in: mean, z",
        "Gaussian",
    } <= set(result.failures)


@pytest.mark.parametrize("unit", ["record", "patient"])
def test_the_audit_releases_what_the_door_would(unit: str) -> None:
    """Same seed, same words: the audit's pieces are the door's, in the door's order."""
    material = generate_material(unit=unit, units=30, classes=4, dimension=16)  # type: ignore[arg-type]
    task = HeadTask(AdapterSpec("linear", 16, 4), material.text, material.centre, 10.0)
    total = clipped_sum(task, task.spec.initial(b"x"), material.units, max_grad_norm=CLIP, device="cpu")
    mechanism = Mechanism("distributed", len(total), 2.0, 30)
    mechanism.rngs = tuple(SeededRng(site) for site in range(len(mechanism.rngs)))
    query = Query(bytes(16), 0, 0, "fake", "1", ("x", "y", "z"), {}, (mechanism.segment,), ())
    words = np.zeros(len(total), np.uint32)
    for site in range(len(mechanism.rngs)):
        door = Door(None, None, None, None, {}, SeededRng(site), "cpu", b"")  # type: ignore[arg-type]
        words += door._encode(query, Answer({"gradient": total * (site == 0)}, {"gradient": 30}), noisy=True)
    expected = words.view(np.int32) * mechanism.segment.grid
    assert len(mechanism.rngs) == 2
    assert np.array_equal(mechanism.release(total), expected)


def test_adversarial_units_have_what_breaks_clips() -> None:
    material = generate_material(unit="patient", units=40, classes=4, dimension=16)
    for patients, records in ((True, 4), (False, 1)):
        units = adversarial_units(material.units, classes=4, patients=patients)
        assert units.features.shape == (16, records, 16)
        assert np.isnan(units.features).any()
        assert np.isinf(units.features).any()
        assert np.array_equal(units.features[2], units.features[3])
        assert not units.mask[9].any()


@pytest.mark.slow
def test_membership_is_a_figure_beside_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    result = quick(seconds=60.0, membership=True)
    assert [m.subject for m in result.memberships] == ["no clipping, no noise", "ε = 4"]
    naked, private = result.memberships
    assert naked.auc > 0.6
    assert naked.auc > private.auc
    assert 0.4 < private.auc < 0.65
    assert any(row[0] == "C" for row in result.table())


def test_nonsense_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({"canaries": 3}, {"seconds": 0.0}):
        with pytest.raises(ModelError, match="FS-1644"):
            quick(**options)
    for wrong in ({"epsilon": -1.0}, {"delta": 1.0}, {"sampling_rate": 0.0}):
        with pytest.raises(PrivacyError, match="FS-1202"):
            quick(**wrong)
    monkeypatch.setattr(audit_run, "load_material", load_material)
    with pytest.raises(DataError):
        quick(features=tmp_path / "missing.npz")


@pytest.mark.slow
def test_a_feature_file_is_audited_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_run, "load_material", load_material)
    rng = np.random.default_rng(0)
    file = tmp_path / "features.npz"
    arrays: dict[str, Any] = {"classes": np.array(["a", "b", "c"]), "text": rng.normal(size=(3, 32)).astype(np.float32)}
    for split in ("train", "test"):
        arrays[f"{split}_x"] = rng.normal(size=(40, 32)).astype(np.float32)
        arrays[f"{split}_y"] = rng.integers(0, 3, 40)
    np.savez(file, **arrays)
    result = quick(features=file, canaries=60)
    assert result.passed, result.failures
    assert result.facts["features"] == "features.npz"
    assert result.facts["other units"] == "40"
    with pytest.raises(PrivacyError, match="FS-1246"):
        quick(features=file, unit="patient")
