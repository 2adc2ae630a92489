"""A disk without room for the transcript: nothing is taken that is not in it, and no run ends for good over it."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from fedsecure.errors import EnvironmentProblem
from fedsecure.secagg.record import MAGIC, Kind
from fedsecure.secagg.verify import verify_transcript
from fedsecure.transport.memory import MemoryTransport
from fedsecure.wire import federation_pb2 as pb
from tests.federation_world import World


class Disk:
    """Full from the first write of a transcript on that is ``chosen``, until it is mended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, chosen: Callable[[bytes], bool]) -> None:
        self.full = False
        self.failed = 0
        self._chosen: Callable[[bytes], bool] | None = chosen
        opened = Path.open

        def open_(path: Path, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            file = opened(path, mode, *arguments, **named)
            return _Filling(self, file) if path.suffix == ".transcript" and mode != "rb" else file

        monkeypatch.setattr(Path, "open", open_)

    def write(self, file: Any, data: bytes) -> None:
        if self._chosen is not None and self._chosen(data):
            self.full, self._chosen = True, None
        if self.full:
            self.failed += 1
            file.write(data[: len(data) // 2])
            file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write(data)

    def mend(self) -> None:
        self.full = False


class _Filling:
    def __init__(self, disk: Disk, file: Any) -> None:
        self._disk, self._file = disk, file

    def __enter__(self) -> _Filling:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> None:
        self._disk.write(self._file, data)


def number(count: int, kind: Kind) -> Callable[[bytes], bool]:
    """Chooses the ``count``-th write that begins with a record of ``kind``."""
    seen = [0]

    def chosen(data: bytes) -> bool:
        seen[0] += data[0] == kind and not data.startswith(MAGIC)
        return seen[0] == count

    return chosen


def transcripts(world: World) -> list[Path]:
    return sorted(world.folder.glob("aggregator/runs/*/transcripts/*.transcript"))


# Of three sites: an evaluation with keys of its own, whose messages are 12; then a set-up, 6, and its round.
@pytest.mark.parametrize(
    ("count", "kind"),
    [
        (1, Kind.MESSAGE),
        pytest.param(3, Kind.MESSAGE, marks=pytest.mark.slow),
        pytest.param(12, Kind.MESSAGE, marks=pytest.mark.slow),
        pytest.param(18, Kind.MESSAGE, marks=pytest.mark.slow),
        (6, Kind.UPLOAD),
    ],
)
def test_a_message_that_finds_no_room_is_not_taken_and_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, kind: Kind
) -> None:
    disk = Disk(monkeypatch, number(count, kind))
    world = World(tmp_path, rounds=1, waits={"prepared_rounds": 2, "transcripts": True})
    core = world.start()

    class Patient(MemoryTransport):
        """Sends again what failed for want of room, as a site does whose call ended with FS-1718."""

        def send(self, message: pb.PhaseMessage) -> None:
            self._again(lambda: super(Patient, self).send(message))

        def upload(self, header: pb.UploadHeader, payload: memoryview) -> None:
            self._again(lambda: super(Patient, self).upload(header, payload))

        def _again(self, call: Callable[[], None]) -> None:
            with self._gate:
                try:
                    call()
                except EnvironmentProblem:
                    state = core.engine.account.state
                    with pytest.raises(EnvironmentProblem, match="FS-1802"):
                        call()
                    core.tick(time.monotonic())
                    assert core.failure is None
                    assert core.engine.account.state == state, "the phase waits for the disk"
                    disk.mend()
                    call()

    world.run(*(world.take_part(name, transport=Patient(core, name, world.gate)) for name in world.names))
    assert not world.errors
    assert disk.failed >= 2
    assert core.outcome is not None
    assert core.outcome["complete"]
    assert not any("aborted" in attempt for attempt in core.outcome["attempts"])
    assert len(transcripts(world)) == 4
    verdicts = [verify_transcript(file) for file in transcripts(world)]
    assert all(verdict.ok and verdict.finished for verdict in verdicts)


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(lambda data: data.startswith(MAGIC), marks=pytest.mark.slow),
        number(2, Kind.BROADCAST),
        pytest.param(number(1, Kind.SEAL), marks=pytest.mark.slow),
    ],
    ids=["beginning", "broadcast", "seal"],
)
def test_a_step_that_finds_no_room_ends_the_process_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: Callable[[bytes], bool]
) -> None:
    disk = Disk(monkeypatch, chosen)
    world = World(tmp_path, rounds=1, waits={"transcripts": True})
    core = world.start()
    world.run(*(world.take_part(name) for name in world.names))
    assert disk.failed
    assert core.failure is not None
    assert (core.failure.code, core.failure.final) == ("FS-1716", False)
    assert "FS-1802" in str(core.failure)
    disk.mend()
    world.errors.clear()
    core = world.start()
    world.run(*(world.take_part(name) for name in world.names))
    assert not world.errors
    assert core.outcome is not None
    assert core.outcome["complete"]
    summed = [one for one in core.outcome["attempts"] if "aborted" not in one]
    assert len(summed) == 3
    for one in summed:
        name = f"round-{one['round']:05d}-attempt-{one['attempt']}.transcript"
        (file,) = [path for path in transcripts(world) if path.name == name]
        assert verify_transcript(file).ok


def test_an_end_for_good_is_recorded_although_the_transcript_cannot_be_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch, number(1, Kind.SEAL))
    world = World(tmp_path, rounds=1, waits={"transcripts": True})
    core = world.start()

    class Last(MemoryTransport):
        """Its vector never comes; the operator stops the run instead."""

        def upload(self, header: pb.UploadHeader, payload: memoryview) -> None:
            with self._gate:
                core.obey("stop", time.monotonic())
                self._wake()

    world.run(
        *(world.take_part(name) for name in world.names[:2]),
        world.take_part(world.names[2], transport=Last(core, world.names[2], world.gate)),
    )
    assert disk.failed
    assert core.failure is not None
    assert core.failure.final
    assert core.outcome is not None
    assert core.outcome["code"] == core.failure.code == "FS-1734"
    assert {cast(Any, error).code for error in world.errors.values()} == {"FS-1709"}
