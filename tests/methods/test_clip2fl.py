"""CLIP2FL as an installed method: whole runs, its price, and a side branch that training never notices."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedsecure.aggregator.step_worker import StepWorker
from fedsecure.aggregator.store import runs_of
from fedsecure.config import Clip2flConfig, MethodConfig, PolicyConfig, RunSettings
from fedsecure.errors import ConfigError
from fedsecure.learning.features import SiteFeatures, load_site_features
from fedsecure.learning.units import UnitFeatures
from fedsecure.messages import Aggregate
from fedsecure.methods.agenda import question, starting_state
from fedsecure.methods.clip2fl import METHOD
from fedsecure.methods.cohorts import cohort_of
from fedsecure.privacy import accounting
from tests.federation_world import CLASSES, World, write_features

SMALL: dict[str, Any] = {
    "features": 10,
    "matching_steps": 20,
    "matching_rate": 5.0,
    "head_epochs": 20,
    "head_rate": 0.1,
}


def world_of(folder: Path, **options: Any) -> World:
    known = {name: options.pop(name) for name in tuple(options) if name in World.__dataclass_fields__}
    known.setdefault("privacy", {})
    known["privacy"] = {"max_grad_norm": 1.0, **known["privacy"]}
    world = World(folder, adapter="clip2fl", **known)
    method = world.settings.method.model_copy(update={"clip2fl": Clip2flConfig(**{**SMALL, **options})})
    world.settings = world.settings.model_copy(update={"method": method})
    return world


def features_of(world: World) -> SiteFeatures:
    return load_site_features(world.settings.encoder, world.settings.classes, file=world.features)


def run_whole(world: World) -> dict[str, Any]:
    world.start()
    world.run(*(world.take_part(name) for name in world.names))
    assert not world.errors, world.errors
    outcome = world.coordinator.outcome
    assert outcome is not None
    return outcome


def saved_state(world: World) -> dict[str, Any]:
    (row,) = runs_of(world.database)
    return {"stage": row.stage, "step": row.step, "facts": {**row.facts, "evaluations": row.evaluations}}


def saved_tensors(world: World) -> dict[str, Any]:
    (file,) = world.folder.glob("aggregator/runs/*/model-*.safetensors")
    return load_file(file)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "options"),
    [
        ("distributed", {"releases": 2, "class_gradients": "full", "warm_start": True}),
        ("local", {"local_steps": 2, "budget_share": 0.3}),
    ],
)
def test_a_whole_run_learns_and_every_release_is_paid_for(tmp_path: Path, noise: str, options: dict[str, Any]):
    # At this ε a step's noise is some hundredths of its signal: what is learned does not hang on chance.
    world = world_of(tmp_path, noise=noise, rounds=3, epsilon=300.0, max_epsilon=600.0, **options)
    outcome = run_whole(world)
    assert outcome["complete"], outcome
    evaluations = outcome["evaluations"]
    assert evaluations["after"]["accuracy"] > evaluations["before"]["accuracy"]
    releases = options.get("releases", 1)
    for name in world.names:
        report = world.reports[name]
        budget = report["budgets"]["train"]
        rows = {row["purpose"]: row for row in budget["shares"]["purposes"]}
        assert rows["training"]["releases"] == 3
        assert rows["class gradients"]["releases"] == releases
        assert rows["class gradients"]["share"] + rows["training"]["share"] == pytest.approx(1)
        _, cohort = cohort_of(world.settings, trainers_only=True)
        plan = METHOD.plan(world.settings, cohort)
        assert report["epsilon"] == pytest.approx(accounting.epsilon(plan.events_of(3), delta=1e-5))
        # Without the class gradients in the account it would claim less than was spent.
        assert accounting.epsilon(plan.round_events * 3, delta=1e-5) < 0.95 * report["epsilon"]
        (run,) = (world.folder / name / "state" / "runs").iterdir()
        assert load_file(run / "adapter.safetensors")["D"].shape == (len(CLASSES), 16)
    told = saved_state(world)["facts"]["clip2fl"]
    assert told["step"] == 3
    assert told["moved_by_matching"] > 0


def test_without_the_branch_it_is_plain_distilled_descent(tmp_path: Path):
    world = world_of(tmp_path, rounds=4, releases=0, epsilon=300.0, max_epsilon=600.0)
    outcome = run_whole(world)
    assert outcome["complete"], outcome
    assert outcome["evaluations"]["after"]["accuracy"] > outcome["evaluations"]["before"]["accuracy"]
    assert {row["purpose"] for row in world.reports["site-1"]["budgets"]["train"]["shares"]["purposes"]} == {"training"}


def test_a_site_whose_budget_holds_the_training_alone_does_not_join(tmp_path: Path):
    world = world_of(tmp_path, rounds=3, releases=3)
    _, cohort = cohort_of(world.settings, trainers_only=True)
    plan = METHOD.plan(world.settings, cohort)
    training = accounting.epsilon(plan.round_events * 3, delta=1e-5)
    limit = (training + accounting.epsilon(plan.events_of(3), delta=1e-5)) / 2
    world.start()
    policy = PolicyConfig(max_epsilon=limit, unit="record", max_evaluation_epsilon=8.0)
    world.run(world.take_part("site-1", changes={"policy": policy}))
    assert world.errors["0"].code == "FS-1201"  # type: ignore[attr-defined]


class _Train:
    """Stands in for a door: all units, no noise; what a site half needs and no more."""

    def __init__(self, world: World, features: SiteFeatures, units: UnitFeatures, name: str) -> None:
        self.settings, self.features, self.site = world.settings, features, name
        self.engine, self.device, self._units = "closed-form", "cpu", units

    def units(self, population: str) -> UnitFeatures:
        return self._units


def trajectory(world: World, units: UnitFeatures, *, rounds: int) -> tuple[list[np.ndarray], dict[str, Any]]:
    """The head that is broadcast in each round, and the tensors at the end, with the same noise in every run."""
    settings, features = world.settings, features_of(world)
    _, cohort = cohort_of(settings, trainers_only=True)
    state, seen = METHOD.start(settings, cohort), []
    while (ask := METHOD.ask(settings, cohort, state)) is not None:
        rng = np.random.default_rng(state.step)
        seen.append(ask.inputs["D"])
        answer, _ = METHOD.answer(ask.inputs, state, _Train(world, features, units, "site-1"))  # type: ignore[arg-type]
        values = {name: value + rng.normal(size=value.shape) for name, value in answer.values.items()}
        state = METHOD.absorb(settings, cohort, state, Aggregate(values, 3))
        if METHOD.due(settings, state):
            state = METHOD.compute(settings, state, features)
    assert len(seen) == rounds
    return seen, dict(state.tensors)


def some_units(seed: int, *, labels: np.ndarray | None = None) -> UnitFeatures:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(CLASSES), 60) if labels is None else labels
    rows = rng.normal(size=(len(labels), 1, 16)).astype(np.float32)
    return UnitFeatures(rows, labels[:, None].astype(np.int64), np.ones((len(labels), 1), bool))


def test_training_is_the_same_with_the_branch_on_or_off(tmp_path: Path):
    rates = {"noise_multiplier": 5.0}
    units, runs = some_units(1), {}
    for releases in (0, 1, 4):
        (folder := tmp_path / str(releases)).mkdir()
        world = world_of(folder, rounds=4, releases=releases, privacy=rates)
        method = world.settings.method.model_copy(update={"learning_rate": 2.0, "temperature": 10.0})
        world.settings = world.settings.model_copy(update={"method": method})
        runs[releases] = trajectory(world, units, rounds=4)
    off, _ = runs[0]
    for releases in (1, 4):
        seen, final = runs[releases]
        for ours, theirs in zip(seen, off, strict=True):
            assert np.array_equal(ours, theirs)
        assert set(final) == {"D"}
        # The branch did something: what it gives is another head than training does.
        assert not np.allclose(final["D"], runs[0][1]["D"])


@pytest.mark.parametrize("labels", [[0] * 30 + [1] * 29, [0] * 30 + [1] * 29 + [2]])
@pytest.mark.parametrize("features", [1, 5])
def test_classes_held_by_nobody_or_by_one_record(tmp_path: Path, labels: list[int], features: int):
    world = world_of(tmp_path, rounds=1, features=features, gate=2.0, privacy={"no_privacy": "a test"})
    _, final = trajectory(world, some_units(2, labels=np.array(labels)), rounds=1)
    assert np.isfinite(final["D"]).all()


def test_a_class_without_signal_follows_its_text(tmp_path: Path):
    # Nobody holds class c. Its features have only the text to go by, and its row must favour that text.
    world = world_of(tmp_path, rounds=1, contrast=1.0, features=100, privacy={"no_privacy": "a test"})
    features = features_of(world)
    _, final = trajectory(world, some_units(3, labels=np.array([0, 1] * 30)), rounds=1)
    task = METHOD.task(world.settings, features)
    whole = final["D"] + task.scale * task.prior
    assert (task.prior @ whole.T)[2].argmax() == 2


def test_sites_expect_the_class_gradients_in_the_last_rounds_only(tmp_path: Path):
    settings = world_of(tmp_path, rounds=3, releases=1).settings
    start = starting_state(settings)
    asks = [question(settings, number, start=start) for number in range(5)]
    names = [None if ask is None else [segment.name for segment in ask.segments] for ask in asks]
    assert names == [["counts"], ["gradient"], ["gradient"], ["gradient", "class_gradients"], ["counts"]]
    ask = asks[3]
    assert ask is not None
    assert [event.purpose for event in ask.events] == ["training", "class gradients"]
    assert set(ask.inputs) == {"D", "classifier"}
    # A unit's gradients may be as long as its training gradient, and the diagonal is as many values as the head.
    assert ask.segments[1].length == len(CLASSES) * 16


@pytest.mark.parametrize(
    ("options", "privacy"),
    [
        ({"releases": 4}, {}),
        ({"features": 10_000, "classes": 128}, {}),
        ({"project": True, "classes": 16}, {}),
        ({}, {"ring_bits": 16}),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, options: dict[str, Any], privacy: dict[str, Any]):
    classes = options.pop("classes", 3)
    world = world_of(tmp_path, rounds=3, privacy=privacy, **options)
    settings = world.settings.model_copy(update={"classes": tuple(f"c{i}" for i in range(classes))})
    with pytest.raises(ConfigError, match="FS-1017"):
        METHOD.start(settings, cohort_of(settings, trainers_only=True)[1])


@pytest.mark.parametrize("wrong", [{"distillation_temperature": 0}, {"contrast_temperature": -1}, {"features": 0}])
def test_temperatures_and_counts_below_their_range_are_refused_by_key(wrong: dict[str, Any]):
    (key,) = wrong
    with pytest.raises(ValueError, match=key):
        MethodConfig(name="clip2fl", clip2fl=wrong)


def test_a_projected_run_releases_fewer_values(tmp_path: Path):
    world = world_of(tmp_path, rounds=1, project=True, privacy={"no_privacy": "a test"})
    assert METHOD.layout(world.settings).length == 9
    _, final = trajectory(world, some_units(4), rounds=1)
    assert np.isfinite(final["D"]).all()


@pytest.mark.slow
def test_the_sum_is_on_disk_before_the_computation_and_polls_are_answered_meanwhile(tmp_path: Path, monkeypatch):
    world = world_of(tmp_path, rounds=1)
    seen: dict[str, Any] = {}

    def patient(self: StepWorker, now: float) -> Any:
        if "reason" not in seen:
            # The state that is being computed with is already saved, and waiting sites are told what for.
            seen["names"] = set(saved_tensors(world))
            seen["reason"] = world.coordinator.reason(time.monotonic())
        seen["polls"] = seen.get("polls", 0) + 1
        return None if seen["polls"] < 5 else original(self, now)

    original = StepWorker.poll
    monkeypatch.setattr(StepWorker, "poll", patient)
    assert run_whole(world)["complete"]
    assert seen["names"] == {"D", "class_gradients"}
    assert "the aggregator computes" in seen["reason"]
    assert seen["polls"] >= 5


@pytest.mark.parametrize(
    ("harm", "code"),
    [
        ("killed", "FS-1721"),
        pytest.param("no room", "FS-1721", marks=pytest.mark.slow),
        pytest.param("slow", "FS-1722", marks=pytest.mark.slow),
    ],
)
def test_a_computation_that_the_machine_fails_is_done_again_by_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str, code: str
):
    world = world_of(tmp_path, rounds=1)
    original = StepWorker.poll

    def poll(self: StepWorker, now: float) -> Any:
        if harm == "killed":
            self._process.kill()
        return original(self, now if harm == "killed" else self._deadline)

    def full() -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(StepWorker, "poll", poll)
        if harm == "no room":
            patch.setattr("fedsecure.aggregator.step_worker._nameless", full)
        core = world.start()
        world.run(*(world.take_part(name) for name in world.names))
    assert core.failure is not None
    assert (core.failure.code, core.failure.final) == (code, False)
    assert "class_gradients" in saved_tensors(world)
    assert {error.code for error in world.errors.values()} == {"FS-1501"}  # type: ignore[attr-defined]
    world.errors.clear()
    outcome = run_whole(world)
    assert outcome["complete"]
    assert [attempt["method"] for attempt in outcome["attempts"]] == ["evaluate", "clip2fl", "evaluate"]
    assert "class_gradients" not in saved_tensors(world)


def test_an_aggregator_without_the_texts_says_so(tmp_path: Path):
    world = world_of(tmp_path, rounds=1)
    world.start()
    core = world.coordinator
    core.engine.config = core.config.model_copy(update={"encoder_file": None})
    world.run(*(world.take_part(name) for name in world.names))
    assert core.outcome is not None
    assert "FS-1640" in core.outcome["error"]
    assert core.failure is not None
    assert core.failure.final, "the next process would have no texts either"


@pytest.mark.slow
def test_an_aggregator_with_the_texts_of_other_classes_says_so(tmp_path: Path):
    world = world_of(tmp_path, rounds=1)
    write_features(tmp_path / "other.npz", seed=1)
    world.start()
    core = world.coordinator
    core.engine.config = core.config.model_copy(update={"encoder_file": tmp_path / "other.npz"})
    world.run(*(world.take_part(name) for name in world.names))
    assert core.outcome is not None
    assert "FS-1630" in core.outcome["error"]


def test_defaults_are_those_of_the_private_profile():
    options = RunSettings.model_fields["method"].default.clip2fl
    assert (options.class_gradients, options.releases, options.reduction) == ("diagonal", 1, "sum")
    assert replace(METHOD, name="x").kind == "linear"
