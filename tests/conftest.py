"""What all tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
# One thread a process: two workers on two cores, and no difference between machines.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The research data folder beside the repository; tests that need it are skipped where there is none."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("FEDSECURE_SHARED", root.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip("no research data beside the repository (set FEDSECURE_SHARED)")
    return folder
