"""What the check of a recorded round says: findings with their authors, and what was checked (secagg.md §6.8)."""

from __future__ import annotations

from dataclasses import dataclass, field

AGGREGATOR = "aggregator"
MAX_FINDINGS = 1000


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        code: an FS-13xx code, with the meaning it has in a live round.
        what: what was found.
        authors: who did it; several names where the transcript alone cannot tell them apart.
    """

    code: str
    what: str
    authors: tuple[str, ...]


@dataclass(slots=True)
class Verdict:
    """What the transcript shows.

    Attributes:
        ctx, run, round, attempt: which attempt it is.
        roster_hash: compare it with that of your own roster, where none was given.
        sites, survivors: cohort and the sites in the sum.
        finished: whether the attempt ended with a signed result.
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

    @property
    def ok(self) -> bool:
        """Nothing is wrong. An attempt that was aborted by the rules is fine too: see ``finished``."""
        return not self.findings

    def lines(self) -> list[str]:
        """The verdict for people."""
        out = [
            f"round {self.round}, attempt {self.attempt} of run {self.run.hex()}, context {self.ctx.hex()}",
            f"roster {self.roster_hash.hex()}: compare it with your own",
            f"{len(self.survivors)} of {len(self.sites)} sites in the sum; "
            + ("finished" if self.finished else "aborted without a sum"),
            "checked: " + ", ".join(f"{count} {name}" for name, count in self.checks.items()),
        ]
        if self.finished and not self.sum_checked:
            out.append("the sum itself was not recomputed: the transcript holds no masked vectors")
        out += [f"{f.code} {' or '.join(f.authors)}: {f.what}" for f in self.findings]
        return [*out, "the round kept the rules" if self.ok else f"{len(self.findings)} breach(es) of the rules"]

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
            "finished": self.finished,
            "sum_checked": self.sum_checked,
            "checks": dict(self.checks),
            "findings": [{"code": f.code, "what": f.what, "authors": list(f.authors)} for f in self.findings],
        }
