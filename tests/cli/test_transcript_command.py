"""``fedsecure transcript verify``: what it says of a recorded round, of an altered one and of a file that is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli.conftest import Command
from federation_world import World

from fedsecure.identity.provision import provision

GOLDEN = Path(__file__).resolve().parents[1] / "vectors" / "golden-n5-drop-masked.transcript"


def test_a_round_that_kept_the_rules(command: Command) -> None:
    told = command("transcript", "verify", GOLDEN)
    assert told.status == 0
    assert told.out.splitlines()[-1] == "the round kept the rules"
    assert "4 of 5 sites in the sum; finished" in told.out
    verdict = json.loads(command("transcript", "verify", GOLDEN, "--json").out)
    assert verdict["ok"]
    assert verdict["findings"] == []
    assert verdict["roster_hash"] in told.out
    for what in ("signatures", "contexts", "hashes", "broadcasts", "sums"):
        assert verdict["checks"][what] > 0


@pytest.mark.parametrize("part", [0.4, 0.6, 0.9])
def test_a_changed_byte_is_a_breach_with_a_name_and_status_1(command: Command, tmp_path: Path, part: float) -> None:
    raw = bytearray(GOLDEN.read_bytes())
    raw[int(part * len(raw))] ^= 1
    file = tmp_path / "altered.transcript"
    file.write_bytes(raw)
    told = command("transcript", "verify", file)
    assert told.status == 1
    assert "breach(es) of the rules" in told.out.splitlines()[-1]
    verdict = json.loads(command("transcript", "verify", file, "--json").out)
    assert not verdict["ok"]
    assert all(finding["authors"] for finding in verdict["findings"])
    assert {"FS-1382"} <= {finding["code"] for finding in verdict["findings"]}, "the seal no longer fits"


def test_a_file_that_is_no_transcript_is_one_error(command: Command, tmp_path: Path) -> None:
    short, other = tmp_path / "short", tmp_path / "other"
    short.write_bytes(GOLDEN.read_bytes()[:-1])
    other.write_bytes(b"PK\x03\x04")
    for file in (short, other, tmp_path / "nothing", tmp_path):
        assert command("transcript", "verify", file).error() == "FS-1380"


def test_a_roster_to_trust_and_the_set_up_by_name(command: Command, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    world = World(tmp_path / "own", rounds=1, waits={"transcripts": True, "prepared_rounds": 2})
    world.start()
    world.run(*(world.take_part(name) for name in world.names))
    assert not world.errors
    folder = next((tmp_path / "own" / "aggregator").rglob("transcripts"))
    (set_up,) = folder.glob("set-up-*.transcript")
    prepared = folder / "round-00001-attempt-0.transcript"
    assert command("transcript", "verify", prepared).status == 0
    roster = tmp_path / "own" / "keys" / "sites" / "site-1" / "identity" / "roster.json"
    moved = tmp_path / "moved"
    set_up.rename(moved)
    assert command("transcript", "verify", prepared).error() == "FS-1380"
    assert command("transcript", "verify", prepared, "--set-up", moved, "--roster", roster).status == 0
    provision(tmp_path / "other", federation="world", sites=dict.fromkeys(world.names, "train"), hosts=("localhost",))
    foreign = tmp_path / "other" / "sites" / "site-1" / "identity" / "roster.json"
    told = command("transcript", "verify", moved, "--roster", foreign)
    assert told.status == 1
    assert "FS-1337" in told.out
    own = roster.with_name("coordinator.pub")
    assert command("transcript", "verify", moved, "--roster", foreign, "--coordinator", own).error().startswith("FS-1")
