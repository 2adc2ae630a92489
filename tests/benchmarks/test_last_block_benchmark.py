"""The comparison of last block and adapters runs as its page says, on next to nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from by_file import load


@pytest.mark.slow
def test_every_method_is_in_the_table_and_nothing_is_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load("benchmarks/last_block.py", monkeypatch)
    monkeypatch.setattr(bench, "TESTED", 2)
    how = {"seeds": 1, "trained": 1, "rounds": 1, "steps": 1}
    table = bench.measure(tmp_path / "out", epsilons=[8.0], **how)
    for method in bench.METHODS:
        assert f"| {method} | iid | local | 3 | 8 | 1 |" in table
    assert bench.measure(tmp_path / "out", epsilons=[8.0], **how) == table
