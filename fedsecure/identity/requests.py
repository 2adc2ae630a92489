"""What a site asks for: a certificate for a TLS key of its own, bound to its identity key (PKCS #10, RFC 2986).

Three keys sign one request. The TLS key signs the CSR, which carries a hash of the identity key and of the invitation;
the identity key signs the CSR with site and time; the token's key signs the same, for an enrolment. A renewal has no
token: the identity key of the roster speaks for it. Private keys are in none of this.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import AttributeOID, NameOID

from fedsecure.errors import IdentityError
from fedsecure.identity import keys
from fedsecure.identity.certificates import AGGREGATOR, host_names
from fedsecure.identity.invitations import Invitation, Token
from fedsecure.identity.spoken import site_print

FORMAT = "fedsecure-request-1"
PURPOSE = "fedsecure/certificate-request/v1"
INVITED_PURPOSE = "fedsecure/invited-request/v1"
MAX_REQUEST = 16 << 10
Kind = Literal["enrol", "renew"]
_KINDS = ("enrol", "renew")


@dataclass(frozen=True, slots=True)
class Request:
    """One request for a certificate; made by :func:`enrolment` or :func:`renewal`.

    Attributes:
        kind: ``"enrol"`` with an invitation, ``"renew"`` with the identity key alone.
        site: id, or ``"aggregator"`` for its renewal.
        identity_key: Ed25519, 32 bytes.
        csr: PKCS #10, DER.
        made: Unix seconds by the site's clock.
    """

    kind: Kind
    site: str
    identity_key: bytes
    csr: bytes
    made: int
    invitation: Invitation | None = None
    identity_signature: bytes = b""
    token_signature: bytes = b""

    def body(self) -> bytes:
        """What is signed and hashed: fixed order, big-endian, strings with a u32 length."""
        invited = self.invitation.body() if self.invitation else b""
        head = struct.pack(">BQ", _KINDS.index(self.kind), self.made) + self.identity_key
        return head + b"".join(struct.pack(">I", len(part)) + part for part in (self.site.encode(), self.csr, invited))

    @property
    def digest(self) -> bytes:
        """SHA-256 that names the request."""
        return hashlib.sha256(PURPOSE.encode() + b"\0" + self.body()).digest()

    @property
    def tls_key(self) -> ec.EllipticCurvePublicKey:
        """The key to be certified; IdentityError FS-1465 where the CSR has none of P-256."""
        return _csr_key(_csr(self.csr))

    @property
    def hosts(self) -> list[str]:
        """Names and addresses that the aggregator's CSR asks for; none for a site."""
        try:
            names = _csr(self.csr).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (x509.ExtensionNotFound, ValueError):
            return []
        dns = names.get_values_for_type(x509.DNSName)
        return [*dns, *(str(address) for address in names.get_values_for_type(x509.IPAddress))]

    @property
    def fingerprint(self) -> str:
        """Five groups to compare aloud."""
        key = self.tls_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return site_print(self.site, self.identity_key, key)

    def check(self, coordinator_key: bytes) -> None:
        """All signatures, and that they cover one another.

        Raises:
            IdentityError: FS-1465 altered or contradictory, FS-1462 no invitation of this coordinator.
        """
        csr, verifier = _csr(self.csr), self.invitation.verifier if self.invitation else b""
        names = [str(a.value) for a in csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        try:
            bound = csr.attributes.get_attribute_for_oid(AttributeOID.CHALLENGE_PASSWORD).value
            sound = csr.is_signature_valid
        except (x509.AttributeNotFound, InvalidSignature, UnsupportedAlgorithm, ValueError):
            bound, sound = b"", False
        _csr_key(csr)
        if not sound or names != [self.site] or bound != _binding(self.site, self.identity_key, verifier):
            raise altered("its CSR is not signed by its own key for this site, identity key and invitation")
        if not keys.verify(self.identity_key, PURPOSE, self.body(), self.identity_signature):
            raise altered("the identity key did not sign it")
        if self.kind == "renew":
            return
        if self.invitation is None or not self.invitation.genuine(coordinator_key):
            raise unauthenticated()
        if self.invitation.site != self.site or self.site == AGGREGATOR:
            raise altered(f"the invitation is for {self.invitation.site!r}")
        if not keys.verify(verifier, INVITED_PURPOSE, self.body(), self.token_signature):
            raise altered("the invitation's token did not sign it")

    def sealed(self) -> bytes:
        """The request as JSON."""
        raw = {
            "format": FORMAT,
            "kind": self.kind,
            "site": self.site,
            "identity_key": self.identity_key.hex(),
            "csr": self.csr.hex(),
            "made": self.made,
            "invitation": self.invitation.to_dict() if self.invitation else None,
            "identity_signature": self.identity_signature.hex(),
            "token_signature": self.token_signature.hex(),
        }
        return (json.dumps(raw, indent=2) + "\n").encode()

    @staticmethod
    def opened(raw: bytes) -> Request:
        """Inverse of :meth:`sealed`; nothing is checked but the form. IdentityError FS-1465."""
        try:
            if len(raw) > MAX_REQUEST:
                raise ValueError("too long")
            return _parsed(json.loads(raw))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise altered(f"it cannot be read ({type(error).__name__})") from error


def enrolment(token: Token, identity: Ed25519PrivateKey, tls_key: ec.EllipticCurvePrivateKey, *, now: int) -> Request:
    """The request that an invited site makes with its two keys."""
    invitation = token.invitation
    csr = _make_csr(invitation.site, identity, tls_key, verifier=invitation.verifier)
    request = Request("enrol", invitation.site, keys.public_bytes(identity), csr, now, invitation)
    signature = keys.sign(token.key(), INVITED_PURPOSE, request.body())
    return replace(request, identity_signature=keys.sign(identity, PURPOSE, request.body()), token_signature=signature)


def renewal(
    member: str, identity: Ed25519PrivateKey, tls_key: ec.EllipticCurvePrivateKey, *, hosts: Sequence[str], now: int
) -> Request:
    """A member's request for a certificate of a new TLS key; ``hosts`` of the aggregator only."""
    csr = _make_csr(member, identity, tls_key, hosts=hosts)
    request = Request("renew", member, keys.public_bytes(identity), csr, now)
    return replace(request, identity_signature=keys.sign(identity, PURPOSE, request.body()))


def altered(why: str) -> IdentityError:
    return IdentityError(
        "FS-1465",
        f"the request for a certificate is refused: {why}",
        expected="a request as `fedsecure enroll` or `fedsecure renew` made it, unaltered",
        cure="send the file again; if it is refused again, ask the site to make a new one",
    )


def unauthenticated() -> IdentityError:
    """One answer to all who cannot show that they may ask, so that it says nothing about who is a member."""
    return IdentityError(
        "FS-1462",
        "neither an invitation of this federation's coordinator nor a member's key speaks for this request",
        expected="a valid invitation, or the identity key of a member",
        cure="ask the coordinator for an invitation",
    )


def _make_csr(
    member: str,
    identity: Ed25519PrivateKey,
    tls_key: ec.EllipticCurvePrivateKey,
    *,
    verifier: bytes = b"",
    hosts: Sequence[str] = (),
) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, member)])
    )
    bound = _binding(member, keys.public_bytes(identity), verifier)
    builder = builder.add_attribute(AttributeOID.CHALLENGE_PASSWORD, bound)
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName(host_names(hosts)), critical=False)
    return builder.sign(tls_key, hashes.SHA256()).public_bytes(Encoding.DER)


