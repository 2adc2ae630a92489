"""A hostile aggregator, a hostile site, a hostile network: each attack is refused with its typed error."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_world import (
    Run,
    client_message,
    edit,
    federation,
    make_client,
    make_descriptor,
    make_query,
    make_server,
    server_message,
)

from fedsecure.errors import ProtocolError, RoundAborted
from fedsecure.identity import keys as identity_keys
from fedsecure.secagg import transcript
from fedsecure.secagg.client import SecAggClient, State
from fedsecure.secagg.server import Phase, SecAggServer
from fedsecure.secagg.spool import FileSpool, MemorySpool
from fedsecure.wire import secagg_pb2 as pb

FIRST, SECOND, THIRD = "site-00", "site-01", "site-02"


def refused(code: str, act: Callable[[], object], client: SecAggClient | None = None) -> None:
    """``act`` raises ``code``; a client, where given, is out of the round for good and holds no secret."""
    with pytest.raises(ProtocolError, match=code):
        act()
    if client is not None:
        assert client.state is State.ABORTED
        assert client._seed is None
        assert client._shares == {}
        with pytest.raises(ProtocolError, match="FS-1320"):
            client.unmask(b"")


def resign(run: Run, site: str, kind: str, body: bytes) -> bytes:
    """A signature by a site that cheats."""
    return transcript.sign(federation(len(run.descriptor.cohort)).keys[site], kind, run.descriptor.ctx, body)


# --- R0 and R1: advertisements -------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_flipped_bit_of_the_advertisements_gets_through(data: st.DataObject) -> None:
    run = Run(make_descriptor(3)).advertise()
    raw = bytearray(run.broadcast["advertise"][FIRST])
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << (bit % 8)
    client = run.clients[FIRST]
    refused("FS-13", lambda: client.shares(bytes(raw)), client)
    run.clients[SECOND].shares(run.broadcast["advertise"][SECOND])


def test_key_substitution_by_the_aggregator() -> None:
    """The aggregator puts a key of its own in a peer's place, signed by nobody or by a site it controls."""
    own_key = X25519PrivateKey.generate().public_key().public_bytes_raw()

    def substitute(message: pb.ServerMessage) -> None:
        message.advertisements.advertisements[1].mask_key = own_key

    def sign_by_colluder(message: pb.ServerMessage) -> None:
        substitute(message)
        ad = message.advertisements.advertisements[1]
        ad.signature = resign(run, THIRD, "advertise", transcript.advertisement_body(ad))

    for change in (substitute, sign_by_colluder):
        run = Run(make_descriptor(3)).advertise()
        raw = edit(run.broadcast["advertise"][FIRST], change)
        refused("FS-1323", lambda run=run, raw=raw: run.clients[FIRST].shares(raw), run.clients[FIRST])


def test_own_advertisement_altered_by_someone_with_the_own_key() -> None:
    """Two processes with one identity: the own advertisement must be the very bytes sent."""
    run = Run(make_descriptor(3)).advertise()
    twin = client_message(make_client(run.descriptor, FIRST).advertise()).advertisement

    def swap(message: pb.ServerMessage) -> None:
        message.advertisements.advertisements[0].CopyFrom(twin)

    raw = edit(run.broadcast["advertise"][FIRST], swap)
    refused("FS-1326", lambda: run.clients[FIRST].shares(raw), run.clients[FIRST])


def test_own_advertisement_left_out() -> None:
    run = Run(make_descriptor(5)).advertise()

    def drop(message: pb.ServerMessage) -> None:
        del message.advertisements.advertisements[0]

    raw = edit(run.broadcast["advertise"][FIRST], drop)
    refused("FS-1326", lambda: run.clients[FIRST].shares(raw), run.clients[FIRST])


