"""What the coordinator answers to a request: a welcome with the certificate, or a refusal. Both are signed.

A welcome covers the request's hash, the certificate, the CA and the least version of the roster that names them; the
roster beside it has its own signature, and may be newer. So whoever carries an answer can keep it back, and no more.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsecure.errors import IdentityError
from fedsecure.identity import certificates, keys

FORMAT = "fedsecure-answer-1"
WELCOME, REFUSAL = "fedsecure/welcome/v1", "fedsecure/refusal/v1"
MAX_ANSWER = 8 << 20


@dataclass(frozen=True, slots=True)
class Welcome:
    """A certificate.

    Attributes:
        request: the request's digest, 32 bytes.
        certificate, ca: PEM.
        version: of the first roster with this certificate.
        roster: the newest roster's file, signed by itself.
    """

    request: bytes
    certificate: bytes
    ca: bytes
    version: int
    roster: bytes = b""
    signature: bytes = b""

    def body(self) -> bytes:
        prints = certificates.fingerprint(self.certificate) + certificates.fingerprint(self.ca)
        return self.request + prints + struct.pack(">I", self.version)

    def signed(self, coordinator: Ed25519PrivateKey) -> Welcome:
        return replace(self, signature=keys.sign(coordinator, WELCOME, self.body()))

    def sealed(self) -> bytes:
        return _text(
            "welcome",
            self.request,
            self.signature,
            certificate=self.certificate.decode(),
            ca=self.ca.decode(),
            version=self.version,
            roster=self.roster.decode(),
        )


@dataclass(frozen=True, slots=True)
class Refusal:
    """No certificate, and why."""

    request: bytes
    reason: str
    signature: bytes = b""

    def body(self) -> bytes:
        return self.request + self.reason.encode()

    def signed(self, coordinator: Ed25519PrivateKey) -> Refusal:
        return replace(self, signature=keys.sign(coordinator, REFUSAL, self.body()))

    def sealed(self) -> bytes:
        return _text("refusal", self.request, self.signature, reason=self.reason)


def opened(raw: bytes, *, request: bytes, coordinator_key: bytes) -> Welcome:
    """The welcome to the request with this digest.

    Raises:
        IdentityError: FS-1466 malformed, altered, or to another request; FS-1467 it is a refusal.
    """
    try:
        if len(raw) > MAX_ANSWER:
            raise ValueError("too long")
        answer = _parsed(json.loads(raw))
        genuine = answer.request == request and keys.verify(
            coordinator_key, WELCOME if isinstance(answer, Welcome) else REFUSAL, answer.body(), answer.signature
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error, IdentityError) as error:
        raise foreign(f"it cannot be read ({type(error).__name__})") from error
    if not genuine:
        raise foreign("the pinned coordinator did not sign it for this request")
    if isinstance(answer, Refusal):
        raise IdentityError(
            "FS-1467",
            f"the coordinator refused the request: {answer.reason}",
            expected="an approval",
            cure="speak with the coordinator; a new try takes a new invitation",
        )
    return answer


def foreign(why: str) -> IdentityError:
    return IdentityError(
        "FS-1466",
        f"the coordinator's answer is not accepted: {why}",
        expected="the answer to this folder's own request, as the coordinator made it",
        cure="ask for the file again; nothing was changed here",
    )


def read(raw: str) -> Welcome | Refusal:
    """An answer from the coordinator's own register."""
    return _parsed(json.loads(raw))


def _text(kind: str, request: bytes, signature: bytes, **fields: Any) -> bytes:
    raw = {"format": FORMAT, "kind": kind, "request": request.hex(), **fields, "signature": signature.hex()}
    return (json.dumps(raw, indent=2) + "\n").encode()


def _parsed(raw: Mapping[str, Any]) -> Welcome | Refusal:
    request, signature = bytes.fromhex(raw["request"]), bytes.fromhex(raw["signature"])
    if raw["format"] != FORMAT:
        raise ValueError("unknown format")
    if raw["kind"] == "refusal":
        return Refusal(request, str(raw["reason"])[:500], signature)
    if raw["kind"] != "welcome" or type(raw["version"]) is not int:
        raise ValueError("no answer")
    certificate, ca, roster = (raw[name].encode() for name in ("certificate", "ca", "roster"))
    return Welcome(request, certificate, ca, raw["version"], roster, signature)
