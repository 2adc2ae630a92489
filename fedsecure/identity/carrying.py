"""How requests reach the coordinator and answers leave: by the drop box, or by files in a hand.

The drop box is the aggregator's ``state/enrolment``; where the federation's folder holds the aggregator too, it is
found there, and a new roster is put into the aggregator's identity folder at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fedsecure.errors import ConfigError, IdentityError
from fedsecure.files import write_whole
from fedsecure.identity import keys
from fedsecure.identity.answers import Refusal, Welcome
from fedsecure.identity.authority import Authority
from fedsecure.identity.box import Box
from fedsecure.identity.requests import Request

MAX_HOURS = 24 * 90
_ADDRESS = re.compile(r"(?:\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]{1,253}):(\d{1,5})")


@dataclass(frozen=True, slots=True)
class Found:
    """A request, and the file it came in; None for the drop box."""

    request: Request
    file: Path | None = None


def check_terms(hours: float, address: str) -> None:
    """What an invitation may say; ConfigError FS-1031."""
    match = _ADDRESS.fullmatch(address)
    sound = not address or (match is not None and 0 < int(match[1]) < 1 << 16)
    if not 0 < hours <= MAX_HOURS or not sound:
        raise ConfigError(
            "FS-1031",
            f"an invitation for {hours:g} hours and the address {address[:300]!r}",
            expected=f"more than 0 and at most {MAX_HOURS} hours; host:port of the enrolment desk, or none",
            cure="name the address that the site dials, such as fed.example.org:8444; IPv6 in brackets",
        )


def box_of(folder: Path, named: Path | None) -> Box | None:
    """The drop box that was named, or the aggregator's beside the CA where there is one."""
    place = named or folder / "aggregator" / "state" / "enrolment"
    return Box(place) if named or place.is_dir() else None


def find(what: str, box: Box | None) -> Found:
    """The request in a file, or the one in the drop box of that site or digest; IdentityError FS-1472."""
    file = Path(what)
    if file.is_file():
        return Found(Request.opened(keys.read(file)), file)
    waiting = box.pending() if box else []
    mine = [one for one in waiting if one.site == what or (len(what) >= 8 and one.digest.hex().startswith(what))]
    if len(mine) != 1:
        raise IdentityError(
            "FS-1472",
            f"{len(mine) or 'no'} requests wait under {what[:300]!r}",
            expected="the file of one request, or a site with one request in the drop box",
            cure="see `fedsecure members pending`; where a site has several, name the first digits of the right one",
        )
    return Found(mine[0])


def deliver(
    answer: Welcome | Refusal, found: Found, *, authority: Authority, folder: Path, box: Box | None, out: Path | None
) -> list[Path]:
    """Write an answer, and the newest roster, to where they are looked for; returns the files."""
    written = publish(authority, folder=folder, box=box)
    if box is not None:
        written.append(box.reply(found.request.digest, answer.sealed()))
        box.drop(found.request)
    if out is None and found.file is not None:
        name = found.file.stem
        name = name.replace("request", "welcome") if "request" in name else f"{name}-welcome"
        out = found.file.with_name(f"{name}.json")
    if out is not None:
        write_whole(out, answer.sealed(), mode=0o644)
        written.append(out)
    return written


def publish(authority: Authority, *, folder: Path, box: Box | None) -> list[Path]:
    """Write the newest roster into the drop box, and to an aggregator that is beside the CA; returns the files."""
    places = [box.folder] if box is not None else []
    places += [place for place in (folder / "aggregator" / "identity",) if place.is_dir()]
    for place in places:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(place / "roster.json", authority.sealed_roster, mode=0o644)
    return [place / "roster.json" for place in places]