def test_repeated_strange_and_too_few_advertisements() -> None:
    def repeat(message: pb.ServerMessage) -> None:
        ads = message.advertisements.advertisements
        ads.add().CopyFrom(ads[1])

    def strange(message: pb.ServerMessage) -> None:
        message.advertisements.advertisements[1].index = 6

    def too_few(message: pb.ServerMessage) -> None:
        del message.advertisements.advertisements[3:]

    for code, change in (("FS-1321", repeat), ("FS-1321", strange), ("FS-1344", too_few)):
        run = Run(make_descriptor(5)).advertise()
        raw = edit(run.broadcast["advertise"][FIRST], change)
        refused(code, lambda run=run, raw=raw: run.clients[FIRST].shares(raw), run.clients[FIRST])


def test_a_site_that_copies_a_peers_key() -> None:
    """Validly signed, so only the comparison of all keys notices it: at the aggregator and at the sites."""
    run = Run(make_descriptor(3)).advertise()
    victim = server_message(run.broadcast["advertise"][FIRST]).advertisements.advertisements[0]
    copy = pb.Advertisement(index=3, cipher_key=victim.cipher_key, mask_key=victim.mask_key, signature=bytes(64))
    copy.signature = resign(run, THIRD, "advertise", transcript.advertisement_body(copy))

    def swap(message: pb.ServerMessage) -> None:
        message.advertisements.advertisements[2].CopyFrom(copy)

    raw = edit(run.broadcast["advertise"][FIRST], swap)
    refused("FS-1327", lambda: run.clients[FIRST].shares(raw), run.clients[FIRST])
    server = make_server(run.descriptor)
    assert server.receive(FIRST, run.sent["advertise", FIRST])
    bad = pb.ClientMessage(advertisement=copy).SerializeToString()
    refused("FS-1327", lambda: server.receive(THIRD, bad))
    assert server.receive(THIRD, run.sent["advertise", THIRD])


def test_a_key_of_low_order_never_reaches_the_sites() -> None:
    run = Run(make_descriptor(3))
    run.clients[FIRST].advertise()
    bad = pb.Advertisement(index=1, cipher_key=bytes(32), mask_key=b"\x01" + bytes(31), signature=bytes(64))
    bad.signature = resign(run, FIRST, "advertise", transcript.advertisement_body(bad))
    raw = pb.ClientMessage(advertisement=bad).SerializeToString()
    refused("FS-1327", lambda: run.server.receive(FIRST, raw))


def test_replay_from_another_attempt() -> None:
    old = Run(make_descriptor(3)).advertise().shares()
    new = Run(make_descriptor(3, query=make_query(3, attempt=1)))
    refused("FS-1323", lambda: new.server.receive(FIRST, old.sent["advertise", FIRST]))
    new.advertise()
    raw = old.broadcast["advertise"][FIRST]
    refused("FS-1323", lambda: new.clients[FIRST].shares(raw), new.clients[FIRST])
    new.clients[SECOND].shares(new.broadcast["advertise"][SECOND])
    raw = old.broadcast["shares"][SECOND]
    refused("FS-1323", lambda: new.clients[SECOND].receive_shares(raw), new.clients[SECOND])


def test_another_model_for_one_site() -> None:
    """Model inconsistency: the target's context differs, so its first message already fails everywhere else."""
    honest = Run(make_descriptor(3))
    other_query = make_query(3, inputs={"adapter": bytes(32)})
    target = make_client(make_descriptor(3, query=other_query), FIRST)
    message = target.advertise()
    refused("FS-1323", lambda: honest.server.receive(FIRST, message))


def test_split_views_of_the_advertisements() -> None:
    """The aggregator shows one site another U1; every peer sees it in that site's header."""
    run = Run(make_descriptor(5)).advertise()

    def without_last(message: pb.ServerMessage) -> None:
        del message.advertisements.advertisements[4]

    other_view = edit(run.broadcast["advertise"][FIRST], without_last)
    deviant = client_message(run.clients[FIRST].shares(other_view))
    refused("FS-1326", lambda: run.server.receive(FIRST, deviant.SerializeToString()))
    for site in run.descriptor.cohort[1:]:
        run._send(Phase.SHARES, site, run.clients[site].shares(run.broadcast["advertise"][site]))
    run._close(Phase.SHARES)

    def add_header(message: pb.ServerMessage) -> None:
        message.routed_shares.headers.add().CopyFrom(deviant.share_keys.header)

    raw = edit(run.broadcast["shares"][SECOND], add_header)
    refused("FS-1326", lambda: run.clients[SECOND].receive_shares(raw), run.clients[SECOND])


