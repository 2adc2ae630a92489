"""A site that leaves and comes back during every set-up of keys does not keep the run from its questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_coordinator_sessions import Stage

from fedsecure.aggregator.rounds import SetUp
from fedsecure.identity.provision import load_identity
from fedsecure.secagg import ring
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.epoch import EpochClient
from fedsecure.secagg.epoch_descriptor import EpochDescriptor
from fedsecure.secagg.latch import MemoryLatch
from fedsecure.wire import federation_pb2 as pb


class SettingUp(Stage):
    """Follows directives by hand, from the first question on training: evaluations do not use prepared keys."""

    def __init__(self, folder: Path, *, sites: int) -> None:
        super().__init__(folder, sites=sites, rounds=8, waits={"prepared_rounds": 4, "silence_seconds": 1000.0})
        self.core.engine.progress = replace(self.core.engine.progress, stage="training")
        self.after: dict[str, int] = {}
        self.epochs: dict[str, EpochClient] = {}

    def directive(self, name: str) -> pb.Directive:
        found = self.poll(name, after=self.after.get(name, 0))
        assert found is not None
        self.after[name] = found.sequence
        return found

    def relay(self, name: str, phase: str) -> bytes:
        found = self.directive(name)
        while found.WhichOneof("kind") == "abort":  # of a set-up before
            found = self.directive(name)
        assert found.relay.phase == phase
        return found.relay.payload

    def say(self, name: str, ctx: bytes, payload: bytes) -> None:
        self.core.send(name, pb.PhaseMessage(session=self.tokens[name], ctx=ctx, payload=payload), self.now)

    def comes_back(self, name: str) -> None:
        self.core.beat(name, self.tokens[name], self.now, leaving="FS-1720")
        self.after.pop(name, None)
        self.join(name)
        self.core.tick(self.now)

    def begin_set_up(self, names: Sequence[str]) -> None:
        for name in names:
            found = self.directive(name)
            while found.WhichOneof("kind") != "prepare":
                assert found.WhichOneof("kind") in ("abort", "relay")
                found = self.directive(name)
            descriptor = EpochDescriptor.parse(found.prepare.descriptor)
            identity = load_identity(self.world.folder / "keys" / "sites" / name / "identity")
            self.epochs[name] = EpochClient(
                descriptor, site=name, signing_key=identity.signing_key, roster=identity.roster, latch=MemoryLatch()
            )
            self.say(name, descriptor.ctx, self.epochs[name].advertise())

    def share(self, name: str) -> None:
        epoch = self.epochs[name]
        self.say(name, epoch.descriptor.ctx, epoch.shares(self.relay(name, "shares")))

    def set_up(self, steady: Sequence[str], *, restless: str) -> None:
        """One whole set-up among the steady sites, in the middle of which the other one comes back."""
        self.begin_set_up(steady)
        self.comes_back(restless)
        for name in steady:
            self.share(name)
        for name in steady:
            self.epochs[name].receive_shares(self.relay(name, "done"))

    def round(self, names: Sequence[str]) -> None:
        """The attempt that these sites are asked for, to its sum."""
        clients = {}
        for name in names:
            descriptor = RoundDescriptor.parse(self.directive(name).ask.descriptor)
            clients[name] = self.epochs[name].round(descriptor)
            masked = clients[name].mask(np.zeros(descriptor.length, dtype=ring.word(descriptor.ring_bits)))
            header = pb.UploadHeader(session=self.tokens[name], ctx=descriptor.ctx, header=masked.header)
            self.core.upload(name, header, masked.payload, self.now)
        for name in names:
            self.say(name, descriptor.ctx, clients[name].sign_survivors(self.relay(name, "survivors")))
        for name in names:
            self.say(name, descriptor.ctx, clients[name].unmask(self.relay(name, "unmask")))
        for name in names:
            clients[name].finished(self.relay(name, "result"))

    def kinds(self, names: Sequence[str]) -> set[str | None]:
        """What these sites are told next; it stays there."""
        waiting = [self.poll(name, after=self.after.get(name, 0)) for name in names]
        return {directive.WhichOneof("kind") if directive else None for directive in waiting}


FIVE = ("site-1", "site-2", "site-3", "site-4", "site-5")
STEADY, RESTLESS = FIVE[:4], FIVE[4]


def test_a_site_that_comes_back_in_every_set_up_does_not_hold_up_the_run(tmp_path: Path) -> None:
    stage = SettingUp(tmp_path, sites=5)
    stage.all_join()
    for done in range(3):
        stage.set_up(STEADY, restless=RESTLESS)
        assert stage.kinds(STEADY) == {"ask"}, "the keys serve a question before others are set up"
        stage.round(STEADY)
        assert stage.core.engine.progress.state.step == done + 1
        # Who came meanwhile does not wait for longer than that: the next keys are set up with it.
        assert stage.kinds(FIVE) == {"prepare"}
    stage.begin_set_up(FIVE)
    for name in FIVE:
        stage.share(name)
    for name in FIVE:
        stage.epochs[name].receive_shares(stage.relay(name, "done"))
    for _ in range(4):  # all slots, once nobody is restless
        stage.round(FIVE)
    assert stage.core.engine.progress.state.step == 7
    assert not [attempt for attempt in stage.attempts if "aborted" in attempt]


def test_without_that_rule_nothing_is_ever_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The control for the test above.
    kept = SetUp.serves

    def whoever_came_first(self: SetUp, cohort: tuple[str, ...], present: dict[str, bytes]) -> bool:
        return set(present.values()) <= set(self._tokens.values()) and kept(self, cohort, present)

    monkeypatch.setattr(SetUp, "serves", whoever_came_first)
    stage = SettingUp(tmp_path, sites=5)
    stage.all_join()
    for number in range(6):
        assert stage.core.engine.epochs == number + 1
        stage.set_up(STEADY, restless=RESTLESS)
        assert stage.kinds(STEADY) == {"prepare"}
    assert stage.core.engine.progress.state.step == 0


def test_set_ups_that_leave_too_few_with_keys_come_to_an_end(tmp_path: Path) -> None:
    """Three sites can do without none: one that shares keys and is then another process ends the run, with its name."""
    stage = SettingUp(tmp_path, sites=3)
    stage.all_join()
    steady, restless = FIVE[:2], FIVE[2]
    for _ in range(stage.world.settings.rounds.max_attempts):
        assert stage.core.outcome is None
        stage.begin_set_up(FIVE[:3])
        stage.share(restless)
        stage.comes_back(restless)
        for name in steady:
            stage.share(name)
    assert len(stage.attempts) == stage.world.settings.rounds.max_attempts
    assert {attempt["code"] for attempt in stage.attempts} == {"FS-1363"}
    assert all("gone: site-3" in attempt["aborted"] for attempt in stage.attempts)
    assert stage.core.failure is not None
    assert stage.core.failure.code == "FS-1702"
    assert stage.kinds(steady) <= {"abort", "finished"}
