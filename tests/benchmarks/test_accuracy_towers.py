"""Methods inside the towers are measured on the division of images that everything else is measured on."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import pytest
from by_file import load

from fedsecure.simulation.folders import divide_folders


@pytest.fixture
def towers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("benchmarks/accuracy_towers.py", monkeypatch)


def test_scans_are_three_scanners_and_a_test_of_all(towers: ModuleType, tmp_path: Path) -> None:
    folder = towers.write_scans(tmp_path / "scans", per_class=5, test_per_class=2)
    division = divide_folders(folder)
    assert (tuple(division.train), division.test_site) == (towers.SCANNERS, "test")
    assert [len(rows) for rows in division.train.values()] == [16, 16, 16]
    names = division.sites["test"].record_ids
    assert [sum(scanner in name for name in names) for scanner in towers.SCANNERS] == [8, 8, 8]
    assert not division.overlap.shared()
    # A folder that is there stays as it is.
    assert towers.write_scans(folder, per_class=9) == folder
    assert len(list(folder.rglob("*.png"))) == 84


def test_nothing_is_written_where_only_finished_runs_are_wanted(towers: ModuleType, tmp_path: Path) -> None:
    part = towers.Towers(tmp_path / "scans", None, "promptfl", tmp_path / "out", (8.0, math.inf), 3)
    assert part.cells == 6
    assert part.finished() == []
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_is_scored_on_images_and_kept(towers: ModuleType, tmp_path: Path) -> None:
    scans = towers.write_scans(tmp_path / "scans", per_class=5, test_per_class=2)
    part = towers.Towers(scans, None, "promptfl", tmp_path / "out", (8.0,), 1, rounds=1)
    (row,) = part.run(lambda step: None)
    # The aggregator's own count of the same test records by the same adapter.
    assert row["accuracy raw"] == pytest.approx(row["accuracy"])
    assert {f"accuracy {scanner}" for scanner in towers.SCANNERS} <= set(row)
    assert part.finished() == [row]