# --- R1 and R2: shares and masked vectors ---------------------------------------------------------------------


def test_damaged_and_swapped_shares_are_reported_and_not_fatal() -> None:
    run = Run(make_descriptor(5)).advertise().shares()

    def damage(message: pb.ServerMessage) -> None:
        share = message.routed_shares.shares[0]
        share.ciphertext = share.ciphertext[:-1] + bytes([share.ciphertext[-1] ^ 1])

    def replace_by_another(message: pb.ServerMessage) -> None:
        foreign = server_message(run.broadcast["shares"][THIRD]).routed_shares.shares[0]
        message.routed_shares.shares[0].ciphertext = foreign.ciphertext

    for site, change in ((FIRST, damage), (SECOND, replace_by_another)):
        run.broadcast["shares"][site] = edit(run.broadcast["shares"][site], change)
    run.masked().survivors().unmask()
    result = run.server.finish()
    assert result.unopened == {FIRST: (SECOND,), SECOND: (FIRST,)}
    np.testing.assert_array_equal(result.total, run.expected(run.descriptor.cohort))


def test_too_many_shares_that_do_not_open() -> None:
    run = Run(make_descriptor(5)).advertise().shares()

    def withhold(message: pb.ServerMessage) -> None:
        kept = [s for s in message.routed_shares.shares if s.sender != 5]
        del message.routed_shares.shares[:]
        message.routed_shares.shares.extend(kept)

    for site in (FIRST, SECOND):
        run.broadcast["shares"][site] = edit(run.broadcast["shares"][site], withhold)
    run.masked().survivors().unmask()
    assert run.server.waiting_for() == ()
    assert not run.server.can_close()
    refused("FS-1354", run.server.finish)
    assert run.server.phase is Phase.ABORTED


def test_headers_and_shares_out_of_place() -> None:
    def own_header(message: pb.ServerMessage) -> None:
        message.routed_shares.headers[0].seed_commitment = bytes(32)
        message.routed_shares.headers[0].signature = resign(
            run, FIRST, "shares", transcript.header_body(message.routed_shares.headers[0])
        )

    def peer_header(message: pb.ServerMessage) -> None:
        message.routed_shares.headers[1].seed_commitment = bytes(32)

    def too_few(message: pb.ServerMessage) -> None:
        del message.routed_shares.headers[3:]
        del message.routed_shares.shares[2:]

    def wrong_recipient(message: pb.ServerMessage) -> None:
        message.routed_shares.shares[0].recipient = 2

    def share_to_self(message: pb.ServerMessage) -> None:
        message.routed_shares.shares[0].sender = 1

    for code, change in (
        ("FS-1326", own_header),
        ("FS-1323", peer_header),
        ("FS-1344", too_few),
        ("FS-1321", wrong_recipient),
        ("FS-1321", share_to_self),
    ):
        run = Run(make_descriptor(5)).advertise().shares()
        client, raw = run.clients[FIRST], edit(run.broadcast["shares"][FIRST], change)
        refused(code, lambda client=client, raw=raw: client.receive_shares(raw), client)


@pytest.mark.parametrize("bad", [np.zeros(4, np.uint32), np.zeros(5, np.int64), np.zeros((1, 5), np.uint32)])
def test_vectors_of_another_form(bad: np.ndarray) -> None:
    run = Run(make_descriptor(3)).advertise().shares()
    run.clients[FIRST].receive_shares(run.broadcast["shares"][FIRST])
    refused("FS-1303", lambda: run.clients[FIRST].mask(bad), run.clients[FIRST])


def test_an_upload_counts_once() -> None:
    run = Run(make_descriptor(3)).advertise().shares().masked(close=False)
    for site, (header, payload) in run.uploads.items():
        assert run.server.buffer(site, header) is None
        assert run.server.receive_masked(site, header, payload) is False
    run._close(Phase.MASKED)
    assert run.server.receive_masked(FIRST, *run.uploads[FIRST]) is False
    run.survivors().unmask()
    np.testing.assert_array_equal(run.server.finish().total, run.expected(run.descriptor.cohort))


