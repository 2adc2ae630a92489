"""Checking a recorded round, or a recorded set-up of keys, after the fact: every signature, context, commitment and
hash, and who is to blame (secagg.md §3.3, §3.7, §6.8).

A finding names its authors. One name is a proof, as long as at most c sites collude. Several are all that can be said:
one of them did it, or more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedsecure.errors import ProtocolError
from fedsecure.identity import keys as identity_keys
from fedsecure.identity.roster import Roster
from fedsecure.secagg import transcript
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.epoch_descriptor import EpochDescriptor
from fedsecure.secagg.party import broken
from fedsecure.secagg.record import EVERYONE, SEAL, Kind, Record, parse_roster, read_records, set_up_name, unreadable
from fedsecure.secagg.verdict import AGGREGATOR, Verdict
from fedsecure.secagg.verify_round import RoundCheck
from fedsecure.secagg.verify_setup import SetUpCheck, Witness
from fedsecure.wire import secagg_pb2 as pb

# Messages, and the broadcasts that close their phases, in their order.
_MESSAGES = ("advertisement", "share_keys", "masked_input", "survivor_signature", "unmask")
_BROADCASTS = ("advertisements", "routed_shares", "survivor_list", "survivor_signatures", "result")
_SET_UP = 2  # phases of the set-up
_ORDER = ("FS-1320", "FS-1324", "FS-1325")  # only the aggregator decides what it still takes


def verify_transcript(
    path: Path,
    *,
    roster: Roster | None = None,
    opened: Mapping[str, bytes] | None = None,
    set_up: Path | None = None,
) -> Verdict:
    """Check a recorded round, with the set-up of its keys if that was recorded by itself, or a set-up.

    Args:
        path: the file.
        roster: a verified copy to compare with; without it the transcript's own roster is taken as it is.
        opened: site → its X25519 cipher key of this set-up (32 private bytes), in tests.
        set_up: the transcript of the set-up; ``None`` for the one beside ``path``, under the name it was written with.

    Returns:
        The verdict; breaches of the rules are findings, not exceptions.

    Raises:
        ProtocolError: FS-1380 a file is no transcript, or damaged, or the set-up's is not there; FS-1381 of a kind this
            release cannot check; FS-1311, FS-1310, FS-1312, FS-1314, FS-1300, FS-1301 its descriptor.
    """
    check, records = _begin(path, roster)
    d = check.descriptor
    if isinstance(d, EpochDescriptor):
        check.set_up = SetUpCheck(d, check.witness, check.verdict)
    elif d.epoch:
        reference = next(records, (None, b""))[0]
        if reference is None or reference.kind is not Kind.SET_UP:
            raise unreadable("a round on prepared keys whose transcript does not name that of their set-up")
        file = set_up or path.with_name(set_up_name(d.epoch))
        if not check.rest_on(_read_set_up(file, check.roster), file, reference.data):
            return check.verdict  # other people's keys: nothing more can be said
    else:
        check.set_up = SetUpCheck(d, check.witness, check.verdict)
    check.read(records)
    return check.finish(opened or {})


def _begin(path: Path, roster: Roster | None) -> tuple[_Check, Iterator[tuple[Record, bytes]]]:
    records = read_records(path)
    first, second = (next(records, (None, b""))[0] for _ in range(2))
    kinds = (first.kind if first else None, second.kind if second else None)
    if first is None or second is None or kinds[1] is not Kind.ROSTER:
        raise unreadable("a transcript that does not begin with a descriptor and a roster")
    if kinds[0] is Kind.EPOCH:
        return _Check(EpochDescriptor.parse(first.data), parse_roster(second.data), trusted=roster), records
    if kinds[0] is not Kind.DESCRIPTOR:
        raise unreadable("a transcript that does not begin with a descriptor and a roster")
    return _Check(RoundDescriptor.parse(first.data), parse_roster(second.data), trusted=roster), records


def _read_set_up(path: Path, roster: Roster) -> _Check:
    check, records = _begin(path, roster)
    if not isinstance(check.descriptor, EpochDescriptor):
        raise unreadable(f"{path.name}, which records a round and not the set-up of its keys,")
    check.set_up = SetUpCheck(check.descriptor, check.witness, check.verdict)
    check.read(records)
    check.finish({})
    return check


class _Check:
    """One file, record by record."""

    set_up: SetUpCheck
    round: RoundCheck | None = None

    def __init__(
        self, descriptor: RoundDescriptor | EpochDescriptor, roster: Roster, *, trusted: Roster | None
    ) -> None:
        self.descriptor, self.roster = d, _ = descriptor, roster
        number, attempt, slots = (d.epoch, 0, d.slots) if isinstance(d, EpochDescriptor) else (d.round, d.attempt, 0)
        self.verdict = Verdict(d.ctx, d.run_id, number, attempt, roster.hash, d.cohort, slots=slots)
        same = d.roster_hash == roster.hash and (trusted is None or trusted.hash == roster.hash)
        self.verdict.require(same, "FS-1337", "a round for another roster", AGGREGATOR)
        self.verdict.count("contexts")
        self.witness = Witness(d, roster, self.verdict)
        self._phase, self._sent, self._own_set_up = 0, set[tuple[str, int]](), True

    def rest_on(self, other: _Check, path: Path, digest: bytes) -> bool:
        """Take the keys from a set-up that was recorded by itself, and is checked; whether they are for this round."""
        epoch, d = other.descriptor, self.descriptor
        assert isinstance(d, RoundDescriptor) and isinstance(epoch, EpochDescriptor)
        self.verdict.include(other.verdict)
        self.verdict.count("hashes")
        with path.open("rb") as file:
            same = hashlib.file_digest(file, "sha256").digest() == digest
        self.verdict.require(same, "FS-1382", "the set-up is not the one that the round refers to", AGGREGATOR)
        self.verdict.require(other.verdict.finished, "FS-1383", "keys of a set-up that was not finished", AGGREGATOR)
        self.verdict.set_up, self.set_up, self._own_set_up = digest, other.set_up, False
        self._phase = _SET_UP
        return self.verdict.guard(lambda: epoch.require_fit(d), AGGREGATOR)

    def read(self, records: Iterator[tuple[Record, bytes]]) -> None:
        """All records up to the seal."""
        last = None
        for record, before in records:
            last = record.kind
            self._take(record, before)
        if last is not Kind.SEAL:
            raise unreadable("a transcript without a seal at its end")

    def finish(self, opened: Mapping[str, bytes]) -> Verdict:
        """The verdict, once everything is read."""
        verdict = self.verdict
        if isinstance(self.descriptor, EpochDescriptor):
            verdict.survivors = self.witness.names(self.set_up.members)
            verdict.finished = ("routed_shares" in {kind for kind, _ in self._sent}) and not self.set_up.unsent
            return verdict
        sent = {kind for kind, _ in self._sent} | (set() if self._own_set_up else set(_BROADCASTS[:_SET_UP]))
        return self._online().finish(sent, opened)

    def _online(self) -> RoundCheck:
        if self.round is None:
            d = self.descriptor
            assert isinstance(d, RoundDescriptor)
            self.round = RoundCheck(d, self.witness, self.verdict, self.set_up, 0 if self._own_set_up else d.slot)
        return self.round

    def _take(self, record: Record, before: bytes) -> None:
        kind, site = record.kind, record.site
        if kind is Kind.SEAL and site == EVERYONE:
            self.verdict.count("signatures")
            sealed = identity_keys.verify(
                self.witness.aggregator_key, transcript.PURPOSE + SEAL, self.witness.ctx + before, record.data
            )
            self.verdict.require(sealed, "FS-1382", "the file is not what the aggregator sealed", AGGREGATOR)
        elif site > len(self.witness.cohort) or kind not in (Kind.MESSAGE, Kind.UPLOAD, Kind.PAYLOAD, Kind.BROADCAST):
            raise unreadable(f"a record of kind {kind.name} for site number {site}")
        elif kind is Kind.BROADCAST:
            self.verdict.guard(lambda: self._take_broadcast(record), AGGREGATOR)
        elif site == EVERYONE:
            raise unreadable("a message from no site")
        elif kind is Kind.PAYLOAD and isinstance(self.descriptor, RoundDescriptor):
            self._online().take_payload(site, record.data)
        else:
            self._take_message(record)

    def _take_message(self, record: Record) -> None:
        who = self.witness.cohort[record.site - 1]
        try:
            self._accept(record)
        except ProtocolError as error:
            if error.code == "FS-1380":
                raise
            authors = (AGGREGATOR,) if error.code in _ORDER else (who, AGGREGATOR)
            self.verdict.blame(error.code, error.found, *authors)

    def _accept(self, record: Record) -> None:
        envelope = transcript.decode(pb.ClientMessage, record.data, **self._sizes())
        kind = str(envelope.WhichOneof("kind"))
        content: Any = getattr(envelope, kind)
        who, said = self.witness.cohort[record.site - 1], getattr(content, "header", content).index
        if (record.kind is Kind.UPLOAD) != (kind == "masked_input"):
            raise unreadable(f"a record of kind {record.kind.name} with a message of kind {kind}")
        if said != record.site:
            raise broken("FS-1322", f"{who!r} sent a message as site number {said}", f"number {record.site}")
        phase = _MESSAGES.index(kind)
        if not self._due(phase):
            raise broken("FS-1320", f"a message of kind {kind}, which has no place here", "one of this protocol run")
        if phase < self._phase:
            raise broken("FS-1325", f"a message of {who!r} was taken after its phase", "messages in their phase")
        # A phase that no broadcast has closed is missed at the end.
        self._phase = phase
        (self.set_up.take if phase < _SET_UP else self._online().take)(record.site, content)

    def _take_broadcast(self, record: Record) -> None:
        message = transcript.decode(pb.ServerMessage, record.data, **self._sizes())
        kind, verdict, d = str(message.WhichOneof("kind")), self.verdict, self.descriptor
        phase = _BROADCASTS.index(kind)
        # Only sealed shares differ from site to site: a second sum for one site alone would hide beside the first.
        alike = (record.site == EVERYONE) == (kind != "routed_shares")
        if not verdict.require(alike, "FS-1383", f"{kind} was not sent to all alike", AGGREGATOR):
            return
        again = (kind, record.site) in self._sent
        verdict.require(not again, "FS-1383", f"{kind} was sent twice", AGGREGATOR)
        late = phase + 1 < self._phase or not self._due(phase)
        if not verdict.require(not late, "FS-1383", f"{kind} was sent where it has no place", AGGREGATOR):
            return
        self._sent.add((kind, record.site))
        self._phase = phase + 1
        verdict.count("broadcasts")
        least = max(d.threshold, d.min_survivors)
        if phase < _SET_UP:
            expected = self.set_up.advertisements() if phase == 0 else self.set_up.routed(record.site)
            have = self.set_up.count(kind)
        else:
            expected, have, least = self._online().broadcast(kind, message)
        verdict.require(message == expected, "FS-1383", f"{kind} other than the messages call for", AGGREGATOR)
        verdict.require(have >= least, "FS-1328", f"the round went on with {have} of {least} sites", AGGREGATOR)

    def _due(self, phase: int) -> bool:
        """Whether messages of this phase belong into this file."""
        if isinstance(self.descriptor, EpochDescriptor):
            return phase < _SET_UP
        return self._own_set_up or phase >= _SET_UP

    def _sizes(self) -> dict[str, int]:
        return {"sites": len(self.witness.cohort), "slots": self.descriptor.slots}
