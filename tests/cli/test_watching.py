"""``fedsecure status`` and ``top``: a run seen from another process; a dead site and a dead aggregator too."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from cli.conftest import Command
from federation_world import World
from rich.console import Console

from fedsecure.aggregator.watching import STALE_SECONDS, Sight, look
from fedsecure.cli import watching
from fedsecure.cli.watched import view
from fedsecure.errors import RunError
from fedsecure.simulation.scaffold import to_toml


def started(folder: Path, **options: Any) -> tuple[World, Path]:
    """A federation whose aggregator has written its status once, and its federation.toml."""
    world = World(folder, **options)
    core = world.start()
    core.write_status(time.monotonic())
    file = folder / "federation.toml"
    file.write_text(to_toml(core.config.model_dump(mode="json", exclude_none=True)))
    return world, file


def test_a_run_that_waits_says_for_whom(tmp_path: Path, command: Command) -> None:
    world, file = started(tmp_path)
    with world.client("site-2"):
        world.coordinator.write_status(time.monotonic())
        shown = command("status", "--config", file)
    assert shown.status == 0
    assert world.coordinator.run.hex()[:8] in shown.out
    assert "waiting for site-1, site-3" in shown.out
    lines = {line.split()[0]: line for line in shown.out.splitlines() if line.strip().startswith("site-")}
    assert "yes" in lines["site-2"]
    assert "0 s ago" in lines["site-2"]
    assert "not seen yet" in lines["site-1"]
    told = json.loads(command("status", "--config", file, "--json").out)
    assert told["sites"] == {"site-1": False, "site-2": True, "site-3": False}
    assert not told["silent"]


def test_a_run_that_is_over(tmp_path: Path, command: Command) -> None:
    world, file = started(tmp_path, rounds=2)
    world.run(*(world.take_part(name) for name in world.names))
    world.coordinator.write_status(time.monotonic())
    for name in ("status", "top"):
        shown = command(name, "--config", file)
        assert shown.status == 0
        assert "complete" in shown.out
        assert "2 of 2 done" in shown.out
        assert shown.out.count("3 of 3") == 4, "evaluation before, two rounds, evaluation after"


def test_a_run_that_was_given_up(tmp_path: Path, command: Command) -> None:
    world, file = started(tmp_path)
    world.hurry()
    world.coordinator.write_status(time.monotonic())
    shown = command("status", "--config", file)
    assert shown.status == 1
    assert "given up" in shown.out
    assert "FS-1701" in shown.out


def test_an_aggregator_that_writes_no_more(tmp_path: Path, command: Command) -> None:
    _, file = started(tmp_path)
    (written,) = tmp_path.glob("aggregator/runs/*/status.json")
    assert command("status", "--config", file).status == 0
    then = time.time() - 10 * STALE_SECONDS
    os.utime(written, (then, then))
    shown = command("status", "--config", file)
    assert shown.status == 1
    assert "has not written" in shown.out


def test_top_looks_until_the_run_is_over(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    world, file = started(tmp_path)
    looks = 0

    def between(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 2:
            world.hurry()
        world.coordinator.write_status(time.monotonic())

    monkeypatch.setattr(watching.time, "sleep", between)
    shown = command("top", "--config", file)
    assert looks == 2
    assert "given up" in shown.out


def test_nothing_to_look_at(tmp_path: Path, command: Command) -> None:
    world, file = started(tmp_path)
    (written,) = tmp_path.glob("aggregator/runs/*/status.json")
    state = world.coordinator.config.state
    assert look(state, run=world.coordinator.run.hex()[:4]).status["stage"] == "before"
    for act in (lambda: look(tmp_path / "absent"), lambda: look(state, run="zz")):
        with pytest.raises(RunError, match="FS-1723"):
            act()
    for content in (b"", b"[]", b"{", b'{"stage": "x"}'):
        written.write_bytes(content)
        with pytest.raises(RunError, match="FS-1723"):
            look(state)
    shown = command("status", "--config", file)
    assert shown.status == 1
    assert "FS-1723" in shown.err


def picture(sites: int, *, gone: tuple[str, ...] = (), attempts: tuple[Any, ...] = (), **status: Any) -> str:
    names = [f"site-{i}" for i in range(1, sites + 1)]
    now = {
        "run": "ab" * 16,
        "stage": "training",
        "round": 7,
        "attempt": 1,
        "step": 6,
        "steps": 20,
        "phase": "masked",
        "sites": {name: name not in gone for name in names},
        "presence": {name: "300 s ago" if name in gone else "0 s ago" for name in names},
        "waiting": "masked of round 7: waiting for 1 of 6 sites: site-1 last heard 300 s ago",
        "outcome": None,
        **status,
    }
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(view(Sight(Path("."), now, attempts, 0.5)))
    return console.export_text()


def test_who_is_waited_for_is_marked_and_only_who_is() -> None:
    shown = picture(12, gone=("site-1",))
    marked = [line.split()[0] for line in shown.splitlines() if line.rstrip().endswith("waited for")]
    assert marked == ["site-1"], "and not site-10, site-11, site-12"
    assert "5 min ago" in shown
    assert "sites: 11 of 12 there" in shown
    assert "6 of 20 done" in shown


def test_a_thousand_sites_fit_a_screen_and_those_that_are_gone_are_on_it() -> None:
    shown = picture(1000, gone=("site-777", "site-12"))
    assert len(shown.splitlines()) < 50
    listed = [line.split()[0] for line in shown.splitlines() if line.strip().startswith("site-")]
    assert listed[:3] == ["site-12", "site-777", "site-1"]
    assert "and 976 more" in shown


def test_what_became_of_attempts_and_why() -> None:
    cohort = ["site-1", "site-2", "site-3"]
    shown = picture(
        3,
        attempts=(
            {"round": 1, "attempt": 0, "stage": "training", "cohort": cohort, "seconds": 1.0, "survivors": cohort},
            {"round": 2, "attempt": 0, "stage": "training", "cohort": cohort, "seconds": 60.0, "code": "FS-1352",
             "aborted": "FS-1352: 1 of 3 vectors came; missing: site-2, site-3"},
        ),
    )  # fmt: skip
    assert "aborted FS-1352" in shown
    assert "last abort: FS-1352: 1 of 3 vectors came; missing: site-2, site-3" in shown
    assert "3 of 3" in shown


def test_a_run_that_is_over_shows_what_it_came_to_and_no_presence() -> None:
    evaluations = {"before": {"accuracy": 0.5}, "after": {"accuracy": 0.752}}
    shown = picture(3, stage="over", outcome={"complete": True, "evaluations": evaluations})
    assert "75.2 %" in shown
    assert "heard" not in shown