@pytest.mark.parametrize("spool", ["memory", "file"])
def test_broken_uploads_leave_no_trace_in_the_sum(spool: str, tmp_path: Path) -> None:
    run = Run(make_descriptor(3)).advertise().shares()
    run.server._spool = MemorySpool() if spool == "memory" else FileSpool(tmp_path / "spool")
    for site in run.descriptor.cohort:
        client = run.clients[site]
        client.receive_shares(run.broadcast["shares"][site])
        masked = client.mask(run.vectors[site])
        header, payload = masked.header, bytes(masked.payload)
        half = run.server.buffer(site, header)
        assert half is not None
        half[:7] = payload[:7]
        refused("FS-1329", lambda s=site, h=header, p=half: run.server.receive_masked(s, h, p))
        for bad in (b"", payload[:-1], payload + b"\0", bytes(len(payload)), payload[4:] + payload[:4]):
            refused("FS-1329", lambda s=site, h=header, p=bad: run.server.receive_masked(s, h, p))
        assert site in run.server.waiting_for()
        whole = run.server.buffer(site, header)
        assert whole is not None
        assert len(whole) == len(payload)
        whole[:] = payload
        assert run.server.receive_masked(site, header, whole)
    run._close(Phase.MASKED)
    run.survivors().unmask()
    np.testing.assert_array_equal(run.server.finish().total, run.expected(run.descriptor.cohort))


def test_a_spool_without_room(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    refused("FS-1349", lambda: FileSpool(tmp_path / "file").create(4))


def test_upload_headers_that_lie() -> None:
    run = Run(make_descriptor(3)).advertise().shares()
    client = run.clients[FIRST]
    client.receive_shares(run.broadcast["shares"][FIRST])
    masked = client.mask(run.vectors[FIRST])

    def lie(**fields: object) -> bytes:
        message = client_message(masked.header)
        for name, value in fields.items():
            setattr(message.masked_input, name, value)
        body = transcript.masked_body(message.masked_input)
        message.masked_input.signature = resign(run, FIRST, "masked-input", body)
        return message.SerializeToString()

    for code, raw in (
        ("FS-1326", lie(advertisements_hash=bytes(32))),
        ("FS-1326", lie(headers_hash=bytes(32))),
        ("FS-1329", lie(length=2**40)),
        ("FS-1329", lie(ring_bits=16)),
        ("FS-1322", lie(index=2)),
        ("FS-1329", lie(root=bytes(32))),
        ("FS-1321", masked.header[:-3]),
        ("FS-1321", run.sent["shares", FIRST]),
    ):
        refused(code, lambda raw=raw: run.server.receive_masked(FIRST, raw, masked.payload))
    refused("FS-1322", lambda: run.server.receive_masked(SECOND, masked.header, masked.payload))
    refused("FS-1322", lambda: run.server.receive_masked("site-99", masked.header, masked.payload))
    refused("FS-1321", lambda: run.server.receive(FIRST, masked.header))
    assert run.server.receive_masked(FIRST, masked.header, masked.payload)
    again = lie(root=bytes(32))
    refused("FS-1324", lambda: run.server.receive_masked(FIRST, again, masked.payload))


def test_a_late_upload_is_dropped_and_stays_hidden() -> None:
    """The classic: declare a site gone, open its pair masks, then accept its vector. Its self mask stays shut."""
    run = Run(make_descriptor(5)).advertise().shares()
    late = run.descriptor.cohort[4]
    run.clients[late].receive_shares(run.broadcast["shares"][late])
    masked = run.clients[late].mask(run.vectors[late])
    run.live.remove(late)
    run.masked().survivors().unmask()
    refused("FS-1325", lambda: run.server.receive_masked(late, masked.header, masked.payload))
    result = run.server.finish()
    np.testing.assert_array_equal(result.total, run.expected(run.descriptor.cohort[:4]))
    for (phase, _), raw in run.sent.items():
        if phase == "unmask":
            message = client_message(raw).unmask
            assert 5 not in {share.owner for share in message.seed_shares}
            assert {share.owner for share in message.mask_key_shares} == {5}


# --- R3 and R4: survivors and unmasking -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "survivors", [[], [1, 2, 3], [2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 1, 2, 3, 4], [2, 1, 3, 4], [0, 1, 2, 3, 4]]
)
def test_survivor_lists_that_break_a_bound(survivors: list[int]) -> None:
    run = Run(make_descriptor(5)).advertise().shares().masked()
    raw = pb.ServerMessage(survivor_list=pb.SurvivorList(survivors=survivors)).SerializeToString()
    refused("FS-1328", lambda: run.clients[FIRST].sign_survivors(raw), run.clients[FIRST])


