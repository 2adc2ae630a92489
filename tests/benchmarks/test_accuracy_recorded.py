"""A table grows: recorded runs keep figures and date, and only what they lack is run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from by_file import load
from federation_world import write_features

from fedsecure.simulation.simulate import SimulationOptions, simulate

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("benchmarks/accuracy_tables.py", monkeypatch)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("benchmarks/accuracy_recorded.py", monkeypatch)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("benchmarks/accuracy_page.py", monkeypatch)


@pytest.fixture
def options(tmp_path: Path) -> SimulationOptions:
    write_features(tmp_path / "features.npz")
    return SimulationOptions(
        out=tmp_path / "first", features=tmp_path / "features.npz", sites=3, seeds=1, rounds=2, epsilons=(8.0,)
    )


def recorded(recording: ModuleType, page: ModuleType, rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Rows after their way through a CSV file beside a page."""
    page.keep(SimpleNamespace(slug="some", drawn=False), rows, folder=folder)
    found: list[dict[str, Any]] = recording.recorded_rows(folder, "some")
    return found


@pytest.mark.slow
def test_only_what_is_not_recorded_is_run(
    tables: ModuleType, recording: ModuleType, page: ModuleType, options: SimulationOptions, tmp_path: Path
) -> None:
    (ran,) = simulate(options, watch=lambda step: None)["rows"]
    old = {**ran, "accuracy": 0.125, "date": "2026-11-21", "cell": "of an earlier release"}
    rows = recorded(recording, page, [old], tmp_path / "page")
    part = tables.Federated(replace(options, out=tmp_path / "second", seeds=2))
    table = tables.Table("some", "", (part,)).growing(rows)
    done = simulate(part.options, watch=lambda step: None)
    assert (done["computed"], done["reused"]) == (1, 1)
    kept, new = table.finished()
    assert (kept["accuracy"], kept["date"], kept["cell"]) == (0.125, "2026-11-21", "of an earlier release")
    assert "date" not in new
    # Nothing of a row changes by being recorded, so that the file's old lines stay as they are.
    assert {name: kept[name] for name in ran if name not in ("accuracy", "cell", "class_counts", "no_privacy")} == {
        name: value for name, value in ran.items() if name not in ("accuracy", "cell", "class_counts", "no_privacy")
    }


@pytest.mark.parametrize(
    "other", [{"sites": 5}, {"rounds": 3}, {"seed": 1}, {"noise": "local"}, {"epsilon": 4.0}, {"method": "facmic"}]
)
def test_a_recorded_run_of_something_else_does_not_count(
    tables: ModuleType, options: SimulationOptions, other: dict[str, Any]
) -> None:
    same = {
        "method": "linear", "partition": "iid", "noise": "distributed", "sites": 3, "epsilon": 8.0, "seed": 0,
        "rounds": 2, "accuracy": 0.5,
    }  # fmt: skip
    part = tables.Federated(options)
    assert part.take([{**same, **other}]) is None
    assert part.finished() == []
    part.take([same])
    assert [row["accuracy"] for row in part.finished()] == [0.5]


@pytest.mark.slow
def test_a_finished_run_is_not_replaced_by_a_recorded_one(tables: ModuleType, options: SimulationOptions) -> None:
    (ran,) = simulate(options, watch=lambda step: None)["rows"]
    part = tables.Federated(options)
    part.take([{**ran, "accuracy": 0.125}])
    assert [row["accuracy"] for row in part.finished()] == [ran["accuracy"]]


def test_tables_that_share_a_run_keep_what_each_has_recorded(tables: ModuleType, options: SimulationOptions) -> None:
    same = {"method": "linear", "partition": "iid", "noise": "distributed", "epsilon": 8.0, "seed": 0, "rounds": 2}
    # Runs of three and of five sites have all other columns in common.
    rows = [[{**same, "sites": sites, "wall_seconds": seconds} for sites in (3, 5)] for seconds in (1.0, 2.0)]
    shared = tables.Federated(options)
    grown = [tables.Table("some", "", (shared,)).growing(found) for found in rows]
    assert [table.finished() for table in grown] == [found[:1] for found in rows]


def test_runs_of_a_process_of_its_own_are_taken_together_or_not_at_all(tables: ModuleType, tmp_path: Path) -> None:
    part = tables.Example({"--method": "linear,ridge", "--epsilon": "8,inf", "--seeds": "1"}, tmp_path / "out")
    rows = [
        {"method": method, "epsilon": epsilon, "seed": 0, "wall_seconds": 1.0}
        for method in ("linear", "other", "ridge")
        for epsilon in (8.0, float("inf"))
    ]
    assert part.cells == 4
    assert part.take(rows[1:]) is None
    whole = tables.Table("some", "", (part,)).growing(rows)
    assert whole.finished() == whole.parts[0].run(lambda step: None) == [*rows[:2], *rows[4:]]
    assert whole.cells == 4


def test_recorded_measurements_are_not_taken_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    work = load("benchmarks/accuracy_work.py", monkeypatch)
    pieces = [("as deployed", 1.0, 0), ("as deployed", 1.0, 1)]
    row = {"method": "facmic", "change": "as deployed", "epsilon": 1.0, "seed": 0, "accuracy": 0.25}
    work.take_work(tmp_path / "out", pieces, [row], key=lambda piece: f"fold-{piece[2]}")
    rows = work.work_off(
        tmp_path / "out", "facmic", pieces, key=lambda piece: f"fold-{piece[2]}", score=lambda piece: 0.75,
        watch=lambda step: None,
    )  # fmt: skip
    assert [found["accuracy"] for found in rows] == [0.25, 0.75]


def test_the_page_says_which_runs_are_of_which_day(page: ModuleType) -> None:
    assert page.dates([{"date": "2026-11-21"}]) == "2026-11-21"
    rows = [{"date": "2026-11-29"}, {"date": "2026-11-21"}, {"date": "2026-11-21"}]
    assert page.dates(rows) == "2026-11-21 (2 runs) and 2026-11-29 (1 run)"
    old, new = page.dated([{"date": "2026-11-21"}, {"seed": 0}])
    assert old["date"] == "2026-11-21"
    assert new["date"] > "2026-11-21"


@pytest.mark.slow
def test_growing_needs_a_page() -> None:
    command = [sys.executable, "-m", "benchmarks.accuracy", "--data", "nowhere", "--grow", "--list"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode != 0
    assert "--page" in done.stderr
