"""The benchmark of CLIP2FL's aggregator step runs and speaks JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_quick_runs_and_prints_json():
    # From the repository's root, since another package of the environment may be called benchmarks too.
    command = [sys.executable, "-W", "error", "-m", "benchmarks.clip2fl", "--quick", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for rows in ("diagonal", "full"):
        assert result[rows]["step_s"] >= result[rows]["matching_s"] > 0