def test_a_site_signs_one_survivor_set_ever() -> None:
    run = Run(make_descriptor(5)).advertise().shares().masked()
    client = run.clients[FIRST]
    other = pb.ServerMessage(survivor_list=pb.SurvivorList(survivors=[1, 2, 3, 4])).SerializeToString()
    client.sign_survivors(run.broadcast["masked"][FIRST])
    refused("FS-1320", lambda: client.sign_survivors(other))
    refused("FS-1320", lambda: client.sign_survivors(run.broadcast["masked"][FIRST]))
    assert client.state is State.SIGNED


def test_the_latch_alone_stops_a_second_signature() -> None:
    """Even a client whose state was rolled back in memory cannot sign or unmask twice."""
    run = Run(make_descriptor(3)).advertise().shares().masked().survivors()
    client = run.clients[FIRST]
    client._state = State.MASKED
    refused("FS-1346", lambda: client.sign_survivors(run.broadcast["masked"][FIRST]), client)
    run.live.remove(FIRST)
    run.unmask()
    client = run.clients[SECOND]
    client._state = State.SIGNED
    refused("FS-1346", lambda: client.unmask(run.broadcast["survivors"][SECOND]), client)


def test_split_views_of_the_survivors_open_nothing() -> None:
    """Half of the sites hear that the target dropped out, half that it did not: neither half reaches t."""
    run = Run(make_descriptor(5)).advertise().shares().masked()
    views = {True: [1, 2, 3, 4, 5], False: [1, 2, 3, 4]}
    signatures: dict[bool, list[pb.SurvivorSignature]] = {True: [], False: []}
    for k, site in enumerate(run.descriptor.cohort[:4]):
        message = pb.ServerMessage(survivor_list=pb.SurvivorList(survivors=views[k < 2]))
        raw = run.clients[site].sign_survivors(message.SerializeToString())
        signatures[k < 2].append(client_message(raw).survivor_signature)

    def gathered(items: list[pb.SurvivorSignature]) -> bytes:
        message = pb.SurvivorSignatures(signatures=items)
        return pb.ServerMessage(survivor_signatures=message).SerializeToString()

    both = signatures[True] + signatures[False]
    refused("FS-1328", lambda: run.clients[FIRST].unmask(gathered(signatures[True])), run.clients[FIRST])
    refused("FS-1323", lambda: run.clients[SECOND].unmask(gathered(both)), run.clients[SECOND])
    padded = gathered(signatures[False] * 2)
    refused("FS-1321", lambda: run.clients[THIRD].unmask(padded), run.clients[THIRD])


def test_a_site_whose_share_does_not_fit_is_named() -> None:
    run = Run(make_descriptor(5), drops={Phase.MASKED: set()})
    run.advertise().shares().masked().survivors()
    for site in run.descriptor.cohort:
        raw = run.clients[site].unmask(run.broadcast["survivors"][site])
        if site == SECOND:
            message = client_message(raw)
            for share in message.unmask.seed_shares:
                share.share = share.share[:-1] + bytes([share.share[-1] ^ 1])
            body = transcript.unmask_body(message.unmask)
            message.unmask.signature = resign(run, SECOND, "unmask", body)
            raw = message.SerializeToString()
        assert run.server.receive(site, raw)
    result = run.server.finish()
    dealers = run.descriptor.cohort
    assert set(result.bad_shares) == {(SECOND, dealer) if dealer != SECOND else (SECOND,) for dealer in dealers}
    np.testing.assert_array_equal(result.total, run.expected(run.descriptor.cohort))


