"""Several runs behind one port: each call goes to the run whose session it names.

A site says in joining which federation's run it means; where it says nothing, the only run with the site is meant.
The runs share nothing but the port: each has its own sessions, database rows and folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedsecure.aggregator.coordinator import Coordinator
from fedsecure.errors import RunError
from fedsecure.wire import federation_pb2 as pb


class House:
    """The calls of one coordinator, for several."""

    def __init__(self, runs: Sequence[Coordinator]) -> None:
        assert runs
        self.runs = tuple(runs)
        self._of: dict[bytes, Coordinator] = {}
        self._tokens: dict[tuple[int, str], bytes] = {}

    def chosen(self, site: str, federation: str) -> Coordinator:
        """The run that a site means.

        Raises:
            RunError: FS-1736 it names none that is served here, or has to say which.
        """
        found = [core for core in self.runs if federation in ("", core.settings.name)]
        if len(found) > 1:
            found = [core for core in found if site in core.settings.sites] or found[:1]
        if len(found) == 1:
            return found[0]
        names = ", ".join(repr(core.settings.name) for core in self.runs)
        raise RunError(
            "FS-1736",
            f"the site asks for the run of {federation!r}" if federation else "the site does not say which run",
            expected=f"one of {names}",
            cure='set federation = "…" in site.toml, as the coordinator names it',
        )

    def join(self, site: str, request: pb.JoinRequest, now: float, expires: float | None = None) -> pb.JoinReply:
        core = self.chosen(site, request.federation)
        reply = core.join(site, request, now, expires)
        place, token = (self.runs.index(core), site), bytes(request.session)
        self._of.pop(self._tokens.get(place, b""), None)
        self._tokens[place], self._of[token] = token, core
        return reply

    def poll(
        self, site: str, token: bytes, after: int, now: float, wake: Callable[[], None] | None = None
    ) -> pb.Directive | None:
        return self._core(token).poll(site, token, after, now, wake)

    def beat(self, site: str, token: bytes, now: float, leaving: str = "") -> None:
        self._core(token).beat(site, token, now, leaving)

    def refused(self, site: str, code: str) -> None:
        for core in self.runs:
            if not site or site in core.settings.sites:
                core.refused(site, code)

    def carried(self, token: bytes, *, up: int = 0, down: int = 0) -> None:
        self._core(token).carried(token, up=up, down=down)

    def gone(self, site: str, token: bytes, now: float) -> None:
        self._core(token).gone(site, token, now)

    def send(self, site: str, message: pb.PhaseMessage, now: float) -> None:
        self._core(message.session).send(site, message, now)

    def expect_upload(self, site: str, header: pb.UploadHeader, now: float) -> memoryview | None:
        return self._core(header.session).expect_upload(site, header, now)

    def accepts_upload(self, ctx: bytes) -> bool:
        """Whether an attempt of that context is in progress in one of the runs, and still takes masked vectors."""
        return any(core.accepts_upload(ctx) for core in self.runs)

    def upload(self, site: str, header: pb.UploadHeader, payload: memoryview | bytes, now: float) -> None:
        self._core(header.session).upload(site, header, payload, now)

    def fetch(self, site: str, token: bytes, digest: bytes, now: float) -> bytes:
        return self._core(token).fetch(site, token, digest, now)

    def tick(self, now: float) -> None:
        for core in self.runs:
            core.tick(now)

    def finished(self, now: float) -> bool:
        """Every run is over, and its sites have heard so or have had the time to."""
        return all(core.finished(now) for core in self.runs)

    def reason(self, now: float) -> str:
        """What the runs wait for, in words."""
        return "; ".join(core.reason(now) for core in self.runs)

    def wait(self, token: bytes, now: float) -> pb.Directive:
        return self._core(token).wait(token, now)

    def write_status(self, now: float) -> None:
        for core in self.runs:
            core.write_status(now)

    def _core(self, token: bytes) -> Coordinator:
        # Where the token is nobody's, any run says so.
        return self._of.get(bytes(token), self.runs[0])


__all__ = ["House"]
