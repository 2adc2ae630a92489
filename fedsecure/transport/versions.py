"""Versions of the wire protocol: which ones this release speaks, and which one two sides agree on.

A site names the range it speaks, the aggregator answers with the highest version that both speak. ``protocol`` is the
lowest of a request's range, so that an aggregator which knows one version only still understands a site that has more.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsecure.errors import TransportError
from fedsecure.wire import federation_pb2 as pb

# Since this version calls have request ids, uploads resume, and a download begins at an offset.
RESUMABLE = 2


@dataclass(frozen=True, slots=True)
class Versions:
    """All versions from ``lowest`` to ``highest``."""

    lowest: int
    highest: int

    def __str__(self) -> str:
        return f"{self.lowest} to {self.highest}" if self.highest > self.lowest else str(self.lowest)


OURS = Versions(1, 2)


def asked_for(request: pb.GreetRequest | pb.JoinRequest) -> Versions:
    """What a site says it speaks; version 1 knew ``protocol`` only."""
    return Versions(request.protocol, max(request.protocol, request.newest))


def agree(theirs: Versions, *, ours: Versions = OURS) -> int:
    """The highest version that site and aggregator speak.

    Raises:
        TransportError: FS-1503 there is none.
    """
    common = min(theirs.highest, ours.highest)
    if common < max(theirs.lowest, ours.lowest):
        raise _nothing_in_common(theirs, ours, older="site" if theirs.highest < ours.lowest else "aggregator")
    return common


def accept_answer(version: int, *, ours: Versions = OURS) -> int:
    """The version that the aggregator chose, at the site; as :func:`agree` where the site does not speak it."""
    if not ours.lowest <= version <= ours.highest:
        older = "aggregator" if version < ours.lowest else "site"
        raise _nothing_in_common(ours, Versions(version, version), older=older)
    return version


def _nothing_in_common(site: Versions, aggregator: Versions, *, older: str) -> TransportError:
    return TransportError(
        "FS-1503",
        f"the site speaks protocol {site}, the aggregator {aggregator}",
        expected="a version that both speak",
        cure=f"install a newer fedsecure release at the {older}",
    )


__all__ = ["OURS", "RESUMABLE", "Versions", "accept_answer", "agree", "asked_for"]
