"""TLS certificates of a federation: one ECDSA P-256 authority, one server certificate, one client each site
(RFC 5280).

A site's certificate carries its id as common name and as the URI ``fedsecure:site:<id>``. Validity starts
five minutes early, so that small clock differences do not lock a new site out.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsecure.errors import IdentityError

AGGREGATOR = "aggregator"
EARLY = dt.timedelta(minutes=5)
DAYS = 365
NOTICE = dt.timedelta(days=30)
_DAY = dt.timedelta(days=1)
SITE_URI = "fedsecure:site:"


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate and its ECDSA P-256 key, both PEM."""

    certificate: bytes
    key: bytes = field(repr=False)


def make_authority(federation: str, *, days: int, now: dt.datetime | None = None) -> Issued:
    """A self-signed authority that may sign end certificates only, valid for ``days`` days."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"{federation} federation CA"[:64])
    builder = _builder(name, name, key.public_key(), days, now)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(authority=True), critical=True)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    builder = builder.add_extension(identifier, critical=False)
    return _issued(builder.sign(key, hashes.SHA256()), key)


def issue_server(authority: Issued, hosts: Sequence[str], *, days: int, now: dt.datetime | None = None) -> Issued:
    """The aggregator's certificate; ``hosts`` are the DNS names and IP addresses that sites dial."""
    return _issue(authority, AGGREGATOR, host_names(hosts), ExtendedKeyUsageOID.SERVER_AUTH, days, now)


def issue_site(authority: Issued, site: str, *, days: int, now: dt.datetime | None = None) -> Issued:
    """A site's client certificate: common name and URI carry its id."""
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(SITE_URI + site)]
    return _issue(authority, site, names, ExtendedKeyUsageOID.CLIENT_AUTH, days, now)


def certify(
    authority: Issued,
    member: str,
    key: ec.EllipticCurvePublicKey,
    *,
    hosts: Sequence[str] = (),
    days: int,
    now: dt.datetime | None = None,
) -> bytes:
    """A PEM certificate for a key made elsewhere: the aggregator's for ``hosts``, or else a site's.

    It ends with the authority's own certificate at the latest.
    """
    if member == AGGREGATOR:
        names, purpose = host_names(hosts), ExtendedKeyUsageOID.SERVER_AUTH
    else:
        names, purpose = [x509.UniformResourceIdentifier(SITE_URI + member)], ExtendedKeyUsageOID.CLIENT_AUTH
    return _certify(authority, member, names, purpose, key, days, now).public_bytes(Encoding.PEM)


def host_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """DNS names and IP addresses as a certificate carries them."""
    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    return names


def parse(pem: bytes, what: str) -> x509.Certificate:
    """The first certificate of a PEM file; ``what`` names it in the error FS-1410."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise IdentityError(
            "FS-1410",
            f"{what} is no PEM certificate",
            expected="-----BEGIN CERTIFICATE----- and a valid X.509 certificate",
            cure="put back the file that provisioning made",
        ) from error


def fingerprint(certificate: x509.Certificate | bytes) -> bytes:
    """SHA-256 (32 bytes) of the DER certificate; accepts PEM bytes, of which the first certificate counts."""
    if isinstance(certificate, bytes):
        certificate = parse(certificate, "the certificate")
    return certificate.fingerprint(hashes.SHA256())


def der(pem: bytes) -> bytes:
    """The first certificate of a PEM file, in DER."""
    return parse(pem, "the certificate").public_bytes(Encoding.DER)


def pem(der: bytes) -> bytes:
    """A DER certificate as PEM; ValueError where it is none."""
    return x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)


def ending(certificate: bytes, authority: bytes, *, now: dt.datetime | None = None) -> list[str]:
    """A sentence for each of a member's two certificates (PEM) that ends within thirty days, with what to do."""
    moment, found = now or dt.datetime.now(dt.UTC), []
    for pem_bytes, name, cure in (
        (certificate, "this member's certificate", "run `fedsecure renew` (docs/enrolment.md)"),
        (authority, "the federation's CA certificate", "ask the coordinator how the federation goes on"),
    ):
        end = parse(pem_bytes, name).not_valid_after_utc
        if end - moment < NOTICE:
            found.append(f"{name} ends on {end:%Y-%m-%d %H:%M} UTC: {cure}")
    return found


class Notices:
    """What :func:`ending` says of a member's two certificates (PEM), once a day: a run can outlast what is left."""

    def __init__(self, certificate: bytes, authority: bytes) -> None:
        self._certificates = certificate, authority
        self._next: dt.datetime | None = None

    def due(self, now: dt.datetime | None = None) -> list[str]:
        """The sentences to be said now; none where a day has not gone by since the last look."""
        moment = now or dt.datetime.now(dt.UTC)
        if self._next is not None and moment < self._next:
            return []
        self._next = moment + _DAY
        return ending(*self._certificates, now=moment)


