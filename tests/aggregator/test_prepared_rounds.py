"""Keys set up ahead: three messages a round, new keys after a restart, and the same sums as without."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from federation_world import World

from fedsecure.secagg.verify import verify_transcript
from fedsecure.transport.memory import MemoryTransport
from fedsecure.wire import federation_pb2 as pb


class Counting(MemoryTransport):
    """Counts what a site sends."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.calls: Counter[str] = Counter()

    def send(self, message: pb.PhaseMessage) -> None:
        self.calls["send"] += 1
        super().send(message)

    def upload(self, header: pb.UploadHeader, payload: memoryview) -> None:
        self.calls["upload"] += 1
        super().upload(header, payload)


@pytest.mark.slow
@pytest.mark.parametrize(("prepared", "set_ups"), [(0, 0), (4, 1), (2, 2), (3, 2)])
def test_a_prepared_round_takes_three_messages(tmp_path: Path, prepared: int, set_ups: int) -> None:
    world = World(tmp_path, rounds=4, waits={"prepared_rounds": prepared})
    world.start()
    transport = Counting(world.coordinator, "site-1", world.gate)
    world.run(world.take_part("site-1", transport=transport), *(world.take_part(n) for n in world.names[1:]))
    assert not world.errors
    evaluations, rounds = 2, world.rounds
    small = 2 if prepared else 4
    assert transport.calls == {"send": 4 * evaluations + small * rounds + 2 * set_ups, "upload": evaluations + rounds}


@pytest.mark.slow
def test_a_site_that_restarts_gets_new_keys_and_takes_part_again(tmp_path: Path) -> None:
    world = World(tmp_path, sites=5, rounds=24, waits={"prepared_rounds": 64})
    world.start()
    back = threading.Event()

    def leaves_and_returns() -> None:
        with world.client("site-2") as client:
            for number, query in enumerate(client.queries()):
                client.answer(query)
                if number == 4:
                    break
        with world.client("site-2") as client:
            back.set()
            client.run()

    def stays(name: str) -> None:
        with world.client(name) as client:
            for query in client.queries():
                # The run must not be over before the other one is back.
                assert query.round < 14 or back.wait(90)
                client.answer(query)

    world.run(leaves_and_returns, *(lambda n=n: stays(n) for n in world.names if n != "site-2"))
    assert not world.errors
    outcome = world.coordinator.outcome
    assert outcome is not None
    assert outcome["complete"]
    assert not [a for a in outcome["attempts"] if "aborted" in a]
    took_part = ["site-2" in a["survivors"] for a in outcome["attempts"]]
    assert took_part[0]
    assert took_part[-2], "in the last training round again"


def test_keys_that_no_round_used_are_wiped_with_the_session(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=2, waits={"prepared_rounds": 8})
    world.start()
    seeds: list[bytearray] = []

    def looks() -> None:
        with world.client("site-1") as client:
            client.run()
            (epoch,) = client._rounds.epochs._epochs.values()
            seeds.extend(slot.seed for slot in epoch._slots.values())
            assert len(seeds) == 6
            assert all(any(seed) for seed in seeds)
        assert epoch.slots_left == 0

    world.run(looks, *(world.take_part(name) for name in world.names[1:]))
    assert not world.errors
    assert not any(any(seed) for seed in seeds)


@pytest.mark.parametrize("prepared", [0, 2])
def test_recorded_rounds_verify_and_a_changed_byte_is_found(tmp_path: Path, prepared: int) -> None:
    world = World(tmp_path, rounds=3, waits={"prepared_rounds": prepared, "transcripts": True})
    world.start()
    world.run(*(world.take_part(name) for name in world.names))
    assert not world.errors
    files = sorted(tmp_path.glob("aggregator/runs/*/transcripts/*.transcript"))
    rounds, set_ups = files[:5], files[5:]
    assert [file.name[:6] for file in files] == ["round-"] * 5 + ["set-up"] * (2 if prepared else 0)
    verdicts = [verify_transcript(file) for file in files]
    assert all(verdict.ok and verdict.finished for verdict in verdicts)
    # Evaluations bring keys of their own.
    on_prepared = [hashlib.sha256(file.read_bytes()).digest() for file in set_ups]
    assert {verdict.set_up for verdict in verdicts} == {b"", *on_prepared}
    # Names of set-ups come from their contexts, so their order says nothing about the rounds they are for.
    resting = [file for file in set_ups if hashlib.sha256(file.read_bytes()).digest() == verdicts[2].set_up]
    assert len(resting) == (1 if prepared else 0)
    for number, altered in ((1, rounds[1]), *((2, file) for file in resting)):
        raw = bytearray(good := altered.read_bytes())
        raw[len(raw) // 2] ^= 1
        altered.write_bytes(bytes(raw))
        assert not verify_transcript(rounds[number]).ok
        altered.write_bytes(good)
        assert verify_transcript(rounds[number]).ok


@pytest.mark.slow
def test_a_restart_that_renews_the_keys_is_recorded(tmp_path: Path) -> None:
    waits = {"prepared_rounds": 64, "transcripts": True, "silence_seconds": 60.0}
    world = World(tmp_path, sites=5, rounds=40, waits=waits)
    world.start()
    back = threading.Event()

    class Patient(MemoryTransport):
        """Holds the run up, some rounds after the other site left, until it is back."""

        def next(self, request: pb.NextRequest) -> pb.Directive:
            if request.after >= 45:
                back.wait(90)
            return super().next(request)

    class Returning(MemoryTransport):
        def join(self, request: pb.JoinRequest) -> pb.JoinReply:
            reply = super().join(request)
            back.set()
            return reply

    def leaves_and_returns() -> None:
        with world.client("site-2") as client:
            for number, query in enumerate(client.queries()):
                client.answer(query)
                if number == 3:
                    break
        world.take_part("site-2", transport=Returning(world.coordinator, "site-2", world.gate))()

    patient = world.take_part("site-1", transport=Patient(world.coordinator, "site-1", world.gate))
    world.run(leaves_and_returns, patient, *(world.take_part(n) for n in world.names[2:]), seconds=120)
    assert not world.errors
    folder = next(iter(tmp_path.glob("aggregator/runs/*/transcripts")))
    verdicts = [verify_transcript(file) for file in sorted(folder.iterdir())]
    assert all(verdict.ok for verdict in verdicts), [verdict.lines() for verdict in verdicts if not verdict.ok]
    finished = [verdict for verdict in verdicts if verdict.slots and verdict.finished]
    assert len(finished) >= 2, "the keys were set up again"
    used = {verdict.set_up for verdict in verdicts if verdict.set_up}
    assert len(used) >= 2, "and used by later rounds"
