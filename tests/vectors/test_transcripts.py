"""Recorded rounds: a sound one passes, and whatever is wrong in one is found and names its author."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_vectors import GOLDEN, Replay, build, fixed, make_roster

from fedsecure.errors import FedsecureError, ProtocolError, RoundAborted
from fedsecure.secagg import shamir, transcript
from fedsecure.secagg.record import MAGIC, SEAL, Kind, Record, RecordingServer, TranscriptRecorder, read_records
from fedsecure.secagg.spool import MemorySpool
from fedsecure.secagg.verify import Verdict, verify_transcript
from fedsecure.wire import secagg_pb2 as pb

Edit = Callable[[Record], Record | None]


def recorded(replay: Replay, tmp_path: Path) -> Verdict:
    path = tmp_path / "round.transcript"
    path.write_bytes(replay.transcript)
    return verify_transcript(path, roster=replay.roster)


def rewrite(path: Path, edit: Edit, *, seal: bool = True) -> Path:
    """The golden transcript with records changed or left out, sealed again by its aggregator: a hostile recorder."""
    replay = Replay("n5-drop-masked")
    out = bytearray()
    recorder = TranscriptRecorder(out.extend, descriptor=replay.descriptor, roster=replay.roster)
    last = b""
    for record, _ in read_records(GOLDEN):
        if record.kind in (Kind.DESCRIPTOR, Kind.ROSTER):
            continue
        if record.kind is Kind.SEAL:
            last = record.data
            continue
        changed = edit(record)
        if changed is not None:
            recorder._add(changed.kind, changed.site, changed.data)
    if seal:
        recorder.seal(replay.server._party.sign)
    else:
        recorder.seal(lambda *_: last)
    path.write_bytes(out)
    return path


def found(verdict: Verdict) -> list[tuple[str, tuple[str, ...]]]:
    return [(finding.code, finding.authors) for finding in verdict.findings]


def test_the_golden_transcript() -> None:
    """n = 5, one site drops out before its upload; the sum is recomputed from the recorded vectors."""
    verdict = verify_transcript(GOLDEN, roster=make_roster(5))
    assert verdict.ok, verdict.lines()
    assert (verdict.finished, verdict.sum_checked) == (True, True)
    assert verdict.survivors == ("site-00", "site-01", "site-03", "site-04")
    assert (verdict.round, verdict.attempt) == (7, 1)
    # Ads, headers, uploads, survivor signatures, shares, the result and the seal.
    assert verdict.checks["signatures"] == 5 + 5 + 4 + 4 + 4 + 1 + 1
    assert verdict.checks["revealed shares"] == 4 * 5
    assert verdict.lines()[-1] == "the round kept the rules"
    assert verdict.to_dict()["ok"] is True


def test_the_golden_transcript_is_what_the_package_records() -> None:
    assert build("n5-drop-masked")[1] == GOLDEN.read_bytes()


@pytest.mark.parametrize(
    "name", ["n3", "n3-b16", "n3-hbc-drop-unmask", "n5-drop-shares", "n5-drop-survivors", "n5-drop-unmask"]
)
def test_honest_rounds_pass(name: str, tmp_path: Path) -> None:
    replay = Replay(name).run()
    replay.server.finish()
    verdict = recorded(replay, tmp_path)
    assert verdict.ok, verdict.lines()
    assert verdict.sum_checked


def test_without_vectors_everything_but_the_sum_is_checked(tmp_path: Path) -> None:
    path = rewrite(tmp_path / "t", lambda r: None if r.kind is Kind.PAYLOAD else r)
    verdict = verify_transcript(path)
    assert verdict.ok
    assert not verdict.sum_checked
    assert any("not recomputed" in line for line in verdict.lines())


def test_an_aborted_round_is_sealed_and_sound(tmp_path: Path) -> None:
    replay = Replay("n3")
    replay.drops = {"masked": ["site-01"]}
    with pytest.raises(RoundAborted):
        replay.run()
    verdict = recorded(replay, tmp_path)
    assert verdict.ok
    assert not verdict.finished
    assert "aborted without a sum" in verdict.lines()[2]


@pytest.mark.parametrize("set_up", [b"", bytes(32)], ids=["not named", "not there"])
def test_a_round_with_prepared_keys_is_not_verified_by_halves(set_up: bytes, tmp_path: Path) -> None:
    replay, out = Replay("n3"), bytearray()
    prepared = replace(replay.descriptor, epoch=bytes(32), slot=1)
    recorder = TranscriptRecorder(out.extend, descriptor=prepared, roster=replay.roster, set_up=set_up)
    recorder.seal(replay.server._party.sign)
    (tmp_path / "t").write_bytes(out)
    with pytest.raises(ProtocolError, match="FS-1380"):
        verify_transcript(tmp_path / "t")


def test_the_recorder_writes_vectors_only_where_asked() -> None:
    replay, out = Replay("n3"), bytearray()
    replay.server = RecordingServer(
        replay.descriptor,
        roster=replay.roster,
        signing_key=replay.keys["aggregator"],
        spool=MemorySpool(),
        write=out.extend,
    )
    replay.run().server.finish()
    for site in replay.descriptor.cohort:
        assert replay.messages["masked"][site][0] in out
        assert replay.messages["masked"][site][1] not in out


# --- damaged files -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_bit_flipped_after_the_seal_is_noticed(tmp_path: Path) -> None:
    """Every bit of the file, in strides: never an untyped error, never a clean verdict."""
    good = GOLDEN.read_bytes()
    path = tmp_path / "t"
    for position in range(0, len(good), 61):
        path.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        try:
            verdict = verify_transcript(path)
        except FedsecureError:
            continue
        assert not verdict.ok, position


@pytest.mark.parametrize("position", range(-64 - 13, -64))
def test_the_head_of_the_seal_counts_too(position: int, tmp_path: Path) -> None:
    """Kind, site and size of the last record, which no signature covers."""
    raw = bytearray(GOLDEN.read_bytes())
    raw[position] ^= 1
    (tmp_path / "t").write_bytes(raw)
    with pytest.raises(ProtocolError, match="FS-1380"):
        verify_transcript(tmp_path / "t")


@pytest.mark.parametrize("cut", [0, 1, len(MAGIC), 30, 500, 15_000, -1, -64, -77])
def test_truncated_files(cut: int, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(GOLDEN.read_bytes()[:cut])
    with pytest.raises(ProtocolError, match="FS-13[18]"):
        verify_transcript(tmp_path / "t")


def test_files_that_are_none(tmp_path: Path) -> None:
    path, good = tmp_path / "t", GOLDEN.read_bytes()
    with pytest.raises(ProtocolError, match="FS-1380"):
        verify_transcript(path)
    # A record that claims 2^60 bytes is refused before anything is read.
    huge = good[: len(MAGIC) + 4] + struct.pack(">BIQ", Kind.PAYLOAD, 1, 1 << 60)
    for raw in (b"", b"hello", huge, good + b"\0" * 13, good + good[len(MAGIC) + 4 :]):
        path.write_bytes(raw)
        with pytest.raises(ProtocolError, match="FS-1380"):
            verify_transcript(path)
    path.write_bytes(MAGIC + struct.pack(">I", 2) + good[len(MAGIC) + 4 :])
    with pytest.raises(ProtocolError, match="FS-1381"):
        verify_transcript(path)


def test_another_roster(tmp_path: Path) -> None:
    verdict = verify_transcript(GOLDEN, roster=make_roster(6))
    assert found(verdict) == [("FS-1337", ("aggregator",))]


def test_a_seal_of_someone_else(tmp_path: Path) -> None:
    path = rewrite(tmp_path / "t", lambda r: None if r.kind is Kind.PAYLOAD else r, seal=False)
    assert found(verify_transcript(path)) == [("FS-1382", ("aggregator",))]


# --- breaches by the aggregator, which seals whatever it likes ---------------------------------------------------


def on(kind: Kind, site: int, which: str, change: Callable[[pb.ClientMessage | pb.ServerMessage], None]) -> Edit:
    def edit(record: Record) -> Record:
        if (record.kind, record.site) != (kind, site):
            return record
        message = (pb.ServerMessage if kind is Kind.BROADCAST else pb.ClientMessage).FromString(record.data)
        if message.WhichOneof("kind") != which:
            return record
        change(message)
        return Record(kind, site, message.SerializeToString())

    return edit


def _alter_ciphertext(message: pb.ServerMessage) -> None:
    share = message.routed_shares.shares[0]
    share.ciphertext = share.ciphertext[:-1] + bytes([share.ciphertext[-1] ^ 1])


def _other_sum(message: pb.ServerMessage) -> None:
    message.result.sum_hash = bytes(32)
    replay = Replay("n5-drop-masked")
    body = transcript.result_body(message.result.survivors, bytes(32))
    message.result.signature = replay.server._party.sign("result", body)


HOST = ("aggregator",)
BREACHES: Mapping[str, tuple[Edit, str, tuple[str, ...]]] = {
    "an advertisement left out of the broadcast": (
        on(Kind.BROADCAST, 0, "advertisements", lambda m: m.advertisements.advertisements.pop()),
        "FS-1383",
        HOST,
    ),
    "a sealed share altered on its way": (on(Kind.BROADCAST, 1, "routed_shares", _alter_ciphertext), "FS-1383", HOST),
    "a survivor left out": (
        on(Kind.BROADCAST, 0, "survivor_list", lambda m: m.survivor_list.survivors.pop()),
        "FS-1383",
        HOST,
    ),
    "a survivor signature left out": (
        on(Kind.BROADCAST, 0, "survivor_signatures", lambda m: m.survivor_signatures.signatures.pop()),
        "FS-1383",
        HOST,
    ),
    "another sum": (on(Kind.BROADCAST, 0, "result", _other_sum), "FS-1386", HOST),
    "a result it did not sign": (
        on(Kind.BROADCAST, 0, "result", lambda m: setattr(m.result, "sum_hash", bytes(32))),
        "FS-1323",
        HOST,
    ),
    "a vector swapped": (
        lambda r: Record(r.kind, r.site, bytes(28)) if (r.kind, r.site) == (Kind.PAYLOAD, 2) else r,
        "FS-1329",
        HOST,
    ),
    "a phase left out": (
        lambda r: None if r.kind is Kind.BROADCAST and r.data[:1] == b"\x1a" else r,
        "FS-1383",
        HOST,
    ),
    "a message whose signature is wrong": (
        on(Kind.MESSAGE, 2, "unmask", lambda m: setattr(m.unmask, "signature", bytes(64))),
        "FS-1323",
        ("site-01", "aggregator"),
    ),
    "a commitment altered": (
        on(Kind.MESSAGE, 2, "share_keys", lambda m: setattr(m.share_keys.header, "seed_commitment", bytes(32))),
        "FS-1323",
        ("site-01", "aggregator"),
    ),
    "a message under another number": (
        lambda r: Record(r.kind, 3, r.data) if (r.kind, r.site) == (Kind.MESSAGE, 2) else r,
        "FS-1322",
        ("site-02", "aggregator"),
    ),
}


@pytest.mark.parametrize("name", BREACHES)
def test_breaches_are_found_and_named(name: str, tmp_path: Path) -> None:
    edit, code, authors = BREACHES[name]
    verdict = verify_transcript(rewrite(tmp_path / "t", edit))
    assert not verdict.ok
    assert (code, authors) in found(verdict), verdict.lines()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_hostile_recorder_seals_gives_a_verdict(data: st.DataObject, tmp_path: Path) -> None:
    """Records dropped, repeated, renumbered and bent, then sealed with the true key: a typed error or a verdict."""
    total = sum(1 for _ in read_records(GOLDEN)) - 3
    victims = data.draw(st.sets(st.integers(0, total - 1), min_size=1, max_size=3))
    how = data.draw(st.sampled_from(["drop", "bend", "renumber", "empty"]))
    place = data.draw(st.integers(0, 10**6))
    seen = iter(range(10**6))

    def edit(record: Record) -> Record | None:
        if next(seen) not in victims:
            return record
        if how == "drop":
            return None
        if how == "renumber":
            return Record(record.kind, place % 7, record.data)
        if how == "empty" or not record.data:
            return Record(record.kind, record.site, b"")
        raw = bytearray(record.data)
        raw[place % len(raw)] ^= 1 << (place % 8)
        return Record(record.kind, record.site, bytes(raw))

    path = rewrite(tmp_path / "t", edit)
    try:
        verdict = verify_transcript(path)
    except FedsecureError:
        return
    # All sites were honest: no finding is without the one who was not.
    assert all("aggregator" in finding.authors for finding in verdict.findings), verdict.lines()
    renumbered_to_itself = how == "renumber" and verdict.ok
    dropped_vector = how == "drop" and not verdict.sum_checked
    assert not verdict.ok or renumbered_to_itself or dropped_vector


# --- breaches by sites, which an honest aggregator records -------------------------------------------------------


def cipher_keys(replay: Replay, *sites: str) -> dict[str, bytes]:
    return {site: replay.drawn.log[site]["key"][0] for site in sites or replay.drawn.log}


def with_keys(replay: Replay, tmp_path: Path, *sites: str) -> list[tuple[str, tuple[str, ...]]]:
    path = tmp_path / "opened.transcript"
    path.write_bytes(replay.transcript)
    return found(verify_transcript(path, opened=cipher_keys(replay, *sites)))


def resign_unmask(replay: Replay, site: str, change: Callable[[pb.Unmask], None]) -> None:
    message = pb.ClientMessage.FromString(replay.messages["unmask"][site])
    change(message.unmask)
    body = transcript.unmask_body(message.unmask)
    message.unmask.signature = transcript.sign(replay.keys[site], "unmask", replay.descriptor.ctx, body)
    replay.messages["unmask"][site] = message.SerializeToString()


def test_a_holder_that_gives_away_a_wrong_share(tmp_path: Path) -> None:
    replay = Replay("n5-drop-shares")
    replay.drops = {}
    replay.run(before="unmask")
    replay.produce("unmask")

    def lie(message: pb.Unmask) -> None:
        message.seed_shares[1].share = bytes(33)

    resign_unmask(replay, "site-04", lie)
    replay.deliver("unmask")
    assert replay.server.finish().bad_shares == (("site-04", "site-01"),)
    verdict = recorded(replay, tmp_path)
    assert found(verdict) == [("FS-1384", ("site-04", "site-01"))]
    assert verdict.sum_checked
    # The dealer is cleared. The aggregator, which may have passed on another message of a dealer it is in league with,
    # is not: what a site received is signed by nobody.
    assert with_keys(replay, tmp_path, "site-01") == [("FS-1384", ("site-04", "aggregator"))]
    assert with_keys(replay, tmp_path, "site-04") == [("FS-1384", ("site-04", "aggregator"))]


def dishonest_dealer(monkeypatch: pytest.MonkeyPatch, replay: Replay, dealer: str, bad: int) -> None:
    """A site that deals one wrong share of its seed, and otherwise keeps to the protocol."""
    honest, client = shamir.share, replay.clients[dealer]

    def share(secret: bytes, threshold: int, *, points: list[int]) -> dict[int, bytes]:
        out = honest(secret, threshold, points=points)
        return {**out, bad: bytes(33)} if client._seed is not None and secret == bytes(client._seed) else out

    monkeypatch.setattr(shamir, "share", share)


def test_a_dealer_that_frames_a_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Live and in the transcript both are named, and by opened shares the dealer alone."""
    replay = Replay("n5-drop-shares")
    replay.drops = {}
    dishonest_dealer(monkeypatch, replay, "site-01", bad=5)
    replay.run()
    assert replay.server.finish().bad_shares == (("site-04", "site-01"),)
    assert found(recorded(replay, tmp_path)) == [("FS-1384", ("site-04", "site-01"))]
    assert with_keys(replay, tmp_path) == [("FS-1384", ("site-01",))]


