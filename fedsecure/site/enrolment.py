"""A machine's side of the enrolment desk: leave a request and wait for the coordinator, fetch the newest roster."""

from __future__ import annotations

import secrets
import time
from pathlib import Path

from fedsecure.errors import IdentityError
from fedsecure.identity import certificates, keys
from fedsecure.identity.enrolling import Open, adopt, enrolment_address, roster_request
from fedsecure.identity.roster import Roster
from fedsecure.transport.desk import DeskLine

POLL_SECONDS = 3.0


def answer_to(opened: Open, *, seconds: float, poll: float = POLL_SECONDS) -> bytes:
    """Leave the request at the desk and wait for the coordinator's answer.

    Args:
        seconds: longest wait; the request stays there, and the next call asks for the same.
        poll: between two questions.

    Raises:
        IdentityError: FS-1474 no answer yet; those of :class:`~fedsecure.transport.desk.DeskLine`.
    """
    give_up = time.monotonic() + seconds
    with DeskLine(opened.address, opened.ca, seconds=seconds) as line:
        while True:
            answer = line.ask(opened.request.sealed())
            if answer:
                return answer
            if time.monotonic() + poll > give_up:
                raise IdentityError(
                    "FS-1474",
                    f"the request is at {opened.address}, and the coordinator has not answered within {seconds:g} s",
                    expected="an approval",
                    cure="compare the fingerprints with the coordinator, then repeat the command with the same folder; "
                    "keys and request stay the same",
                )
            time.sleep(poll * (0.75 + secrets.randbelow(500) / 1000))


def refresh(folder: Path, *, address: str = "", seconds: float, file: Path | None = None) -> tuple[Roster, list[str]]:
    """Take up the newest roster, from a file or from the desk; the roster in force, and what changed.

    Args:
        folder: the member's identity folder.
        address: of the desk, where the folder does not say.
        file: a roster that was carried here.

    Raises:
        IdentityError: FS-1473 an older one, FS-1471 no address; those of loading keys and of the desk.
    """
    if file is not None:
        return adopt(folder, keys.read(file))
    where, ca = enrolment_address(folder, address), keys.read(folder / "ca.pem")
    key = keys.load_private_key(folder / "identity.key")
    site = certificates.subject(certificates.parse(keys.read(folder / "certificate.pem"), "the certificate"))
    made = int(time.time())
    purpose, body = roster_request(site, made)
    with DeskLine(where, ca, seconds=seconds) as line:
        return adopt(folder, line.roster(site, made, keys.sign(key, purpose, body)))
