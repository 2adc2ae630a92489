"""A recommendation from public numbers: which method, why, and what to paste."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsecure.config import MethodConfig, PrivacyConfig
from fedsecure.errors import ConfigError, FedsecureError, PrivacyError
from fedsecure.methods.recommend import AMPLE_SIGNAL, LEAST_SIGNAL, Numbers, Recommendation, recommend
from fedsecure.methods.registry import load_training_method


def even(**changes: Any) -> Recommendation:
    values: dict[str, Any] = {"sites": 3, "units": 900, "classes": 101, "dimension": 512, "epsilon": 1.0}
    return recommend(Numbers.even(**{**values, **changes}))


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({"units": 100}, "prototypes"),
        ({"epsilon": 0.3}, "prototypes"),
        ({}, "linear"),
        ({"epsilon": 8.0}, "linear"),
        ({"classes": 4, "units": 5000, "epsilon": 8.0}, "ridge"),
    ],
)
def test_the_signal_of_a_class_decides(changes: dict[str, Any], method: str) -> None:
    found = even(**changes)
    assert found.best.method == method
    assert found.best.noise == "distributed"
    signal = max(one.class_signal for one in found.candidates)
    assert method == ("prototypes" if signal < LEAST_SIGNAL else "linear" if signal < AMPLE_SIGNAL else "ridge")
    assert found.reason.count(". ") == 0, "one sentence"


def test_every_method_and_place_is_a_candidate_with_the_plan_of_a_run() -> None:
    found = even()
    assert len({one.label for one in found.candidates}) == len(found.candidates) == 8
    by = {one.label: one for one in found.candidates}
    for method in ("linear", "facmic", "prototypes", "ridge"):
        shared, own = by[f"{method}, distributed"], by[f"{method}, local"]
        assert shared.noise_multiplier == own.noise_multiplier
        assert shared.sum_noise_multiplier < own.sum_noise_multiplier
    assert by["facmic, distributed"].parameters > by["linear, distributed"].parameters
    assert by["ridge, distributed"].released == 512 * 513 // 2 + 101 * 512 + 2


def test_refused_candidates_are_shown_and_never_taken() -> None:
    found = even(units=100)
    refused = [one for one in found.candidates if one.refused]
    assert {one.method for one in refused} == {"facmic"}
    assert all("refused" in one.verdict for one in refused)
    assert not found.best.refused
    with pytest.raises(PrivacyError, match="FS-1204"):
        even(units=3, epsilon=0.01)


def test_the_lines_to_paste_are_settings_of_a_run_that_starts(tmp_path: Path) -> None:
    from test_one_release import settings_for

    for changes in ({"units": 100}, {}, {"classes": 4, "units": 5000, "epsilon": 8.0}):
        found = even(**changes)
        pasted = tomllib.loads(found.toml())
        base = settings_for(found.best.method)
        values = {**base.model_dump(), "method": MethodConfig(**pasted["method"]).model_dump()}
        values["privacy"] = PrivacyConfig(**{"unit": "record", **pasted["privacy"]}).model_dump()
        settings = type(base)(**values)
        plan = load_training_method(settings.method.name).plan(settings, found.numbers.cohort)
        assert plan.noise_multiplier == found.best.noise_multiplier
        assert plan.rounds == found.best.rounds


def test_a_file_gives_the_same_as_its_numbers(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    sites = "".join(f"[sites.s{i}]\nmax_units = 900\n" for i in range(3))
    classes = json.dumps([f"c{i}" for i in range(101)])
    file.write_text(f'name = "x"\nclasses = {classes}\n[privacy]\ntarget_epsilon = 4.0\n{sites}')
    read, said = recommend(Numbers.read(file, epsilon=1.0)), even()
    assert read.best == said.best
    assert read.candidates == said.candidates
    assert recommend(Numbers.read(file)).numbers.privacy.target_epsilon == 4.0
    twice = replace(read.numbers, units={site: 1800 for site in read.numbers.units})
    assert recommend(twice).best.class_signal > read.best.class_signal


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"sites": 0}, "FS-1300"),
        ({"sites": 2}, "FS-1300"),
        ({"sites": 3, "colluders": 3}, "FS-1301"),
        ({"units": 0}, "FS-1211"),
        ({"units": -5}, "FS-1211"),
        ({"classes": 1}, "FS-1631"),
        ({"dimension": 0}, "FS-1631"),
        ({"epsilon": 0.0}, "FS-1003"),
        ({"epsilon": -1.0}, "FS-1003"),
        ({"epsilon": float("nan")}, "FS-1003"),
        ({"delta": 0.0}, "FS-1003"),
        ({"delta": 1.0}, "FS-1003"),
        ({"delta": 0.01}, "FS-1203"),
    ],
)
def test_bad_numbers_are_refused(changes: dict[str, Any], code: str) -> None:
    with pytest.raises(FedsecureError) as caught:
        even(**changes)
    assert caught.value.code == code


def test_a_file_and_numbers_together_or_neither_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="FS-1015"):
        Numbers.check_alone(tmp_path / "x.toml", sites=3, units=None)
    with pytest.raises(ConfigError, match="FS-1015"):
        Numbers.given(sites=3, units=None, classes=4, dimension=None, epsilon=None, delta=1e-5, colluders=None)


@pytest.mark.slow
def test_the_recommended_method_is_within_a_point_and_a_half_of_the_best(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few federations of ``python -m benchmarks.recommendation``, seeded; the whole table is in docs/choosing.md."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    from benchmarks.recommendation import runner, worlds

    def even_split(world: Any, epsilon: float) -> Numbers:
        spec = world.task.spec
        return Numbers.even(
            sites=3, units=len(world.units) // 3, classes=spec.classes, dimension=spec.dimension, epsilon=epsilon
        )

    for world in worlds(shared_data, split="test", every=4):
        for epsilon in (1.0, 8.0):
            numbers = even_split(world, epsilon)
            found = recommend(numbers)
            scores = {}
            for one in found.candidates:
                if one.noise == "distributed" and one.method != "facmic":
                    run = runner(world, one.method, numbers)
                    scores[one.method] = np.mean(
                        [run(one.sum_noise_multiplier, np.random.default_rng(seed)) for seed in range(2)]
                    )
            assert scores[found.best.method] >= max(scores.values()) - 0.015, (world.name, epsilon, scores)
