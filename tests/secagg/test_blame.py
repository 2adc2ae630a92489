"""Who is named: of those that are, one at least has lied, whoever works together. The honest are never named alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from secagg_world import Run, client_message, edit, federation, make_descriptor

from fedsecure.secagg import recovery, shamir, transcript
from fedsecure.secagg.record import RecordingServer
from fedsecure.secagg.server import SecAggResult
from fedsecure.secagg.spool import MemorySpool
from fedsecure.secagg.verify import Verdict, verify_transcript
from fedsecure.wire import secagg_pb2 as pb

SITES = federation(7).sites  # n = 7: c = 2, t = 5
HOST = "aggregator"


class Recorded(Run):
    """A round whose transcript is kept, and whose cipher keys a test may open."""

    def __init__(self, n: int = 7) -> None:
        super().__init__(make_descriptor(n))
        f, self.transcript = federation(n), bytearray()
        self.server = RecordingServer(
            self.descriptor,
            roster=f.roster,
            signing_key=f.aggregator,
            spool=MemorySpool(),
            write=self.transcript.extend,
            payloads=True,
        )
        self.opened: dict[str, bytes] = {}

    def advertise(self) -> Recorded:
        super().advertise()
        for site, client in self.clients.items():
            assert isinstance(client._cipher_key, X25519PrivateKey)
            self.opened[site] = client._cipher_key.private_bytes_raw()
        return self

    def answer(self, *, wrong: dict[str, dict[int, bytes]] | None = None) -> SecAggResult:
        """R4 with other seed shares given away by some sites (owner → share), signed by them; then the sum."""
        for site in self.live:
            message = client_message(self.clients[site].unmask(self.broadcast["survivors"][site]))
            for share in message.unmask.seed_shares:
                share.share = (wrong or {}).get(site, {}).get(share.owner, share.share)
            body = transcript.unmask_body(message.unmask)
            key = federation(len(self.descriptor.cohort)).keys[site]
            message.unmask.signature = transcript.sign(key, "unmask", self.descriptor.ctx, body)
            assert self.server.receive(site, message.SerializeToString())
        return self.server.finish()

    def verdict(self, tmp_path: Path, *opened: str) -> Verdict:
        (tmp_path / "t").write_bytes(self.transcript)
        return verify_transcript(tmp_path / "t", opened={site: self.opened[site] for site in opened})


def named(verdict: Verdict) -> set[frozenset[str]]:
    return {frozenset(finding.authors) for finding in verdict.findings}


def shares_of(run: Recorded, owner: int) -> dict[int, bytes]:
    """What the holders have of a seed."""
    return {i: run.clients[site]._shares[owner][1] for i, site in enumerate(SITES, start=1)}


def plus(share: bytes, number: int) -> bytes:
    return ((shamir.element(share) + number) % shamir.PRIME).to_bytes(shamir.SHARE_BYTES, "big")


def test_two_holders_cannot_bend_a_polynomial_around_honest_ones(tmp_path: Path) -> None:
    """Sites 1 and 2 of the first t move their shares so that the secret stays what it is: 6 and 7 seem wrong."""
    run = Recorded()
    run.advertise().shares().masked().survivors()
    dealer, points, right = 4, tuple(range(1, 6)), shares_of(run, 4)
    first, second = shamir._weights(points, 0)[:2]
    moved = {1: plus(right[1], second), 2: plus(right[2], -first)}
    result = run.answer(wrong={SITES[i - 1]: {dealer: share} for i, share in moved.items()})
    np.testing.assert_array_equal(result.total, run.expected(SITES))
    liars = {SITES[0], SITES[1]}
    assert result.bad_shares
    assert all(liars & set(group) for group in result.bad_shares)
    verdict = run.verdict(tmp_path)
    assert verdict.findings
    assert all(liars & group for group in named(verdict))
    # Opened, both are named, each with the aggregator only.
    assert named(run.verdict(tmp_path, *SITES)) == {frozenset({site, HOST}) for site in liars}
    # Control: with no colluders to reckon with, the rule would have framed the honest.
    framed = recovery.suspects(dealer, {6, 7}, range(1, 8), threshold=5, colluders=0)
    assert framed == [(6, 4), (7, 4)]


@pytest.mark.parametrize("opened", [(), SITES])
def test_holders_that_agree_on_another_secret_do_not_frame_its_dealer(tmp_path: Path, opened: tuple[str, ...]) -> None:
    """t + 1 answers, two of them of liars who know the rest: all on one line that is not the dealer's."""
    run = Recorded()
    run.advertise().shares().masked().survivors()
    run.live = list(SITES[:6])
    right = shares_of(run, 4)
    honest = {i: right[i] for i in (3, 4, 5, 6)}
    line = {**honest, 1: plus(right[1], 1)}
    forged = {1: line[1], 2: shamir.interpolate(line, 2).to_bytes(shamir.SHARE_BYTES, "big")}
    with pytest.raises(Exception, match="FS-1355"):
        run.answer(wrong={SITES[i - 1]: {4: share} for i, share in forged.items()})
    verdict = run.verdict(tmp_path, *opened)
    assert verdict.findings
    assert all(group & {SITES[0], SITES[1]} for group in named(verdict))


