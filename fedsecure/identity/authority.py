"""The coordinator's acts on the ``ca/`` folder: invite, approve, refuse, renew, revoke (docs/enrolment.md).

Nothing here needs a network: requests come in and answers go out as bytes. One process at a time works on a folder.
"""

from __future__ import annotations

import datetime as dt
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fedsecure.errors import IdentityError
from fedsecure.files import write_whole
from fedsecure.identity import certificates, invitations, keys
from fedsecure.identity.answers import Refusal, Welcome
from fedsecure.identity.certificates import AGGREGATOR, Issued
from fedsecure.identity.invitations import Token, expired
from fedsecure.identity.register import Invited, Issue, Register, Revoked
from fedsecure.identity.requests import Request, altered, unauthenticated
from fedsecure.identity.roster import Role, Roster, RosterEntry
from fedsecure.identity.spoken import confirm, federation_print

# How long a certificate before a renewal stays in later rosters: time to bring the new roster to everybody.
GRACE_SECONDS = 14 * 86_400


@dataclass(frozen=True, slots=True)
class Member:
    """A line of ``fedsecure members list``; times in Unix seconds, 0 where they are not known here."""

    site: str
    role: str
    until: int
    previous: bool
    identity_key: bytes


class Authority:
    """The open CA folder; use :func:`open_authority`.

    Attributes:
        roster: the newest.
        coordinator_key: Ed25519 public key, 32 bytes.
        authority: the CA certificate, DER.
    """

    def __init__(self, folder: Path, *, now: Callable[[], float] = time.time) -> None:
        self._folder, self._now = folder, now
        self._coordinator = keys.load_private_key(folder / "coordinator.key")
        self.coordinator_key = keys.public_bytes(self._coordinator)
        self._issuer = Issued(keys.read(folder / "ca.pem"), keys.read_private(folder / "ca-key.pem"))
        self.authority = certificates.der(self._issuer.certificate)
        self._register = Register.load(folder / "register.json")
        copy = folder / "roster.json"
        sealed = self._register.roster or keys.read(copy)
        self.roster = Roster.opened(sealed, self.coordinator_key, name=str(copy))
        if not copy.exists() or copy.read_bytes() != sealed:
            # The last act ended between the register and this copy.
            write_whole(copy, sealed, mode=0o644)
        self._register.roster = sealed

    @property
    def federation_print(self) -> str:
        """What every site's screen shows of the federation."""
        return federation_print(self.coordinator_key, self.authority)

    @property
    def sealed_roster(self) -> bytes:
        """The newest roster's file."""
        return self._register.roster

    @property
    def open_invitations(self) -> list[invitations.Invitation]:
        """Neither used nor over."""
        now = self._now()
        return [i.invitation for i in self._register.invited.values() if not i.request and i.invitation.expires > now]

    @property
    def members(self) -> list[Member]:
        """The aggregator and all sites."""
        roster, issued = self.roster, self._register.issued
        own = (AGGREGATOR, AGGREGATOR, roster.aggregator_previous, roster.aggregator_key)
        lines = [own, *((e.site, str(e.role), e.previous, e.identity_key) for e in roster.entries)]
        return [
            Member(site, role, issued[site].until if site in issued else 0, bool(previous), key)
            for site, role, previous, key in lines
        ]

    @property
    def revoked(self) -> Sequence[Revoked]:
        return tuple(self._register.revoked)

    def invite(self, site: str, role: Role, *, hours: float, address: str) -> Token:
        """A one-time token for a site that is no member yet.

        Raises:
            IdentityError: FS-1422 no site id or role, FS-1476 a member already.
        """
        self._check_new(site)
        # Its rules refuse a bad id or role before anything is signed for it.
        replace(self.roster, entries=(RosterEntry(site, role, bytes(32), bytes([1] * 32)),))
        token = invitations.invite(
            site,
            role,
            expires=int(self._now() + hours * 3600),
            address=address,
            coordinator=self._coordinator,
            authority=self.authority,
        )
        self._register.invited[token.invitation.verifier.hex()] = Invited(token.invitation)
        self._save()
        return token

    def approve(self, request: Request, *, confirmation: str) -> Welcome:
        """Make a site a member; the same request again gets the same answer.

        Args:
            confirmation: the beginning of the request's fingerprint as the site read it out, three groups at least.

        Raises:
            IdentityError: FS-1462, FS-1465 the request; FS-1463 too late, FS-1464 the invitation is used or withdrawn,
                FS-1468 the key was revoked, FS-1469 the confirmation, FS-1476 a member already.
        """
        request.check(self.coordinator_key)
        if request.kind != "enrol" or request.invitation is None:
            raise unauthenticated()
        given = self._given(request)
        if given is not None:
            return given
        self._check_invitation(request)
        self._check_new(request.site)
        self._check_revoked(request)
        confirm(request.fingerprint, confirmation)
        verifier = request.invitation.verifier.hex()
        certificate = self._certificate(request)
        entry = RosterEntry(
            request.site, request.invitation.role, request.identity_key, certificates.fingerprint(certificate)
        )
        entries = tuple(sorted((*self.roster.entries, entry), key=lambda e: e.site))
        self._register.invited[verifier] = replace(self._register.invited[verifier], request=request.digest.hex())
        return self._admit(request, certificate, replace(self.roster, entries=entries))

    def renew(self, request: Request) -> Welcome:
        """A certificate for a member's new TLS key; the identity key of the roster speaks for it.

        The one before stays accepted; it leaves the roster with the next change after ``GRACE_SECONDS``.

        Raises:
            IdentityError: FS-1462 no member's key, FS-1465 altered, or older than the last one.
        """
        request.check(self.coordinator_key)
        roster = self.roster
        mine = [e for e in roster.entries if e.site == request.site]
        known = roster.aggregator_key if request.site == AGGREGATOR else mine[0].identity_key if mine else b""
        if request.kind != "renew" or request.identity_key != known:
            raise unauthenticated()
        given = self._given(request)
        if given is not None:
            return given
        last = self._register.issued.get(request.site)
        if last is not None and request.made < last.made:
            raise altered("it is older than this member's last one")
        certificate = self._certificate(request)
        print_ = certificates.fingerprint(certificate)
        if request.site == AGGREGATOR:
            changed = replace(roster, aggregator_fingerprint=print_, aggregator_previous=roster.aggregator_fingerprint)
        else:
            entry = replace(mine[0], tls_fingerprint=print_, previous=mine[0].tls_fingerprint)
            changed = replace(roster, entries=tuple(entry if e is mine[0] else e for e in roster.entries))
        return self._admit(request, certificate, changed)

    def refuse(self, request: Request, reason: str) -> Refusal | Welcome:
        """Answer no; an invitation is used up by it. What was answered before stays answered."""
        request.check(self.coordinator_key)
        given = self._register.answers.get(request.digest.hex())
        if given is not None:
            return replace(given, roster=self.sealed_roster) if isinstance(given, Welcome) else given
        refusal = Refusal(request.digest, reason[:500]).signed(self._coordinator)
        self._register.answers[request.digest.hex()] = refusal
        if request.invitation is not None:
            verifier = request.invitation.verifier.hex()
            known = self._register.invited.get(verifier)
            if known is not None and not known.request:
                self._register.invited[verifier] = replace(known, request=request.digest.hex())
        self._save()
        return refusal

    def withdraw(self, site: str) -> int:
        """Withdraw the open invitations of a site; returns how many there were."""
        mine = [i for i in self.open_invitations if i.site == site]
        for one in mine:
            self._register.invited[one.verifier.hex()] = Invited(one, request="withdrawn")
        self._save()
        return len(mine)

    def revoke(self, site: str) -> Roster:
        """Take a site out of the roster for good: its keys are never admitted again. FS-1423 where it is none."""
        entry = self.roster.find(site)
        fingerprints = tuple(value for value in entry.fingerprints)
        self._register.revoked.append(Revoked(site, entry.identity_key, fingerprints, int(self._now())))
        self._register.issued.pop(site, None)
        self._adopt(replace(self.roster, entries=tuple(e for e in self.roster.entries if e is not entry)))
        self._save()
        return self.roster

    # --- inside -----------------------------------------------------------------------------------------------------

    def _given(self, request: Request) -> Welcome | None:
        answer = self._register.answers.get(request.digest.hex())
        if isinstance(answer, Refusal):
            raise IdentityError(
                "FS-1464",
                f"the request of {request.site!r} was refused before",
                expected="a request with an invitation that was not used",
                cure="invite the site again if the refusal was a mistake",
            )
        return replace(answer, roster=self.sealed_roster) if answer else None

    def _check_invitation(self, request: Request) -> None:
        assert request.invitation is not None
        known = self._register.invited.get(request.invitation.verifier.hex())
        if known is None or known.request:
            raise IdentityError(
                "FS-1464",
                f"the invitation of {request.site!r} was "
                + ("used or withdrawn" if known else "not made with this ca/"),
                expected="an invitation that was not used: each admits one request",
                cure="invite the site again; if it did not use the first invitation, somebody else did",
            )
        if request.invitation.expires <= self._now():
            raise expired(request.site, request.invitation.expires)

    def _check_new(self, site: str) -> None:
        if any(entry.site == site for entry in self.roster.entries):
            raise IdentityError(
                "FS-1476",
                f"{site!r} is a member already",
                expected="a site that is not in the roster",
                cure="renew its certificate with `fedsecure renew` at the site, or revoke it first",
            )

    def _check_revoked(self, request: Request) -> None:
        if any(one.identity_key == request.identity_key for one in self._register.revoked):
            raise IdentityError(
                "FS-1468",
                f"the identity key of this request of {request.site!r} was revoked",
                expected="new keys",
                cure="refuse it; after the cause is mended, invite the site again and have it enrol in a new folder",
            )

    def _certificate(self, request: Request) -> bytes:
        moment = dt.datetime.fromtimestamp(self._now(), dt.UTC)
        hosts = request.hosts if request.site == AGGREGATOR else []
        return certificates.certify(
            self._issuer, request.site, request.tls_key, hosts=hosts, days=certificates.DAYS, now=moment
        )

    def _admit(self, request: Request, certificate: bytes, roster: Roster) -> Welcome:
        """Next roster, register entry and welcome, all in one write."""
        end = certificates.parse(certificate, "the new certificate").not_valid_after_utc
        self._register.issued[request.site] = Issue(int(end.timestamp()), request.made, int(self._now()))
        self._adopt(roster)
        welcome = Welcome(request.digest, certificate, self._issuer.certificate, self.roster.version)
        self._register.answers[request.digest.hex()] = welcome.signed(self._coordinator)
        self._save()
        given = self._given(request)
        assert given is not None
        return given

    def _adopt(self, roster: Roster) -> None:
        """The next version, without certificates whose grace is over."""
        over = {m for m, i in self._register.issued.items() if self._now() - i.when > GRACE_SECONDS}
        self.roster = replace(
            roster,
            version=self.roster.version + 1,
            entries=tuple(replace(e, previous=b"") if e.site in over else e for e in roster.entries),
            aggregator_previous=b"" if AGGREGATOR in over else roster.aggregator_previous,
        )
        self._register.roster = self.roster.sealed(self._coordinator)

    def _save(self) -> None:
        self._register.save(self._folder / "register.json")
        write_whole(self._folder / "roster.json", self.sealed_roster, mode=0o644)


@contextmanager
def open_authority(folder: Path, *, now: Callable[[], float] = time.time) -> Iterator[Authority]:
    """The CA folder, or a federation's folder with ``ca/`` in it, for one process at a time.

    Raises:
        IdentityError: FS-1400 to FS-1402 its keys, FS-1420 to FS-1422 its roster, FS-1479 its register.
    """
    place = folder / "ca" if (folder / "ca").is_dir() else folder
    try:
        lock = os.open(place, os.O_RDONLY)
    except OSError as error:
        raise IdentityError(
            "FS-1479",
            f"{place} cannot be opened ({error.strerror})",
            expected="the folder that `fedsecure init` made, or its ca/",
            cure="name the folder with the coordinator's keys",
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Authority(place, now=now)
    finally:
        os.close(lock)
