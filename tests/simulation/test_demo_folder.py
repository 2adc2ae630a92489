"""What a demo writes before its processes start."""

from __future__ import annotations

from pathlib import Path

import pytest
from federation_world import write_features

from fedsecure.config import FederationConfig, read_toml
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