def test_too_many_wrong_shares_end_the_round_without_a_sum() -> None:
    run = Run(make_descriptor(5)).advertise().shares().masked().survivors()
    for site in run.descriptor.cohort:
        message = client_message(run.clients[site].unmask(run.broadcast["survivors"][site]))
        if site in (FIRST, SECOND):
            message.unmask.seed_shares[2].share = bytes(33)
            body = transcript.unmask_body(message.unmask)
            message.unmask.signature = resign(run, site, "unmask", body)
        assert run.server.receive(site, message.SerializeToString())
    with pytest.raises(RoundAborted, match="FS-1355"):
        run.server.finish()
    assert run.server.phase is Phase.ABORTED
    assert not len(run.server._accumulator)


def test_the_server_takes_no_share_of_the_wrong_kind() -> None:
    run = Run(make_descriptor(3)).advertise().shares().masked().survivors()
    message = client_message(run.clients[FIRST].unmask(run.broadcast["survivors"][FIRST]))
    message.unmask.mask_key_shares.add(owner=2, share=bytes(33))
    message.unmask.signature = resign(run, FIRST, "unmask", transcript.unmask_body(message.unmask))
    refused("FS-1321", lambda: run.server.receive(FIRST, message.SerializeToString()))


def test_t_holders_can_open_a_site_and_fewer_cannot() -> None:
    """Positive control of the ledger: the shares that sites hold do open a victim, once t of them collude."""
    from fedsecure.secagg import shamir

    run = Run(make_descriptor(5)).advertise().shares()
    for site in run.descriptor.cohort:
        run.clients[site].receive_shares(run.broadcast["shares"][site])
    victim = 1
    secret = run.clients[FIRST]._mask_key.private_bytes_raw()
    held = {k: run.clients[s]._shares[victim][0] for k, s in enumerate(run.descriptor.cohort, start=1)}
    t = run.descriptor.threshold
    for holders in itertools.combinations(held, t):
        assert shamir.reconstruct({x: held[x] for x in holders}) == secret
    for holders in itertools.combinations(held, t - 1):
        assert shamir.reconstruct({x: held[x] for x in holders}) != secret


# --- the result ------------------------------------------------------------------------------------------------


def test_forged_results() -> None:
    def by_a_site(message: pb.ServerMessage) -> None:
        body = transcript.result_body(message.result.survivors, bytes(32))
        message.result.sum_hash = bytes(32)
        message.result.signature = resign(run, SECOND, "result", body)

    def other_sum(message: pb.ServerMessage) -> None:
        message.result.sum_hash = bytes(32)

    def other_survivors(message: pb.ServerMessage) -> None:
        message.result.survivors.pop()

    def other_round(message: pb.ServerMessage) -> None:
        message.result.context = bytes(32)

    for code, change in (
        ("FS-1323", by_a_site),
        ("FS-1323", other_sum),
        ("FS-1328", other_survivors),
        ("FS-1328", other_round),
    ):
        run = Run(make_descriptor(3))
        result = run.complete()
        client, raw = run.clients[FIRST], edit(result.result_message, change)
        refused(code, lambda client=client, raw=raw: client.finished(raw))
        assert run.clients[SECOND].finished(result.result_message)


# --- states, senders, repeats, sizes ---------------------------------------------------------------------------

STEPS = ("advertise", "shares", "receive_shares", "mask", "sign_survivors", "unmask", "finished")


def call(run: Run, step: str) -> None:
    client, b = run.clients[FIRST], {k: v[FIRST] for k, v in run.broadcast.items()}
    arguments = {
        "advertise": (),
        "shares": (b.get("advertise", b""),),
        "receive_shares": (b.get("shares", b""),),
        "mask": (run.vectors[FIRST],),
        "sign_survivors": (b.get("masked", b""),),
        "unmask": (b.get("survivors", b""),),
        "finished": (run.broadcast.get("result", {}).get(FIRST, b""),),
    }
    getattr(client, step)(*arguments[step])


