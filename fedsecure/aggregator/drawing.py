"""The run's draw at the aggregator: toss after toss until one comes to its end, and then its record, for every site.

No clock and no sockets, like :mod:`fedsecure.aggregator.rounds`. How many tosses were begun, and the record, are on
disk before anybody hears of them, so that a restart goes on from there; beside them stands why tosses were given up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from fedsecure.aggregator.sessions import Sessions
from fedsecure.config import RunSettings
from fedsecure.errors import FedsecureError, RoundAborted
from fedsecure.files import write_whole
from fedsecure.identity.roster import Roster
from fedsecure.methods.cohorts import tossers
from fedsecure.methods.contexts import draw_of, toss_context
from fedsecure.secagg.coin import CoinServer, Record, given_up
from fedsecure.secagg.draw import Draw
from fedsecure.wire import federation_pb2 as pb

FILE = "draw.json"


class Drawing:
    """The draw of one run.

    Args:
        settings, run, roster: of the run.
        folder: the run's, where ``draw.json`` is kept.
        sessions: of its sites.
        alarm: is told of a toss that is given up.

    Attributes:
        sites, required: who tosses, and how many have to.
        draw: what was drawn, once it is; ``record`` its bytes for the sites.
        number: of the toss in progress, or of the last one; −1 before the first.
    """

    def __init__(
        self,
        settings: RunSettings,
        *,
        run: bytes,
        roster: Roster,
        folder: Path,
        sessions: Sessions,
        alarm: Callable[[FedsecureError], None],
    ) -> None:
        self.sites, self.required = tossers(settings)
        self.draw: Draw | None = None
        self.record = b""
        self.number = -1
        self._settings, self._run, self._roster = settings, run, roster
        self._file, self._sessions, self._alarm = folder / FILE, sessions, alarm
        self._given_up: list[dict[str, Any]] = []
        self._toss: CoinServer | None = None
        self._withheld: set[str] = set()
        self._deadline = 0.0
        self._load()

    @property
    def ctx(self) -> bytes:
        """The context of the toss in progress; empty where there is none."""
        return self._toss.toss.ctx if self._toss is not None else b""

    @property
    def stage(self) -> str:
        """``"commit"`` or ``"reveal"``; empty where no toss is in progress."""
        return self._toss.stage if self._toss is not None else ""

    def reason(self, now: float) -> str:
        """What the toss waits for, in words."""
        missing = self._toss.waiting_for() if self._toss is not None else ()
        seen = ", ".join(self._sessions.last_seen(site, now) for site in missing)
        return f"{self.stage} for the draw of cohorts: waiting for {len(missing)} of {len(self.sites)} sites: {seen}"

    def candidates(self) -> tuple[str, ...]:
        """Who the next toss would ask: all but those that committed in an earlier one and did not reveal."""
        return tuple(site for site in self.sites if site not in self._withheld)

    def begin(self, present: Collection[str], now: float) -> None:
        """Begin the next toss among the candidates that are there.

        Raises:
            RoundAborted: FS-1396 there may be no further one, as after a restart in the last.
        """
        if self._spent:
            raise given_up(f"{self.number + 1} tosses were begun, and no further one is allowed")
        self.number += 1
        self._save()
        parties = tuple(site for site in self.candidates() if site in present)
        toss = toss_context(self._settings, run=self._run, number=self.number, parties=parties, roster=self._roster)
        self._toss = CoinServer(toss, roster=self._roster)
        self._deadline = now + self._settings.rounds.phase_seconds
        self._sessions.ask(parties, toss.ctx, prepare=pb.Prepare(descriptor=toss.canonical()))

    def receive(self, site: str, message: bytes) -> None:
        """A message of the toss; raises ``ProtocolError``."""
        assert self._toss is not None
        self._toss.receive(site, message)

    def advance(self, now: float) -> bool:
        """End the stage if it is ripe; whether it was. After the last one :attr:`draw` is there.

        Raises:
            RoundAborted: FS-1396 a toss is given up, and there may be no further one: sites take part in so many.
        """
        assert self._toss is not None
        coin, ctx = self._toss, self.ctx
        missing = coin.waiting_for()
        if any(self._sessions.takes_part(site, ctx, now) for site in missing) and now < self._deadline:
            return False
        try:
            shown = coin.close()
        except RoundAborted as error:
            self._give_up(coin, error)
            return True
        self._deadline = now + self._settings.rounds.phase_seconds
        if coin.stage == "reveal":
            self._sessions.relay(ctx, coin.stage, shown)
            late = set(coin.toss.parties) - set(shown)
            self._sessions.tell_asked(late, ctx, code="FS-1707", reason="the toss goes on without this site")
            return True
        found = coin.record()
        self.record, self.draw, self._toss = found.pack(), draw_of(self._settings, found), None
        self._save()
        for site in self.sites:
            self.tell_record(site)
        return True

    def tell_record(self, site: str) -> None:
        """Send a training site the record, if there is one, and if it has joined."""
        if self.record and site in self.sites:
            self._sessions.tell(site, prepare=pb.Prepare(descriptor=self.record))

    @property
    def _spent(self) -> bool:
        """Sites take part in no further toss."""
        return self.number + 1 >= self._settings.rounds.max_attempts

    def _give_up(self, coin: CoinServer, error: RoundAborted) -> None:
        self._withheld |= set(coin.withheld())
        self._toss = None
        reason = f"{error.code}: {error.found}"
        self._given_up.append({"toss": self.number, "parties": list(coin.toss.parties), "reason": reason})
        self._save()
        self._alarm(error)
        self._sessions.tell_asked(coin.toss.parties, coin.toss.ctx, code=error.code, reason=reason)
        if self._spent:
            raise error

    def _save(self) -> None:
        raw = {"tosses": self.number + 1, "given_up": self._given_up, "record": self.record.hex()}
        write_whole(self._file, json.dumps(raw, indent=2).encode())

    def _load(self) -> None:
        if self._file.exists():
            raw = json.loads(self._file.read_bytes())
            self.number, self._given_up = int(raw["tosses"]) - 1, list(raw["given_up"])
            self.record = bytes.fromhex(raw["record"])
            if self.record:
                self.draw = draw_of(self._settings, Record.parse(self.record, roster=self._roster))


__all__ = ["Drawing"]
