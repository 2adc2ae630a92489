"""A site's part in the run's draw: it tosses with the others, checks the record of the toss, and keeps to one draw.

The conversation is that of :mod:`fedsecure.secagg.coin`. A site that was not there for the toss checks the record
alone. The first record that holds is kept in the run's folder, and no other is believed in this run.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from fedsecure.errors import ProtocolError, RoundAborted
from fedsecure.methods.cohorts import tossers
from fedsecure.methods.contexts import draw_of, toss_context
from fedsecure.secagg.coin import CoinSite, Record, Toss
from fedsecure.secagg.draw import Draw
from fedsecure.site.line import Line
from fedsecure.site.membership import Membership
from fedsecure.site.results import RunFolder

log = logging.getLogger("fedsecure.client")


@dataclass(slots=True)
class Draws:
    """The draw of one run, as one site knows it."""

    member: Membership
    line: Line
    folder: RunFolder
    draw: Draw | None = None
    _tosses: dict[bytes, CoinSite] = field(default_factory=dict)

    @staticmethod
    def begin(member: Membership, line: Line, *, folder: RunFolder) -> Draws:
        """With the draw that this site knew before a restart, if it did."""
        draws = Draws(member, line, folder)
        kept = folder.load_draw()
        if kept is not None:
            draws.learn(kept)
        return draws

    def toss(self, raw: bytes) -> None:
        """Take part in a toss; one that is given up is no error, the next one follows.

        Raises:
            ProtocolError: FS-1391 not a toss of this run, FS-1398 one that is not the next, or after the draw; others
                as :meth:`fedsecure.secagg.coin.CoinSite.reveal`.
        """
        toss = self._accept(Toss.parse(raw))
        member = self.member
        last = max((coin.toss.number for coin in self._tosses.values()), default=-1)
        if self.draw is not None or toss.number <= last or member.config.site not in toss.parties:
            raise _out_of_turn(f"toss {toss.number} after " + ("the draw" if self.draw else f"toss {last}"))
        identity = member.identity
        coin = CoinSite(toss, site=member.config.site, signing_key=identity.signing_key, roster=identity.roster)
        self._tosses[toss.ctx] = coin
        if last >= 0:
            log.warning("toss %d for the run's draw follows one that was given up", toss.number)
        try:
            self.line.send(toss.ctx, coin.commit())
            self.line.send(toss.ctx, coin.reveal(self.line.relay(toss.ctx, "reveal")))
        except RoundAborted as error:
            log.warning("toss for the run's draw given up: %s", error)

    def learn(self, raw: bytes) -> None:
        """Check the record of the toss that succeeded, and keep it.

        Raises:
            ProtocolError: FS-1391 not of this run, FS-1393 without what this site revealed in it, FS-1398 another draw
                than the one this site knows; others as :meth:`fedsecure.secagg.coin.Record.parse`.
        """
        record = Record.parse(raw, roster=self.member.identity.roster)
        self._accept(record.toss)
        own = self._tosses.get(record.toss.ctx)
        if own is not None:
            own.check(record)
        draw = draw_of(self.member.settings, record)
        if self.draw is not None and self.draw != draw:
            raise _out_of_turn("a second draw, of another seed,")
        if self.draw is None:
            self.folder.save_draw(raw)
            log.info("the run's cohorts are drawn, toss %d, of %d sites", record.toss.number, len(record.reveals))
        self.draw = draw

    def _accept(self, toss: Toss) -> Toss:
        """The toss, if it is one of this run that this site would have made of the same parties."""
        settings, roster = self.member.settings, self.member.identity.roster
        sites, required = tossers(settings)
        parties = tuple(site for site in sites if site in toss.parties)
        expected = toss_context(
            settings, run=self.member.run, number=toss.number, parties=parties, roster=roster
        ).canonical()
        most = settings.rounds.max_attempts
        if not settings.draws or toss.canonical() != expected or len(parties) < required or toss.number >= most:
            raise ProtocolError(
                "FS-1391",
                f"a toss for the run's draw, number {toss.number} of {len(toss.parties)} sites, that is not what this "
                "site computes from the same public settings",
                expected=f"{required} training sites at least, in order, and a number below {most}",
                cure="do not go on with this aggregator; report it",
            )
        return toss


def _out_of_turn(found: str) -> ProtocolError:
    return ProtocolError(
        "FS-1398",
        f"the aggregator comes with {found} in this run",
        expected="one draw a run, and each toss after the last, with this site among those asked",
        cure="do not go on with this aggregator; report it",
    )


__all__ = ["Draws"]