@pytest.mark.parametrize("done", range(len(STEPS) + 1))
def test_every_call_out_of_turn_is_refused_and_changes_nothing(done: int) -> None:
    run = Run(make_descriptor(3))
    phases = [run.advertise, run.shares, None, run.masked, run.survivors, run.unmask]
    if done == 3:  # between receiving the shares and masking
        run.advertise().shares()
        run.clients[FIRST].receive_shares(run.broadcast["shares"][FIRST])
    else:
        for phase in phases[:done]:
            if phase is not None:
                phase()
        if done == 7:
            run.clients[FIRST].finished(run.server.finish().result_message)
    state = run.clients[FIRST].state
    assert state is list(State)[done]
    for k, step in enumerate(STEPS):
        if k != done:
            with pytest.raises(ProtocolError, match="FS-1320"):
                call(run, step)
            assert run.clients[FIRST].state is state


def test_an_aborted_site_answers_nothing() -> None:
    run = Run(make_descriptor(3)).advertise()
    run.clients[FIRST].abort()
    for step in STEPS:
        with pytest.raises(ProtocolError, match="FS-1320"):
            call(run, step)


PHASES = ("advertise", "shares", "survivors", "unmask")


def test_repeats_contradictions_and_foreign_senders() -> None:
    """For each small message: again → False; another one → FS-1324; another sender or a stranger → FS-1322."""
    run = Run(make_descriptor(3))
    steps = {"advertise": run.advertise, "shares": run.shares, "survivors": run.survivors, "unmask": run.unmask}
    probe = Run(make_descriptor(3))
    probe.complete()
    for phase in PHASES:
        if phase == "survivors":
            run.masked()
        foreign = probe.sent[phase, FIRST]
        refused("FS-1322", lambda raw=foreign: run.server.receive(SECOND, raw))
        refused("FS-1322", lambda raw=foreign: run.server.receive("site-99", raw))
        steps[phase]()
        raw = run.sent[phase, FIRST]
        assert run.server.receive(FIRST, raw) is False
        refused("FS-1324", lambda raw=foreign: run.server.receive(FIRST, raw))
    np.testing.assert_array_equal(run.server.finish().total, run.expected(run.descriptor.cohort))


def test_messages_before_and_after_their_phase() -> None:
    probe = Run(make_descriptor(5))
    probe.complete()
    early = make_server(probe.descriptor)
    for phase in ("shares", "survivors", "unmask"):
        refused("FS-1320", lambda raw=probe.sent[phase, FIRST]: early.receive(FIRST, raw))
    refused("FS-1320", lambda: early.receive_masked(FIRST, *probe.uploads[FIRST]))
    late = probe.descriptor.cohort[4]
    run = Run(probe.descriptor, drops={Phase.ADVERTISE: {late}})
    run.advertise()
    refused("FS-1325", lambda: run.server.receive(late, probe.sent["advertise", late]))
    refused("FS-1325", lambda: run.server.receive(late, probe.sent["shares", late]))
    run.shares()
    refused("FS-1325", lambda: run.server.receive(late, probe.sent["shares", late]))
    refused("FS-1325", lambda: run.server.receive_masked(late, *probe.uploads[late]))


def deliver(run: Run, phase: str, raw: bytes) -> object:
    client = run.clients[FIRST]
    if phase == "advertise":
        return client.shares(raw)
    if phase == "shares":
        return client.receive_shares(raw)
    if phase == "masked":
        return client.sign_survivors(raw)
    return client.unmask(raw)


PREPARE: dict[str, Callable[[Run], Run]] = {
    "advertise": lambda run: run.advertise(),
    "shares": lambda run: run.advertise().shares(),
    "masked": lambda run: run.advertise().shares().masked(),
    "survivors": lambda run: run.advertise().shares().masked().survivors(),
}


