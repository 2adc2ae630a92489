"""Sites that train alone: each under the whole budget, scored by the mean, kept once finished, else refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsecure.errors import ConfigError
from fedsecure.privacy.accounting import mu_for_epsilon
from fedsecure.simulation import alone
from fedsecure.simulation.folders import Experiment, Part
from fedsecure.simulation.simulate import open_results

D, K = 16, 3
SETTINGS: dict[str, Any] = {"delta": 1e-5, "partition": "iid", "seed": 0}


def part(count: int, seed: int) -> Part:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, count)
    features = np.eye(K, D)[labels] + 0.4 * rng.normal(size=(count, D))
    return Part(features.astype(np.float32), labels.astype(np.int64))


@pytest.fixture
def experiment() -> Experiment:
    # Each text points half at the next class, so that there is something to learn.
    text = np.eye(K, D, dtype=np.float32) + 0.9 * np.roll(np.eye(K, D, dtype=np.float32), 1, axis=0)
    return Experiment(
        classes=("a", "b", "c"),
        text=text,
        mean=None,
        scale=10.0,
        train={"one": part(300, 1), "two": part(200, 2)},
        own={"one": part(40, 3)},
        tests={"raw": part(400, 4)},
        target=None,
    )


def test_the_score_is_the_mean_over_unconnected_sites(experiment: Experiment, tmp_path: Path) -> None:
    def accuracy(name: str, **sites: Part) -> float:
        out = open_results(tmp_path / name)
        row = alone.run_alone(
            replace(experiment, train=sites), "local-only-linear", out=out, epsilon=math.inf, **SETTINGS
        )
        return float(row["accuracy"])

    one, two = experiment.train["one"], experiment.train["two"]
    # Seeds go by position, and a token of noise changes no prediction by much.
    first, both = accuracy("first", one=one), accuracy("both", one=one, two=two)
    second = 2 * both - first
    assert second == pytest.approx(accuracy("second", two=two), abs=0.02)


def test_without_privacy_a_site_learns_and_its_row_is_kept(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = open_results(tmp_path / "out")
    row = alone.run_alone(experiment, "local-only-linear", out=out, epsilon=math.inf, **SETTINGS)
    assert row["accuracy"] > row["zero_shot"] + 0.05
    assert row["noise"] == "own"
    assert row["epsilon_spent"] is None
    assert set(row["site_scores"]) == {"one"}

    def forbidden(*arguments: object, **named: object) -> None:
        raise AssertionError("a finished run was run again")

    monkeypatch.setattr(alone, "_train", forbidden)
    assert alone.run_alone(experiment, "local-only-linear", out=out, epsilon=math.inf, **SETTINGS) == row


def test_every_site_carries_the_whole_noise(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standard deviation of what is added in a step: C·√T/μ(ε), whatever the number of sites."""
    drawn: list[float] = []

    def train(
        task: Any, start: Any, units: Any, *, steps: int, privatise: Any, max_grad_norm: float, **rest: Any
    ) -> Any:
        assert steps == 20
        drawn.append(float(np.std(privatise(np.zeros(40_000), max_grad_norm))) / max_grad_norm)
        return {name: np.zeros(shape) for name, shape in task.spec.shapes.items()}

    monkeypatch.setattr(alone, "train_locally", train)
    out = open_results(tmp_path / "out")
    alone.run_alone(experiment, "local-only-linear", out=out, epsilon=2.0, **SETTINGS)
    expected = math.sqrt(20) / mu_for_epsilon(2.0, 1e-5)
    assert len(drawn) == 2
    # Seeded; the deviation of an estimate from 40,000 values is 0.35 %.
    assert drawn == pytest.approx([expected, expected], rel=0.02)


@pytest.mark.parametrize(
    ("name", "code"),
    [("local-only-prototypes", "FS-1010"), ("local-only-fedavg", "FS-1010"), ("local-only-nothing", "FS-1004")],
)
def test_what_takes_no_steps_alone_is_refused(experiment: Experiment, tmp_path: Path, name: str, code: str) -> None:
    with pytest.raises(ConfigError) as refused:
        alone.run_alone(experiment, name, out=open_results(tmp_path / "out"), epsilon=8.0, **SETTINGS)
    assert refused.value.code == code
