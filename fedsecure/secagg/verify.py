"""Checking a recorded round after the fact: every signature, context, commitment and hash, and who is to blame
(secagg.md §3.3, §6.8).

A finding names its authors. One name is a proof: its signature is on the bad bytes, or only the aggregator could have
changed them. Several are all that it can be; with the cipher keys of an attempt that was run for a test, sealed shares
are opened and most of these come down to one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedsecure.errors import ProtocolError
from fedsecure.identity import keys as identity_keys
from fedsecure.identity.roster import Roster
from fedsecure.secagg import keys, prg, transcript
from fedsecure.secagg.blame import Dealings
from fedsecure.secagg.descriptor import COMPLETE, RoundDescriptor
from fedsecure.secagg.record import EVERYONE, SEAL, Kind, Record, parse_roster, read_records, unreadable, unsupported
from fedsecure.secagg.thresholds import Mode
from fedsecure.secagg.verdict import AGGREGATOR, Verdict
from fedsecure.wire import secagg_pb2 as pb

_Result = TypeVar("_Result")


def verify_transcript(
    path: Path, *, roster: Roster | None = None, opened: Mapping[str, bytes] | None = None
) -> Verdict:
    """Check a recorded round.

    Args:
        path: the file.
        roster: a verified copy to compare with; without it the transcript's own roster is taken as it is.
        opened: site → its X25519 cipher key of this attempt (32 private bytes), in tests.

    Returns:
        The verdict; breaches of the rules are findings, not exceptions.

    Raises:
        ProtocolError: FS-1380 the file is no transcript, or damaged; FS-1381 of a kind this release cannot check;
            FS-1311, FS-1310, FS-1312, FS-1300, FS-1301 its descriptor.
    """
    records = read_records(path)
    head = [record for record, _ in (next(records, (None, b"")), next(records, (None, b"")))]
    if [record.kind if record else None for record in head] != [Kind.DESCRIPTOR, Kind.ROSTER]:
        raise unreadable("a transcript that does not begin with a descriptor and a roster")
    assert head[0] and head[1]
    check = _Check(RoundDescriptor.parse(head[0].data), parse_roster(head[1].data), trusted=roster, opened=opened or {})
    last = None
    for record, before in records:
        last = record.kind
        check.take(record, before)
    if last is not Kind.SEAL:
        raise unreadable("a transcript without a seal at its end")
    return check.finish()


class _Check:
    """The round as the transcript tells it, record by record."""

    def __init__(
        self, descriptor: RoundDescriptor, roster: Roster, *, trusted: Roster | None, opened: Mapping[str, bytes]
    ) -> None:
        if descriptor.graph != COMPLETE:
            raise unsupported(f"a round with graph {descriptor.graph!r}")
        if descriptor.epoch:
            raise unsupported("a round whose keys were set up before, in an epoch")
        if descriptor.epoch:
            raise unsupported("a round of a prepared epoch")
        self.descriptor, self.ctx, self.roster = descriptor, descriptor.ctx, roster
        d = descriptor
        self.verdict = Verdict(d.ctx, d.run_id, d.round, d.attempt, roster.hash, d.cohort)
        self.ads: dict[int, pb.Advertisement] = {}
        self.headers: dict[int, pb.ShareHeader] = {}
        self.sealed: dict[tuple[int, int], bytes] = {}
        self.uploads: dict[int, pb.MaskedInputHeader] = {}
        self.payloads: set[int] = set()
        self.signatures: dict[int, bytes] = {}
        self.unmask: dict[int, pb.Unmask] = {}
        self.sent: set[tuple[str, int]] = set()
        self.t1 = self.t2 = b""
        self.dtype = np.dtype(f"<u{descriptor.ring_bits // 8}")
        self.total = np.zeros(0, dtype=self.dtype)
        self.result: pb.RoundResult | None = None
        self.opened = dict(opened)
        if descriptor.roster_hash != roster.hash or (trusted is not None and trusted.hash != roster.hash):
            self.blame("FS-1337", "a round for another roster", AGGREGATOR)
        self.count("contexts")
        self.public = {i: self.key_of(site) for i, site in enumerate(descriptor.cohort, start=1)}

    def key_of(self, site: str) -> bytes:
        for entry in self.roster.entries:
            if entry.site == site:
                return entry.identity_key
        self.blame("FS-1335", f"{site!r} is in the cohort and not in the roster", AGGREGATOR)
        return b""

    # --- bookkeeping ---------------------------------------------------------------------------------------------

    def name(self, index: int) -> str:
        return self.descriptor.cohort[index - 1]

    def count(self, what: str, number: int = 1) -> None:
        self.verdict.count(what, number)

    def blame(self, code: str, what: str, *authors: str) -> None:
        self.verdict.blame(code, what, *authors)

    def require(self, good: bool, code: str, what: str, *authors: str) -> bool:
        if not good:
            self.blame(code, what, *authors)
        return good

    def attempt(self, act: Callable[[], _Result], *authors: str) -> _Result | None:
        """What ``act`` returns; what it refuses is a finding."""
        try:
            return act()
        except ProtocolError as error:
            self.blame(error.code, error.found, *authors)
            return None

    def signed(self, index: int, kind: str, *, body: bytes, signature: bytes) -> None:
        self.count("signatures")
        who = self.name(index)
        key = self.public[index]
        # The aggregator took it for good, so it shares the blame for what is not signed.
        self.attempt(
            lambda: transcript.verify(key, kind, ctx=self.ctx, body=body, signature=signature, who=who), who, AGGREGATOR
        )

    # --- the records ---------------------------------------------------------------------------------------------

    def take(self, record: Record, before: bytes) -> None:
        if record.kind is Kind.SEAL:
            self.count("signatures")
            framed = identity_keys.verify(
                self.roster.aggregator_key, transcript.PURPOSE + SEAL, self.ctx + before, record.data
            )
            self.require(framed, "FS-1382", "the file is not what the aggregator sealed", AGGREGATOR)
        elif record.site > len(self.descriptor.cohort) or record.kind in (Kind.DESCRIPTOR, Kind.ROSTER):
            raise unreadable(f"a record of kind {record.kind.name} for site number {record.site}")
        elif record.kind is Kind.BROADCAST:
            self.attempt(lambda: self.take_broadcast(record), AGGREGATOR)
        elif record.site == EVERYONE:
            raise unreadable("a message from no site")
        elif record.kind is Kind.PAYLOAD:
            self.take_payload(record)
        else:
            self.attempt(lambda: self.take_message(record), self.name(record.site), AGGREGATOR)

    def take_message(self, record: Record) -> None:
        sites, i = len(self.descriptor.cohort), record.site
        envelope = transcript.decode(pb.ClientMessage, record.data, sites=sites)
        kind = envelope.WhichOneof("kind")
        content = getattr(envelope, str(kind))
        said = content.header.index if isinstance(content, pb.ShareKeys) else content.index
        who = self.name(i)
        if (record.kind is Kind.UPLOAD) != (kind == "masked_input"):
            raise unreadable(f"a record of kind {record.kind.name} with a message of kind {kind}")
        if not self.require(said == i, "FS-1322", f"{who!r} sent a message as site number {said}", who, AGGREGATOR):
            return
        taken: Mapping[str, Collection[int]] = {
            "advertisement": self.ads,
            "share_keys": self.headers,
            "masked_input": self.uploads,
            "survivor_signature": self.signatures,
            "unmask": self.unmask,
        }
        again = i in taken[str(kind)]
        expected: Mapping[str, Collection[int]] = {
            "advertisement": self.public,
            "share_keys": self.ads,
            "masked_input": self.headers,
        }
        gone = i not in expected.get(str(kind), self.uploads)
        self.require(not again, "FS-1324", f"a second {kind} of {who!r} was taken", AGGREGATOR)
        self.require(not gone, "FS-1325", f"a {kind} of {who!r}, which had dropped out, was taken", AGGREGATOR)
        if again or gone:
            return
        getattr(self, f"take_{kind}")(i, content)

    def take_advertisement(self, i: int, ad: pb.Advertisement) -> None:
        self.signed(i, "advertise", body=transcript.advertisement_body(ad), signature=ad.signature)
        self.late(i, "advertisements")
        known = {key for other in self.ads.values() for key in (other.cipher_key, other.mask_key)}
        fresh = {ad.cipher_key, ad.mask_key}
        self.count("keys", 2)
        self.require(len(fresh) == 2 and not fresh & known, "FS-1327", "a public key twice", self.name(i), AGGREGATOR)
        for key in fresh:
            keys.exchange(X25519PrivateKey.generate(), key)
        self.ads[i] = ad

    def take_share_keys(self, i: int, message: pb.ShareKeys) -> None:
        header, who = message.header, self.name(i)
        self.signed(i, "shares", body=transcript.header_body(header), signature=header.signature)
        self.late(i, "routed_shares")
        self.view(who, "shares", (header.advertisements_hash, self.t1))
        sealed = {share.recipient: share.ciphertext for share in message.shares}
        complete = set(sealed) == set(self.ads) - {i} and len(sealed) == len(message.shares)
        self.require(complete, "FS-1321", f"{who!r} did not send one sealed share for each peer", who, AGGREGATOR)
        self.count("hashes")
        same = transcript.ciphertexts_hash(sealed) == header.ciphertexts_hash
        self.require(same, "FS-1321", f"{who!r} sent other sealed shares than its header says", who, AGGREGATOR)
        self.headers[i] = header
        self.sealed.update(((i, j), ciphertext) for j, ciphertext in sealed.items())

    def take_masked_input(self, i: int, header: pb.MaskedInputHeader) -> None:
        who, d = self.name(i), self.descriptor
        self.signed(i, "masked-input", body=transcript.masked_body(header), signature=header.signature)
        self.late(i, "survivor_list")
        self.view(who, "vector", (header.advertisements_hash, self.t1), (header.headers_hash, self.t2))
        fits = (header.length, header.ring_bits) == (d.length, d.ring_bits)
        self.require(fits, "FS-1329", f"{who!r} sent {header.length} words of {header.ring_bits} bits", who, AGGREGATOR)
        self.uploads[i] = header

    def take_payload(self, record: Record) -> None:
        who, header = self.name(record.site), self.uploads.get(record.site)
        self.count("hashes")
        size = self.descriptor.length * self.dtype.itemsize
        good = header is not None and len(record.data) == size and record.site not in self.payloads
        good = good and header is not None and transcript.payload_root(record.data) == header.root
        if self.require(good, "FS-1329", f"the vector of {who!r} is not the one its header signs", AGGREGATOR):
            if not self.payloads:
                self.total = np.zeros(self.descriptor.length, dtype=self.dtype)
            np.add(self.total, np.frombuffer(record.data, dtype=self.dtype), out=self.total)
            self.payloads.add(record.site)

    def take_survivor_signature(self, i: int, message: pb.SurvivorSignature) -> None:
        body = transcript.survivors_body(self.t1, self.t2, self.uploads)
        self.signed(i, "survivors", body=body, signature=message.signature)
        self.late(i, "survivor_signatures")
        self.signatures[i] = message.signature

    def take_unmask(self, i: int, message: pb.Unmask) -> None:
        who = self.name(i)
        self.signed(i, "unmask", body=transcript.unmask_body(message), signature=message.signature)
        self.late(i, "result")
        seeds = [share.owner for share in message.seed_shares]
        mask_keys = [share.owner for share in message.mask_key_shares]
        self.count("share lists")
        both = set(seeds) & set(mask_keys)
        right = set(seeds) <= set(self.uploads) and set(mask_keys) <= set(self.headers) - set(self.uploads)
        self.require(not both, "FS-1388", f"{who!r} gave away both kinds of share of one site", who)
        once = len(set(seeds)) == len(seeds) and len(set(mask_keys)) == len(mask_keys)
        self.require(right and once, "FS-1321", f"{who!r} gave away shares that are not asked for", who)
        report = self.uploads.get(i)
        owed = set(self.headers) - set(report.invalid_from if report else ())
        self.require(owed <= {*seeds, *mask_keys}, "FS-1384", f"{who!r} kept shares back", who)
        self.unmask[i] = message

    def late(self, i: int, after: str) -> None:
        closed = after in {kind for kind, _ in self.sent}
        self.require(not closed, "FS-1325", f"a message of {self.name(i)!r} was taken after its phase", AGGREGATOR)

    def view(self, who: str, what: str, *pairs: tuple[bytes, bytes]) -> None:
        self.count("hashes", len(pairs))
        same = all(said == seen for said, seen in pairs)
        self.require(same, "FS-1326", f"the {what} of {who!r} is for other messages", who, AGGREGATOR)

    def take_broadcast(self, record: Record) -> None:
        message = transcript.decode(pb.ServerMessage, record.data, sites=len(self.descriptor.cohort))
        kind = str(message.WhichOneof("kind"))
        again = (kind, record.site) in self.sent
        self.require(not again, "FS-1383", f"{kind} was sent twice", AGGREGATOR)
        self.sent.add((kind, record.site))
        self.count("broadcasts")
        d = self.descriptor
        expected, have, least = pb.ServerMessage(), 0, max(d.threshold, d.min_survivors)
        if kind == "advertisements":
            expected.advertisements.advertisements.extend(self.ads[i] for i in sorted(self.ads))
            have, self.t1 = len(self.ads), transcript.advertisements_hash(self.ctx, self.ads)
        elif kind == "routed_shares":
            have, self.t2 = len(self.headers), transcript.headers_hash(self.ctx, self.headers)
            expected.routed_shares.headers.extend(self.headers[i] for i in sorted(self.headers))
            for sender in sorted(set(self.headers) - {record.site}):
                sealed = self.sealed.get((sender, record.site), b"")
                expected.routed_shares.shares.add(sender=sender, recipient=record.site, ciphertext=sealed)
        elif kind == "survivor_list":
            have = len(self.uploads)
            expected.survivor_list.survivors.extend(sorted(self.uploads))
        elif kind == "survivor_signatures":
            have, least = len(self.signatures), d.threshold
            for i in sorted(self.signatures):
                expected.survivor_signatures.signatures.add(index=i, signature=self.signatures[i])
        else:
            self.result, expected, have = message.result, message, least
        self.require(message == expected, "FS-1383", f"{kind} other than the sites' messages call for", AGGREGATOR)
        self.require(have >= least, "FS-1328", f"the round went on with {have} of {least} sites", AGGREGATOR)

    # --- the end -------------------------------------------------------------------------------------------------

    def finish(self) -> Verdict:
        self.verdict.survivors = tuple(self.name(i) for i in sorted(self.uploads))
        dealings = Dealings(
            descriptor=self.descriptor,
            ads=self.ads,
            headers=self.headers,
            sealed=self.sealed,
            uploads=self.uploads,
            unmask=self.unmask,
            opened=self.opened,
            verdict=self.verdict,
        )
        dealings.check_reports()
        if self.result is not None:
            self.verdict.finished = True
            self.check_end(self.result)
            masks = dealings.open_masks()
            if masks is not None and self.payloads == set(self.uploads):
                prg.add_masks(self.total, masks.plus, masks.minus)
                self.verdict.sum_checked = True
                self.count("sums")
                right = hashlib.sha256(self.total.tobytes()).digest() == self.result.sum_hash
                self.require(right, "FS-1386", "the sum is not that of the recorded vectors", AGGREGATOR)
        return self.verdict

    def check_end(self, result: pb.RoundResult) -> None:
        """The signed result, and that nothing was opened without the phases before."""
        self.count("signatures")
        named = list(result.survivors) == sorted(self.uploads) and result.context == self.ctx
        self.require(named, "FS-1328", "a result of another round or of other survivors", AGGREGATOR)
        body, key = transcript.result_body(result.survivors, result.sum_hash), self.roster.aggregator_key
        signature = result.signature
        self.attempt(
            lambda: transcript.verify(key, "result", ctx=self.ctx, body=body, signature=signature, who=AGGREGATOR),
            AGGREGATOR,
        )
        phases = {"advertisements", "routed_shares", "survivor_list"}
        phases |= {"survivor_signatures"} if self.descriptor.mode is Mode.ACTIVE else set()
        missing = phases - {kind for kind, _ in self.sent}
        self.require(not missing, "FS-1383", f"a sum without {', '.join(sorted(missing))}", AGGREGATOR)
        unsent = {i for i in self.headers if ("routed_shares", i) not in self.sent}
        self.require(not unsent, "FS-1383", f"no record of the shares for {len(unsent)} site(s)", AGGREGATOR)
        have, least = len(self.unmask), self.descriptor.threshold
        self.require(have >= least, "FS-1328", f"a sum opened with {have} of {least} sites' shares", AGGREGATOR)