def _binding(site: str, identity_key: bytes, verifier: bytes) -> bytes:
    """What the TLS key signs beside itself, 64 hexadecimal digits."""
    parts = (site.encode(), identity_key, verifier)
    framed = b"".join(struct.pack(">I", len(part)) + part for part in parts)
    return hashlib.sha256(b"fedsecure/csr-binding/v1\0" + framed).hexdigest().encode()


def _csr(der: bytes) -> x509.CertificateSigningRequest:
    try:
        return x509.load_der_x509_csr(der)
    except ValueError as error:
        raise altered("its CSR cannot be read") from error


def _csr_key(csr: x509.CertificateSigningRequest) -> ec.EllipticCurvePublicKey:
    try:
        key = csr.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise altered("its CSR has a key that cannot be read") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise altered("its TLS key is not of ECDSA P-256")
    return key


def _parsed(raw: Mapping[str, Any]) -> Request:
    kind, site, made = raw["kind"], raw["site"], raw["made"]
    if raw["format"] != FORMAT or kind not in _KINDS or type(site) is not str or len(site) > 63:
        raise ValueError("no request")
    if type(made) is not int or not 0 <= made < 1 << 63:
        raise ValueError("no time")
    invitation = None if raw["invitation"] is None else Invitation.from_dict(raw["invitation"])
    if (kind == "enrol") != (invitation is not None):
        raise ValueError("an invitation goes with an enrolment")
    identity_key = bytes.fromhex(raw["identity_key"])
    if len(identity_key) != keys.KEY_BYTES:
        raise ValueError("no key")
    return Request(
        kind=kind,
        site=site,
        identity_key=identity_key,
        csr=bytes.fromhex(raw["csr"]),
        made=made,
        invitation=invitation,
        identity_signature=bytes.fromhex(raw["identity_signature"]),
        token_signature=bytes.fromhex(raw["token_signature"]),
    )
