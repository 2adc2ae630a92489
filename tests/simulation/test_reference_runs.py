"""Whole reference runs: never private, last and best round both there, finished runs not run again."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsecure.errors import ModelError, PrivacyError
from fedsecure.learning import reference as training
from fedsecure.simulation import reference
from fedsecure.simulation.folders import Experiment, Part
from fedsecure.simulation.simulate import open_results

D, K = 16, 3


def part(count: int, seed: int) -> Part:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, count)
    features = np.eye(K, D)[labels] + 0.4 * rng.normal(size=(count, D))
    return Part(features.astype(np.float32), labels.astype(np.int64))


@pytest.fixture
def experiment() -> Experiment:
    text = np.eye(K, D, dtype=np.float32) + 0.5 * np.roll(np.eye(K, D, dtype=np.float32), 1, axis=0)
    test = part(40, 9)
    return Experiment(
        classes=("a", "b", "c"),
        text=text,
        mean=None,
        scale=10.0,
        train={"one": part(70, 1), "two": part(33, 2), "three": part(40, 3)},
        own={"one": part(12, 4), "two": part(12, 5), "three": part(12, 6)},
        tests={"raw": test, "clean": test.rows(range(20))},
        target=test.features,
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return open_results(tmp_path / "reference")


def run(experiment: Experiment, out: Path, name: str = "reference", **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"seed": 0, "reason": "public data", "partition": "iid", "rounds": 3, "steps": 4}
    return reference.run_reference(experiment, name, out=out, **{**options, **changes})


@pytest.mark.parametrize(("epsilon", "reason"), [(8.0, "public data"), (math.inf, ""), (math.inf, "  "), (1.0, "")])
def test_a_private_reference_is_refused(experiment: Experiment, out: Path, epsilon: float, reason: str) -> None:
    with pytest.raises(PrivacyError, match="FS-1218"):
        run(experiment, out, epsilon=epsilon, reason=reason)
    assert not list((out / "cells").iterdir())


@pytest.mark.parametrize("name", reference.NAMES)
def test_a_run_tells_last_and_best_round_for_every_test_set_and_site(
    experiment: Experiment, out: Path, name: str
) -> None:
    row = run(experiment, out, name)
    assert (row["method"], row["epsilon"], row["no_privacy"]) == (name, math.inf, "public data")
    assert {key: value["records"] for key, value in row["tests"].items()} == {"raw": 40, "clean": 20}
    assert set(row["site_scores"]) == {"one", "two", "three"}
    assert row["accuracy"] == row["tests"]["raw"]["accuracy"] == row["curve"][-1]
    assert row["best"]["tests"]["raw"]["accuracy"] == max(row["curve"]) >= row["accuracy"]
    assert row["best"]["round"] == 1 + int(np.argmax(row["curve"]))
    assert row["alignment"] == (name != "reference-fedclip")
    # Six tensors and two running statistics; FedCLIP's gate has four tensors, and who never averages sends none.
    sizes = {"reference-fedclip": 2 * D * D + 2 * D, "reference-local": 0}
    assert row["bytes_up"] == 3 * 4 * sizes.get(name, 2 * D * D + 6 * D)


def test_a_finished_run_is_taken_from_before(
    experiment: Experiment, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(experiment, out)

    def forbidden(*arguments: object, **named: object) -> None:
        raise AssertionError("a finished run was run again")

    monkeypatch.setattr(reference, "_train", forbidden)
    assert run(experiment, out) == first
    for changes in ({"seed": 1}, {"rounds": 4}, {"steps": 5}, {"partition": "other"}):
        with pytest.raises(AssertionError, match="again"):
            run(experiment, out, **changes)
    with pytest.raises(AssertionError, match="again"):
        run(replace(experiment, target=None), out)


def test_one_round_is_the_weighted_average_of_the_sites(experiment: Experiment, out: Path) -> None:
    """⌊n/32⌋ = 2, 1, 1: as the released program weighs, not by records."""
    row = run(experiment, out, rounds=1)
    recipe = reference.recipe_of("reference", scale=10.0, steps=4)
    first = training.start(D, gate="batchnorm", seed=0)
    sent = []
    for index, records in enumerate(experiment.train.values()):
        site = training.ReferenceSite(
            features=records.features,
            labels=records.labels,
            text=experiment.text,
            target=experiment.target,
            recipe=recipe,
            seed=index,
        )
        sent.append(site.train(first)[0])
    mean = {
        name: (2 * sent[0][name].astype(float) + sent[1][name] + sent[2][name]).astype(np.float32) / 4 for name in first
    }
    test = experiment.tests["raw"]
    found = training.predict(mean, test.features, experiment.text, gate="batchnorm")
    assert row["accuracy"] == pytest.approx(float((found == test.labels).mean()))


def test_as_released_where_nothing_is_said() -> None:
    recipe = reference.recipe_of("reference", scale=100.0)
    assert (recipe.steps, recipe.batch, recipe.rate, recipe.weight_decay) == (199, 32, 5e-5, 0.02)
    assert (recipe.target, recipe.keeps_moments, reference.ROUNDS) == ("raw", True, 50)
    assert reference.recipe_of("reference-fedclip", scale=100.0).alignment == 0


@pytest.mark.parametrize("spoil", ["site", "target"])
def test_sets_smaller_than_the_batch_are_refused_before_training(
    experiment: Experiment, out: Path, spoil: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.ReferenceSite, "train", lambda *_: pytest.fail("a site trained"))
    small = (
        replace(experiment, train={**experiment.train, "three": part(31, 3)})
        if spoil == "site"
        else replace(experiment, target=part(31, 3).features)
    )
    with pytest.raises(ModelError, match="FS-1663"):
        run(small, out)
    assert not list((out / "cells").iterdir())


def test_plain_zero_shot_is_the_nearest_text(experiment: Experiment) -> None:
    perfect = replace(experiment, tests={"raw": Part(experiment.text.copy(), np.arange(K))})
    assert reference.zero_shot(perfect)["raw"]["accuracy"] == 1.0
