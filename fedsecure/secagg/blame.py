"""Who dealt or gave away a share that does not fit, in a recorded round (secagg.md §3.3, server finish).

A wrong share has two possible authors: the holder, who gave away another than it got, or the dealer, who dealt it so.
What was sealed tells them apart, and can be read only with one of the two cipher keys, which exist outside of the sites
only in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedsecure.errors import ProtocolError
from fedsecure.secagg import keys, sealing, shamir
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.recovery import Masks, recover
from fedsecure.secagg.verdict import AGGREGATOR, Verdict
from fedsecure.wire import secagg_pb2 as pb

KEY, SEED = 0, 1  # place of a share in what is sealed
_NAMES = ("mask key", "seed")


@dataclass(slots=True)
class Dealings:
    """Shares of one attempt: what was sealed for whom, and what was given away.

    Attributes:
        sealed: (dealer, holder) → ciphertext.
        opened: site → its X25519 cipher key of this attempt.
        verdict: where findings go.

    Raises:
        ProtocolError: FS-1389 an opened key is not the one advertised.
    """

    descriptor: RoundDescriptor
    ads: Mapping[int, pb.Advertisement]
    headers: Mapping[int, pb.ShareHeader]
    sealed: Mapping[tuple[int, int], bytes]
    uploads: Mapping[int, pb.MaskedInputHeader]
    unmask: Mapping[int, pb.Unmask]
    opened: Mapping[str, bytes]
    verdict: Verdict

    def __post_init__(self) -> None:
        for site, private in self.opened.items():
            index = self.descriptor.index(site) if site in self.descriptor.cohort else 0
            public = X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
            if index not in self.ads or self.ads[index].cipher_key != public:
                raise ProtocolError(
                    "FS-1389",
                    f"an opened key that {site!r} did not advertise",
                    expected="the cipher keys of this very attempt",
                    cure="give the keys of the attempt that the transcript records",
                )

    def check_reports(self) -> None:
        """Sealed shares that a site says it could not open, and those it should have said that of."""
        for holder, header in self.uploads.items():
            reported = set(header.invalid_from)
            for dealer in sorted(set(self.headers) - {holder}):
                known, dealt = self._dealt(dealer, holder)
                self.verdict.count("sealed shares", int(known))
                if known and dealt is None:
                    self._blame("FS-1385", f"the share for {self._name(holder)!r} does not open", dealer)
                elif known and dealer in reported:
                    self._blame("FS-1385", f"a good share of {self._name(dealer)!r} was reported as bad", holder)
                elif dealer in reported:
                    self._blame("FS-1385", f"{self._name(holder)!r} reports a share that does not open", holder, dealer)
            if not reported <= set(self.headers) - {holder}:
                self._blame("FS-1321", "a report about shares of no peer", holder)

    def open_masks(self) -> Masks | None:
        """The mask keys that hide the recorded sum, each compared with its commitment; ``None`` where one is lost."""
        masks, whole = Masks(), True
        for owner in sorted(self.headers):
            lives = owner in self.uploads
            secret = self._open(owner, SEED if lives else KEY)
            if secret is None:
                whole = False
            elif lives:
                masks.minus.append(keys.self_mask_key(secret, ctx=self.descriptor.ctx, index=owner))
            else:
                private = X25519PrivateKey.from_private_bytes(secret)
                for peer in sorted(self.uploads):
                    public = self.ads[peer].mask_key
                    key = keys.pair_mask_key(private, public, ctx=self.descriptor.ctx, own=owner, peer=peer)
                    (masks.minus if owner > peer else masks.plus).append(key)
        return masks if whole else None

    def _open(self, owner: int, place: int) -> bytes | None:
        given: dict[int, bytes] = {}
        for holder, message in self.unmask.items():
            shares = message.seed_shares if place == SEED else message.mask_key_shares
            for share in shares:
                if share.owner == owner:
                    given[holder] = share.share
        found = recover(given, self.descriptor.threshold, fits=self._fits(owner, place))
        self.verdict.count("commitments")
        if found is None:
            self._blame_all(owner, place, given)
            return None
        self.verdict.count("revealed shares", len(given))
        for holder in sorted(found[1]):
            what = f"a share of the {_NAMES[place]} of {self._name(owner)!r} given away by {self._name(holder)!r}"
            self._blame("FS-1384", f"{what} does not fit", *self._suspects(owner, holder, place, given[holder]))
        return found[0]

    def _fits(self, owner: int, place: int) -> Callable[[bytes], bool]:
        return partial(self._is_seed if place == SEED else self._is_key, owner)

    def _is_seed(self, owner: int, secret: bytes) -> bool:
        return keys.commit(secret, ctx=self.descriptor.ctx, index=owner) == self.headers[owner].seed_commitment

    def _is_key(self, owner: int, secret: bytes) -> bool:
        return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw() == self.ads[owner].mask_key

    def _blame_all(self, owner: int, place: int, given: Mapping[int, bytes]) -> None:
        t, what = self.descriptor.threshold, f"the {_NAMES[place]} of {self._name(owner)!r} does not come back"
        if len(given) < t:
            self.verdict.blame("FS-1328", f"{what}: {len(given)} of {t} shares", AGGREGATOR)
            return
        if len(given) > t and _on_one_line(given, t):
            # More holders than a secret needs would all have had to lie to the same polynomial.
            self._blame("FS-1387", f"{what}: its shares agree with each other and not with the commitment", owner)
            return
        suspects = {s for holder, share in given.items() for s in self._suspects(owner, holder, place, share)}
        self._blame("FS-1387", what, *sorted(suspects))

    def _suspects(self, owner: int, holder: int, place: int, share: bytes) -> tuple[int, ...]:
        known, dealt = self._dealt(owner, holder)
        if known:
            return (owner,) if dealt is None or dealt[place] == share else (holder,)
        return tuple(dict.fromkeys((holder, owner)))

    def _dealt(self, dealer: int, holder: int) -> tuple[bool, tuple[bytes, bytes] | None]:
        """Whether it can be known, and the two shares that were sealed, ``None`` where they do not open."""
        names = self._name(dealer), self._name(holder)
        sealed = self.sealed.get((dealer, holder))
        if sealed is None or not (names[0] in self.opened or names[1] in self.opened):
            return False, None
        sending = names[0] in self.opened
        private = X25519PrivateKey.from_private_bytes(self.opened[names[0] if sending else names[1]])
        public, ctx = self.ads[holder if sending else dealer].cipher_key, self.descriptor.ctx
        key = keys.share_key(private, public, ctx=ctx, sender=dealer, recipient=holder, sending=sending)
        t1 = bytes(self.headers[dealer].advertisements_hash)
        return True, sealing.unseal(key, sealed, ctx=ctx, t1=t1, sender=dealer, recipient=holder)

    def _name(self, index: int) -> str:
        return self.descriptor.cohort[index - 1]

    def _blame(self, code: str, what: str, *suspects: int) -> None:
        self.verdict.blame(code, what, *(self._name(index) for index in suspects))


def _on_one_line(given: Mapping[int, bytes], threshold: int) -> bool:
    """Whether all shares are of one polynomial of degree below ``threshold``."""
    base = dict(islice(sorted(given.items()), threshold))
    try:
        return all(shamir.interpolate(base, x) == shamir.element(share) for x, share in given.items())
    except ValueError:
        return False