def alter(message: pb.ServerMessage) -> None:
    share = next(share for share in message.routed_shares.shares if share.sender == 2)
    share.ciphertext = share.ciphertext[:-1] + bytes([share.ciphertext[-1] ^ 1])


@pytest.mark.parametrize("altered", [True, False])
def test_an_aggregator_that_alters_a_share_on_its_way_is_among_the_named(altered: bool, tmp_path: Path) -> None:
    """Recorded is what should have been sent; dealer and holder are honest."""
    run = Recorded()
    run.advertise().shares()
    if altered:
        run.broadcast["shares"][SITES[2]] = edit(run.broadcast["shares"][SITES[2]], alter)
    run.masked().survivors()
    result = run.answer()
    if not altered:
        assert run.verdict(tmp_path, *SITES).ok
        return
    assert result.unopened == {SITES[2]: (SITES[1],)}
    assert named(run.verdict(tmp_path)) == {frozenset({SITES[1], SITES[2], HOST})}
    for site in (SITES[1], SITES[2]):
        assert named(run.verdict(tmp_path, site)) == {frozenset({SITES[2], HOST})}


def test_a_dealer_in_league_with_the_aggregator_does_not_frame_a_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A good share is sealed for the record, another one is passed on: the holder gives away what it got."""
    run = Recorded()
    run.advertise()
    dealer, holder = run.clients[SITES[1]], 3
    seal, second = dealer._seal, list[bytes]()

    def twice(peer: int, shares: list[bytes]) -> bytes:
        if peer == holder:
            second.append(seal(peer, [shares[0], plus(shares[1], 1)]))
        return seal(peer, shares)

    monkeypatch.setattr(dealer, "_seal", twice)
    run.shares()

    def swap(message: pb.ServerMessage) -> None:
        next(share for share in message.routed_shares.shares if share.sender == 2).ciphertext = second[0]

    run.broadcast["shares"][SITES[2]] = edit(run.broadcast["shares"][SITES[2]], swap)
    run.masked().survivors()
    assert run.answer().bad_shares == ((SITES[2], SITES[1]),)
    assert named(run.verdict(tmp_path)) == {frozenset({SITES[1], SITES[2]})}
    assert named(run.verdict(tmp_path, SITES[1])) == {frozenset({SITES[2], HOST})}


def test_a_dealer_that_seals_a_wrong_share_is_named_alone_once_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Recorded()
    run.advertise()
    dealer = run.clients[SITES[1]]
    seal = dealer._seal
    monkeypatch.setattr(dealer, "_seal", lambda j, s: seal(j, [s[0], plus(s[1], 1)] if j == 3 else s))
    run.shares().masked().survivors()
    assert run.answer().bad_shares == ((SITES[2], SITES[1]),)
    assert named(run.verdict(tmp_path)) == {frozenset({SITES[1], SITES[2]})}
    for site in (SITES[1], SITES[2]):
        assert named(run.verdict(tmp_path, site)) == {frozenset({SITES[1]})}


def test_a_site_that_reports_itself_is_named_for_what_it_signed(tmp_path: Path) -> None:
    run = Recorded()
    run.advertise().shares()
    site, client = SITES[0], run.clients[SITES[0]]
    take = client._take_shares

    def and_itself(raw: bytes) -> None:
        take(raw)
        client._invalid = (1,)

    client._take_shares = and_itself  # type: ignore[method-assign]
    run.masked().survivors()
    run.answer()
    assert named(run.verdict(tmp_path)) == {frozenset({site})}
