"""``fedsecure plan``: what is printed, and what is refused."""

from __future__ import annotations

import json

from cli.conftest import Command


def test_the_command_prints_table_reason_and_settings(command: Command) -> None:
    numbers = ("--sites", "3", "--units", "900", "--classes", "101", "--epsilon", "1")
    shown = command("plan", *numbers)
    assert shown.status == 0, shown.err
    (marked,) = [line for line in shown.out.splitlines() if line.startswith("→")]
    assert "linear" in marked
    assert "distributed" in marked
    assert 'name = "linear"' in shown.out
    ended = command("plan", *numbers, "--json")
    found = json.loads(ended.out)
    assert found["recommended"]["method"] == "linear"
    assert len(found["candidates"]) == 8
    assert found["delta"] == 1e-5
    large = command("plan", "--sites", "3", "--units", "200000", "--classes", "5", "--json")
    assert json.loads(large.out)["delta"] == 1e-7, "a tenth of one over the units, rounded down"
    refused = command("plan", "--sites", "3")
    assert refused.status == 1
    assert "FS-1015" in refused.err
