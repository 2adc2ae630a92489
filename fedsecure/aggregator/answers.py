"""Calls that change something are done once: a repeated request gets the answer that its first one got.

A request carries an id of 16 random bytes. The last few answers of each site are kept, with a hash of what was asked;
they are lost with the process, as the sessions are that they belong to.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from hmac import compare_digest
from typing import TypeVar

from google.protobuf.message import Message

from fedsecure.errors import EnvironmentProblem, FedsecureError, TransportError
from fedsecure.transport.status import RETRY_AFTER
from fedsecure.wire import federation_pb2 as pb

ID_BYTES = 16
# A site repeats a call before it makes the next one; three threads call.
KEPT = 32

Changing = pb.JoinRequest | pb.PhaseMessage | pb.UploadHeader | pb.BeatRequest
_Reply = TypeVar("_Reply", bound=Message)


class Answers:
    """The last answers of each site."""

    def __init__(self, *, kept: int = KEPT) -> None:
        self._kept = kept
        self._answers: dict[str, OrderedDict[bytes, tuple[bytes, Message | FedsecureError]]] = {}

    def once(self, site: str, request: Changing, act: Callable[[], _Reply]) -> _Reply:
        """The answer to a request: of ``act``, or the one that the same request got before.

        A refusal is an answer too, but for those of one moment (:data:`~fedsecure.transport.status.RETRY_AFTER`) and
        what is wrong with this machine. What fails in any other way is no answer.

        Raises:
            TransportError: as :meth:`find`.
        """
        known = self.find(site, request, act)
        if known is not None:
            return known
        try:
            reply = act()
        except FedsecureError as error:
            if error.code not in RETRY_AFTER and not isinstance(error, EnvironmentProblem):
                self.keep(site, request, error)
            raise
        self.keep(site, request, reply)
        return reply

    def find(self, site: str, request: Changing, like: Callable[[], _Reply]) -> _Reply | None:
        """The answer that this request got before, or None; raises it where it was a refusal.

        Raises:
            TransportError: FS-1531 another request had this id, FS-1532 an id of another size.
        """
        if not request.request:
            return None
        if len(request.request) != ID_BYTES:
            raise TransportError(
                "FS-1532",
                f"a request id of {len(request.request)} bytes",
                expected=f"{ID_BYTES} random bytes",
                cure="install the same fedsecure release on both sides",
            )
        mine = self._answers.get(site)
        found = None if mine is None else mine.get(_name(request))
        if found is None:
            return None
        asked, answer = found
        if not compare_digest(asked, _digest(request)):
            raise TransportError(
                "FS-1531",
                "a request id that another request has had",
                expected="16 fresh random bytes for each request",
                cure="install the same fedsecure release on both sides",
            )
        if isinstance(answer, FedsecureError):
            raise type(answer)(answer.code, answer.found, expected=answer.expected, cure=answer.cure)
        return answer  # type: ignore[return-value]

    def keep(self, site: str, request: Changing, answer: Message | FedsecureError) -> None:
        """Remember an answer, and forget the oldest ones."""
        if request.request:
            mine = self._answers.setdefault(site, OrderedDict())
            mine[_name(request)] = (_digest(request), answer)
            while len(mine) > self._kept:
                mine.popitem(last=False)


def _name(request: Changing) -> bytes:
    """Sizes are fixed or hashed apart, so that no two sessions share a name."""
    return hashlib.sha256(request.session).digest() + request.request


def _digest(request: Changing) -> bytes:
    kind = request.DESCRIPTOR.name.encode()
    return hashlib.sha256(kind + b"\0" + request.SerializeToString(deterministic=True)).digest()


__all__ = ["Answers"]
