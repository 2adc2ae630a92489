"""The benchmark of secure aggregation prints what it promises, and the bytes on the wire keep their bound."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MASK_KEYS = {"ms", "aes_floor_ms", "of_floor", "flwr_ms", "vs_flwr"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """From the repository's root, since another package of the environment may be called benchmarks too."""
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter whose Flower takes half a second, it says."""
    path = tmp_path_factory.mktemp("flower") / "python"
    path.write_text("#!/bin/sh\necho ready\nwhile read line; do echo 0.5; done\n", encoding="ascii")
    path.chmod(0o755)
    return path


@pytest.mark.slow
def test_the_json_has_the_promised_keys(stub: Path) -> None:
    done = run("-m", "benchmarks.secagg", "--quick", "--json", "--flower", str(stub))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert set(result) == {"mask", "mask_two_workers", "server", "wire", "peak_rss_mb"}
    assert set(result["mask"]) == {"d1e6_k10", "d1e6_k50", "d1e7_k10"}
    for mask in result["mask"].values():
        assert set(mask) == MASK_KEYS
        assert mask["of_floor"] == pytest.approx(mask["aes_floor_ms"] / mask["ms"])
        assert mask["flwr_ms"] == 500
        assert mask["vs_flwr"] == pytest.approx(500 / mask["ms"])
    assert set(result["mask_two_workers"]) == {"d1e7_k10"}
    assert set(result["mask_two_workers"]["d1e7_k10"]) == {"speedup"}
    assert set(result["server"]) == {"n100_d1e6", "n500_d1e5"}
    for seconds in result["server"].values():
        assert list(seconds) == ["drop0_s", "drop10_s", "drop30_s"]
        assert all(value > 0 for value in seconds.values())
    assert 10 < result["peak_rss_mb"] < 1000
    assert set(result["wire"]) == {"n100_b32", "n100_b16"}


@pytest.mark.slow
def test_the_masks_alone(stub: Path) -> None:
    done = run("-m", "benchmarks.secagg", "--quick", "--masks", "--json", "--flower", str(stub))
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {"mask"}


@pytest.mark.slow
def test_a_hundred_sites_keep_the_bound_on_bytes() -> None:
    """What comes on top of the vector does not grow with it, so that a short vector shows it for long ones."""
    program = """
import json
from benchmarks.secagg_wire import measure
print(json.dumps(measure(100, (1000,), progress=lambda text: None)))
"""
    done = run("-c", program)
    assert done.stderr == ""
    ratios = json.loads(done.stdout)
    assert ratios["n100_b32"] - ratios["n100_b16"] == pytest.approx(0.5)
    extra = (ratios["n100_b32"] - 1) * 4 * 1000
    assert extra > 100 * (102 + 33)  # a sealed share for each peer, and one share of each
    for length in (526_336, 1_000_000):
        assert 1 + extra / (4 * length) <= 1.02
        assert 0.5 + extra / (4 * length) <= 0.52


def test_without_flower_its_figures_are_null() -> None:
    program = """
import json
from benchmarks.secagg_masks import measure
print(json.dumps(measure(100, 2, repeats=2, flower_repeats=1, python="false")))
"""
    done = run("-c", program)
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert set(result) == MASK_KEYS
    assert result["flwr_ms"] is None
    assert result["vs_flwr"] is None
    assert result["ms"] > 0


def test_a_missing_interpreter_is_named() -> None:
    done = run("-m", "benchmarks.secagg", "--quick", "--flower", "no-such-python")
    assert done.returncode == 2
    assert "'no-such-python' is no program" in done.stderr
