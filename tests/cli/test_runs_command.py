"""``fedsecure runs``: what was run, why attempts ended, and what the operator wants."""

from __future__ import annotations

import json
import time
from pathlib import Path

from cli.conftest import Command
from federation_world import World

from fedsecure.simulation.scaffold import to_toml


def started(tmp_path: Path) -> tuple[World, Path]:
    world = World(tmp_path, rounds=2)
    config = world.start().config
    file = tmp_path / "federation.toml"
    file.write_text(to_toml(json.loads(config.model_dump_json(exclude_none=True))))
    return world, file


def test_a_run_is_listed_and_shown(tmp_path: Path, command: Command) -> None:
    world, file = started(tmp_path)
    world.run(*(world.take_part(name) for name in world.names))
    listed = command("runs", "list", "--config", file)
    assert listed.status == 0
    assert "complete" in listed.out
    run = world.coordinator.run.hex()
    assert run[:8] in listed.out
    shown = command("runs", "show", "--config", file, run[:5])
    assert shown.out.count("3 of 3") == 4
    raw = json.loads(command("runs", "show", "--config", file, "--json").out)
    assert raw["run"] == run
    assert [a["stage"] for a in raw["attempts"]] == ["before", "training", "training", "after"]
    assert raw["evaluations"]["after"]["accuracy"] > 0


def test_pause_resume_and_stop_are_what_the_aggregator_is_asked_for(tmp_path: Path, command: Command) -> None:
    world, file = started(tmp_path)
    core = world.coordinator
    for word, wanted in (("pause", "pause"), ("resume", "run"), ("stop", "stop")):
        assert command("runs", word, "--config", file).status == 0
        assert core.wanted() == wanted
    core.obey(core.wanted(), time.monotonic())
    assert core.outcome is not None
    assert core.outcome["code"] == "FS-1734"
    assert command("runs", "pause", "--config", file).error() == "FS-1733"


def test_no_such_run(tmp_path: Path, command: Command) -> None:
    _, file = started(tmp_path)
    assert command("runs", "show", "--config", file, "zz").error() == "FS-1733"
