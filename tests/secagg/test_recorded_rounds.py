"""Transcripts of rounds whose keys were set up before, and of rounds on a sparse graph."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from epoch_world import EpochWorld, SlotRun
from secagg_world import Run, client_message, federation, make_descriptor

from fedsecure.errors import ProtocolError
from fedsecure.secagg import transcript
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.epoch_descriptor import EpochDescriptor
from fedsecure.secagg.record import (
    Kind,
    Record,
    RecordingEpochServer,
    RecordingServer,
    TranscriptRecorder,
    file_name,
    read_records,
)
from fedsecure.secagg.server import Phase
from fedsecure.secagg.spool import MemorySpool
from fedsecure.secagg.thresholds import Mode
from fedsecure.secagg.verify import verify_transcript
from fedsecure.wire import secagg_pb2 as pb


class RecordedEpoch(EpochWorld):
    """An epoch that leaves its transcripts in ``folder``."""

    folder: Path

    def recorded(self, folder: Path) -> RecordedEpoch:
        f, self.folder = federation(self.n), folder
        self.server = RecordingEpochServer(
            self.descriptor,
            roster=f.roster,
            signing_key=f.aggregator,
            write=self.write(file_name(self.descriptor)),
            rounds=lambda descriptor: self.write(file_name(descriptor)),
            payloads=True,
        )
        return self

    def write(self, name: str) -> Callable[[bytes | memoryview], object]:
        def append(data: bytes | memoryview) -> None:
            with (self.folder / name).open("ab") as file:
                file.write(data)

        return append

    @property
    def set_up_file(self) -> Path:
        return self.folder / file_name(self.descriptor)


def rewrite(path: Path, n: int, ctx: bytes, edit: Callable[[Record], Record | None]) -> None:
    """Change records and let the aggregator seal the rest again."""
    f, out, records = federation(n), bytearray(), [record for record, _ in read_records(path)]
    parse = EpochDescriptor.parse if records[0].kind is Kind.EPOCH else RoundDescriptor.parse
    recorder = TranscriptRecorder(out.extend, descriptor=parse(records[0].data), roster=f.roster)
    for record in records[2:-1]:
        changed = edit(record)
        if changed is not None:
            recorder._add(changed.kind, changed.site, changed.data)
    recorder.seal(lambda kind, body: transcript.sign(f.aggregator, kind, ctx, body))
    path.write_bytes(out)


@pytest.mark.parametrize("mode", [Mode.ACTIVE, Mode.HBC])
def test_set_up_and_rounds_verify_with_drop_outs(mode: Mode, tmp_path: Path) -> None:
    world = RecordedEpoch(7, slots=3, mode=mode, drops={"advertise": ["site-00"], "shares": []}).recorded(tmp_path)
    world.set_up()
    first = world.round(0)
    SlotRun(world, first, absent=["site-03"]).masked().survivors().unmask().server.finish()
    second = world.round(1)
    SlotRun(world, second).masked().survivors().unmask().server.finish()
    keys = verify_transcript(world.set_up_file)
    assert keys.ok, keys.lines()
    assert (keys.finished, keys.slots, len(keys.survivors)) == (True, 3, 6)
    for descriptor, survivors in ((first, 5), (second, 6)):
        verdict = verify_transcript(tmp_path / file_name(descriptor), roster=federation(7).roster)
        assert verdict.ok, verdict.lines()
        assert (verdict.finished, verdict.sum_checked, len(verdict.survivors)) == (True, True, survivors)
        assert verdict.set_up == hashlib.sha256(world.set_up_file.read_bytes()).digest()
        assert verdict.checks["signatures"] > keys.checks["signatures"]


@pytest.fixture
def epoch(tmp_path: Path) -> tuple[RecordedEpoch, Path]:
    world = RecordedEpoch(5, slots=2).recorded(tmp_path)
    world.set_up()
    d = world.round(0)
    SlotRun(world, d, absent=["site-03"]).masked().survivors().unmask().server.finish()
    return world, tmp_path / file_name(d)


def test_a_round_is_not_verified_without_its_set_up(epoch: tuple[RecordedEpoch, Path]) -> None:
    world, file = epoch
    elsewhere = world.folder / "elsewhere"
    world.set_up_file.rename(elsewhere)
    with pytest.raises(ProtocolError, match="FS-1380"):
        verify_transcript(file)
    assert verify_transcript(file, set_up=elsewhere).ok
    with pytest.raises(ProtocolError, match="FS-1380"):
        verify_transcript(file, set_up=file)


def test_another_set_up_of_the_same_epoch_is_found(epoch: tuple[RecordedEpoch, Path]) -> None:
    """Sealed by the aggregator too, with one message left out."""
    world, file = epoch

    def without_one(record: Record) -> Record | None:
        return None if record.kind is Kind.BROADCAST and record.site == 2 else record

    rewrite(world.set_up_file, 5, world.descriptor.ctx, without_one)
    found = {(finding.code, finding.authors) for finding in verify_transcript(file).findings}
    assert {("FS-1382", ("aggregator",)), ("FS-1383", ("aggregator",))} == found


def test_keys_of_another_run_are_found(epoch: tuple[RecordedEpoch, Path], tmp_path: Path) -> None:
    _, file = epoch
    (tmp_path / "other").mkdir()
    other = RecordedEpoch(5, slots=2, epoch=9).recorded(tmp_path / "other")
    other.set_up()
    found = {(finding.code, finding.authors) for finding in verify_transcript(file, set_up=other.set_up_file).findings}
    assert found == {("FS-1382", ("aggregator",)), ("FS-1357", ("aggregator",))}


def test_every_bit_of_both_files_counts(epoch: tuple[RecordedEpoch, Path]) -> None:
    world, file = epoch
    for altered in (file, world.set_up_file):
        good = altered.read_bytes()
        for position in range(0, len(good), max(1, len(good) // 60)):
            altered.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
            try:
                assert not verify_transcript(file).ok, position
            except ProtocolError:
                continue
        altered.write_bytes(good)
    assert verify_transcript(file).ok


def test_a_wrong_share_in_a_prepared_round_names_holder_or_dealer(tmp_path: Path) -> None:
    world = RecordedEpoch(5, slots=2).recorded(tmp_path)
    world.set_up()
    d = world.round(0, slot=1)
    run = SlotRun(world, d).masked().survivors()
    for site in run.live:
        message = client_message(run.clients[site].unmask(run.broadcast["survivors"][site]))
        if site == "site-04":
            message.unmask.seed_shares[1].share = bytes(33)
            body = transcript.unmask_body(message.unmask)
            message.unmask.signature = transcript.sign(federation(5).keys[site], "unmask", d.ctx, body)
        run.server.receive(site, message.SerializeToString())
    assert run.server.finish().bad_shares == (("site-04", "site-01"),)
    verdict = verify_transcript(tmp_path / file_name(d))
    assert [(f.code, f.authors) for f in verdict.findings] == [("FS-1384", ("site-04", "site-01"))]
    assert verdict.sum_checked


def test_a_set_up_that_fails_is_sealed_and_sound(tmp_path: Path) -> None:
    world = RecordedEpoch(5, slots=2, drops={"shares": ["site-00", "site-01"]}).recorded(tmp_path)
    with pytest.raises(ProtocolError, match="FS-1351"):
        world.set_up()
    verdict = verify_transcript(world.set_up_file)
    assert verdict.ok
    assert not verdict.finished
    assert "aborted without keys" in verdict.lines()[2]


@pytest.mark.slow
def test_a_round_on_a_sparse_graph_verifies_and_an_altered_neighbourhood_is_found(tmp_path: Path) -> None:
    n, out = 132, bytearray()
    f, d = federation(n), make_descriptor(132, mode=Mode.HBC, colluders=6, min_survivors=122)
    sites = d.cohort
    drops = {Phase.ADVERTISE: sites[:1], Phase.SHARES: sites[1:3], Phase.MASKED: sites[3:6], Phase.UNMASK: sites[6:7]}
    run = Run(d, drops)
    run.server = RecordingServer(
        d, roster=f.roster, signing_key=f.aggregator, spool=MemorySpool(), write=out.extend, payloads=True
    )
    run.complete()
    path = tmp_path / "t"
    path.write_bytes(out)
    verdict = verify_transcript(path)
    assert verdict.ok, verdict.lines()[-5:]
    assert verdict.sum_checked
    assert len(verdict.survivors) == n - 6

    def thinner(record: Record) -> Record:
        if record.kind is not Kind.BROADCAST or record.site != 40:
            return record
        message = pb.ServerMessage.FromString(record.data)
        message.routed_shares.headers.pop()
        return Record(record.kind, record.site, message.SerializeToString())

    rewrite(path, n, d.ctx, thinner)
    assert [(x.code, x.authors) for x in verify_transcript(path).findings] == [("FS-1383", ("aggregator",))]
