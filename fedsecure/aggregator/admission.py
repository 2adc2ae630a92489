"""Who may join a run: a site of its settings, of this protocol, with the aggregator's own roster."""

from __future__ import annotations

from hmac import compare_digest

from fedsecure.config import RunSettings
from fedsecure.errors import IdentityError, TransportError
from fedsecure.identity.roster import Roster
from fedsecure.transport.versions import OURS, agree, asked_for
from fedsecure.wire import federation_pb2 as pb

PROTOCOL = OURS.highest
TOKEN_BYTES = 16


def admit(site: str, request: pb.JoinRequest, *, settings: RunSettings, roster: Roster) -> None:
    """Returns where ``site``, known by its certificate, may join.

    Raises:
        IdentityError: FS-1451 not in this run, FS-1452 another roster.
        TransportError: FS-1503 no common protocol version, FS-1509 a session of another size.
    """
    if site not in settings.sites:
        raise IdentityError(
            "FS-1451",
            f"site {site!r} is not part of this run",
            expected="one of " + ", ".join(sorted(settings.sites)),
            cure="ask the coordinator to add it",
        )
    agree(asked_for(request))
    if len(request.session) != TOKEN_BYTES:
        raise TransportError(
            "FS-1509",
            f"a session of {len(request.session)} bytes",
            expected=f"{TOKEN_BYTES} random bytes",
            cure="install the same fedsecure release on both sides",
        )
    if not compare_digest(request.roster_hash, roster.hash):
        raise IdentityError(
            "FS-1452",
            "the site's roster is not the aggregator's",
            expected="the same signed roster everywhere",
            cure="fetch the current roster from the coordinator",
        )


__all__ = ["PROTOCOL", "admit"]
