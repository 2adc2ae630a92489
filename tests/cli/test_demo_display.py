"""What a demo says at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedsecure.cli.display import show_demo
from fedsecure.simulation.demo import DemoResult


@pytest.mark.parametrize(("source", "said"), [("phantoms", False), ("images", True), ("features", True)])
def test_whoever_brings_records_hears_that_the_demos_ledgers_do_not_last(
    capsys: pytest.CaptureFixture[str], source: str, said: bool
) -> None:
    summary: dict[str, Any] = {
        "accuracy": {"before": 0.5, "after": 0.6},
        "balanced_accuracy": {"before": 0.5, "after": 0.6},
        "delta": 1e-5,
        "sites": ["a"],
        "lost_sites": ["a"],
        "secagg": {"colluders": 1, "min_survivors": 3},
        "attempts": [],
        "source": source,
        "unit": "record",
        "adapter": "linear",
        "rounds": 3,
        "engine": "closed-form",
        "noise": "local",
        "processes": 5,
        "wall_seconds": 1.0,
        "page": "demo/report.html",
        "report": "demo/report.json",
        "adapter_file": "demo/adapter.safetensors",
        "evaluation_public": True,
        "epsilon": {},
        "epsilon_evaluation": {},
    }
    show_demo(DemoResult(summary, Path("report.json"), Path("report.html"), Path("adapter.safetensors")))
    last = capsys.readouterr().out.splitlines()[-1]
    assert ("each demo begins with an unspent budget" in last) == said
    assert ("demo/adapter.safetensors" in last) != said
