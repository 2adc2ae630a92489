"""fedsecure errors across gRPC: the aggregator's typed error arrives at the site as the same typed error."""

from __future__ import annotations

import json
import math

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
# Refusals of one moment, and after how many seconds the call may come again.
RETRY_AFTER = {"FS-1510": 0.5, "FS-1511": 0.5, "FS-1512": 0.1, "FS-1530": 1.0}


def printable(text: str, *, limit: int = _LIMIT) -> str:
    """Text of the other side as it may be shown and logged: on one line, without control characters, bounded."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text[:limit])


def to_details(error: errors.FedsecureError, *, again: float | None = None) -> str:
    """The error as the details of a gRPC status; ``again``: the seconds after which the call may come again, where the
    code does not say."""
    texts = {"code": error.code, "found": error.found, "expected": error.expected, "cure": error.cure}
    fields: dict[str, object] = {name: text[:_LIMIT] for name, text in texts.items()}
    if again is not None or error.code in RETRY_AFTER:
        fields["retry_after"] = RETRY_AFTER.get(error.code, again)
    return json.dumps(fields)


def from_details(details: str | None) -> errors.FedsecureError | None:
    """Inverse of :func:`to_details`; None where the details are not ours."""
    try:
        raw = json.loads((details or "")[: 5 * _LIMIT])
        family = _FAMILIES[raw["code"][:5]]
        found, expected, cure = (printable(str(raw[field])) for field in ("found", "expected", "cure"))
        return family(raw["code"], found, expected=expected, cure=cure)
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
        return None


def retry_after(details: str | None) -> float | None:
    """Seconds after which the other side wants the call again, at least 0; None where repeating it is of no use."""
    try:
        raw = json.loads((details or "")[: 5 * _LIMIT])
        asked = raw.get("retry_after", RETRY_AFTER.get(raw["code"]))
        return None if asked is None or not math.isfinite(asked) else max(0.0, float(asked))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return None
