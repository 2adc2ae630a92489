"""What the check of a recorded round, or of a recorded set-up of keys, says: findings with their authors, and what was
checked (secagg.md §6.8)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fedsecure.errors import ProtocolError

AGGREGATOR = "aggregator"
MAX_FINDINGS = 1000


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        code: an FS-13xx code, with the meaning it has in a live round.
        what: what was found.
        authors: who did it; several names where all that is known is that one of them, or more, did.
    """

    code: str
    what: str
    authors: tuple[str, ...]


@dataclass(slots=True)
class Verdict:
    """What the transcript shows.

    Attributes:
        ctx, run, round, attempt: which attempt it is; of a set-up of keys, ``round`` is the number of its epoch.
        roster_hash: compare it with that of your own roster, where none was given.
        sites, survivors: cohort, and the sites in the sum, or of a set-up those that hold keys.
        slots: for how many rounds a set-up made keys; 0 where this is a round.
        set_up: SHA-256 of the transcript of the set-up that the round's keys come from; empty where it has its own.
        finished: whether the attempt ended with a signed result, or the set-up with keys.
        sum_checked: whether the masked vectors were recorded and the sum recomputed from them.
        checks: kind of check → how many were made.
        findings: what is wrong, in the order found.
    """

    ctx: bytes
    run: bytes
    round: int
    attempt: int
    roster_hash: bytes
    sites: tuple[str, ...]
    survivors: tuple[str, ...] = ()
    slots: int = 0
    set_up: bytes = b""
    finished: bool = False
    sum_checked: bool = False
    checks: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def count(self, what: str, number: int = 1) -> None:
        """Note that ``number`` checks of a kind were made."""
        self.checks[what] = self.checks.get(what, 0) + number

    def blame(self, code: str, what: str, *authors: str) -> None:
        """Add a finding; after a thousand the rest is left out."""
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(Finding(code, what, authors))

    def require(self, good: bool, code: str, what: str, *authors: str) -> bool:
        """Add a finding unless ``good``, which is returned."""
        if not good:
            self.blame(code, what, *authors)
        return good

    def guard(self, act: Callable[[], object], *authors: str) -> bool:
        """Whether ``act`` goes through; what it refuses is a finding."""
        try:
            act()
        except ProtocolError as error:
            self.blame(error.code, error.found, *authors)
            return False
        return True

    def include(self, other: Verdict) -> None:
        """Add the checks and findings of the set-up that this round rests on."""
        for what, number in other.checks.items():
            self.count(what, number)
        for finding in other.findings:
            self.blame(finding.code, f"in the set-up of its keys: {finding.what}", *finding.authors)

    @property
    def ok(self) -> bool:
        """Nothing is wrong. An attempt that was aborted by the rules is fine too: see ``finished``."""
        return not self.findings

    def lines(self) -> list[str]:
        """The verdict for people."""
        members = f"{len(self.survivors)} of {len(self.sites)} sites "
        if self.slots:
            title = f"set-up of keys number {self.round} of run {self.run.hex()}, for {self.slots} rounds"
            end = members + ("hold keys" if self.finished else "answered; aborted without keys")
        else:
            title = f"round {self.round}, attempt {self.attempt} of run {self.run.hex()}"
            end = members + "in the sum; " + ("finished" if self.finished else "aborted without a sum")
        out = [
            f"{title}, context {self.ctx.hex()}",
            f"roster {self.roster_hash.hex()}: compare it with your own",
            end,
            "checked: " + ", ".join(f"{count} {name}" for name, count in self.checks.items()),
        ]
        if self.set_up:
            out.append(f"its keys were set up before: the transcript of that, {self.set_up.hex()}, was checked with it")
        if self.finished and not self.slots and not self.sum_checked:
            out.append("the sum itself was not recomputed: the transcript holds no masked vectors")
        out += [f"{f.code} {' or '.join(f.authors)}: {f.what}" for f in self.findings]
        what = "set-up" if self.slots else "round"
        return [*out, f"the {what} kept the rules" if self.ok else f"{len(self.findings)} breach(es) of the rules"]

    def to_dict(self) -> dict[str, object]:
        """The same for programs; bytes as hexadecimal strings."""
        return {
            "ok": self.ok,
            "ctx": self.ctx.hex(),
            "run": self.run.hex(),
            "round": self.round,
            "attempt": self.attempt,
            "roster_hash": self.roster_hash.hex(),
            "sites": list(self.sites),
            "survivors": list(self.survivors),
            "slots": self.slots,
            "set_up": self.set_up.hex(),
            "finished": self.finished,
            "sum_checked": self.sum_checked,
            "checks": dict(self.checks),
            "findings": [{"code": f.code, "what": f.what, "authors": list(f.authors)} for f in self.findings],
        }