def check(certificate: bytes, authority: bytes, *, now: dt.datetime | None = None) -> str:
    """Check a PEM certificate against the federation's authority (PEM); returns the site id (or
    ``aggregator``).

    Raises:
        IdentityError: FS-1410 unreadable, FS-1413 signed by another authority, FS-1411 expired, FS-1412 not
            yet valid (the authority's own window counts too), FS-1414 common name and URI disagree.
    """
    leaf, root = parse(certificate, "the certificate"), parse(authority, "the federation's CA certificate")
    site = subject(leaf)
    try:
        leaf.verify_directly_issued_by(root)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise IdentityError(
            "FS-1413",
            f"the certificate of {site!r} was not issued by this federation's CA",
            expected=f"a certificate signed by {root.subject.rfc4514_string()}",
            cure="use the identity folder that this federation's coordinator provisioned",
        ) from error
    moment = now or dt.datetime.now(dt.UTC)
    for name, item in ((f"certificate of {site!r}", leaf), ("federation's CA certificate", root)):
        if moment > item.not_valid_after_utc:
            raise IdentityError(
                "FS-1411",
                f"the {name} expired on {item.not_valid_after_utc:%Y-%m-%d %H:%M} UTC",
                expected=f"a certificate valid at {moment:%Y-%m-%d %H:%M} UTC",
                cure="ask the coordinator for a new identity, or set this machine's clock right",
            )
        if moment < item.not_valid_before_utc:
            raise IdentityError(
                "FS-1412",
                f"the {name} is valid only from {item.not_valid_before_utc:%Y-%m-%d %H:%M} UTC",
                expected=f"a certificate valid at {moment:%Y-%m-%d %H:%M} UTC",
                cure="set this machine's clock right",
            )
    return site


def subject(certificate: x509.Certificate) -> str:
    """The site id of a certificate; FS-1414 where common name and URI do not name one and the same site."""
    names = [str(a.value) for a in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        uris = extension.value.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, ValueError):
        uris = []
    if len(names) == 1 and (uris == [SITE_URI + names[0]] or (names == [AGGREGATOR] and not uris)):
        return names[0]
    raise IdentityError(
        "FS-1414",
        f"the certificate names {names} as common name and {uris} as URI",
        expected=f"one common name <id> and the URI {SITE_URI}<id>",
        cure="use the certificate that provisioning made for this site",
    )


def key_matches(key: bytes, certificate: bytes) -> bool:
    """Whether the PEM private key belongs to the PEM certificate."""
    try:
        private = load_pem_private_key(key, password=None)
    except (ValueError, TypeError):
        return False
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        return False
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    public = parse(certificate, "the certificate").public_key()
    return private.public_key().public_bytes(*form) == public.public_bytes(*form)


def _issue(
    authority: Issued,
    common_name: str,
    names: Sequence[x509.GeneralName],
    purpose: x509.ObjectIdentifier,
    days: int,
    now: dt.datetime | None,
) -> Issued:
    key = ec.generate_private_key(ec.SECP256R1())
    return _issued(_certify(authority, common_name, names, purpose, key.public_key(), days, now), key)


def _certify(
    authority: Issued,
    common_name: str,
    names: Sequence[x509.GeneralName],
    purpose: x509.ObjectIdentifier,
    key: ec.EllipticCurvePublicKey,
    days: int,
    now: dt.datetime | None,
) -> x509.Certificate:
    root = parse(authority.certificate, "the federation's CA certificate")
    signer = load_pem_private_key(authority.key, password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    builder = _builder(_name(common_name), root.subject, key, days, now, latest=root.not_valid_after_utc)
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(authority=False), True),
        (x509.ExtendedKeyUsage([purpose]), False),
        (x509.SubjectAlternativeName(names), False),
        (x509.SubjectKeyIdentifier.from_public_key(key), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False),
    ]
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(signer, hashes.SHA256())


def _builder(
    name: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    days: int,
    now: dt.datetime | None,
    *,
    latest: dt.datetime | None = None,
) -> x509.CertificateBuilder:
    moment = now or dt.datetime.now(dt.UTC)
    end = moment + dt.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(moment - EARLY)
        .not_valid_after(min(end, latest) if latest else end)
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _issued(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Issued:
    return Issued(
        certificate.public_bytes(Encoding.PEM),
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )
