"""The comparison of last block and adapters runs as its page says, on next to nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from by_file import load

from fedsecure.config import FederationConfig
from fedsecure.config import load as load_file
from fedsecure.data.phantoms import write_federation


@pytest.mark.slow
def test_every_method_is_in_the_table_and_nothing_is_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load("benchmarks/last_block.py", monkeypatch)
    monkeypatch.setattr(bench, "TESTED", 2)
    how = {"seeds": 1, "trained": 1, "rounds": 1, "steps": 1}
    table = bench.measure(tmp_path / "out", epsilons=[8.0], **how)
    for method in bench.METHODS:
        assert f"| {method} | iid | local | 3 | 8 | 1 |" in table
    assert bench.measure(tmp_path / "out", epsilons=[8.0], **how) == table


@pytest.mark.slow
def test_slices_train_on_four_fifths_and_are_scored_on_a_tenth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load("benchmarks/last_block.py", monkeypatch)
    names = tuple(bench.SITES)[:4]
    write_federation(tmp_path / "scans", sites=names, per_class=5, test_per_class=1, seed=0)
    data = tmp_path / "data"
    for name in names:
        shutil.copytree(tmp_path / "scans" / name / "train", data / name)
    federation = load_file(bench.slices(tmp_path, data), FederationConfig)
    assert sorted(federation.sites) == sorted(names[:3])
    assert {(entry.max_units, entry.evaluation_units) for entry in federation.sites.values()} == {(16, 2)}
    rows = [(tmp_path / f"{names[0]}-{part}.csv").read_text().splitlines()[1:] for part in ("train", "test")]
    assert not set(rows[0]) & set(rows[1])