@settings(max_examples=80, deadline=None)
@given(
    phase=st.sampled_from(list(PREPARE)),
    kind=st.sampled_from(["truncate", "extend", "flip", "noise", "oversize", "other"]),
    data=st.data(),
)
def test_damaged_broadcasts_end_the_round_for_the_site(phase: str, kind: str, data: st.DataObject) -> None:
    """Only typed errors, whatever the bytes; and the site never sends anything after one."""
    run = PREPARE[phase](Run(make_descriptor(3)))
    good = run.broadcast[phase][FIRST]
    if kind == "truncate":
        raw = good[: data.draw(st.integers(0, len(good) - 1))]
    elif kind == "extend":
        raw = good + b"\xff"
    elif kind == "flip":
        bit = data.draw(st.integers(0, 8 * len(good) - 1))
        raw = bytes(b ^ (1 << (bit % 8)) if k == bit // 8 else b for k, b in enumerate(good))
    elif kind == "noise":
        raw = data.draw(st.binary(max_size=300))
    elif kind == "oversize":
        raw = good + bytes(transcript.size_limit(3))
    else:
        raw = run.broadcast[next(p for p in run.broadcast if p != phase)][FIRST] if phase != "advertise" else b""
    client = run.clients[FIRST]
    try:
        deliver(run, phase, raw)
    except ProtocolError:
        assert client.state is State.ABORTED
    else:
        # A damaged ciphertext is reported, not fatal; nothing else may pass.
        assert phase == "shares"
        assert client._invalid


@settings(max_examples=80, deadline=None)
@given(phase=st.sampled_from(PHASES), bit=st.integers(0, 10**6), cut=st.integers(0, 10**6))
def test_damaged_client_messages_change_nothing_at_the_server(phase: str, bit: int, cut: int) -> None:
    run = Run(make_descriptor(3))
    steps = {"advertise": [], "shares": [run.advertise], "survivors": [run.advertise, run.shares, run.masked]}
    steps["unmask"] = [*steps["survivors"], run.survivors]
    for step in steps[phase]:
        step()
    client = run.clients[FIRST]
    good = {
        "advertise": client.advertise,
        "shares": lambda: client.shares(run.broadcast["advertise"][FIRST]),
        "survivors": lambda: client.sign_survivors(run.broadcast["masked"][FIRST]),
        "unmask": lambda: client.unmask(run.broadcast["survivors"][FIRST]),
    }[phase]()
    bit %= 8 * len(good)
    bent = bytes(b ^ (1 << (bit % 8)) if k == bit // 8 else b for k, b in enumerate(good))
    for raw in (bent, good[: cut % len(good)], good + bytes(transcript.size_limit(3))):
        with pytest.raises(ProtocolError):
            run.server.receive(FIRST, raw)
        assert FIRST in run.server.waiting_for()
    assert run.server.receive(FIRST, good)


def test_wrong_keys_and_rosters_at_the_start() -> None:
    f, descriptor = federation(3), make_descriptor(3)
    latch = make_client(descriptor, FIRST)._latch
    start = {"site": FIRST, "signing_key": f.keys[FIRST], "roster": f.roster, "latch": latch}
    refused("FS-1343", lambda: SecAggClient(descriptor, **{**start, "signing_key": identity_keys.generate()}))
    refused("FS-1336", lambda: SecAggClient(descriptor, **{**start, "site": "site-03"}))
    refused("FS-1337", lambda: SecAggClient(descriptor, **{**start, "roster": replace(f.roster, version=2)}))
    host = {"roster": f.roster, "signing_key": f.aggregator, "spool": MemorySpool()}
    refused("FS-1343", lambda: SecAggServer(descriptor, **{**host, "signing_key": f.keys[FIRST]}))
    refused("FS-1337", lambda: SecAggServer(descriptor, **{**host, "roster": replace(f.roster, version=2)}))
    SecAggClient(descriptor, **start)
    SecAggServer(descriptor, **host)


def test_errors_name_no_secret() -> None:
    """What an error says can be logged or sent: no key, share or vector word in it."""
    run = Run(make_descriptor(3)).advertise()
    client = run.clients[FIRST]
    secrets = [client._mask_key.private_bytes_raw(), client._cipher_key.private_bytes_raw(), bytes(client._seed)]
    with pytest.raises(ProtocolError) as caught:
        client.shares(b"\x00garbage")
    assert not any(secret.hex() in str(caught.value) for secret in secrets)
