"""The line to an aggregator, floor by floor: name, port, TLS, certificate. For whoever has to find out why it fails.

gRPC says of all these failures that the service is unavailable. Here each is tried by itself, with Python's own TLS.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import socket
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from fedsecure.errors import ConfigError, IdentityError, TransportError
from fedsecure.identity.provision import Identity


@dataclass(frozen=True, slots=True)
class Address:
    """``host:port`` in its parts; IPv6 addresses stand in brackets.

    Raises:
        ConfigError: FS-1019 from :meth:`parse`, where it is something else.
    """

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        host, colon, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
            raise ConfigError(
                "FS-1019",
                f"aggregator = {text!r}",
                expected="host:port, such as fed.example.org:8443",
                cure="write the address that the coordinator named into the site's file",
            )
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Handshake:
    """A TLS connection as it was agreed on.

    Attributes:
        version, cipher: of the connection.
        expires: end of the aggregator's certificate.
    """

    version: str
    cipher: str
    expires: dt.datetime


def resolve(address: Address) -> list[str]:
    """The IP addresses of the host, without repeats; TransportError FS-1520 where the name has none."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise TransportError(
            "FS-1520",
            f"the name {address.host!r} is not known here ({getattr(error, 'strerror', None) or 'no host name'})",
            expected="a name that this machine's resolver knows",
            cure="check its spelling and the resolver (`getent hosts`), or have the name added to the hospital's DNS",
        ) from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def connect(address: Address, *, seconds: float) -> float:
    """Milliseconds of a TCP connection; TransportError FS-1521 where nobody answers within ``seconds``."""
    begun = time.monotonic()
    with _connected(address, seconds):
        return 1000 * (time.monotonic() - begun)


def shake_hands(address: Address, identity: Identity, *, folder: Path | None = None, seconds: float) -> Handshake:
    """TLS 1.3 with the aggregator of the roster.

    Args:
        address: where it listens.
        identity: the site's own.
        folder: where its certificate and key are, which Python's TLS reads from files, for mutual TLS. Without them
            only the aggregator's side is looked at.
        seconds: longest wait.

    Raises:
        TransportError: FS-1521 nobody answers, FS-1522 whoever answers speaks no TLS 1.3.
        IdentityError: FS-1456 something between opens TLS, FS-1457 another certificate than the roster's, or one that
            does not stand for this host or time.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(cadata=identity.ca.decode())
    if folder is not None:
        context.load_cert_chain(folder / "certificate.pem", folder / "tls-key.pem")
    try:
        with (
            _connected(address, seconds) as plain,
            context.wrap_socket(plain, server_hostname=address.host) as secured,
        ):
            shown = secured.getpeercert(binary_form=True) or b""
            agreed = (secured.version() or "", (secured.cipher() or ("",))[0])
    except ssl.SSLCertVerificationError as error:
        raise _untrusted(address, identity, error, seconds=seconds) from error
    except (ssl.SSLError, OSError) as error:
        raise TransportError(
            "FS-1522",
            f"{address} answers, and not in TLS 1.3 ({_reason(error)})",
            expected="an aggregator, which speaks TLS 1.3 and nothing else",
            cure="check the port; have a proxy pass this connection through unchanged (TCP, not HTTP)",
        ) from error
    roster = identity.roster
    # After a renewal the aggregator shows its earlier certificate until it is started again.
    if hashlib.sha256(shown).digest() not in (roster.aggregator_fingerprint, roster.aggregator_previous):
        raise IdentityError(
            "FS-1457",
            f"{address} shows a certificate of this federation's CA that is not the aggregator's",
            expected="the certificate that the roster names",
            cure="check the address; after a renewal, take up the new roster: `fedsecure enroll --refresh`",
        )
    return Handshake(*agreed, expires=x509.load_der_x509_certificate(shown).not_valid_after_utc)


def _connected(address: Address, seconds: float) -> socket.socket:
    try:
        return socket.create_connection((address.host, address.port), timeout=seconds)
    except OSError as error:
        raise TransportError(
            "FS-1521",
            f"{address} does not answer ({_reason(error)})",
            expected=f"a connection within {seconds:g} s",
            cure="ask the operator whether `fedsecure serve` runs, and the hospital's network for outgoing TCP to "
            "this port",
        ) from error


def _untrusted(
    address: Address, identity: Identity, error: ssl.SSLCertVerificationError, *, seconds: float
) -> IdentityError:
    """Who made the certificate that was refused says whether something between opens TLS."""
    shown = _shown_to_strangers(address, seconds)
    ours = x509.load_pem_x509_certificate(identity.ca).subject
    if shown is not None and shown.issuer != ours:
        return IdentityError(
            "FS-1456",
            f"{address} shows a certificate made by {shown.issuer.rfc4514_string()[:200]!r}",
            expected=f"one made by {ours.rfc4514_string()!r}",
            cure="something between opens TLS, or this is another server: have the network leave this address and port "
            "out of TLS inspection",
        )
    return IdentityError(
        "FS-1457",
        f"the certificate of {address} is refused ({error.verify_message})",
        expected="the aggregator's certificate, valid now and for this host name",
        cure="check the host name and this machine's clock, or ask the coordinator for a new certificate",
    )


def _shown_to_strangers(address: Address, seconds: float) -> x509.Certificate | None:
    """The certificate that the other side shows, believed by nobody; nothing is sent over this connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            _connected(address, seconds) as plain,
            context.wrap_socket(plain, server_hostname=address.host) as secured,
        ):
            return x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b"")
    except (TransportError, OSError, ValueError):
        return None


def _reason(error: OSError) -> str:
    reason = getattr(error, "reason", None) or error.strerror
    return str(reason or type(error).__name__).lower()
