"""The benchmark of sums inside towers runs and prints what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_json_has_the_promised_keys_and_both_ways_agree() -> None:
    command = [sys.executable, "-m", "benchmarks.towers", "--json", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=True)
    result = json.loads(done.stdout)
    assert set(result["methods"]) == {"promptfl", "lora", "resnet8"}
    for row in result["methods"].values():
        assert row["held_units_per_second"] > 0
        assert row["ghost_units_per_second"] > 0
        assert row["apart"] < 1e-4
