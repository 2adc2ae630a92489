"""The comparison of last block and adapters runs as its page says, on next to nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.last_block import METHODS, measure


@pytest.mark.slow
def test_every_method_is_in_the_table_and_nothing_is_run_twice(tmp_path: Path) -> None:
    how = {"seeds": 1, "trained": 1, "rounds": 1, "steps": 1}
    table = measure(tmp_path / "out", epsilons=[8.0], **how)  # type: ignore[arg-type]
    for method in METHODS:
        assert f"| {method} | iid | local | 3 | 8 | 1 |" in table
    assert measure(tmp_path / "out", epsilons=[8.0], **how) == table  # type: ignore[arg-type]
