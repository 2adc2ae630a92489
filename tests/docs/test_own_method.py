"""The manual's method of one's own is installed as it says, and measured beside the built-in ones."""

from __future__ import annotations

import csv
import tomllib
from pathlib import Path

import pytest
from docs_pages import blocks, page
from federation_world import write_features

from fedsecure.methods import registry
from fedsecure.simulation.simulate import SimulationOptions, simulate


def test_the_method_of_the_manual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page("simulation.md")
    (code,) = (block for block in blocks(text, "python") if block.name == "own_method.py")
    points = next(
        found["project"]["entry-points"]["fedsecure.methods"]
        for block in blocks(text, "toml")
        if "project" in (found := tomllib.loads(block.text))
    )
    site = tmp_path / "site"
    (site / "own_method-1.dist-info").mkdir(parents=True)
    (site / "own_method.py").write_text(code.text)
    (site / "own_method-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: own-method\nVersion: 1\n")
    lines = [f"{name} = {where}" for name, where in points.items()]
    (site / "own_method-1.dist-info" / "entry_points.txt").write_text("\n".join(["[fedsecure.methods]", *lines]))
    monkeypatch.syspath_prepend(site)
    registry._load.cache_clear()

    write_features(tmp_path / "features.npz")
    options = SimulationOptions(
        out=tmp_path / "out", methods=("linear", *points), features=tmp_path / "features.npz", sites=3,
        epsilons=(8.0,), seeds=1, rounds=2, partitions=("iid",), noises=("distributed",),
    )  # fmt: skip
    simulate(options, watch=lambda step: None)
    with (tmp_path / "out" / "results.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["method"] for row in rows] == ["linear", *points]
    adapters = {(tmp_path / "out" / "adapters" / f"{row['cell']}.safetensors").read_bytes() for row in rows}
    assert len(adapters) == 2
    registry._load.cache_clear()
