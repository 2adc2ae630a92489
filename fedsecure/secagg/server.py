"""The aggregator's side of one attempt of one round, phases R0 to R4, as a state machine without I/O
(secagg.md §3.3).

The server routes, counts and adds; it holds no secret until the sites give away the shares that open one sum.
Every message is checked on arrival, a repeat of the same bytes changes nothing, and what comes after its
phase has closed is refused. Below a bound the attempt ends with ``RoundAborted`` and no part of a sum comes
out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsecure.errors import RoundAborted
from fedsecure.identity.roster import Roster
from fedsecure.secagg import prg, ring, transcript
from fedsecure.secagg.collection import KeyCollection, PublicKeys
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.inbox import Inbox
from fedsecure.secagg.party import Party, broken
from fedsecure.secagg.phases import ABORTS, Phase
from fedsecure.secagg.recovery import Shares, Unrecoverable, open_masks, suspects
from fedsecure.secagg.spool import Spool
from fedsecure.secagg.thresholds import Mode
from fedsecure.wire import secagg_pb2 as pb

__all__ = ["Phase", "SecAggResult", "SecAggServer"]

# Kind of small message → its phase.
_PHASES = {
    "advertisement": Phase.ADVERTISE,
    "share_keys": Phase.SHARES,
    "masked_input": Phase.MASKED,
    "survivor_signature": Phase.SURVIVORS,
    "unmask": Phase.UNMASK,
}


@dataclass(frozen=True, slots=True)
class SecAggResult:
    """The sum, and all that may be known beside it.

    Attributes:
        total: int64, length d: the sum of the survivors' vectors, lifted to [−2^(b−1), 2^(b−1)).
        survivors: sites in the sum, in protocol order.
        result_message: the signed result for every survivor.
        bad_shares: of the sites in each tuple at least one lied about a share: the holder that gave it away and the
            one that dealt it, or all who dealt and gave where it cannot be narrowed down. The sum is right without.
        unopened: site → senders whose sealed share it says it could not open: it, or the sender, is at fault.
    """

    total: npt.NDArray[np.int64]
    survivors: tuple[str, ...]
    result_message: bytes
    bad_shares: tuple[tuple[str, ...], ...]
    unopened: Mapping[str, tuple[str, ...]]


class SecAggServer:
    """One attempt of one round at the aggregator.

    Args:
        descriptor: the round.
        roster: verified.
        signing_key: the aggregator's identity key.
        spool: where uploads wait.
        keys: of an epoch's set-up; the attempt then begins with the uploads (secagg.md §3.7).

    Raises:
        ProtocolError: FS-1337 another roster, FS-1343 the key is not the roster's.
    """

    def __init__(
        self,
        descriptor: RoundDescriptor,
        *,
        roster: Roster,
        signing_key: Ed25519PrivateKey,
        spool: Spool,
        keys: PublicKeys | None = None,
    ) -> None:
        self._party = Party(descriptor, site=None, signing_key=signing_key, roster=roster)
        self._descriptor, self._ctx, self._spool = descriptor, descriptor.ctx, spool
        self._inbox = Inbox(self._party)
        self._collection = KeyCollection(descriptor, self._party)
        self._keys = keys
        self._uploaded: dict[int, tuple[int, ...]] = {}  # site → senders it could not open
        self._signatures: dict[int, bytes] = {}
        self._seed_shares: Shares = {}  # owner → holder → share
        self._key_shares: Shares = {}
        self._accumulator = np.zeros(0, dtype="<u4")
        if keys is not None:
            self._inbox.open(Phase.MASKED, keys.commitments)
            self._begin_upload()

    @property
    def phase(self) -> Phase:
        return self._inbox.phase

    @property
    def ctx(self) -> bytes:
        return self._ctx

    def receive(self, site: str, message: bytes) -> bool:
        """Take a small message from an authenticated ``site``.

        Returns:
            True where it is new, False where the same bytes came before.

        Raises:
            ProtocolError: FS-1320 before its phase, FS-1321 malformed, FS-1322 not from its sender, FS-1323
                signature, FS-1324 contradicts an earlier message, FS-1325 after its phase has closed, FS-1326
                another view of the round, FS-1327 weak or repeated keys.
        """
        index = self._inbox.sender(site)
        envelope = self._inbox.decode(message)
        kind = envelope.WhichOneof("kind")
        assert kind is not None
        if kind == "masked_input":
            raise transcript.malformed("an upload header without its vector")
        if self._inbox.is_repeat(_PHASES[kind], index, message):
            return False
        content = getattr(envelope, kind)
        said = content.header.index if isinstance(content, pb.ShareKeys) else content.index
        if said != index:
            raise broken("FS-1322", f"site number {said} from {site!r}", f"number {index}")
        if isinstance(content, pb.Advertisement):
            self._collection.take_advertisement(index, content)
        elif isinstance(content, pb.ShareKeys):
            self._collection.take_shares(index, content)
        elif isinstance(content, pb.SurvivorSignature):
            public = self._public_keys()
            body = transcript.survivors_body(public.t1, public.t2(index), self._uploaded)
            self._party.verify(index, "survivors", body=body, signature=content.signature)
            self._signatures[index] = content.signature
        else:
            self._take_unmask(index, content)
        self._inbox.remember(index, message)
        return True

    def buffer(self, site: str, header: bytes) -> memoryview | None:
        """Check an upload's header and make room in the spool for its vector (b/8·d bytes).

        Fill it, then hand it to :meth:`receive_masked`; a buffer that is dropped half full leaves no trace.

        Returns:
            A writable buffer, or ``None`` where this very upload has been counted already.

        Raises:
            ProtocolError: as :meth:`receive`; FS-1349 the spool is full.
        """
        if self._check_header(site, header) is None:
            return None
        return memoryview(self._spool.create(self._descriptor.length * self._descriptor.word_bytes))

    def receive_masked(self, site: str, header: bytes, payload: memoryview | bytes) -> bool:
        """Add a complete upload to the sum, once.

        Args:
            site: the authenticated sender.
            header: as the site sent it.
            payload: b/8·d bytes, little-endian ring words.

        Returns:
            True where it was added, False where this very upload has been counted already.

        Raises:
            ProtocolError: as :meth:`receive`; FS-1329 size or hash differ from the signed header.
        """
        checked = self._check_header(site, header)
        if checked is None:
            return False
        view = memoryview(payload).cast("B")
        size = self._descriptor.length * self._descriptor.word_bytes
        if len(view) != size or transcript.payload_root(view) != checked.root:
            raise broken("FS-1329", f"a vector of {len(view)} bytes", f"{size} bytes with the signed hash")
        np.add(self._accumulator, np.frombuffer(view, dtype=self._accumulator.dtype), out=self._accumulator)
        self._uploaded[checked.index] = tuple(checked.invalid_from)
        self._inbox.remember(checked.index, header)
        return True

    def waiting_for(self) -> tuple[str, ...]:
        """Sites whose message of this phase has not come, in protocol order."""
        return self._inbox.waiting_for()

    def waits(self, alive: Callable[[str], bool]) -> bool:
        """Whether one of them is ``alive``; asked after every message, so mostly of the first of them only."""
        return any(map(alive, self._inbox.missing()))

    def can_close(self) -> bool:
        """Whether enough messages have come for the round to go on without the rest."""
        return self._missing() is None

    def close(self) -> Mapping[str, bytes]:
        """Close this phase; returns site → message that opens the next one.

        Raises:
            RoundAborted: FS-1350 … FS-1353 too few messages; the attempt is over.
            ProtocolError: FS-1320 there is no phase to close: call :meth:`finish` in the last one.
        """
        phase, inbox = self.phase, self._inbox
        if phase not in ABORTS or phase is Phase.UNMASK:
            raise broken("FS-1320", f"closing phase {phase.value}", "an open phase before the last")
        self._require_enough()
        if phase is Phase.ADVERTISE:
            message = self._collection.close_advertise()
            inbox.open(Phase.SHARES, self._collection.advertisements)
        elif phase is Phase.SHARES:
            routed = self._collection.close_shares()
            inbox.open(Phase.MASKED, self._collection.headers)
            self._keys = self._collection.public_keys()
            self._begin_upload()
            return routed
        elif phase is Phase.MASKED:
            message = pb.ServerMessage(survivor_list=pb.SurvivorList(survivors=sorted(self._uploaded)))
            inbox.open(Phase.SURVIVORS if self._descriptor.mode is Mode.ACTIVE else Phase.UNMASK, self._uploaded)
        else:
            signatures = [pb.SurvivorSignature(index=i, signature=s) for i, s in sorted(self._signatures.items())]
            message = pb.ServerMessage(survivor_signatures=pb.SurvivorSignatures(signatures=signatures))
            inbox.open(Phase.UNMASK, self._signatures)
        return inbox.to_all(message)

    def finish(self) -> SecAggResult:
        """Open the sum.

        Raises:
            RoundAborted: FS-1354 too few shares, FS-1355 no shares fit together.
            ProtocolError: FS-1320 not in the last phase.
        """
        if self.phase is not Phase.UNMASK:
            raise broken("FS-1320", f"finishing in phase {self.phase.value}", "phase unmask")
        self._require_enough()
        survivors = sorted(self._uploaded)
        bad = self._remove_masks(survivors)
        sum_hash = hashlib.sha256(self._accumulator.data).digest()
        result = pb.RoundResult(context=self._ctx, survivors=survivors, sum_hash=sum_hash)
        body = transcript.result_body(survivors, sum_hash)
        result.signature = self._party.sign("result", body)
        self._inbox.phase = Phase.DONE
        return SecAggResult(
            total=ring.lift(self._accumulator),
            survivors=self._party.names(survivors),
            result_message=pb.ServerMessage(result=result).SerializeToString(),
            bad_shares=tuple(self._party.names(group) for group in bad),
            unopened={self._descriptor.cohort[i - 1]: self._party.names(v) for i, v in self._uploaded.items() if v},
        )

    def abort(self) -> None:
        """End the attempt without a sum; what was collected is dropped."""
        self._inbox.phase = Phase.ABORTED
        self._accumulator = np.zeros(0, dtype="<u4")
        self._seed_shares, self._key_shares = {}, {}
        self._collection.clear()

    def _public_keys(self) -> PublicKeys:
        assert self._keys is not None  # set before any phase that asks
        return self._keys

    def _check_header(self, site: str, raw: bytes) -> pb.MaskedInputHeader | None:
        index = self._inbox.sender(site)
        envelope = self._inbox.decode(raw)
        if envelope.WhichOneof("kind") != "masked_input":
            raise transcript.malformed("an upload that begins with another message")
        if self._inbox.is_repeat(Phase.MASKED, index, raw):
            return None
        header = envelope.masked_input
        if header.index != index:
            raise broken("FS-1322", f"site number {header.index} from {site!r}", f"number {index}")
        self._party.verify(index, "masked-input", body=transcript.masked_body(header), signature=header.signature)
        public = self._public_keys()
        if (header.advertisements_hash, header.headers_hash) != (public.t1, public.t2(index)):
            raise broken("FS-1326", "a vector masked for other messages", "those that were sent to all")
        d, b = self._descriptor.length, self._descriptor.ring_bits
        if (header.length, header.ring_bits) != (d, b):
            raise broken("FS-1329", f"{header.length} words of {header.ring_bits} bits", f"{d} of {b}")
        reported = set(header.invalid_from)
        if len(reported) != len(header.invalid_from) or not reported <= set(public.commitments):
            raise transcript.malformed("a report about shares that is repeated or about a stranger")
        return header

    def _take_unmask(self, index: int, message: pb.Unmask) -> None:
        self._party.verify(index, "unmask", body=transcript.unmask_body(message), signature=message.signature)
        public = self._public_keys()
        near = {index, *public.graph.peers(index)} if self._descriptor.neighbours else set(public.commitments)
        dropped = set(public.commitments) - set(self._uploaded)
        pairs = ((message.seed_shares, near & set(self._uploaded)), (message.mask_key_shares, near & dropped))
        for shares, owners in pairs:
            named = [share.owner for share in shares]
            if len(set(named)) != len(named) or not set(named) <= owners:
                raise transcript.malformed("shares that are repeated or of the wrong kind")
        for share in message.seed_shares:
            self._seed_shares.setdefault(share.owner, {})[index] = share.share
        for share in message.mask_key_shares:
            self._key_shares.setdefault(share.owner, {})[index] = share.share

    def _begin_upload(self) -> None:
        """Nothing is added before the key set-up is over."""
        self._accumulator = np.zeros(self._descriptor.length, dtype=f"<u{self._descriptor.word_bytes}")

    def _missing(self) -> tuple[int, int] | None:
        """(how many there are, how many are needed) where a bound is not reached."""
        d = self._descriptor
        if self.phase in (Phase.DONE, Phase.ABORTED):
            return 0, d.min_survivors
        got = self._inbox.count
        early = self.phase in (Phase.ADVERTISE, Phase.SHARES, Phase.MASKED)
        need = d.min_survivors if early else d.threshold
        if self.phase is Phase.UNMASK:
            public = self._public_keys()
            owners = [self._seed_shares.get(i, {}) for i in self._uploaded]
            owners += [self._key_shares.get(i, {}) for i in set(public.commitments) - set(self._uploaded)]
            got = min(got, *(len(shares) for shares in owners))
        return None if got >= need else (got, need)

    def _require_enough(self) -> None:
        short = self._missing()
        if short is None:
            return
        phase, missing = self.phase, ", ".join(self.waiting_for()) or "none, but shares of theirs did not open"
        self.abort()
        raise RoundAborted(
            ABORTS[phase],
            f"{short[0]} of {short[1]} needed in phase {phase.value}; missing: {missing}",
            expected=f"messages of at least {short[1]} sites",
            cure="bring the missing sites back; the next attempt uses new keys and a new charge",
        )

    def _remove_masks(self, survivors: list[int]) -> list[tuple[int, ...]]:
        """Subtract every mask from the accumulator; returns who may have lied about a share."""
        public = self._public_keys()
        try:
            masks = open_masks(
                ctx=self._ctx,
                threshold=self._descriptor.threshold,
                survivors=survivors,
                seed_shares=self._seed_shares,
                key_shares=self._key_shares,
                commitments=public.commitments,
                mask_keys=public.mask_keys,
                commitment_ctx=public.ctx,
                peers=public.graph.peers if self._descriptor.neighbours else None,
            )
        except Unrecoverable as error:
            self.abort()
            raise RoundAborted(
                "FS-1355",
                f"no {self._descriptor.threshold} shares of a secret of site number {error.owner} fit together",
                expected="shares that give back what the site committed to",
                cure="compare the signed shares; the next attempt uses new keys and a new charge",
            ) from error
        prg.add_masks(self._accumulator, masks.plus, masks.minus)
        limits = {"threshold": self._descriptor.threshold, "colluders": self._descriptor.colluders}
        found = dict[tuple[int, ...], None]()
        for owner, wrong in masks.wrong.items():
            given = (self._seed_shares if owner in self._uploaded else self._key_shares)[owner]
            found.update(dict.fromkeys(suspects(owner, wrong, given, **limits)))
        return list(found)
