"""Units pay, not names: whatever shares one inherits the largest spend among them (privacy.md, "Evasion")."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_world import DELTA, PAYLOAD, event, reserve

from fedsecure.errors import BudgetExceeded, LedgerError
from fedsecure.messages import Event
from fedsecure.privacy import accounting
from fedsecure.privacy.ledger import Ledger, Limit
from fedsecure.privacy.unit_sets import Account, Charge, accounts


def some(ledger: Ledger, *numbers: int) -> list[bytes]:
    return ledger.hash_units(f"patient/{n}" for n in numbers)


def epsilon(*multipliers: float) -> float:
    return accounting.epsilon([event(z) for z in multipliers], delta=DELTA)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    with Ledger(tmp_path / "ledger.db") as opened:
        yield opened  # type: ignore[misc]


def test_hashes_are_keyed_by_site_population_and_id(ledger: Ledger, tmp_path: Path) -> None:
    one, two = ledger.hash_units(["patient/1", "patient/2"])
    assert len(one) == len(two) == 32
    assert ledger.hash_units(["patient/1"]) == [one] != [two]
    assert ledger.hash_units(["patient/1"], "evaluation") != [one]
    with Ledger(tmp_path / "other.db") as other:
        assert other.hash_units(["patient/1"]) != [one]


def test_adding_an_image_never_resets_a_budget(ledger: Ledger) -> None:
    reserve(ledger, 0, z=2.0, units=some(ledger, 1, 2, 3))
    made = reserve(ledger, 1, z=3.0, units=some(ledger, 1, 2, 3, 4))
    assert made.epsilon == epsilon(2.0, 3.0)
    assert ledger.epsilon("xrays", "train", DELTA, units=some(ledger, 4)) == epsilon(3.0)


def test_another_name_or_project_inherits_what_a_shared_unit_has_paid(ledger: Ledger) -> None:
    reserve(ledger, 0, z=1.2, units=some(ledger, 1, 2))
    limit = epsilon(1.2) + 0.01
    for name, units in (("renamed", (1, 2)), ("second project", (2, 7, 8, 9))):
        with pytest.raises(BudgetExceeded, match=r"spent so far 3\.\d+"):
            reserve(ledger, 0, z=5.0, dataset=name, run="cd" * 16, units=some(ledger, *units), limit_epsilon=limit)
    # The positive control: strangers have a budget of their own, under a name of their own.
    made = reserve(ledger, 0, z=5.0, dataset="others", units=some(ledger, 7, 8, 9), limit_epsilon=limit)
    assert made.epsilon == epsilon(5.0)


def test_the_worst_unit_decides_and_not_the_sum_over_sets(ledger: Ledger) -> None:
    reserve(ledger, 0, z=2.0, dataset="a", units=some(ledger, 1, 2))
    reserve(ledger, 1, z=3.0, dataset="b", units=some(ledger, 3, 4))
    made = reserve(ledger, 2, z=4.0, dataset="c", units=some(ledger, 2, 3, 5))
    assert made.epsilon == epsilon(2.0, 4.0)
    assert ledger.spent("c", "train") == (event(2.0), event(4.0))
    assert ledger.spent("b", "train") == (event(3.0), event(4.0))


def test_a_unit_removed_and_added_again_keeps_its_spend(ledger: Ledger) -> None:
    reserve(ledger, 0, z=2.0, units=some(ledger, 1, 2))
    assert reserve(ledger, 1, z=3.0, units=some(ledger, 2)).epsilon == epsilon(2.0, 3.0)
    assert reserve(ledger, 2, z=4.0, units=some(ledger, 1, 2)).epsilon == epsilon(2.0, 3.0, 4.0)
    assert ledger.epsilon("xrays", "train", DELTA, units=some(ledger, 1)) == epsilon(2.0, 4.0)


def test_voids_of_shared_units_do_not_count(ledger: Ledger) -> None:
    made = reserve(ledger, 0, z=2.0, dataset="a", units=some(ledger, 1))
    ledger.void(made, "nothing left")
    assert reserve(ledger, 1, z=3.0, units=some(ledger, 1)).epsilon == epsilon(3.0)


def test_order_and_repetition_do_not_matter_and_populations_are_apart(ledger: Ledger) -> None:
    reserve(ledger, 0, units=some(ledger, 1, 2, 3))
    reserve(ledger, 1, units=some(ledger, 3, 1, 2, 1))
    reserve(
        ledger, 2, population="evaluation", events=(event(4.0, "evaluation"),),
        units=ledger.hash_units(["patient/1"], "evaluation"),
    )  # fmt: skip
    assert len({entry.units for entry in ledger.history(population="train")}) == 1
    assert ledger._db.execute("SELECT count(*) FROM unit_sets").fetchone() == (2,)
    assert ledger.spent("xrays", "evaluation") == (event(4.0, "evaluation"),)


def test_new_ids_under_the_old_name_are_no_new_budget(ledger: Ledger) -> None:
    reserve(ledger, 0, units=some(ledger, 1, 2))
    before = ledger.head()
    with pytest.raises(LedgerError, match=r"FS-1265.*holds none of the train units.*a new id is no new budget"):
        reserve(ledger, 1, units=some(ledger, 3, 4))
    # Nor if that set was charged under another name meanwhile.
    reserve(ledger, 1, dataset="b", units=some(ledger, 3, 4))
    with pytest.raises(LedgerError, match="FS-1265"):
        reserve(ledger, 2, units=some(ledger, 3, 4))
    assert ledger.head()[0] == before[0] + 1
    reserve(ledger, 3, units=some(ledger, 2, 3, 4))


def test_an_empty_data_set_may_be_filled_later(ledger: Ledger) -> None:
    assert reserve(ledger, 0, units=[]).epsilon == epsilon(5.0)
    assert reserve(ledger, 1, units=some(ledger, 1)).epsilon == epsilon(5.0)


def test_a_charge_by_name_binds_every_set_of_that_name(ledger: Ledger) -> None:
    """Nobody knows whose units it was: the ones that are called so later pay, wherever they go."""
    reserve(ledger, 0, z=2.0)
    assert reserve(ledger, 1, z=3.0, units=some(ledger, 1, 2)).epsilon == epsilon(2.0, 3.0)
    assert reserve(ledger, 2, z=4.0, dataset="renamed", units=some(ledger, 2)).epsilon == epsilon(2.0, 3.0, 4.0)
    assert reserve(ledger, 3, z=5.0).epsilon == epsilon(2.0, 3.0, 4.0, 5.0)
    assert reserve(ledger, 4, z=6.0, dataset="strangers", units=some(ledger, 8)).epsilon == epsilon(6.0)


@pytest.mark.parametrize("units", [[b"short"], [b"x" * 33], [b"x" * 32, b""], ["x" * 31]])
def test_wrong_hashes_are_refused(ledger: Ledger, units: list[bytes]) -> None:
    with pytest.raises(LedgerError, match=r"FS-1259.*hash_units"):
        reserve(ledger, 0, units=units)
    assert ledger.head()[0] == 0


def test_a_limit_follows_the_units_to_every_name(ledger: Ledger) -> None:
    reserve(ledger, 0, z=5.0, units=some(ledger, 1, 2))
    ledger.set_limit("xrays", "train", Limit(epsilon(5.0, 5.0), DELTA), reason="agreed with the board")
    reserve(ledger, 1, z=5.0, units=some(ledger, 1, 2))
    for name in ("xrays", "renamed"):
        with pytest.raises(BudgetExceeded, match=r"budget set.*'xrays'"):
            reserve(ledger, 2, z=50.0, dataset=name, units=some(ledger, 2, 3))
    reserve(ledger, 2, z=5.0, dataset="strangers", units=some(ledger, 3))
    ledger.set_limit("xrays", "train", Limit(8.0, DELTA), reason="raised by the board")
    reserve(ledger, 3, z=5.0, units=some(ledger, 1, 2))
    # The policy's limit still holds, whatever the ledger allows.
    with pytest.raises(BudgetExceeded, match=r"at most ε = 1\.5 .*policy"):
        reserve(ledger, 4, z=5.0, units=some(ledger, 1, 2), limit_epsilon=1.5)


def test_afford_asks_without_charging(ledger: Ledger) -> None:
    units = some(ledger, 1)
    given = {"dataset": "xrays", "population": "train", "limit_epsilon": 3.0, "delta": DELTA, "units": units}
    assert ledger.afford(events=(event(5.0),) * 2, **given) == epsilon(5.0, 5.0)  # type: ignore[arg-type]
    with pytest.raises(BudgetExceeded):
        ledger.afford(events=(event(1.0),), **given)  # type: ignore[arg-type]
    assert ledger.head()[0] == 0


def test_two_handles_see_each_others_sets(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.db") as one, Ledger(tmp_path / "ledger.db") as two:
        units = some(one, 1, 2, 3)
        reserve(one, 0, z=2.0, units=units)
        assert reserve(two, 1, z=3.0, units=units).epsilon == epsilon(2.0, 3.0)
        reserve(two, 2, z=4.0, dataset="b", units=some(two, 3, 9))
        assert reserve(one, 3, z=5.0, units=units).epsilon == epsilon(2.0, 3.0, 4.0, 5.0)


def test_a_refused_set_leaves_no_trace_in_what_is_remembered(ledger: Ledger) -> None:
    """A set that was refused was never stored, and its number goes to another set."""
    wide = some(ledger, 1, 2, 3)
    with pytest.raises(BudgetExceeded):
        reserve(ledger, 0, z=0.5, units=wide)
    reserve(ledger, 1, z=2.0, dataset="b", units=some(ledger, 3))
    assert reserve(ledger, 2, z=3.0, units=wide).epsilon == epsilon(2.0, 3.0)
    assert ledger.epsilon("xrays", "train", DELTA, units=some(ledger, 1)) == epsilon(3.0)


def test_twenty_rounds_on_a_large_set_store_it_once(ledger: Ledger) -> None:
    units = some(ledger, *range(20_000))
    for number in range(20):
        ledger.commit(reserve(ledger, number, z=50.0, units=units), PAYLOAD)
    assert ledger._db.execute("SELECT count(*), sum(length(added)) FROM unit_sets").fetchone() == (1, 32 * 20_000)
    reserve(ledger, 20, z=50.0, units=[*units[5:], *some(ledger, -1)])
    added, removed = ledger._db.execute("SELECT length(added), length(removed) FROM unit_sets WHERE key = 2").fetchone()
    assert (added, removed) == (32, 5 * 32)
    assert ledger.verify() == 41


subsets = st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(subsets, st.data())
def test_the_worst_account_is_the_worst_unit_s(sets: list[set[int]], data: st.DataObject) -> None:
    """Against the plain way: follow every unit by itself. Charges by name bind all that was ever called so."""
    rates = st.sampled_from([1.0, 1.0, 0.5])
    multipliers = st.sampled_from([4.0, 5.0, 8.0])
    names = [data.draw(st.sampled_from("ab")) for _ in sets]
    by_name = [data.draw(st.booleans()) for _ in sets]
    charges, links = [], {name: frozenset(k for k, n in enumerate(names) if n == name) for name in set(names)}
    for key, name in enumerate(names):
        made = Event("train", "t", data.draw(multipliers), 2.0, data.draw(rates))
        charges.append(Charge(name, None if by_name[key] else key, (made,)))
    asked = data.draw(st.sets(st.integers(0, 5), min_size=1))
    patterns = [frozenset(key for key, members in enumerate(sets) if unit in members) for unit in asked]

    def paid(pattern: frozenset[int]) -> list[Event]:
        called = {"a", *(names[key] for key in pattern)}
        return [
            e for c in charges for e in c.events if (c.name in called if c.units is None else c.units in pattern)
        ]  # fmt: skip

    found = accounts(charges, links, patterns, dataset="a", limited=frozenset())
    truth = max(accounting.epsilon(paid(pattern), delta=DELTA) for pattern in patterns)
    assert max(accounting.epsilon(account.events, delta=DELTA) for account in found) == pytest.approx(truth)


def test_very_many_poisson_histories_are_bounded_from_above() -> None:
    def poisson(z: float) -> Event:
        return Event("train", "t", z, z, 0.5)

    charges = [Charge("a", key, (poisson(4.0 + key),)) for key in range(12)]
    patterns = [frozenset(pair) for pair in itertools.combinations(range(12), 2)]
    assert len(patterns) > 64
    (account,) = accounts(charges, {"a": frozenset(range(12))}, patterns, dataset="a", limited=frozenset())
    assert set(account.events) == {poisson(4.0 + key) for key in range(12)}
    few: Sequence[Account] = accounts(charges, {}, patterns[:3], dataset="a", limited=frozenset())
    assert {frozenset(a.events) for a in few} == {frozenset(poisson(4.0 + key) for key in p) for p in patterns[:3]}
