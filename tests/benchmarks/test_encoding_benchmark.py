"""The benchmark of encoding runs and prints what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_json_has_the_promised_keys() -> None:
    command = [sys.executable, "-m", "benchmarks.encoding", "--json", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=True)
    result = json.loads(done.stdout)
    assert result["images"] == 8
    assert result["images_per_second"]["ViT-B-32"] > 0
    assert result["images_per_processor_second"]["ViT-B-32"] > 0
    assert (result["images_per_second"]["ViT-L-14"] is None) == (result["device"] == "CPU")
