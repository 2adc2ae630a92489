"""The drop box between an aggregator and a coordinator who may be offline: requests in, answers and rosters back.

``requests/<digest>.json``, ``answers/<digest>.json`` and ``roster.json``; the whole folder can be carried on a stick.
Nothing in it is secret, and nothing in it is believed without a signature.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedsecure.errors import IdentityError
from fedsecure.files import make_folder, write_whole
from fedsecure.identity import keys
from fedsecure.identity.answers import MAX_ANSWER
from fedsecure.identity.requests import MAX_REQUEST, Request

MAX_PENDING = 64


class Box:
    """The drop box in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, request: Request) -> Path:
        return self.folder / "requests" / f"{request.digest.hex()}.json"

    def put(self, request: Request) -> None:
        """Keep a request that was checked."""
        write_whole(make_folder(self.folder / "requests") / self.file(request).name, request.sealed())

    def drop(self, request: Request) -> None:
        """A request that was answered or overtaken."""
        self.file(request).unlink(missing_ok=True)

    def pending(self) -> list[Request]:
        """All requests without an answer, in order of their time; what is none is left out."""
        found = [request for request in self._requests() if self.answer(request.digest) is None]
        return sorted(found, key=lambda request: (request.made, request.digest))

    def answer(self, digest: bytes) -> bytes | None:
        """The answer's file, if there is one of a sane size."""
        file = self.folder / "answers" / f"{digest.hex()}.json"
        try:
            return keys.read(file) if file.stat().st_size <= MAX_ANSWER else None
        except (OSError, IdentityError):
            return None

    def reply(self, digest: bytes, answer: bytes) -> Path:
        """Keep an answer for the service to hand out."""
        file = make_folder(self.folder / "answers") / f"{digest.hex()}.json"
        write_whole(file, answer)
        return file

    def _requests(self) -> Iterator[Request]:
        for file in sorted((self.folder / "requests").glob("*.json")):
            try:
                if file.stat().st_size <= MAX_REQUEST:
                    yield Request.opened(keys.read(file))
            except (OSError, IdentityError):
                continue
