"""The example shows what it says: updates leak records, clipping and sums alone do not stop it, noise does."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import ModuleType

import pytest
from by_file import load


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load("examples/gradient_inversion.py", monkeypatch)
    monkeypatch.setattr(module, "BATCHES", (1, 16))
    return module


@pytest.mark.slow
def test_noise_stops_what_clipping_and_sums_do_not(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gradient_inversion.py", "--out", str(tmp_path), "--repeats", "1"])
    example.main()
    with (tmp_path / "table.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {(r["adapter"], r["protection"], r["batch"]): float(r["recovered"]) for r in rows}
    for protection in ("none", "clipping only", "secure sum of 3"):
        assert found["honest", protection, "1"] == 1.0
        assert found["imprint", protection, "16"] > 0.5
    for kind in ("honest", "imprint"):
        for batch in ("1", "16"):
            assert found[kind, "DP noise", batch] == 0.0
            assert found[kind, "secure sum of 3 + DP", batch] == 0.0
    assert (tmp_path / "recovered.png").stat().st_size > 10_000
    assert "honest adapter" in capsys.readouterr().out
