"""Checking the recorded online part of a round, R2 to R4 and the sum, on keys that are checked (secagg.md §3.3, §6.8).

A site is named alone only for what it signed with the same view of the round: its signature over T1, T2 and U3 of this
very transcript. Without one, as in mode HBC, the aggregator may have shown it another list and is named with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import numpy as np

from fedsecure.secagg import prg, transcript
from fedsecure.secagg.blame import Dealings
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.party import broken
from fedsecure.secagg.thresholds import Mode
from fedsecure.secagg.verdict import AGGREGATOR, Verdict
from fedsecure.secagg.verify_setup import SetUpCheck, Witness
from fedsecure.wire import secagg_pb2 as pb

_Content = pb.MaskedInputHeader | pb.SurvivorSignature | pb.Unmask


class RoundCheck:
    """R2 to R4 as a transcript tells them; a message that an honest aggregator refuses raises ``ProtocolError``."""

    def __init__(
        self, descriptor: RoundDescriptor, witness: Witness, verdict: Verdict, set_up: SetUpCheck, slot: int
    ) -> None:
        self._descriptor, self._witness, self._verdict, self._set_up = descriptor, witness, verdict, set_up
        self._dealt = set_up.dealt(slot)
        self._public = self._dealt.public
        self._active = descriptor.mode is Mode.ACTIVE
        self._uploads: dict[int, pb.MaskedInputHeader] = {}
        self._signatures: dict[int, bytes] = {}
        self._unmask: dict[int, pb.Unmask] = {}
        self._payloads: set[int] = set()
        self._total = np.zeros(0, dtype=f"<u{descriptor.word_bytes}")
        self._result: pb.RoundResult | None = None

    def take(self, index: int, content: _Content) -> None:
        """A message of site number ``index``."""
        if isinstance(content, pb.MaskedInputHeader):
            self._require_due(index, self._uploads, self._public.commitments)
            self._take_upload(index, content)
        elif isinstance(content, pb.SurvivorSignature):
            self._require_due(index, self._signatures, self._uploads if self._active else ())
            body = transcript.survivors_body(self._public.t1, self._public.t2(index), self._uploads)
            self._witness.verify(index, "survivors", body=body, signature=content.signature)
            self._signatures[index] = content.signature
        else:
            self._require_due(index, self._unmask, self._signatures if self._active else self._uploads)
            body = transcript.unmask_body(content)
            self._witness.verify(index, "unmask", body=body, signature=content.signature)
            self._check_unmask(index, content)
            self._unmask[index] = content

    def take_payload(self, index: int, data: bytes) -> None:
        """The masked vector whose header came before it."""
        header = self._uploads.get(index)
        self._verdict.count("hashes")
        good = header is not None and len(data) == self._descriptor.length * self._total.itemsize
        good = good and index not in self._payloads
        good = good and header is not None and transcript.payload_root(data) == header.root
        what = f"the vector of {self._name(index)!r} is not the one its header signs"
        if self._verdict.require(good, "FS-1329", what, AGGREGATOR):
            if not self._payloads:
                self._total = np.zeros(self._descriptor.length, dtype=self._total.dtype)
            np.add(self._total, np.frombuffer(data, dtype=self._total.dtype), out=self._total)
            self._payloads.add(index)

    def broadcast(self, kind: str, message: pb.ServerMessage) -> tuple[pb.ServerMessage, int, int]:
        """What must have been sent, on how many sites it rests, and the least there must be."""
        d, expected = self._descriptor, pb.ServerMessage()
        least = max(d.threshold, d.min_survivors)
        if kind == "survivor_list":
            expected.survivor_list.survivors.extend(sorted(self._uploads))
            return expected, len(self._uploads), least
        if kind == "survivor_signatures":
            expected.survivor_signatures.SetInParent()
            for i in sorted(self._signatures):
                expected.survivor_signatures.signatures.add(index=i, signature=self._signatures[i])
            return expected, len(self._signatures), d.threshold
        self._result = message.result
        return message, least, least

    def finish(self, sent: Collection[str], opened: Mapping[str, bytes]) -> Verdict:
        """What can be said only at the end; ``sent`` holds the kinds of broadcast that there were."""
        verdict = self._verdict
        verdict.survivors = self._witness.names(sorted(self._uploads))
        verdict.finished = self._result is not None
        dealings = Dealings(self._descriptor, self._dealt, self._uploads, self._unmask, opened, verdict)
        dealings.check_reports()
        if self._result is not None:
            self._check_end(self._result, sent)
        masks = dealings.open_masks(finished=verdict.finished)
        if self._result is not None and masks is not None and self._payloads == set(self._uploads):
            prg.add_masks(self._total, masks.plus, masks.minus)
            verdict.sum_checked = True
            verdict.count("sums")
            right = hashlib.sha256(self._total.tobytes()).digest() == self._result.sum_hash
            verdict.require(right, "FS-1386", "the sum is not that of the recorded vectors", AGGREGATOR)
        return verdict

    def _name(self, index: int) -> str:
        return self._descriptor.cohort[index - 1]

    def _require_due(self, index: int, taken: Collection[int], expected: Collection[int]) -> None:
        who = self._name(index)
        if index in taken:
            raise broken("FS-1324", f"a second message of {who!r} was taken", "one message a phase")
        if index not in expected:
            raise broken("FS-1325", f"a message of {who!r}, which had dropped out, was taken", "sites in the round")

    def _take_upload(self, index: int, header: pb.MaskedInputHeader) -> None:
        who, d = self._name(index), self._descriptor
        self._witness.verify(index, "masked-input", body=transcript.masked_body(header), signature=header.signature)
        self._verdict.count("hashes", 2)
        if (header.advertisements_hash, header.headers_hash) != (self._public.t1, self._public.t2(index)):
            raise broken("FS-1326", f"the vector of {who!r} is for other messages", "those that were sent to all")
        if (header.length, header.ring_bits) != (d.length, d.ring_bits):
            found = f"{who!r} sent {header.length} words of {header.ring_bits} bits"
            raise broken("FS-1329", found, f"{d.length} of {d.ring_bits}")
        reported = set(header.invalid_from)
        if len(reported) != len(header.invalid_from) or not reported <= set(self._public.commitments):
            raise transcript.malformed(f"a report of {who!r} about shares that is repeated or about a stranger")
        self._uploads[index] = header

    def _check_unmask(self, index: int, message: pb.Unmask) -> None:
        who, verdict = self._name(index), self._verdict
        seeds = [share.owner for share in message.seed_shares]
        mask_keys = [share.owner for share in message.mask_key_shares]
        verdict.count("share lists")
        # Its view is proven where it signed this survivor set; giving away both kinds is wrong in every view.
        authors = (who,) if index in self._signatures else (who, AGGREGATOR)
        both = set(seeds) & set(mask_keys)
        verdict.require(not both, "FS-1388", f"{who!r} gave away both kinds of share of one site", who)
        held, lives = self._dealt.owed(index), set(self._uploads)
        right = set(seeds) <= held & lives and set(mask_keys) <= held - lives
        once = len(set(seeds)) == len(seeds) and len(set(mask_keys)) == len(mask_keys)
        verdict.require(right and once, "FS-1321", f"{who!r} gave away shares that are not asked for", *authors)
        kept = held - set(self._uploads[index].invalid_from) - {*seeds, *mask_keys}
        verdict.require(not kept, "FS-1384", f"{who!r} kept shares back", *authors)

    def _check_end(self, result: pb.RoundResult, sent: Collection[str]) -> None:
        """The signed result, and that nothing was opened without the phases before."""
        verdict, need = self._verdict, {"advertisements", "routed_shares", "survivor_list"}
        named = list(result.survivors) == sorted(self._uploads) and result.context == self._witness.ctx
        verdict.require(named, "FS-1328", "a result of another round or of other survivors", AGGREGATOR)
        body, signature = transcript.result_body(result.survivors, result.sum_hash), result.signature
        verdict.guard(lambda: self._witness.verify_aggregator("result", body=body, signature=signature), AGGREGATOR)
        missing = (need | ({"survivor_signatures"} if self._active else set())) - set(sent)
        verdict.require(not missing, "FS-1383", f"a sum without {', '.join(sorted(missing))}", AGGREGATOR)
        unsent = self._set_up.unsent
        verdict.require(not unsent, "FS-1383", f"no record of the shares for {unsent} site(s)", AGGREGATOR)
        have, least = len(self._unmask), self._descriptor.threshold
        verdict.require(have >= least, "FS-1328", f"a sum opened with {have} of {least} sites' shares", AGGREGATOR)
