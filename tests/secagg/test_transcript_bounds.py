"""What a hostile file costs whoever checks it, and results that differ from site to site."""

from __future__ import annotations

from pathlib import Path

import pytest
from secagg_world import client_message, federation, server_message
from test_blame import SITES, Recorded, plus, shares_of

from fedsecure.errors import ProtocolError, RoundAborted
from fedsecure.secagg import recovery, transcript
from fedsecure.secagg.record import Kind, TranscriptRecorder, read_records
from fedsecure.secagg.verify import verify_transcript
from fedsecure.wire import secagg_pb2 as pb

Item = tuple[Kind, int, bytes]


def rewritten(run: Recorded, path: Path, *, change: dict[str, list[Item]]) -> Path:
    """The transcript with some broadcasts replaced (kind → records), sealed again by its aggregator."""
    path.write_bytes(run.transcript)
    f, out = federation(7), bytearray()
    recorder = TranscriptRecorder(out.extend, descriptor=run.descriptor, roster=f.roster)
    for record, _ in list(read_records(path))[2:-1]:
        kind = server_message(record.data).WhichOneof("kind") if record.kind is Kind.BROADCAST else None
        for item in change.get(str(kind), [(record.kind, record.site, record.data)]):
            recorder._add(*item)
    recorder.seal(lambda kind, body: transcript.sign(f.aggregator, kind, run.descriptor.ctx, body))
    path.write_bytes(out)
    return path


def other_sum(run: Recorded, result: bytes) -> bytes:
    """Another sum of the same round, signed by the aggregator like the first."""
    message = server_message(result)
    message.result.sum_hash = bytes(32)
    body = transcript.result_body(message.result.survivors, bytes(32))
    message.result.signature = transcript.sign(federation(7).aggregator, "result", run.descriptor.ctx, body)
    return message.SerializeToString()


def test_a_second_sum_for_one_site_alone_is_found(tmp_path: Path) -> None:
    run = Recorded()
    result = run.complete().result_message
    both = [(Kind.BROADCAST, 2, other_sum(run, result)), (Kind.BROADCAST, 0, result)]
    verdict = verify_transcript(rewritten(run, tmp_path / "t", change={"result": both}))
    assert [(f.code, f.authors) for f in verdict.findings] == [("FS-1383", ("aggregator",))]
    # Control: the same file with the one sum that all were sent is sound.
    assert verify_transcript(rewritten(run, tmp_path / "t", change={"result": both[1:]})).ok


@pytest.mark.parametrize("kind", ["advertisements", "survivor_list", "survivor_signatures", "result"])
def test_what_all_must_get_is_not_sent_to_one_alone(kind: str, tmp_path: Path) -> None:
    run = Recorded()
    run.complete()
    path = tmp_path / "t"
    path.write_bytes(run.transcript)
    sent = [r for r, _ in read_records(path) if r.kind is Kind.BROADCAST]
    (record,) = [r for r in sent if server_message(r.data).WhichOneof("kind") == kind]
    verdict = verify_transcript(rewritten(run, path, change={kind: [(Kind.BROADCAST, 2, record.data)]}))
    assert ("FS-1383", ("aggregator",)) in [(f.code, f.authors) for f in verdict.findings]


def test_a_vector_larger_than_its_round_is_not_read(tmp_path: Path) -> None:
    """A size from the file is believed only up to what the descriptor calls for."""
    run, out = Recorded(), bytearray()
    recorder = TranscriptRecorder(out.extend, descriptor=run.descriptor, roster=federation(7).roster)
    size = run.descriptor.length * run.descriptor.word_bytes
    recorder._add(Kind.PAYLOAD, 1, bytes(size))
    recorder.flush()
    (tmp_path / "t").write_bytes(out)
    assert len([record for record, _ in read_records(tmp_path / "t")]) == 3
    recorder._add(Kind.PAYLOAD, 1, bytes(size + 1))
    recorder.flush()
    (tmp_path / "t").write_bytes(out)
    with pytest.raises(ProtocolError, match=f"of kind {Kind.PAYLOAD.value} and {size + 1} bytes"):
        list(read_records(tmp_path / "t"))


def test_shares_that_cannot_be_told_apart_are_searched_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of seven lie about every secret, more than the protocol bears: 21 choices of 5 are tried for one."""
    run = Recorded()
    run.advertise().shares().masked().survivors()
    wrong: dict[str, dict[int, bytes]] = {}
    for owner in range(1, 8):
        right = shares_of(run, owner)
        for holder in (1, 2, 3):
            wrong.setdefault(SITES[holder - 1], {})[owner] = plus(right[holder], holder)
    with pytest.raises(RoundAborted, match="FS-1355"):
        run.answer(wrong=wrong)
    tried: list[object] = []
    honest = recovery.shamir.reconstruct

    def counting(shares: dict[int, bytes]) -> bytes | None:
        tried.append(shares)
        return honest(shares)

    monkeypatch.setattr(recovery.shamir, "reconstruct", counting)
    verdict = run.verdict(tmp_path)
    assert len(tried) == 21 + 6
    # Nobody is named alone, and every group holds a liar.
    liars = {SITES[0], SITES[1], SITES[2]}
    assert len(verdict.findings) == 7
    assert all(len(f.authors) > 1 and liars & set(f.authors) for f in verdict.findings)


@pytest.mark.parametrize("reported", [[2, 2], [2] * 3000, [8]])
def test_a_report_that_repeats_itself_is_refused(reported: list[int]) -> None:
    run = Recorded()
    run.advertise().shares()
    site = SITES[0]
    client = run.clients[site]
    client.receive_shares(run.broadcast["shares"][site])
    masked = client.mask(run.vectors[site])

    def header(of: list[int]) -> bytes:
        message = client_message(masked.header)
        message.masked_input.invalid_from[:] = of
        body = transcript.masked_body(message.masked_input)
        message.masked_input.signature = transcript.sign(
            federation(7).keys[site], "masked-input", run.descriptor.ctx, body
        )
        return message.SerializeToString()

    with pytest.raises(ProtocolError, match="FS-1321"):
        run.server.buffer(site, header(reported))
    assert run.server.receive_masked(site, header([2]), masked.payload)
    assert isinstance(client_message(header([2])).masked_input, pb.MaskedInputHeader)