def test_a_dealer_whose_shares_do_not_fit_its_commitment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedsecure.secagg import keys

    replay = Replay("n5-drop-shares")
    replay.drops = {}
    honest, client = keys.commit, replay.clients["site-02"]

    def commit(seed: bytes, *, ctx: bytes, index: int) -> bytes:
        mine = client._seed is not None and seed == bytes(client._seed)
        return fixed("no commitment") if mine else honest(seed, ctx=ctx, index=index)

    with monkeypatch.context() as patched:
        patched.setattr(keys, "commit", commit)
        replay.run()
    with pytest.raises(RoundAborted, match="FS-1355"):
        replay.server.finish()
    verdict = recorded(replay, tmp_path)
    assert not verdict.finished
    assert found(verdict) == [("FS-1387", ("site-02",))]  # it is named although nothing was published
    # Had the aggregator published a sum all the same, the dealer would be named, and the aggregator too.
    result = pb.RoundResult(context=replay.descriptor.ctx, survivors=[1, 2, 3, 4, 5], sum_hash=bytes(32))
    result.signature = replay.server._party.sign("result", transcript.result_body(result.survivors, bytes(32)))
    out = bytearray()
    recorder = TranscriptRecorder(out.extend, descriptor=replay.descriptor, roster=replay.roster)
    (tmp_path / "aborted").write_bytes(replay.transcript)
    for record, _ in read_records(tmp_path / "aborted"):
        if record.kind not in (Kind.DESCRIPTOR, Kind.ROSTER, Kind.SEAL):
            recorder._add(record.kind, record.site, record.data)
    recorder.broadcast({0: pb.ServerMessage(result=result).SerializeToString()})
    recorder.seal(replay.server._party.sign)
    (tmp_path / "forged").write_bytes(out)
    assert found(verify_transcript(tmp_path / "forged")) == [("FS-1387", ("site-02",))]


