"""One side of a round as a signer: its own key, everybody's roster keys, and the context that every signature covers.

Keys come from the verified roster, never from the other side (secagg.md §2.7, §3.2).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsecure.errors import ProtocolError
from fedsecure.identity import keys as identity_keys
from fedsecure.identity.roster import Roster
from fedsecure.secagg import transcript


class Setting(Protocol):
    """What keys are set up for: a round, or an epoch of rounds."""

    @property
    def roster_hash(self) -> bytes: ...
    @property
    def cohort(self) -> tuple[str, ...]: ...
    @property
    def ctx(self) -> bytes: ...
    @property
    def threshold(self) -> int: ...
    @property
    def min_survivors(self) -> int: ...
    @property
    def neighbours(self) -> int: ...
    @property
    def slots(self) -> int: ...


class Party:
    """A site (``site`` given) or the aggregator (``None``) in one round, or in the set-up of an epoch.

    Raises:
        ProtocolError: FS-1336 not in the cohort, FS-1337 another roster, FS-1343 the key is not the roster's.
    """

    def __init__(
        self,
        descriptor: Setting,
        *,
        site: str | None,
        signing_key: Ed25519PrivateKey,
        roster: Roster,
    ) -> None:
        if descriptor.roster_hash != roster.hash:
            raise broken("FS-1337", "a round for another roster", f"roster {roster.hash.hex()[:16]}…")
        if site is not None and site not in descriptor.cohort:
            raise broken("FS-1336", f"a cohort without {site!r}", "a cohort with this site in it")
        self.cohort, self.ctx = descriptor.cohort, descriptor.ctx
        self.aggregator_key = roster.aggregator_key
        entries = {entry.site: entry for entry in roster.entries}
        members = (entries.get(member) or roster.find(member) for member in self.cohort)
        self.keys = {i: member.identity_key for i, member in enumerate(members, start=1)}
        self._signing_key = signing_key
        expected = self.aggregator_key if site is None else roster.find(site).identity_key
        if identity_keys.public_bytes(signing_key) != expected:
            who = site or "the aggregator"
            raise broken("FS-1343", f"a signing key that is not {who!r}'s", "the key that the roster names")

    def sign(self, kind: str, body: bytes) -> bytes:
        """Signature of a message of this type in this round."""
        return transcript.sign(self._signing_key, kind, self.ctx, body)

    def verify(self, index: int, kind: str, *, body: bytes, signature: bytes) -> None:
        """FS-1323 unless site number ``index`` of the cohort made ``signature``."""
        who, key = self.cohort[index - 1], self.keys[index]
        transcript.verify(key, kind, ctx=self.ctx, body=body, signature=signature, who=who)

    def names(self, indices: Iterable[int]) -> tuple[str, ...]:
        """Site ids of protocol indices, in the order given."""
        return tuple(self.cohort[i - 1] for i in indices)


def broken(code: str, found: str, expected: str) -> ProtocolError:
    """A message or a call that breaks a rule of the protocol."""
    return ProtocolError(
        code,
        found,
        expected=expected,
        cure="drop what was received; if the attempt is over, let the aggregator start a new one",
    )
