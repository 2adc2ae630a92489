"""Genuine CLIP features with a strong prior: what the demo trains on them must not spoil zero-shot."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fedsecure.simulation.simulate import SimulationOptions, simulate


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.parametrize(("method", "epsilons"), [("linear", (1.0, 8.0)), ("facmic", (8.0,))])
def test_training_ends_at_most_one_standard_error_below_zero_shot(
    tmp_path: Path, shared_data: Path, method: str, epsilons: tuple[float, ...]
) -> None:
    """In the demo's federation: three sites, the 896 records of ``train``, the method's own rounds and rates."""
    options = SimulationOptions(
        features=shared_data / "caltech_clip_vitb32.npz",
        methods=(method,),
        sites=3,
        train=("train",),
        epsilons=epsilons,
        seeds=1,
        out=tmp_path,
    )
    rows = simulate(options, watch=lambda step: None)["rows"]
    assert tuple(row["epsilon"] for row in rows) == epsilons
    for row in rows:
        assert row["zero_shot"] == pytest.approx(0.9598, abs=5e-4)
        error = math.sqrt(row["zero_shot"] * (1 - row["zero_shot"]) / 1641)
        assert row["accuracy"] >= row["zero_shot"] - error
