"""Whoever waits for images to be encoded sees how many are done a second: at a site, in a demo, in a simulation."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fedsecure.cli import progress, simulated
from fedsecure.client import Moment
from fedsecure.learning.encoding import Encoded
from fedsecure.simulation.processes import Processes, encoded_at
from fedsecure.simulation.simulate import Step, encoding_steps

LINE = "encoding scans: 640/1,474 images, 123/s"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal of 80 columns is sent."""
    sent = io.StringIO()
    console = Console(file=sent, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(progress, "err", console)
    monkeypatch.setattr(simulated, "err", console)
    return sent


def test_beside_the_bar_of_an_example(terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.2])
    monkeypatch.setattr("fedsecure.learning.encoding.time.monotonic", lambda: next(clock))
    with simulated.simulation_progress(live=True) as watch:
        show = encoding_steps(watch)
        for done in (0, 640):
            show("client_0", done, 1474)
    assert "encoding client_0" in terminal.getvalue()
    assert "640/1,474 images, 123/s" in terminal.getvalue()
    assert "0/1 runs" not in terminal.getvalue()


def test_two_sets_are_paced_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr("fedsecure.learning.encoding.time.monotonic", lambda: float(next(clock)))
    steps: list[Step] = []
    show = encoding_steps(steps.append)
    for name, done in (("a", 10), ("b", 0), ("a", 20), ("b", 40)):
        show(name, done, 100)
    assert [(step.what, step.round, step.note) for step in steps] == [
        ("encoding a", 20, "20/100 images, 5/s"),
        ("encoding b", 40, "40/100 images, 20/s"),
    ]


def test_beside_the_runs_of_a_simulation(terminal: io.StringIO) -> None:
    with simulated.simulation_progress(live=True) as watch:
        watch(Step(3, 9, "linear", note="encoding 640/1,474 images, 123/s"))
    assert "encoding 640/1,474 images, 123/s" in terminal.getvalue()


@pytest.mark.parametrize("live", [True, False])
def test_on_a_sites_own_terminal(terminal: io.StringIO, live: bool) -> None:
    with progress.join_progress(live=live) as watch:
        watch(Moment(LINE))
    assert LINE in terminal.getvalue()


def test_in_a_demo_the_sites_are_added_up(terminal: io.StringIO) -> None:
    status = {"stage": "training", "phase": "masked", "waiting": "x: waiting for 3 of 3 sites: a, b, c"}
    with progress.demo_progress(live=True) as watch:
        watch({**status, "encoding": "encoding 3 sites: 9/30 images, 5/s"})
    assert "encoding 3 sites: 9/30 images, 5/s" in terminal.getvalue()


def test_sites_that_are_done_or_do_something_else_are_not_added() -> None:
    done = Encoded("c", 10, 10, 99)
    half = Encoded("a", 3, 10, 2)
    assert encoded_at([str(half), "training: round 1 of 20", str(done), ""]) == "encoding a: 3/10 images, 2/s"
    two = encoded_at([str(half), str(Encoded("b", 1_000, 2_000, 40))])
    assert two == "encoding 2 sites: 1,003/2,010 images, 42/s"
    assert encoded_at([str(done), "joined scans"]) == ""


class Ends:
    """A process that is there for a moment and then ends well."""

    returncode = 0

    def __init__(self) -> None:
        self._answers = iter([None, 0])

    def poll(self) -> int | None:
        return next(self._answers, 0)

    def wait(self, timeout: float) -> None:
        pass


def test_a_demo_reads_its_sites_logs(tmp_path: Path) -> None:
    for name in ("coordinator", "site-1", "site-2"):
        (tmp_path / name).mkdir()
    run = tmp_path / "coordinator" / "state" / "runs" / "00"
    run.mkdir(parents=True)
    (run / "status.json").write_text(json.dumps({"stage": "training"}))
    (tmp_path / "site-1" / "log.txt").write_text("x" * 3000 + "\njoined scans\n" + LINE + "\n")
    (tmp_path / "site-2" / "log.txt").write_text("")
    layout: Any = SimpleNamespace(
        folder=tmp_path,
        federation=tmp_path / "coordinator" / "federation.toml",
        sites={name: tmp_path / name / "site.toml" for name in ("site-1", "site-2")},
    )
    processes = Processes(layout)
    processes._children = {name: Ends() for name in ("aggregator", "site-1", "site-2")}  # type: ignore[misc]
    told: list[Any] = []
    processes.watch(told.append)
    assert told[0]["encoding"] == LINE
    assert told[0]["lost"] == []
