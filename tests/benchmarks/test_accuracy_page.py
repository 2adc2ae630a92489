"""The page of results: means, paired intervals and places for tables; the benchmarks behind it run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from by_file import load

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("benchmarks/accuracy_page.py", monkeypatch)


def rows() -> list[dict[str, Any]]:
    scores = {("linear", 1.0): [0.60, 0.62, 0.61], ("facmic", 1.0): [0.58, 0.61, 0.58], ("linear", math.inf): [0.8]}
    return [
        {
            "method": method,
            "epsilon": epsilon,
            "seed": seed,
            "accuracy": accuracy,
            "wall_seconds": 3.0,
            "date": "2026-11-21",
        }
        for (method, epsilon), found in scores.items()
        for seed, accuracy in enumerate(found)
    ]


def table(**changes: Any) -> Any:
    facts = {
        "slug": "some",
        "label": ("method",),
        "pairs": (("facmic", "linear"),),
        "columns": None,
        "compared": (),
        "lines": None,
    }
    return SimpleNamespace(**{**facts, **changes})


def test_the_interval_is_students(page: ModuleType) -> None:
    # Mean 2, standard deviation 1, three values: half a width of 4.303/√3.
    assert page.interval([1.0, 2.0, 3.0]) == "+2.0 (−0.5 to +4.5)"
    assert page.interval([-1.5]) == "−1.5 (n = 1)"
    assert page.interval([]) == "–"


def test_a_line_a_method_and_differences_by_seed(page: ModuleType) -> None:
    lines = page.render(table(), rows()).splitlines()
    assert "seeds 0 to 2, 7 runs" in lines[1]
    assert lines[3] == "| test accuracy, % | ε = 1 | ε = ∞ |"
    assert lines[5] == "| linear head | 61.0 ± 1.0 | 80.0 (n = 1) |"
    assert lines[6] == "| attention module | 59.0 ± 1.7 | – |"
    # Differences −2, −1 and −3: the spread of the seeds, which both have in common, is not in it.
    assert lines[7] == "| attention module minus linear head, 95 % | −2.0 (−4.5 to +0.5) | – |"


def test_scores_side_by_side(page: ModuleType) -> None:
    given = [{**row, "other": 0.5} for row in rows()]
    lines = page.render(table(columns={"all": "accuracy", "own": "other", "none": "missing"}), given).splitlines()
    assert lines[5] == "| linear head | 1 | 61.0 ± 1.0 | 50.0 ± 0.0 | – | 3 |"


def test_scores_side_by_side_are_compared_by_seed_below(page: ModuleType) -> None:
    """Differences −2, −1 and −3 of one score, and of the other only at the seed where both have it."""
    given = [{**row, "own": 0.5 + (row["method"] == "facmic") / 4} for row in rows()]
    given = [{**row, "own": None} if row["seed"] else row for row in given]
    scores = {"all": "accuracy", "balanced": "accuracy", "own": "own"}
    lines = page.render(table(columns=scores, compared=("all", "own")), given).splitlines()
    assert lines[8:] == [
        "",
        "| difference by seed, 95 % | ε | all | own |",
        "|---|---|---|---|",
        "| attention module minus linear head | 1 | −2.0 (−4.5 to +0.5) | +25.0 (n = 1) |",
    ]
    assert "difference by seed" not in page.render(table(columns=scores, pairs=()), given)


def test_only_the_place_of_a_table_changes(page: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- begin a -->\nold\n<!-- end a -->\nafter\n", encoding="utf-8")
    for _ in range(2):
        page.update_page(file, {"a": "new\n", "b": "no place for it"})
        text = file.read_text(encoding="utf-8")
        assert text == "before\n<!-- begin a -->\n\nnew\n\n<!-- end a -->\nafter\n"


def run(*arguments: str) -> str:
    command = [sys.executable, "-W", "error", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_installed_method_can_be_measured() -> None:
    names = "linear,facmic,fedclip,bottleneck,fedfocal,probe,fedavg,fedprox,moon,prototypes,ridge"
    listed = run("-m", "benchmarks.accuracy", "--data", "nowhere", "--list", "--method", names)
    assert [line.split()[:2] for line in listed.splitlines()] == [
        ["ucf101-methods", "198"],
        ["caltech101-methods", "198"],
    ]


def test_finished_measurements_are_not_taken_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept = load("benchmarks/accuracy_work.py", monkeypatch)
    work = [("as deployed", 1.0, 0), ("as deployed", 1.0, 1), ("other", 1.0, 0), ("other", 1.0, 1)]
    taken: list[Any] = []

    def score(piece: Any) -> float:
        taken.append(piece)
        return 0.5 + 0.1 * (piece[0] == "other") + 0.01 * piece[2]

    def measured(pieces: Any) -> Any:
        return kept.work_off(
            tmp_path / "out", "linear", pieces, key=lambda p: f"{p[0]}-{p[2]}", score=score, watch=lambda step: None
        )

    measured(work[:3])
    rows = measured(work)
    assert taken == work
    assert kept.finished_work(tmp_path / "out", work, key=lambda p: f"{p[0]}-{p[2]}") == rows
    assert [row["accuracy"] for row in rows] == [0.5, 0.51, 0.6, 0.61]


@pytest.mark.slow
def test_every_table_of_the_page_has_a_place_there() -> None:
    listed = run("-m", "benchmarks.accuracy", "--data", "nowhere", "--list")
    page = (ROOT / "examples" / "results" / "facmic.md").read_text(encoding="utf-8")
    slugs = [line.split()[0] for line in listed.splitlines()]
    assert slugs == list(dict.fromkeys(slugs))
    for slug in slugs:
        assert f"<!-- begin {slug} -->\n" in page, slug
        assert f"<!-- end {slug} -->" in page, slug


@pytest.mark.slow
def test_a_whole_run_on_the_sizes_of_the_set_is_timed() -> None:
    found = json.loads(run("-m", "benchmarks.facmic", "--quick", "--json"))
    assert set(found) == {"linear", "facmic", "reference", "about"}
    for method in ("linear", "facmic"):
        assert 0 < found[method]["epsilon"] <= 8
        assert found[method]["seconds"] > 0
        assert found[method]["processor_seconds"] > 0
    # Two rounds of four bytes for each of the module's 526,336 values.
    assert found["facmic"]["megabytes_up"] >= 2 * 4 * 526_336 / 1e6
