"""FACMIC's alignment in a private run: exact gradients, bounded sensitivity, and the price that the plan says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from fedsecure.config import AlignmentConfig, MethodConfig, RunSettings
from fedsecure.data.loading import read_feature_header
from fedsecure.errors import ConfigError, DataError, ModelError
from fedsecure.learning.adapters import AdapterSpec
from fedsecure.learning.alignment import FourierFeatures, align, centred_rows, frequencies_of, negatives_of, witness_of
from fedsecure.learning.artefact import load_adapter
from fedsecure.learning.engines import clipped_sum
from fedsecure.learning.modules import FeatureAdapter, build_module
from fedsecure.learning.objective import Negatives, Objective
from fedsecure.learning.targets import check_apart, read_target, write_target
from fedsecure.learning.task import HeadTask, unit_rows
from fedsecure.learning.units import UnitFeatures
from fedsecure.messages import Aggregate
from fedsecure.methods.base import ServerState
from fedsecure.methods.cohorts import cohort_of
from fedsecure.methods.facmic import PROTOTYPES, PURPOSE, SOURCE, Facmic
from fedsecure.methods.registry import load_training_method
from tests.federation_world import World

D, K = 8, 3


def a_task(seed: int = 0, *, centred: bool = True) -> tuple[HeadTask, dict[str, np.ndarray], np.random.Generator]:
    rng = np.random.default_rng(seed)
    spec = AdapterSpec("facmic", D, K)
    centre = 0.2 * rng.normal(size=D) if centred else np.zeros(D)
    task = HeadTask(spec, rng.normal(size=(K, D)).astype(np.float32), centre.astype(np.float32), 5.0)
    tensors = {n: v + 0.3 * rng.normal(size=v.shape).astype(np.float32) for n, v in spec.initial(b"t").items()}
    return task, tensors, rng


def some_units(rng: np.random.Generator, count: int = 6, records: int = 2) -> UnitFeatures:
    features = rng.normal(size=(count, records, D)).astype(np.float32)
    return UnitFeatures(features, rng.integers(0, K, (count, records)), np.ones((count, records), np.bool_))


def test_the_witness_gives_the_gradient_that_autograd_finds_in_the_discrepancy_with_fixed_weights() -> None:
    """Each class's prototype adapted by the module: ∂ of Σ_c ℓ(c)/K in all parameters is that of the squared distance
    of embeddings, 5·Σ_c ‖φ(z_c) − μ_c‖²/K, with the target's soft labels held fixed."""
    task, tensors, rng = a_task()
    target = rng.normal(size=(20, D)).astype(np.float32)
    source = unit_rows(rng.normal(size=(K, D)))
    frequencies = frequencies_of(task, target, count=32, seed=3)
    phi = FourierFeatures(frequencies)
    found = witness_of(task, tensors, target=target, source=source, frequencies=frequencies, strength=1.0)

    module: Any = build_module(task, tensors, device=torch.device("cpu"), dtype=torch.float64)
    assert isinstance(module, FeatureAdapter)
    rows = torch.from_numpy(source)
    loss = found.loss(module.from_inputs(rows), torch.arange(K)).mean()
    ours = torch.autograd.grad(loss, list(module.parameters()))

    raw = centred_rows(task, target)
    with torch.no_grad():
        soft = torch.softmax(module.from_inputs(torch.from_numpy(raw)) @ module.prior.T, -1).numpy()
    aims = torch.from_numpy((soft / soft.sum(0)).T @ phi.of(raw))
    angles = module.from_inputs(rows) @ torch.from_numpy(frequencies).T
    embedded = torch.cat([angles.cos(), angles.sin()], -1) / len(frequencies) ** 0.5
    theirs = torch.autograd.grad(5 * (embedded - aims).square().sum() / K, list(module.parameters()))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
    assert sum(float(part.abs().sum()) for part in ours) > 0


