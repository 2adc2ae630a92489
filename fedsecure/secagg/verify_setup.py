"""Checking the recorded set-up of keys, R0 and R1, of one round or of all rounds of an epoch (secagg.md §3.3, §3.7,
§3.8).

The aggregator's own rules are applied to the recorded messages again. One that an honest aggregator would have refused
accuses the aggregator, beside its sender, and nothing is concluded from it against anybody.
"""

from __future__ import annotations

from fedsecure.identity.roster import Roster
from fedsecure.secagg import transcript
from fedsecure.secagg.blame import Dealt
from fedsecure.secagg.collection import KeyCollection
from fedsecure.secagg.party import Party, Setting, broken
from fedsecure.secagg.verdict import AGGREGATOR, Verdict
from fedsecure.wire import secagg_pb2 as pb


class Witness(Party):
    """Checks everybody's signatures over one context, and can make none."""

    def __init__(self, setting: Setting, roster: Roster, verdict: Verdict) -> None:
        self.cohort, self.ctx, self.aggregator_key = setting.cohort, setting.ctx, roster.aggregator_key
        public = {entry.site: entry.identity_key for entry in roster.entries}
        self.keys = {i: public.get(site, b"") for i, site in enumerate(setting.cohort, start=1)}
        self._verdict = verdict
        for site in setting.cohort:
            verdict.require(site in public, "FS-1335", f"{site!r} is in the cohort and not in the roster", AGGREGATOR)

    def verify(self, index: int, kind: str, *, body: bytes, signature: bytes) -> None:
        """FS-1323 unless site number ``index`` of the cohort made ``signature``."""
        self._verdict.count("signatures")
        super().verify(index, kind, body=body, signature=signature)

    def verify_aggregator(self, kind: str, *, body: bytes, signature: bytes) -> None:
        """FS-1323 unless the aggregator made ``signature``."""
        self._verdict.count("signatures")
        transcript.verify(self.aggregator_key, kind, ctx=self.ctx, body=body, signature=signature, who=AGGREGATOR)


class SetUpCheck:
    """R0 and R1 as a transcript tells them; what is refused raises ``ProtocolError``."""

    def __init__(self, setting: Setting, witness: Witness, verdict: Verdict) -> None:
        self._setting, self._witness, self._verdict = setting, witness, verdict
        self._collection = KeyCollection(setting, witness)
        self._sealed: dict[tuple[int, int], bytes] = {}
        self._advertised: pb.ServerMessage | None = None
        self._routed: dict[str, bytes] | None = None
        self._recorded: set[int] = set()

    def take(self, index: int, content: pb.Advertisement | pb.ShareKeys) -> None:
        """A message of site number ``index``."""
        who = self._witness.cohort[index - 1]
        if isinstance(content, pb.Advertisement):
            if index in self._collection.advertisements:
                raise broken("FS-1324", f"a second advertisement of {who!r}", "one")
            self._collection.take_advertisement(index, content)
            self._verdict.count("keys", 1 + self._setting.slots)
            return
        self.advertisements()
        if index in self._collection.headers:
            raise broken("FS-1324", f"second shares of {who!r}", "one message")
        if index not in self._collection.advertisements:
            raise broken("FS-1325", f"shares of {who!r}, which had dropped out", "a site that has advertised keys")
        self._collection.take_shares(index, content)
        self._verdict.count("hashes", 2)
        self._sealed.update(((index, share.recipient), share.ciphertext) for share in content.shares)

    def advertisements(self) -> pb.ServerMessage:
        """What all members of U1 must have been sent; U1 is fixed from here on."""
        if self._advertised is None:
            self._advertised = self._collection.close_advertise()
        return self._advertised

    def routed(self, index: int) -> pb.ServerMessage:
        """What site number ``index`` must have been sent; U2 is fixed from here on."""
        self._recorded.add(index)
        name = self._witness.cohort[index - 1] if index else ""
        return pb.ServerMessage.FromString(self._close().get(name, b""))

    @property
    def members(self) -> tuple[int, ...]:
        """U2, in protocol order."""
        return tuple(sorted(self._collection.headers))

    def count(self, kind: str) -> int:
        """How many sites a broadcast of this kind rests on."""
        return len(self._collection.advertisements if kind == "advertisements" else self._collection.headers)

    @property
    def unsent(self) -> int:
        """Members that were sent no shares, as far as the transcript says."""
        return len(set(self._collection.headers) - self._recorded)

    def dealt(self, slot: int = 0) -> Dealt:
        """What the round of ``slot`` rests on."""
        self._close()
        ads = self._collection.advertisements
        ciphers = {i: ad.cipher_key for i, ad in ads.items()}
        return Dealt(self._collection.public_keys(slot), ciphers, self._sealed, self._setting.slots, slot)

    def _close(self) -> dict[str, bytes]:
        self.advertisements()
        if self._routed is None:
            self._routed = dict(self._collection.close_shares())
        return self._routed
