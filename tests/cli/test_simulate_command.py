"""``fedsecure simulate`` as a command: what it prints."""

from __future__ import annotations

import json
from pathlib import Path

from cli.conftest import Command
from federation_world import write_features


def test_the_command_prints_json_that_others_can_read(tmp_path: Path, command: Command) -> None:
    features = tmp_path / "features.npz"
    write_features(features)
    arguments = ("--features", str(features), "--sites", "3", "--seeds", "1", "--rounds", "2", "--epsilon", "inf")
    ended = command("simulate", *arguments, "--out", str(tmp_path / "out"), "--json")
    assert ended.status == 0, ended.err

    def strange(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(ended.out, parse_constant=strange)
    assert found["summary"][0]["epsilon"] == "inf"
    shown = command("simulate", *arguments, "--out", str(tmp_path / "out"))
    assert "0 runs computed, 1 taken from before" in shown.out
    assert "site-1: 30 in all" in shown.out
    assert command("simulate", "--features", str(features), "--epsilon", "some").error() == "FS-1003"
