"""What the coordinator keeps beside its keys: invitations, answers given, revoked keys, and the newest roster.

One file, written whole, is the point at which an approval has happened: the invitation is used, the roster is the next
and the certificate is issued in the same moment, or none of it. ``roster.json`` is a copy for carrying.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsecure.errors import IdentityError
from fedsecure.files import write_whole
from fedsecure.identity import answers, keys
from fedsecure.identity.answers import Refusal, Welcome
from fedsecure.identity.invitations import Invitation

FORMAT = "fedsecure-register-1"


@dataclass(frozen=True, slots=True)
class Invited:
    """An invitation, and the digest of the request that used it; empty while it is open."""

    invitation: Invitation
    request: str = ""


@dataclass(frozen=True, slots=True)
class Revoked:
    """A member that is none any more: its keys are never admitted again. ``when`` is in Unix seconds."""

    site: str
    identity_key: bytes
    fingerprints: tuple[bytes, ...]
    when: int


@dataclass(frozen=True, slots=True)
class Issue:
    """A member's newest certificate from here: end, and time of the request, in Unix seconds; when it was issued."""

    until: int
    made: int
    when: int


@dataclass(slots=True)
class Register:
    """The file's content.

    Attributes:
        roster: the newest roster's file; empty before the first change.
        invited: by verifier, in hex.
        answers: by the request's digest, in hex; a welcome without its roster.
        revoked: in order of time.
        issued: by member.
    """

    roster: bytes = b""
    invited: dict[str, Invited] = field(default_factory=dict)
    answers: dict[str, Welcome | Refusal] = field(default_factory=dict)
    revoked: list[Revoked] = field(default_factory=list)
    issued: dict[str, Issue] = field(default_factory=dict)

    def save(self, file: Path) -> None:
        raw = {
            "format": FORMAT,
            "roster": self.roster.decode(),
            "invited": [{**one.invitation.to_dict(), "request": one.request} for one in self.invited.values()],
            "answers": {digest: answer.sealed().decode() for digest, answer in self.answers.items()},
            "revoked": [
                {
                    "site": one.site,
                    "identity_key": one.identity_key.hex(),
                    "fingerprints": [value.hex() for value in one.fingerprints],
                    "when": one.when,
                }
                for one in self.revoked
            ],
            "issued": {
                member: {"until": one.until, "made": one.made, "when": one.when} for member, one in self.issued.items()
            },
        }
        write_whole(file, (json.dumps(raw, indent=2) + "\n").encode())

    @staticmethod
    def load(file: Path) -> Register:
        """The register, empty where there is no file yet; IdentityError FS-1479 where it cannot be understood."""
        if not file.exists():
            return Register()
        try:
            return _parsed(json.loads(keys.read(file)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise IdentityError(
                "FS-1479",
                f"{file} is no register ({type(error).__name__})",
                expected="the file that `fedsecure members` wrote",
                cure="put back the newest copy of the whole ca/ folder; a missing revocation would come back",
            ) from error


def _parsed(raw: Mapping[str, Any]) -> Register:
    if raw["format"] != FORMAT:
        raise ValueError("unknown format")
    invited = {one["verifier"]: Invited(Invitation.from_dict(one), str(one["request"])) for one in raw["invited"]}
    revoked = [
        Revoked(
            one["site"],
            bytes.fromhex(one["identity_key"]),
            tuple(bytes.fromhex(value) for value in one["fingerprints"]),
            int(one["when"]),
        )
        for one in raw["revoked"]
    ]
    return Register(
        roster=raw["roster"].encode(),
        invited=invited,
        answers={digest: answers.read(text) for digest, text in raw["answers"].items()},
        revoked=revoked,
        issued={member: Issue(one["until"], one["made"], one["when"]) for member, one in raw["issued"].items()},
    )
