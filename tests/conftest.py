"""What all tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))
# One thread a process: two workers on two cores, and no difference between machines.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Every run draws the same examples, and a slow machine is no failure; look for new ones with
# `pytest --hypothesis-profile explore`.
_PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeatable", _PATIENT, derandomize=True, database=None)
settings.register_profile("explore", _PATIENT)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow", action="store_true", help="simulate a million steps of faults: pytest tests/faults --slow"
    )


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The research data folder beside the repository; tests that need it are skipped where there is none."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("FEDSECURE_SHARED", root.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip("no research data beside the repository (set FEDSECURE_SHARED)")
    return folder