@pytest.mark.parametrize("centred", [True, False])
def test_frequencies_follow_the_spread_of_the_target(centred: bool) -> None:
    task, _, rng = a_task(centred=centred)
    target = rng.normal(size=(15, D)).astype(np.float32)
    rows = centred_rows(task, target)
    pairs = [((a - b) ** 2).sum() for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
    from fedsecure.learning.alignment import bandwidths

    expected = FourierFeatures.draw(bandwidths(float(np.mean(pairs))), dimension=D, count=16, seed=1).frequencies
    assert frequencies_of(task, target, count=16, seed=1) == pytest.approx(expected, rel=1e-9)


def aligned_objective(task: HeadTask, tensors: dict[str, np.ndarray], rng: np.random.Generator) -> Objective:
    target = rng.normal(size=(12, D)).astype(np.float32)
    frequencies = frequencies_of(task, target, count=16, seed=0)
    source = 0.7 * unit_rows(rng.normal(size=(K, D)))
    witness = witness_of(task, tensors, target=target, source=source, frequencies=frequencies, strength=50.0)
    return Objective(alignment=witness, negatives=Negatives(negatives_of(task, tensors, target=target), strength=3.0))


def test_both_engines_clip_the_aligned_objective_alike() -> None:
    task, tensors, rng = a_task()
    task, units = replace(task, objective=aligned_objective(task, tensors, rng)), some_units(rng)
    engines: tuple[Literal["opacus", "closed-form"], ...] = ("opacus", "closed-form")
    for clip in (0.05, 1e3):
        one, two = (clipped_sum(task, tensors, units, max_grad_norm=clip, engine=e, device="cpu") for e in engines)
        np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-9)


def test_a_rare_class_pulls_harder_up_to_the_cap() -> None:
    """1/(C·π_c), at most 3 (facmic.md §5.4-4), by the shares that the run has."""
    task, tensors, rng = a_task()
    given: Any = {"target": rng.normal(size=(20, D)).astype(np.float32), "source": None, "strength": 1.0}
    given["frequencies"] = frequencies_of(task, given["target"], count=16, seed=0)
    shares = np.full(K, 0.03)
    shares[0] = 1 - 0.03 * (K - 1)
    even, tilted = (
        witness_of(replace(task, log_prior=prior), tensors, **given).weights
        for prior in (None, np.log(shares).astype(np.float32))
    )
    assert np.ptp(even) == 0
    assert np.asarray(tilted / even) == pytest.approx(np.minimum(1 / (K * shares), 3.0), rel=1e-5)


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_one_unit_moves_the_aligned_sum_by_no_more_than_the_clip_norm(size: float) -> None:
    """Whatever the weights of the terms are."""
    task, tensors, rng = a_task(1)
    task = replace(task, objective=aligned_objective(task, tensors, rng))
    units = some_units(rng)
    units.features[2] *= size
    whole = clipped_sum(task, tensors, units, max_grad_norm=0.1, device="cpu")
    for row in range(len(units)):
        rest = clipped_sum(task, tensors, units.select(np.arange(len(units)) != row), max_grad_norm=0.1, device="cpu")
        assert np.linalg.norm(whole - rest) <= 0.1 * (1 + 1e-9)
    # The objective really is at work.
    plain = clipped_sum(replace(task, objective=Objective()), tensors, units, max_grad_norm=0.1, device="cpu")
    assert np.linalg.norm(whole - plain) > 1e-3


def test_public_negatives_are_the_other_classes_images() -> None:
    task, tensors, rng = a_task(2)
    target = rng.normal(size=(30, D)).astype(np.float32)
    module: Any = build_module(task, tensors, device=torch.device("cpu"), dtype=torch.float64)
    logits = module(torch.from_numpy(target).double()).detach().numpy()
    expected = [np.log(np.exp(logits[logits.argmax(1) != c, c]).sum()) for c in range(K)]
    assert negatives_of(task, tensors, target=target) == pytest.approx(expected, rel=1e-9)
    # Where every image is taken for one class, there is nothing to be told apart from, and no gradient.
    alone = np.repeat(target[:1], 3, axis=0)
    (only,) = {int(row) for row in module(torch.from_numpy(alone).double()).argmax(1)}
    assert negatives_of(task, tensors, target=alone)[only] == -1e30


