"""What a demo writes before its processes start."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from federation_world import write_features

from fedsecure.cli.app import main
from fedsecure.config import FederationConfig, read_toml
from fedsecure.privacy.plan import PrivacyPlan
from fedsecure.simulation import demo
from fedsecure.simulation.demo import DemoOptions, run_demo
from fedsecure.simulation.scaffold import Layout


class NotStartedError(Exception):
    """In place of the processes."""


@pytest.fixture
def features(tmp_path: Path) -> Path:
    write_features(tmp_path / "features.npz", count=300)
    return tmp_path / "features.npz"


def test_the_aggregator_names_its_copy_of_the_feature_file(
    tmp_path: Path, features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[FederationConfig] = []

    def read(layout: Layout) -> None:
        found.append(FederationConfig.model_validate(read_toml(layout.federation)))
        raise NotStartedError

    monkeypatch.setattr(demo, "Processes", read)
    options = DemoOptions(tmp_path / "demo", adapter="clip2fl", rounds=3, features=features)
    with pytest.raises(NotStartedError):
        run_demo(options, watch=lambda _: None)
    assert [config.encoder_file for config in found] == [features.resolve()]


def test_the_plan_is_told_before_anything_is_written(tmp_path: Path, features: Path) -> None:
    told: list[PrivacyPlan] = []

    def planned(plan: PrivacyPlan) -> None:
        told.append(plan)
        assert not (tmp_path / "demo").exists()
        raise NotStartedError

    with pytest.raises(NotStartedError):
        run_demo(DemoOptions(tmp_path / "demo", rounds=3, features=features), watch=lambda _: None, planned=planned)
    assert [(plan.rounds, plan.units) for plan in told] == [(3, {f"site-{i}": 100 for i in (1, 2, 3)})]


@pytest.mark.parametrize("as_json", [False, True])
def test_the_plan_is_shown_before_the_processes_start_but_not_beside_json(
    tmp_path: Path,
    features: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    as_json: bool,
) -> None:
    shown: list[bool] = []

    def look(layout: Layout) -> None:
        shown.append("Privacy plan of this run" in capsys.readouterr().err)
        raise NotStartedError

    monkeypatch.setattr(demo, "Processes", look)
    arguments = ["fedsecure", "demo", "--features", features, "--out", tmp_path / "demo", *["--json"] * as_json]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    with pytest.raises(NotStartedError):
        main()
    assert shown == [not as_json]
