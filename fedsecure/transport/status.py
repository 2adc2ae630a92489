"""fedsecure errors across gRPC: the aggregator's typed error arrives at the site as the same typed error."""

from __future__ import annotations

import json

from fedsecure import errors

_FAMILIES: dict[str, type[errors.FedsecureError]] = {
    "FS-10": errors.ConfigError,
    "FS-11": errors.DataError,
    "FS-12": errors.PrivacyError,
    "FS-13": errors.ProtocolError,
    "FS-14": errors.IdentityError,
    "FS-15": errors.TransportError,
    "FS-16": errors.ModelError,
    "FS-17": errors.RunError,
    "FS-18": errors.EnvironmentProblem,
}
_LIMIT = 2000


def printable(text: str, *, limit: int = _LIMIT) -> str:
    """Text of the other side as it may be shown and logged: on one line, without control characters, bounded."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text[:limit])


def to_details(error: errors.FedsecureError) -> str:
    """The error as the details of a gRPC status."""
    fields = {"code": error.code, "found": error.found, "expected": error.expected, "cure": error.cure}
    return json.dumps({name: text[:_LIMIT] for name, text in fields.items()})


def from_details(details: str | None) -> errors.FedsecureError | None:
    """Inverse of :func:`to_details`; None where the details are not ours."""
    try:
        raw = json.loads((details or "")[: 5 * _LIMIT])
        family = _FAMILIES[raw["code"][:5]]
        found, expected, cure = (printable(str(raw[field])) for field in ("found", "expected", "cure"))
        return family(raw["code"], found, expected=expected, cure=cure)
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
        return None
