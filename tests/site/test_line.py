"""A site waits while the run moves; of the reasons for which it leaves, others hear those that tell of no record."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedsecure.errors import BudgetExceeded, ConfigError, DataError, FedsecureError, LedgerError, PrivacyError, RunError
from fedsecure.site.line import Line
from fedsecure.transport.memory import MemoryTransport
from fedsecure.wire import federation_pb2 as pb
from tests.federation_world import World

WORDS = {"expected": "another", "cure": "mend it"}


def heard(error: BaseException) -> list[str]:
    """What an aggregator hears from a site that is about to stop for that reason."""
    told: list[str] = []
    transport: Any = SimpleNamespace(
        beat=lambda request: told.append(request.leaving), join=lambda request: pb.JoinReply()
    )
    line = Line(transport, wait_seconds=1.0, progress=lambda moment: None)
    line.join(b"roster")
    line.say_why(error)
    return told


@pytest.mark.parametrize(
    "error",
    [
        DataError("FS-1110", "row 7 is not finite", **WORDS),
        DataError("FS-1113", "a patient without images", **WORDS),
        PrivacyError("FS-1207", "a sum that is not finite", **WORDS),
        PrivacyError("FS-1229", "3 patients in both sets", **WORDS),
        PrivacyError("FS-1243", "not finite", **WORDS),
        PrivacyError("FS-1246", "no patient ids", **WORDS),
        LedgerError("FS-1265", "none of the units of before", **WORDS),
        RunError("FS-1719", "ValueError", **WORDS),
        ValueError("row 7"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_reasons_about_records_are_not_told(error: BaseException) -> None:
    assert heard(error) == []


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("FS-1007", "no data to train on", **WORDS),
        BudgetExceeded("FS-1201", "ε = 9", **WORDS),
        PrivacyError("FS-1222", "too little noise", **WORDS),
        LedgerError("FS-1270", "the clock went back", **WORDS),
    ],
    ids=repr,
)
def test_reasons_from_settings_and_limits_are_told_as_a_code_only(error: FedsecureError) -> None:
    assert heard(error) == [error.code]


class Clock:
    """The time, as a site's line sees it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("fedsecure.site.line.time", SimpleNamespace(monotonic=lambda: self.now))


def waiting(clock: Clock, positions: list[str]) -> Line:
    """A line on which a wait of six seconds comes for each position, and then a question; ten are its patience."""
    left = [pb.Directive(wait=pb.Wait(reason=f"{i} s", position=at)) for i, at in enumerate(positions)]
    left.append(pb.Directive(sequence=1, ask=pb.Ask()))

    def following(request: pb.NextRequest) -> pb.Directive:
        clock.now += 6.0
        return left.pop(0)

    transport: Any = SimpleNamespace(next=following)
    return Line(transport, wait_seconds=10.0, progress=lambda moment: None)


def test_a_site_waits_for_as_long_as_the_run_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    line = waiting(clock, [f"{number}.0 masked" for number in range(20)])
    assert line.next(line.deadline()).HasField("ask")
    assert clock.now > 100.0


@pytest.mark.parametrize("positions", [[""] * 20, ["3.0 masked"] * 20], ids=["an older aggregator", "it stands still"])
def test_a_site_leaves_a_run_that_does_not_move(monkeypatch: pytest.MonkeyPatch, positions: list[str]) -> None:
    clock = Clock(monkeypatch)
    line = waiting(clock, positions)
    with pytest.raises(RunError, match="FS-1711"):
        line.next(line.deadline())
    assert clock.now <= 18.0


def test_a_site_that_only_evaluates_stays_through_a_long_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsecure.transport.memory._PATIENCE", 0.02)
    clock = Clock(monkeypatch)
    world = World(tmp_path, sites=4, rounds=4)
    last = world.settings.sites["site-4"].model_copy(update={"role": "evaluate", "max_units": 0})
    world.settings = world.settings.model_copy(update={"sites": {**world.settings.sites, "site-4": last}})
    core = world.start()
    told: set[int] = set()

    class Evaluator(MemoryTransport):
        """Where the run is at another place than before, six seconds have gone by."""

        position = ""

        def next(self, request: pb.NextRequest) -> pb.Directive:
            current = core.engine.account.round
            directive = super().next(request)
            position = directive.wait.position
            if position and position != self.position:
                self.position = position
                clock.now += 6.0
            if directive.HasField("wait") or current in (0, 5):
                with world.gate:
                    told.add(current)
                    world.gate.notify_all()
            return directive

    class Trainer(MemoryTransport):
        """No training round ends before the evaluating site was told of it."""

        def upload(self, header: pb.UploadHeader, payload: memoryview) -> None:
            with world.gate:
                current = core.engine.account.round
                assert world.gate.wait_for(lambda: current in told, 60.0)
            super().upload(header, payload)

    def take_part(name: str, kind: type[MemoryTransport], **changes: Any) -> Any:
        return world.take_part(name, transport=kind(core, name, world.gate), changes=changes)

    trainers = [take_part(name, Trainer, wait_seconds=1e9) for name in world.names[:3]]
    world.run(*trainers, take_part("site-4", Evaluator, wait_seconds=10.0, train=None))
    assert not world.errors
    assert core.outcome is not None
    assert core.outcome["complete"]
    assert {1, 2, 3, 4} <= told
    assert clock.now >= 24.0
