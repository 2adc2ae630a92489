"""The benchmark of privacy prints what it promises, under the same settings for everything it compares."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEP_KEYS = {"plain_ms", "private_ms", "ratio", "opacus_hooks_ms", "opacus_ghost_ms", "vs_hooks", "vs_ghost"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """From the repository's root, since another package of the environment may be called benchmarks too."""
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
def test_the_json_has_the_promised_keys() -> None:
    done = run("-m", "benchmarks.privacy", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) == {"step", "step_linear", "sampler", "ledger", "epsilon", "about"}
    assert set(result["step"]) == {"b64", "b256", "b1024"}
    for figures in (*result["step"].values(), result["step_linear"]["b256"]):
        assert set(figures) >= STEP_KEYS
        assert all(value > 0 for value in figures.values())
        assert figures["ratio"] == pytest.approx(figures["private_ms"] / figures["plain_ms"])
        assert figures["vs_hooks"] == pytest.approx(figures["opacus_hooks_ms"] / figures["private_ms"])
        assert figures["vs_ghost"] == pytest.approx(figures["opacus_ghost_ms"] / figures["private_ms"])
    assert result["sampler"]["s_per_1e6"] > 0
    assert set(result["ledger"]) == {"reserve_ms", "commit_ms"}
    assert set(result["epsilon"]) == {"n3", "n5", "n10", "n20"}
    assert {"date", "machine", "versions", "environment", "seeds"} <= set(result["about"])


def test_local_noise_costs_more_the_more_sites_there_are() -> None:
    """Equal noise on the sum: n sites' own shares are each weaker by √n, so μ grows by √n."""
    program = """
import json
from benchmarks.privacy import local_against_distributed
from fedsecure.privacy.accounting import mu_for_epsilon
print(json.dumps({n: [*(mu_for_epsilon(e, 1e-5) for e in local_against_distributed(n).values())] for n in (1, 3, 20)}))
"""
    done = run("-c", program)
    assert done.stderr == ""
    for sites, (shared, own) in json.loads(done.stdout).items():
        assert own / shared == pytest.approx(int(sites) ** 0.5, rel=1e-6)
