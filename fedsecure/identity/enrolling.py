"""A site's own folder while it enrols or renews: keys that are made here and stay, and steps that can be repeated.

Until the coordinator has answered, ``enrolment.json`` (or ``renewal.json``) holds the request and what the invitation
pinned; never the token. It goes last, so that whatever was interrupted is done again with the same keys.
"""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from fedsecure.errors import IdentityError
from fedsecure.files import make_folder, write_whole
from fedsecure.identity import answers, certificates, keys
from fedsecure.identity.answers import Welcome
from fedsecure.identity.certificates import AGGREGATOR
from fedsecure.identity.invitations import Token, expired
from fedsecure.identity.provision import Identity, load_identity
from fedsecure.identity.requests import Request, enrolment, renewal
from fedsecure.identity.roster import Roster
from fedsecure.identity.spoken import federation_print
from fedsecure.identity.standing import differences, newer

FORMAT = "fedsecure-enrolling-1"
ADDRESS = "enrolment-address"
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Open:
    """A request under way.

    Attributes:
        request: as it is sent.
        address: ``host:port`` of the enrolment service, or empty.
        coordinator_key: Ed25519, 32 bytes, pinned.
        authority: the CA certificate, DER, pinned.
    """

    request: Request
    address: str
    coordinator_key: bytes
    authority: bytes

    @property
    def site_print(self) -> str:
        return self.request.fingerprint

    @property
    def federation_print(self) -> str:
        return federation_print(self.coordinator_key, self.authority)

    @property
    def ca(self) -> bytes:
        """The CA certificate, PEM."""
        return certificates.pem(self.authority)


def begin(folder: Path, token: Token, *, now: Clock = time.time) -> Open:
    """Make keys and request, or take up those of the same invitation; an ended one can be followed by a new one.

    Raises:
        IdentityError: FS-1463 the invitation is over, FS-1470 the folder is a member's or another site's.
    """
    invitation = token.invitation
    if invitation.expires <= now():
        raise expired(invitation.site, invitation.expires)
    if (folder / "certificate.pem").exists() and not (folder / "enrolment.json").exists():
        raise _taken(folder, "holds an identity already", "`fedsecure renew` for a new certificate, or a new folder")
    if (folder / "enrolment.json").exists():
        known = resume(folder)
        if (known.request.site, known.coordinator_key, known.authority) != (
            invitation.site,
            token.coordinator_key,
            token.authority,
        ):
            raise _taken(folder, "is enrolling with another invitation", "name another folder for this one")
        if known.request.invitation == invitation:
            return known
    make_folder(folder)
    identity, tls_key = _identity_key(folder / "identity.key"), _tls_key(folder / "tls-key.pem")
    request = enrolment(token, identity, tls_key, now=int(now()))
    opened = Open(request, token.address, token.coordinator_key, token.authority)
    _keep(folder / "enrolment.json", opened)
    return opened


def resume(folder: Path) -> Open:
    """The enrolment under way; IdentityError FS-1471 where there is none."""
    return _kept(folder / "enrolment.json", "enrolment", "give the token that the coordinator made for this site")


def finish(folder: Path, answer: bytes) -> Identity:
    """Check the coordinator's answer against what was pinned, and write the identity.

    Raises:
        IdentityError: FS-1466 not the answer to this request, FS-1467 refused, FS-1471 nothing is under way; and those
            of :func:`~fedsecure.identity.provision.load_identity`.
    """
    opened = resume(folder)
    welcome, roster = _checked(opened, answer)
    public = Ed25519PublicKey.from_public_bytes(opened.coordinator_key)
    pub = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    entry = roster.find(opened.request.site)
    invitation = opened.request.invitation
    if entry.identity_key != opened.request.identity_key or invitation is None or entry.role != invitation.role:
        raise answers.foreign("its roster has another key or role for this site")
    for name, content in (
        ("ca.pem", opened.ca),
        ("coordinator.pub", pub),
        ("roster.json", welcome.roster),
        (ADDRESS, opened.address.encode()),
        ("certificate.pem", welcome.certificate),
    ):
        write_whole(folder / name, content, mode=0o644)
    identity = load_identity(folder)
    (folder / "enrolment.json").unlink()
    return identity


def begin_renewal(folder: Path, *, address: str = "", now: Clock = time.time) -> Open:
    """A new TLS key beside the one in use, and a request that the identity key signs; or the one under way.

    Raises:
        IdentityError: those of loading the identity; an ended certificate can still be renewed.
    """
    if (folder / "renewal.json").exists():
        return resume_renewal(folder)
    certificate = certificates.parse(keys.read(folder / "certificate.pem"), "the certificate")
    # An ended certificate is no reason against a new one: the identity key speaks, not the certificate.
    identity = load_identity(folder, now=min(certificate.not_valid_after_utc, _moment(now)))
    hosts = _hosts(certificate) if identity.site == AGGREGATOR else []
    # A key without its request was left by a crash.
    (folder / "tls-key.next.pem").unlink(missing_ok=True)
    tls_key = _tls_key(folder / "tls-key.next.pem")
    request = renewal(identity.site, identity.signing_key, tls_key, hosts=hosts, now=int(now()))
    where = address or _address(folder)
    opened = Open(request, where, identity.coordinator_key, certificates.der(identity.ca))
    _keep(folder / "renewal.json", opened)
    return opened


def resume_renewal(folder: Path) -> Open:
    """The renewal under way; IdentityError FS-1471 where there is none."""
    return _kept(folder / "renewal.json", "renewal", "run `fedsecure renew` with --folder alone first")