def test_an_alignment_step_lowers_the_discrepancy_and_is_no_longer_than_told() -> None:
    task, tensors, rng = a_task(4)
    target = rng.normal(size=(25, D)).astype(np.float32)
    source = unit_rows(rng.normal(size=(K, D)))
    frequencies = frequencies_of(task, target, count=64, seed=0)
    how: Any = {"target": target, "source": source, "frequencies": frequencies}
    phi = FourierFeatures(frequencies)

    def apart(values: Any) -> float:
        module: Any = build_module(task, values, device=torch.device("cpu"), dtype=torch.float64)
        raw = centred_rows(task, target)
        with torch.no_grad():
            soft = torch.softmax(module.from_inputs(torch.from_numpy(raw)) @ module.prior.T, -1).numpy()
            ours = phi.of(module.from_inputs(torch.from_numpy(source)).numpy())
        return float(np.square(ours - (soft / soft.sum(0)).T @ phi.of(raw)).sum())

    current: Any = tensors
    for _ in range(5):
        following = align(task, current, strength=1.0, step=0.02, **how)
        moved = task.spec.flatten(following) - task.spec.flatten(current)
        assert 0 < np.linalg.norm(moved) <= 0.02 * (1 + 1e-4)
        current = following
    assert apart(current) < apart(tensors)
    still = align(task, tensors, strength=1.0, step=0.02, **{**how, "source": np.zeros((K, D))})
    assert all(np.array_equal(still[name], tensors[name]) for name in tensors), "prototypes that nobody trusts"


# --- whole runs -------------------------------------------------------------------------------------------------------


def aligned_world(folder: Path, *, noise: str = "distributed", rounds: int = 3, **alignment: Any) -> World:
    world = World(folder, rounds=rounds, adapter="facmic", noise=noise, privacy={"minimum_signal_to_noise": 0.0})
    header = read_feature_header(world.features)
    rows = np.random.default_rng(9).normal(size=(20, header.dimension)).astype(np.float32)
    digest = write_target(folder / "target.safetensors", rows, fingerprint=header.fingerprint)
    chosen = AlignmentConfig(**{"weight": 1.0, "target": digest, "prototypes": True, **alignment})
    method = MethodConfig(
        name="facmic", rounds=rounds, local_steps=1 if noise == "distributed" else 2, alignment=chosen
    )
    world.settings = world.settings.model_copy(update={"method": method})
    return world


def run(world: World) -> None:
    changes = {"target_file": world.folder / "target.safetensors"}
    core = world.start()
    core.engine.config = core.config.model_copy(update={**changes, "encoder_file": world.features})
    world.run(*(world.take_part(name, changes=changes) for name in world.names))
    assert not world.errors, world.errors
    assert core.outcome is not None
    assert core.outcome["complete"]


@pytest.mark.parametrize(
    ("noise", "at"),
    [
        ("distributed", "sites"),
        pytest.param("local", "sites", marks=pytest.mark.slow),
        pytest.param("distributed", "aggregator", marks=pytest.mark.slow),
    ],
)
def test_an_aligned_run_costs_what_its_plan_says_and_shows_what_for(tmp_path: Path, noise: str, at: str) -> None:
    world = aligned_world(tmp_path, noise=noise, at=at, negatives=0.5)
    run(world)
    _, cohort = cohort_of(world.settings, trainers_only=True)
    plan = load_training_method("facmic").plan(world.settings, cohort)
    for report in world.reports.values():
        purposes = {row["purpose"]: row["releases"] for row in report["budgets"]["train"]["shares"]["purposes"]}
        assert purposes == {PURPOSE: 1, "training": 2}
        if noise == "distributed":
            assert report["epsilon"] == pytest.approx(plan.epsilon_expected, rel=1e-6)
        else:
            # Prototypes are one noisy step, where a round of training has two.
            assert report["epsilon"] < plan.epsilon_expected
    (kept,) = (tmp_path / "site-1" / "state" / "runs").glob("*/adapter.safetensors")
    assert set(load_adapter(kept).tensors) == set(AdapterSpec("facmic", 16, 3).shapes), "the adapter and nothing else"


