"""A run as happenings, made up: two rounds, the first with an attempt that was aborted, and evaluations."""

from __future__ import annotations

from typing import Any

from fedsecure.aggregator.happenings import Happening, Kind

RUN = "0123456789abcdef" * 2
COHORT = ["site-1", "site-2", "site-3"]


def run(*, complete: bool = True, epsilon: bool = True) -> list[Happening]:
    told: list[Happening] = []

    def tell(kind: Kind, **facts: Any) -> None:
        told.append(Happening(kind, RUN, 1000.0 + len(told), facts))

    def attempt(round: int, number: int, stage: str, phases: tuple[str, ...], **ends: Any) -> None:
        where = {"round": round, "attempt": number, "stage": stage}
        tell("attempt-opened", **where, cohort=COHORT, context=f"{round:02x}" * 32)
        for phase in phases:
            tell("phase-closed", round=round, attempt=number, phase=phase)
        if "code" in ends:
            tell("attempt-aborted", **where, **ends, seconds=60.0)
        else:
            tell("attempt-summed", **where, survivors=COHORT[: 3 - round % 2], seconds=1.5 + round)
            # The saved state is already in the stage that comes next.
            following = "training" if round < 2 else "after"
            tell(
                "round-saved",
                round=round,
                stage=following,
                step=round,
                **({"epsilon": float(round)} if epsilon else {}),
            )

    full = ("shares", "masked", "survivors", "unmask")
    tell("run-started", sites=COHORT, method="linear", rounds=2)
    for site in COHORT:
        tell("site-joined", site=site)
    attempt(0, 0, "before", full)
    tell("evaluated", stage="before", accuracy=0.5, balanced_accuracy=0.4, hits=[5.0], totals=[10.0])
    tell("keys-prepared", epoch=0, holders=COHORT)
    attempt(1, 0, "training", (), code="FS-1352", reason="1 of 3 vectors came")
    attempt(1, 1, "training", ("survivors", "unmask"))
    tell("alarm", code="FS-1730", reason="a norm that is odd")
    attempt(2, 0, "training", ("survivors", "unmask"))
    tell("evaluated", stage="after", accuracy=0.75, balanced_accuracy=None, hits=[7.0], totals=[10.0])
    tell("run-ended", complete=complete, **({} if complete else {"code": "FS-1702", "reason": "failed too often"}))
    return told
