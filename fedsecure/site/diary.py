"""What a site did, in its own audit log (``<state>/audit.log``): for the site, never sent.

It says which runs were joined under which settings, what was asked, what was charged and what left, by hash. It says
nothing about any record: reasons stand in it as codes, since an error's words may be about data.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsecure.audit_log import PURPOSE, AuditLog, Fact
from fedsecure.errors import EnvironmentProblem, FedsecureError
from fedsecure.identity import keys
from fedsecure.messages import Query
from fedsecure.privacy.ledger import Reservation
from fedsecure.site.membership import Membership

log = logging.getLogger("fedsecure.client")
_CODE = re.compile(r"FS-1\d{3}")


class Diary:
    """Writes one site's audit log; each line is on disk when a method returns.

    Raises (all methods but those that record an error):
        EnvironmentProblem: FS-1820 … FS-1822 as :meth:`~fedsecure.audit_log.AuditLog.append`.
    """

    def __init__(self, state: Path, key: Ed25519PrivateKey) -> None:
        self._log = AuditLog(state / "audit.log", sign=lambda body: keys.sign(key, PURPOSE, body))
        self._run: dict[str, Fact] = {}

    def joined(self, member: Membership) -> None:
        """A run was joined, under these settings and with this roster."""
        self._run = {"run": member.run.hex()}
        settings = member.settings
        self._write(
            "run-joined",
            federation=settings.name,
            aggregator=member.config.aggregator,
            method=settings.method.name,
            rounds=settings.method.rounds,
            role=member.entry.role,
            settings=settings.digest().hex(),
            roster=member.identity.roster.hash.hex(),
            roster_version=member.identity.roster.version,
        )

    def not_joined(self, error: BaseException) -> None:
        """The aggregator refused, or this site did."""
        self._last_word("run-not-joined", error)

    def accepted(self, query: Query, ctx: bytes) -> None:
        """A question that is what the settings call for."""
        self._write("question-accepted", **_of(query), method=query.method, context=ctx.hex())

    def refused(self, error: BaseException) -> None:
        """A question, or a set-up of keys, that this site does not go along with."""
        self._last_word("question-refused", error)

    def charged(self, query: Query, reservations: Sequence[Reservation]) -> None:
        """What the ledger has reserved; records are read after this only."""
        for made in reservations:
            self._write(
                "charged",
                **_of(query),
                reservation=made.id,
                dataset=made.dataset,
                population=made.population,
                epsilon_so_far=round(made.epsilon, 6),
            )

    def leaves(self, query: Query, ctx: bytes, digest: bytes) -> None:
        """A contribution is about to leave; the ledger holds the same hash of its signed header."""
        self._write("contribution-sent", **_of(query), context=ctx.hex(), sha256=digest.hex())

    def released(self, query: Query) -> None:
        """The sum with this site's contribution is published."""
        self._write("sum-published", **_of(query))

    def aborted(self, query: Query, error: BaseException) -> None:
        """The attempt ended without a sum; what was charged stays charged."""
        self._write("attempt-aborted", **_of(query), code=code_of(error))

    def failed(self, query: Query, error: BaseException) -> None:
        """This site could not, or would not, answer."""
        self._last_word("answer-failed", error, **_of(query))

    def finished(self, *, complete: bool, code: str) -> None:
        """The aggregator said that the run is over."""
        self._write("run-finished", complete=complete, code=code if _CODE.fullmatch(code) else "")
        self._log.checkpoint()

    def left(self, error: BaseException | None) -> None:
        """This process leaves before the run is over."""
        self._last_word("left", error)

    def _last_word(self, event: str, error: BaseException | None, **facts: Fact) -> None:
        """What is recorded while an error is on its way; where it cannot be, that error is the one to show."""
        try:
            self._write(event, **facts, code=code_of(error) if error is not None else "")
            self._log.checkpoint()
        except EnvironmentProblem as problem:
            log.warning("%s", problem)

    def _write(self, event: str, **facts: Fact) -> None:
        self._log.append(event, {**self._run, **facts})


def code_of(error: BaseException) -> str:
    """The error's code, or the name of its type; never its words."""
    return error.code if isinstance(error, FedsecureError) else type(error).__name__


def _of(query: Query) -> dict[str, Fact]:
    return {"round": query.round, "attempt": query.attempt}
