"""Who dealt, altered or gave away a share that does not fit, in a recorded round (secagg.md §3.3, server finish).

What each signature proves. A dealer signs its public keys, its commitments and the hash of what it sealed for all
holders. A holder signs that it saw these very headers, which sealed shares did not open, and the shares it gives away.
Nobody signs what a holder *received*. Hence, without opening anything:

* a share off the polynomial was dealt so or given away so: holder or dealer. Nobody else can make a sealed share that
  opens, so a third party can at most keep one from the holder, who then says so;
* a sealed share that was reported as bad was sealed so, altered on its way, or opened after all: dealer, aggregator or
  holder.

What was sealed tells more. It opens with the key of that one pair, which both cipher keys give, and these exist outside
of the sites only in tests: one sealed message holds *both* kinds of share of its dealer, so every pair that is opened
counts as one more colluder against that dealer. A dealer that sealed garbage, or a share off the polynomial, is then
named alone, for it signed the hash of it. A holder that gave away another share than was sealed is not: dealer and
aggregator together may have passed it another message, so the aggregator is named with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedsecure.errors import ProtocolError
from fedsecure.secagg import keys, sealing, shamir
from fedsecure.secagg.collection import PublicKeys
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.recovery import Masks, recover, suspects
from fedsecure.secagg.verdict import AGGREGATOR, Verdict
from fedsecure.wire import secagg_pb2 as pb

KEY, SEED = 0, 1  # place of a share in what is sealed
_NAMES = ("mask key", "seed")


@dataclass(frozen=True, slots=True)
class Dealt:
    """What a recorded set-up leaves for one of its rounds.

    Attributes:
        public: keys and commitments of the round's slot.
        cipher_keys: site → c_pub.
        sealed: (dealer, holder) → ciphertext, with the shares of all slots.
        slots, slot: how many there are, and the round's.
    """

    public: PublicKeys
    cipher_keys: Mapping[int, bytes]
    sealed: Mapping[tuple[int, int], bytes]
    slots: int
    slot: int

    def owed(self, holder: int) -> set[int]:
        """Sites of U2 of whose secrets ``holder`` got shares."""
        return {owner for owner in self.public.commitments if holder in self.public.graph.holders(owner)}


@dataclass(slots=True)
class Dealings:
    """Shares of one attempt: what was sealed for whom, and what was given away.

    Attributes:
        dealt: of the set-up.
        uploads, unmask: what the sites signed.
        opened: site → its X25519 cipher key of this set-up.
        verdict: where findings go.

    Raises:
        ProtocolError: FS-1389 an opened key is not the one advertised.
    """

    descriptor: RoundDescriptor
    dealt: Dealt
    uploads: Mapping[int, pb.MaskedInputHeader]
    unmask: Mapping[int, pb.Unmask]
    opened: Mapping[str, bytes]
    verdict: Verdict
    _wrong: set[int] = field(default_factory=set)  # holders of shares that did not fit: tried last from then on
    _lost: bool = False  # a secret did not come back, and the sum with it: no further search is worth its time

    def __post_init__(self) -> None:
        for site, private in self.opened.items():
            index = self.descriptor.index(site) if site in self.descriptor.cohort else 0
            public = X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
            if self.dealt.cipher_keys.get(index) != public:
                raise ProtocolError(
                    "FS-1389",
                    f"an opened key that {site!r} did not advertise",
                    expected="the cipher keys of this very attempt",
                    cure="give the keys of the attempt that the transcript records",
                )

    def check_reports(self) -> None:
        """Sealed shares that a site says it could not open, and those it should have said that of."""
        for holder, header in self.uploads.items():
            reported, peers = set(header.invalid_from), self.dealt.owed(holder) - {holder}
            for dealer in sorted(peers):
                known, dealt = self._dealt(dealer, holder)
                self.verdict.count("sealed shares", int(known))
                who = f"{self._name(holder)!r}"
                if known and dealt is None:
                    self._blame("FS-1385", f"the share for {who} does not open", dealer)
                elif known and dealer in reported:
                    what = f"a good share of {self._name(dealer)!r} was reported as bad, or altered on its way"
                    self._blame("FS-1385", what, holder, aggregator=True)
                elif dealer in reported:
                    self._blame("FS-1385", f"{who} reports a share that does not open", holder, dealer, aggregator=True)
            if not reported <= peers:
                self._blame("FS-1321", "a report about shares of no peer", holder)

    def open_masks(self, *, finished: bool) -> Masks | None:
        """The mask keys that hide the recorded sum, each compared with its commitment; ``None`` where one is lost.

        In an attempt that was not ``finished``, secrets with fewer than t shares are passed over.
        """
        masks, whole, ctx = Masks(), True, self.descriptor.ctx
        public = self.dealt.public
        for owner in sorted(public.commitments):
            lives = owner in self.uploads
            near = sorted(set(self.uploads).intersection(public.graph.peers(owner)))
            if not (lives or near):
                continue
            secret = self._open(owner, SEED if lives else KEY, finished)
            if secret is None:
                whole = False
            elif lives:
                masks.minus.append(keys.self_mask_key(secret, ctx=ctx, index=owner))
            else:
                private = X25519PrivateKey.from_private_bytes(secret)
                for peer in near:
                    key = keys.pair_mask_key(private, public.mask_keys[peer], ctx=ctx, own=owner, peer=peer)
                    (masks.minus if owner > peer else masks.plus).append(key)
        return masks if whole else None

    def _open(self, owner: int, place: int, finished: bool) -> bytes | None:
        given: dict[int, bytes] = {}
        for holder, message in self.unmask.items():
            shares = message.seed_shares if place == SEED else message.mask_key_shares
            given.update((holder, share.share) for share in shares if share.owner == owner)
        t, c = self.descriptor.threshold, self.descriptor.colluders
        what = f"the {_NAMES[place]} of {self._name(owner)!r}"
        if len(given) < t:
            if finished:
                self.verdict.blame("FS-1328", f"{what} does not come back: {len(given)} of {t} shares", AGGREGATOR)
            return None
        self.verdict.count("commitments")
        found = recover(given, t, fits=self._fits(owner, place), suspects=self._wrong, tries=1 if self._lost else None)
        if found is None:
            self._lost = True
            if len(given) >= t + c and _on_one_line(given, t):
                # More than c holders would all have had to lie to the same polynomial.
                self._blame("FS-1387", f"{what} is shared well, and is not what was committed to", owner)
            else:
                self._blame_some("FS-1387", f"{what} does not come back", owner, place, given)
            return None
        self.verdict.count("revealed shares", len(given))
        secret, wrong = found
        self._wrong |= wrong
        for group in suspects(owner, wrong, given, threshold=t, colluders=c):
            if len(group) <= 2:
                right = {holder: share for holder, share in given.items() if holder not in wrong}
                self._blame_pair(f"a share of {what}", owner, group[0], place, given[group[0]], _at(right, t, group[0]))
            else:
                self._blame_some("FS-1384", f"a share of {what} does not fit", owner, place, given)
        return secret

    def _fits(self, owner: int, place: int) -> Callable[[bytes], bool]:
        return partial(self._is_seed if place == SEED else self._is_key, owner)

    def _is_seed(self, owner: int, secret: bytes) -> bool:
        public = self.dealt.public
        return keys.commit(secret, ctx=public.ctx, index=owner) == public.commitments[owner]

    def _is_key(self, owner: int, secret: bytes) -> bool:
        public = X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
        return public == self.dealt.public.mask_keys[owner]

    def _blame_pair(self, what: str, owner: int, holder: int, place: int, share: bytes, right: bytes) -> None:
        """A share off a polynomial that is certain."""
        known, dealt = self._dealt(owner, holder)
        name = f"{what} does not fit, given away by {self._name(holder)!r}"
        if known and (dealt is None or dealt[place] != right):
            self._blame("FS-1384", name, owner)
        elif known:
            self._blame("FS-1384", name, holder, aggregator=True)
        else:
            self._blame("FS-1384", name, holder, owner)

    def _blame_some(self, code: str, what: str, owner: int, place: int, given: Mapping[int, bytes]) -> None:
        """Shares of which nobody can say by themselves which are wrong."""
        sealed = {holder: self._dealt(owner, holder) for holder in given}
        false = [h for h, (known, dealt) in sealed.items() if known and dealt is not None and dealt[place] != given[h]]
        unknown = [] if (True, None) in sealed.values() else [h for h, (known, _) in sealed.items() if not known]
        for holder in false:
            self._blame(code, f"{what}; {self._name(holder)!r} gave another", holder, aggregator=True)
        if not false:
            self._blame(code, what, owner, *sorted(unknown))

    def _dealt(self, dealer: int, holder: int) -> tuple[bool, tuple[bytes, ...] | None]:
        """Whether it can be known, and the two shares that were sealed, ``None`` where they do not open."""
        names = self._name(dealer), self._name(holder)
        sealed = self.dealt.sealed.get((dealer, holder))
        if sealed is None or not (names[0] in self.opened or names[1] in self.opened):
            return False, None
        sending = names[0] in self.opened
        private = X25519PrivateKey.from_private_bytes(self.opened[names[0] if sending else names[1]])
        public, ctx, at = self.dealt.cipher_keys[holder if sending else dealer], self.dealt.public.ctx, self.dealt.slot
        key = keys.share_key(private, public, ctx=ctx, sender=dealer, recipient=holder, sending=sending)
        t1, slots = self.dealt.public.t1, self.dealt.slots
        opened = sealing.unseal_all(key, sealed, ctx=ctx, t1=t1, sender=dealer, recipient=holder, slots=slots)
        return True, None if opened is None else opened[2 * at : 2 * at + 2]

    def _name(self, index: int) -> str:
        return self.descriptor.cohort[index - 1]

    def _blame(self, code: str, what: str, *sites: int, aggregator: bool = False) -> None:
        names = dict.fromkeys(self._name(index) for index in sites)
        self.verdict.blame(code, what, *names, *((AGGREGATOR,) if aggregator else ()))


def _base(given: Mapping[int, bytes], threshold: int) -> dict[int, bytes]:
    return dict(islice(sorted(given.items()), threshold))


def _at(right: Mapping[int, bytes], threshold: int, holder: int) -> bytes:
    """The share that ``holder`` would have on the polynomial through the right shares."""
    return shamir.interpolate(_base(right, threshold), holder).to_bytes(shamir.SHARE_BYTES, "big")


def _on_one_line(given: Mapping[int, bytes], threshold: int) -> bool:
    """Whether all shares are of one polynomial of degree below ``threshold``."""
    base = _base(given, threshold)
    try:
        return all(shamir.interpolate(base, x) == shamir.element(share) for x, share in given.items())
    except ValueError:
        return False
