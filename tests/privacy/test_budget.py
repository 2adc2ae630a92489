"""What the officer sees and sets: rows of ``fedsecure budget show, set, history, verify``."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from ledger_world import DELTA, PAYLOAD, copy_to, event, reserve

from fedsecure.errors import BudgetExceeded, LedgerError, PrivacyError
from fedsecure.privacy import accounting, budget
from fedsecure.privacy.ledger import Ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "site" / "ledger.db"
    with Ledger(file) as ledger:
        units = ledger.hash_units(["patient/1", "patient/2"])
        ledger.commit(reserve(ledger, 0, units=units), PAYLOAD)
        ledger.void(reserve(ledger, 1, units=units), "the line was down")
        reserve(ledger, 2, dataset="scans", units=units[:1])
    return file


def test_show_is_the_worst_unit_s_spend_and_what_its_limit_leaves(path: Path) -> None:
    spent = accounting.epsilon([event()] * 2, delta=DELTA)
    rows = budget.show(path)
    assert [(row["dataset"], row["epsilon"], row["releases"]) for row in rows] == [
        ("xrays", spent, 1),
        ("scans", spent, 1),
    ]
    assert {row["limit_epsilon"] for row in rows} == {None}
    set_to = budget.set_limit(path, "xrays", epsilon=2.0, reason="agreed")
    assert (set_to["limit_epsilon"], set_to["before"]) == (2.0, None)
    assert set_to["remaining"] == pytest.approx(2.0 - spent)
    assert budget.set_limit(path, "xrays", epsilon=0.5, reason="lowered")["before"] == 2.0
    row = budget.show(path, delta=1e-6)[0]
    assert (row["limit_epsilon"], row["limit_delta"], row["remaining"]) == (0.5, 1e-5, 0.0)
    assert row["epsilon"] > spent


def test_releases_left_is_how_many_more_the_ledger_accepts(path: Path) -> None:
    assert budget.show(path)[0]["releases_left"] is None
    row = budget.set_limit(path, "xrays", epsilon=1.9, reason="agreed")
    left = row["releases_left"]
    assert left > 1
    with Ledger(path) as ledger:
        units = ledger.hash_units(["patient/1", "patient/2"])
        for number in range(3, 3 + left):
            reserve(ledger, number, units=units)
        with pytest.raises(BudgetExceeded):
            reserve(ledger, 3 + left, units=units)
    used_up = budget.show(path)[0]
    assert used_up["releases_left"] == 0
    assert 0 < used_up["remaining"] < row["remaining"]


def test_a_policy_s_limit_can_be_reckoned_with(path: Path) -> None:
    budget.set_limit(path, "scans", epsilon=1.5, reason="agreed")
    xrays, scans = budget.show(path, max_epsilon=3.0)
    assert (xrays["limit_epsilon"], xrays["limit_delta"], scans["limit_epsilon"]) == (3.0, 1e-5, 1.5)
    assert xrays["releases_left"] > scans["releases_left"]
    with pytest.raises(PrivacyError, match="FS-1202"):
        budget.show(path, max_epsilon=0.0)


def test_a_limit_in_the_ledger_stops_a_charge_that_the_policy_allows(path: Path) -> None:
    budget.set_limit(path, "xrays", epsilon=1.2, reason="agreed")
    with Ledger(path) as ledger:
        units = ledger.hash_units(["patient/1", "patient/2"])
        with pytest.raises(BudgetExceeded, match=r"at most ε = 1\.2 .*budget set"):
            reserve(ledger, 3, units=units, limit_epsilon=8.0)
    budget.set_limit(path, "xrays", epsilon=8.0, reason="raised")
    with Ledger(path) as ledger:
        reserve(ledger, 3, units=units, limit_epsilon=8.0)


def test_a_limit_may_come_before_the_first_charge(path: Path) -> None:
    row = budget.set_limit(path, "new", population="evaluation", epsilon=1.0, delta=1e-6, reason="agreed")
    assert (row["epsilon"], row["releases"], row["remaining"]) == (0.0, 0, 1.0)
    with Ledger(path) as ledger, pytest.raises(BudgetExceeded):
        reserve(ledger, 0, dataset="new", population="evaluation", events=(event(2.0, "evaluation"),))


def test_a_limit_holds_at_its_own_delta(path: Path) -> None:
    at_1e_5, at_1e_9 = (accounting.epsilon([event()] * 3, delta=delta) for delta in (1e-5, 1e-9))
    budget.set_limit(path, "xrays", epsilon=(at_1e_5 + at_1e_9) / 2, delta=1e-9, reason="agreed")
    with Ledger(path) as ledger, pytest.raises(BudgetExceeded, match="δ = 1e-09"):
        reserve(ledger, 3, units=ledger.hash_units(["patient/1"]))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"epsilon": 0.0}, "FS-1267"),
        ({"epsilon": -1.0}, "FS-1267"),
        ({"epsilon": math.inf}, "FS-1267"),
        ({"epsilon": math.nan}, "FS-1267"),
        ({"delta": 0.0}, "FS-1267"),
        ({"delta": 1.0}, "FS-1267"),
        ({"delta": 0.002}, "FS-1267"),
        ({"reason": " "}, "FS-1259"),
        ({"population": "tuning"}, "FS-1259"),
        ({"dataset": ""}, "FS-1259"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused(path: Path, changes: dict[str, object], code: str) -> None:
    head = budget.verify(path)["head"]
    with pytest.raises(LedgerError, match=code):
        budget.set_limit(path, **({"dataset": "xrays", "epsilon": 2.0, "reason": "agreed"} | changes))  # type: ignore[arg-type]
    assert budget.verify(path)["head"] == head


def test_history_lists_every_row(path: Path) -> None:
    budget.set_limit(path, "xrays", epsilon=2.0, reason="agreed with the board")
    rows = budget.history(path)
    assert [(row["state"], row["final"]) for row in rows] == [
        ("RESERVED", "COMMITTED"), ("COMMITTED", "COMMITTED"), ("RESERVED", "VOID"), ("VOID", "VOID"),
        ("RESERVED", "RESERVED"), ("LIMIT", "LIMIT"),
    ]  # fmt: skip
    assert [row["seq"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0]["epsilon"] == accounting.epsilon([event()], delta=DELTA)
    assert (rows[3]["reason"], rows[3]["epsilon"]) == ("the line was down", None)
    assert (rows[5]["limit_epsilon"], rows[5]["reason"]) == (2.0, "agreed with the board")
    assert rows[0]["units"] == rows[2]["units"] != rows[4]["units"]
    assert [row["seq"] for row in budget.history(path, dataset="scans")] == [5]


def test_verify_against_an_earlier_head_finds_a_ledger_set_back(path: Path, tmp_path: Path) -> None:
    early = budget.verify(path)
    assert early["rows"] == 5
    assert early["head"].startswith("5:")
    backup = copy_to(path, tmp_path / "backup")
    budget.set_limit(path, "xrays", epsilon=2.0, reason="agreed")
    late = budget.verify(path, head=early["head"])
    assert (late["rows"], late["checked_against"]) == (6, early["head"])
    # The backup is sound in itself, copy of the head included; only a head kept elsewhere tells.
    assert budget.verify(backup)["rows"] == 5
    with pytest.raises(LedgerError, match="FS-1262"):
        budget.verify(backup, head=late["head"])
    # Without the older copy it is refused by itself.
    shutil.copy(backup, path)
    with pytest.raises(LedgerError, match="FS-1262"):
        budget.verify(path)


def test_a_lost_copy_is_renewed_only_against_a_known_head(path: Path) -> None:
    head = budget.verify(path)["head"]
    path.with_name("ledger.db.head").unlink()
    for known in (None, head):
        with pytest.raises(LedgerError, match="FS-1264"):
            budget.verify(path, head=known)
    with pytest.raises(LedgerError, match="FS-1266"):
        budget.verify(path, renew=True)
    assert budget.verify(path, head=head, renew=True)["head"] == head
    assert budget.verify(path)["head"] == head


@pytest.mark.parametrize(
    "text", ["", "5", "5:abc", *(f"{row}:" + "a" * 64 for row in ("x", "-1", "05", "")), "5:" + "A" * 64]
)
def test_what_is_no_head(path: Path, text: str) -> None:
    with pytest.raises(LedgerError, match="FS-1266"):
        budget.verify(path, head=text)


def test_no_ledger_is_made(tmp_path: Path) -> None:
    absent = tmp_path / "ledger.db"
    for ask in (
        budget.show,
        budget.history,
        budget.verify,
        lambda p: budget.set_limit(p, "x", epsilon=1.0, reason="y"),
    ):
        with pytest.raises(LedgerError, match="FS-1261"):
            ask(absent)
    assert not list(tmp_path.iterdir())


def test_a_charge_with_noise_from_a_seed_says_so(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with Ledger(path) as ledger:
        reserve(ledger, 0)
        made = reserve(ledger, 1, seeded=True)
        reserve(ledger, 2, seeded=True)
        ledger.commit(made, PAYLOAD)
        ledger.verify()
    assert [row["seeded"] for row in budget.show(path)] == [2]
    said = {row["round"]: row["reason"] for row in budget.history(path) if row["state"] == "RESERVED"}
    assert said == {0: "", 1: "NO PRIVACY (seeded)", 2: "NO PRIVACY (seeded)"}