def released(settings: RunSettings, sums: np.ndarray) -> np.ndarray:
    """What the aggregator keeps of a sum of class sums (K, d) without noise, in its own units."""
    _, cohort = cohort_of(settings, trainers_only=True)
    method: Any = load_training_method("facmic")
    weight = 0.96**0.5
    values = settings.privacy.max_grad_norm * np.concatenate([weight * sums.ravel(), [0.0, 0.0]])
    state = ServerState(tensors=method.start(settings, cohort).tensors)
    after = method.absorb(settings, cohort, state, Aggregate({PROTOTYPES: values}, ()))
    assert all(np.array_equal(after.tensors[name], state.tensors[name]) for name in state.tensors)
    return np.asarray(after.tensors[SOURCE])


def test_prototypes_are_trusted_as_far_as_their_noise_allows(tmp_path: Path) -> None:
    settings = aligned_world(tmp_path).settings
    _, cohort = cohort_of(settings, trainers_only=True)
    noise = load_training_method("facmic").plan(settings, cohort).sum_noise_multiplier / 0.96**0.5
    direction = unit_rows(np.random.default_rng(0).normal(size=(3, 16)))
    lengths = np.array([1e3, 2.0, 0.5])[:, None] * noise * 16**0.5
    found = released(settings, direction * lengths)
    trust = np.sqrt(np.clip(1 - 16 * noise**2 / lengths**2, 0, 1))
    assert found == pytest.approx(direction * trust, abs=1e-5)
    assert not found[2].any(), "below its own noise a row says nothing"


def test_every_question_is_known_to_the_sites_beforehand(tmp_path: Path) -> None:
    settings = aligned_world(tmp_path).settings
    _, cohort = cohort_of(settings, trainers_only=True)
    method: Any = load_training_method("facmic")
    start = method.start(settings, cohort)
    first, second, last = (method.ask(settings, cohort, replace(start, step=step)) for step in range(3))
    assert method.ask(settings, cohort, replace(start, step=3)) is None
    assert [segment.name for segment in first.segments] == [PROTOTYPES]
    assert [event.purpose for event in first.events] == [PURPOSE]
    assert SOURCE not in first.inputs
    for ask in (second, last):
        assert [segment.name for segment in ask.segments] == ["gradient"]
        assert ask.inputs[SOURCE].shape == (3, 16)
    # The same noise, and the same price.
    assert {e.noise_multiplier for ask in (first, second) for e in ask.events} == {first.events[0].noise_multiplier}
    there = settings.model_copy(
        update={"method": settings.method.model_copy(update={"alignment": AlignmentConfig(
            **{**settings.method.alignment.model_dump(), "at": "aggregator"})})}
    )  # fmt: skip
    assert SOURCE not in method.ask(there, cohort, replace(start, step=1)).inputs
    assert method.due(there, replace(start, step=3))
    assert not method.due(there, replace(start, step=2))
    assert not method.due(settings, replace(start, step=3))


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight": 1.0},
        {"weight": -1.0, "target": "ab" * 32},
        {"weight": 1.0, "target": "short"},
        {"negatives": 1.0, "target": "ab" * 32, "prototypes": True},
        {"weight": 1.0, "target": "ab" * 32, "at": "aggregator"},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        AlignmentConfig(**wrong)


def test_a_target_that_nothing_looks_at_is_refused() -> None:
    alignment = {"target": "ab" * 32}
    with pytest.raises(ValueError, match="a target goes with"):
        MethodConfig.model_validate({"name": "facmic", "alignment": alignment})
    MethodConfig.model_validate({"name": "facmic", "alignment": alignment, "facmic": {"normalisation": "public"}})