@pytest.mark.parametrize("liar", ["sender", "reporter"])
def test_a_sealed_share_that_does_not_open(liar: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = Replay("n5-drop-shares")
    replay.drops = {}
    replay.run(before="shares")
    if liar == "sender":
        sender = replay.clients["site-01"]
        seal = sender._seal
        monkeypatch.setattr(sender, "_seal", lambda j, s: bytes(102) if j == 4 else seal(j, s), raising=False)
    else:
        reporter = replay.clients["site-03"]
        unseal = reporter._unseal
        monkeypatch.setattr(reporter, "_unseal", lambda j, s: None if j == 2 else unseal(j, s), raising=False)
    for phase in ("shares", "masked", "survivors", "unmask"):
        replay.produce(phase)
        replay.deliver(phase)
    assert replay.server.finish().unopened == {"site-03": ("site-01",)}
    assert found(recorded(replay, tmp_path)) == [("FS-1385", ("site-03", "site-01", "aggregator"))]
    authors = ("site-01",) if liar == "sender" else ("site-03", "aggregator")
    assert with_keys(replay, tmp_path, "site-01") == [("FS-1385", authors)]
    assert with_keys(replay, tmp_path, "site-03") == [("FS-1385", authors)]


def test_opened_keys_must_be_those_of_the_attempt() -> None:
    for site in ("site-00", "nobody"):
        with pytest.raises(ProtocolError, match="FS-1389"):
            verify_transcript(GOLDEN, opened={site: bytes(range(32))})


def test_a_site_that_keeps_shares_back(tmp_path: Path) -> None:
    replay = Replay("n5-drop-shares")
    replay.drops = {}
    replay.run(before="unmask")
    replay.produce("unmask")
    resign_unmask(replay, "site-04", lambda message: message.seed_shares.pop())
    replay.deliver("unmask")
    replay.server.finish()
    assert found(recorded(replay, tmp_path)) == [("FS-1384", ("site-04",))]


def test_a_site_that_gives_away_both_kinds(tmp_path: Path) -> None:
    """The server refuses it; a server that does not is convicted together with the site by its own transcript."""
    replay = Replay("n5-drop-masked").run(before="unmask")
    replay.produce("unmask")
    resign_unmask(replay, "site-04", lambda message: message.mask_key_shares.add(owner=1, share=bytes(33)))
    with pytest.raises(ProtocolError, match="FS-1321"):
        replay.deliver("unmask")
    bad = replay.messages["unmask"]["site-04"]

    def edit(record: Record) -> Record:
        mine = record.kind is Kind.MESSAGE and record.site == 5
        is_unmask = mine and pb.ClientMessage.FromString(record.data).WhichOneof("kind") == "unmask"
        return Record(record.kind, record.site, bad) if is_unmask else record

    verdict = verify_transcript(rewrite(tmp_path / "t", edit))
    assert ("FS-1388", ("site-04",)) in found(verdict)


def test_the_seal_is_a_signature_of_its_own_type() -> None:
    """A signature over a transcript cannot pass for one over a result."""
    records = list(read_records(GOLDEN))
    seal, before = records[-1]
    replay = Replay("n5-drop-masked")
    assert hashlib.sha256(GOLDEN.read_bytes()[: -13 - 64]).digest() == before
    transcript.verify(
        replay.roster.aggregator_key,
        SEAL,
        ctx=replay.descriptor.ctx,
        body=before,
        signature=seal.data,
        who="aggregator",
    )