def finish_renewal(folder: Path, answer: bytes) -> Identity:
    """Change over to the new key and certificate. The roster goes first: it accepts the old ones as well.

    Raises:
        IdentityError: as :func:`finish`; FS-1473 a roster that is older than the one here.
    """
    opened = resume_renewal(folder)
    welcome, _ = _checked(opened, answer, key=folder / "tls-key.next.pem")
    adopt(folder, welcome.roster)
    write_whole(folder / "tls-key.pem", keys.read_private(folder / "tls-key.next.pem"))
    write_whole(folder / "certificate.pem", welcome.certificate, mode=0o644)
    identity = load_identity(folder)
    (folder / "renewal.json").unlink()
    (folder / "tls-key.next.pem").unlink()
    return identity


def adopt(folder: Path, sealed: bytes) -> tuple[Roster, list[str]]:
    """Put a newer roster into a member's folder; the roster in force, and what changed.

    Raises:
        IdentityError: FS-1473 and others of :func:`~fedsecure.identity.standing.newer`.
    """
    coordinator_key = keys.load_public_key(folder / "coordinator.pub")
    current = Roster.load(folder / "roster.json", coordinator_key)
    roster = newer(current, sealed, coordinator_key)
    if roster is not current:
        write_whole(folder / "roster.json", sealed, mode=0o644)
    return roster, differences(current, roster)


def roster_request(site: str, made: int) -> tuple[str, bytes]:
    """Purpose and body of what a member signs to be given the newest roster; ``made`` in Unix seconds."""
    return "fedsecure/roster-request/v1", made.to_bytes(8, "big") + site.encode()


def enrolment_address(folder: Path, given: str = "") -> str:
    """Where the enrolment service is; IdentityError FS-1471 where neither the folder nor the caller says."""
    address = given or _address(folder)
    if not address:
        raise IdentityError(
            "FS-1471",
            f"{folder} does not say where the enrolment service is",
            expected=f"an address in its file {ADDRESS}, as an enrolment writes it",
            cure="give --address host:port, or carry files with --out and --welcome",
        )
    return address


def _checked(opened: Open, answer: bytes, *, key: Path | None = None) -> tuple[Welcome, Roster]:
    """The welcome to this request: signed, of the pinned CA, for the key that is here, with a roster as new."""
    request = opened.request
    welcome = answers.opened(answer, request=request.digest, coordinator_key=opened.coordinator_key)
    if certificates.check(welcome.certificate, opened.ca) != request.site:
        raise answers.foreign("its certificate is another member's")
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    certified = certificates.parse(welcome.certificate, "the certificate").public_key().public_bytes(*form)
    if certified != request.tls_key.public_bytes(*form):
        raise answers.foreign("its certificate is for another key")
    if key is not None and not certificates.key_matches(keys.read_private(key), welcome.certificate):
        raise answers.foreign(f"its certificate is for another key than {key.name}")
    roster = Roster.opened(welcome.roster, opened.coordinator_key)
    if roster.version < welcome.version:
        raise answers.foreign("its roster is older than its certificate")
    return welcome, roster


def _identity_key(file: Path) -> Ed25519PrivateKey:
    if not file.exists():
        _write_key(file, keys.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return keys.load_private_key(file)


def _tls_key(file: Path) -> ec.EllipticCurvePrivateKey:
    if not file.exists():
        key = ec.generate_private_key(ec.SECP256R1())
        _write_key(file, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    try:
        found = load_pem_private_key(keys.read_private(file), password=None)
    except (ValueError, TypeError):
        found = None
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise _taken(file, "is no ECDSA key", "name another folder")
    return found


def _write_key(file: Path, content: bytes) -> None:
    """Whole or not at all, and only where there is none."""
    write_whole(file, content, mode=0o600)


def _keep(file: Path, opened: Open) -> None:
    raw = {
        "format": FORMAT,
        "address": opened.address,
        "coordinator_key": opened.coordinator_key.hex(),
        "authority": opened.authority.hex(),
        "request": opened.request.sealed().decode(),
    }
    write_whole(file, (json.dumps(raw, indent=2) + "\n").encode())


def _kept(file: Path, what: str, cure: str) -> Open:
    try:
        raw = json.loads(keys.read(file))
        if raw["format"] != FORMAT:
            raise ValueError("unknown format")
        key, authority = bytes.fromhex(raw["coordinator_key"]), bytes.fromhex(raw["authority"])
        opened = Open(Request.opened(raw["request"].encode()), str(raw["address"]), key, authority)
        certificates.pem(authority)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IdentityError) as error:
        raise IdentityError(
            "FS-1471",
            f"no {what} is under way in {file.parent}",
            expected=f"the {file.name} of a {what} that was begun",
            cure=cure,
        ) from error
    return opened


def _address(folder: Path) -> str:
    try:
        return (folder / ADDRESS).read_text()[:300].strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _hosts(certificate: x509.Certificate) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = names.get_values_for_type(x509.IPAddress)
    return [*names.get_values_for_type(x509.DNSName), *(str(address) for address in addresses)]


def _moment(now: Clock) -> dt.datetime:
    return dt.datetime.fromtimestamp(now(), dt.UTC)


def _taken(place: Path, found: str, cure: str) -> IdentityError:
    return IdentityError(
        "FS-1470",
        f"{place} {found}",
        expected="a new folder, or the one in which this enrolment was begun",
        cure=cure,
    )