def test_prototypes_need_a_second_round_and_a_wide_ring(tmp_path: Path) -> None:
    settings = aligned_world(tmp_path).settings
    content = settings.model_dump()
    with pytest.raises(ValueError, match="at least 2"):
        RunSettings.model_validate({**content, "method": {**content["method"], "rounds": 1}})
    with pytest.raises(ValueError, match="ring_bits = 32"):
        RunSettings.model_validate({**content, "privacy": {**content["privacy"], "ring_bits": 16}})


@pytest.mark.parametrize("name", ["linear", "fedclip", "clip2fl", "ridge"])
def test_methods_that_do_not_align_refuse_a_target(tmp_path: Path, name: str) -> None:
    settings = aligned_world(tmp_path).settings
    _, cohort = cohort_of(settings, trainers_only=True)
    other = settings.model_copy(update={"method": settings.method.model_copy(update={"name": name})})
    with pytest.raises(ConfigError, match="FS-1018"):
        load_training_method(name).plan(other, cohort)
    assert Facmic.aligns


def test_a_target_file_is_the_runs_or_none(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    file, other = tmp_path / "t.safetensors", tmp_path / "other.safetensors"
    digest = write_target(file, rows, fingerprint="ab" * 32)
    how: Any = {"digest": digest, "fingerprint": "ab" * 32, "dimension": 5}
    assert np.array_equal(read_target(file, **how), rows)
    write_target(other, rows + 1, fingerprint="ab" * 32)
    for path, changes in (
        (None, {}),
        (tmp_path / "absent", {}),
        (other, {}),
        (file, {"fingerprint": "cd" * 32}),
        (file, {"dimension": 6}),
    ):
        with pytest.raises(ModelError, match="FS-1676"):
            read_target(path, **{**how, **changes})
    import hashlib

    other.write_bytes(b"no safetensors")
    with pytest.raises(ModelError, match="FS-1676"):
        read_target(other, **{**how, "digest": hashlib.sha256(b"no safetensors").hexdigest()})
    for bad in (rows[:1], rows * np.nan, rows[0]):
        with pytest.raises(ModelError, match="FS-1676"):
            write_target(tmp_path / "bad", bad, fingerprint="ab" * 32)
    assert not (tmp_path / "bad").exists()


def test_a_target_that_holds_test_images_is_refused_unless_that_is_said(tmp_path: Path) -> None:
    """Found at the first evaluation, before any training unit is read; also where an encoder rounds otherwise."""
    for folder, transductive in ((tmp_path / "a", False), (tmp_path / "b", True)):
        folder.mkdir()
        world = aligned_world(folder, rounds=2, transductive=transductive)
        with np.load(world.features) as held:
            rows = np.concatenate([held["test_x"][:3] * np.float32(1 + 1e-6), -held["test_x"][3:6]])
        header = read_feature_header(world.features)
        digest = write_target(folder / "target.safetensors", rows, fingerprint=header.fingerprint)
        content = world.settings.model_dump()
        content["method"]["alignment"]["target"] = digest
        world.settings = RunSettings.model_validate(content)
        if transductive:
            run(world)
            continue
        changes = {"target_file": folder / "target.safetensors"}
        core = world.start()
        world.run(*(world.take_part(name, changes=changes) for name in world.names))
        # The sites share one file in turn, so that each has one of the three.
        assert [getattr(error, "code", "") for error in world.errors.values()] == ["FS-1137"] * 3
        assert core.outcome is None or not core.outcome["complete"]
        assert not list(folder.glob("site-*/state/runs/*/adapter.safetensors"))


def test_near_images_are_not_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    target = rng.normal(size=(5, 64)).astype(np.float32)
    units = UnitFeatures(
        (target + 0.01 * rng.normal(size=target.shape).astype(np.float32))[:, None],
        np.zeros((5, 1), np.int64),
        np.ones((5, 1), np.bool_),
    )
    check_apart(target, units)
    with pytest.raises(DataError, match="FS-1137"):
        check_apart(target, UnitFeatures(2 * target[:1, None], np.zeros((1, 1), np.int64), np.ones((1, 1), np.bool_)))
