"""``--log-format json``: stderr of ``serve`` and ``join`` is JSON, one object a line, the last error too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli.conftest import Command
from federation_world import World

from fedsecure.simulation.scaffold import to_toml

pytestmark = pytest.mark.usefixtures("log_state")


def federation(folder: Path) -> Path:
    world = World(folder, waits={"start_seconds": 0.5})
    file = folder / "federation.toml"
    config = world.start().config.model_copy(update={"listen": "127.0.0.1:0"})
    file.write_text(to_toml(config.model_dump(mode="json", exclude_none=True)))
    return file


def test_serve_speaks_json(tmp_path: Path, command: Command) -> None:
    ended = command("serve", "--config", federation(tmp_path), "--log-format", "json")
    assert ended.status == 1
    lines = [json.loads(line) for line in ended.err.splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    (listening,) = [line for line in lines if line.get("event") == "listening"]
    assert listening["message"].startswith("listening on 127.0.0.1:")
    assert len(listening["run"]) == 32
    assert [line["code"] for line in lines if line.get("event") == "run-ended"] == ["FS-1701"]
    assert (lines[-1]["level"], lines[-1]["code"]) == ("ERROR", "FS-1701")


def test_the_environment_chooses_too(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSECURE_LOG_FORMAT", "json")
    ended = command("join", "--config", tmp_path / "none.toml")
    assert ended.status == 1
    (line,) = map(json.loads, ended.err.splitlines())
    assert line["code"] == "FS-1001"
    monkeypatch.setenv("FEDSECURE_LOG_FORMAT", "xml")
    assert command("join", "--config", tmp_path / "none.toml").status == 2


def test_text_stays_as_it_is(tmp_path: Path, command: Command) -> None:
    assert command("join", "--config", tmp_path / "none.toml").error() == "FS-1001"
