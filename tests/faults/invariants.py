"""What holds in the simulated world at every moment, and what has to come once faults stop."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from faults.basis import vector_of
from faults.world import SimulatedWorld
from safetensors.numpy import load_file

from fedsecure.privacy.ledger import Ledger

# Steps within which two more sums come out, from any state, once nothing goes wrong any more.
PROGRESS_STEPS = 6000


def check(world: SimulatedWorld) -> None:
    """Nothing unexpected was raised, and every sum is what its record says."""
    assert not world.stage.surprises, world.stage.surprises
    assert not world.surprises, world.surprises
    check_sums(world)


def check_everything(world: SimulatedWorld) -> None:
    """Also what takes reading files: budgets and chains."""
    check(world)
    for name in world.names:
        check_budget(world, name)


def check_sums(world: SimulatedWorld) -> None:
    """Each sum is the exact sum of the answers of its recorded survivors, and no answer is in two of them."""
    numbers = {(a.site, a.run, a.round, a.attempt): a.number for a in world.answers.values()}
    assert len(numbers) == len(world.answers), "a site answered one attempt twice"
    counted = Counter[int]()
    for run in world.runs:
        sums = [absorbed for absorbed in world.absorbed_sums if absorbed.run == run]
        released = [record for record in records_of(world, run) if "survivors" in record]
        assert len(sums) == len(released), f"{len(sums)} sums, {len(released)} records of one"
        total = np.zeros(len(sums[0].sum)) if sums else np.zeros(0)
        for absorbed, record in zip(sums, released, strict=True):
            cohort = tuple(record["cohort"])
            survivors = record["survivors"]
            assert len(set(survivors)) == len(survivors) == absorbed.survivors
            expected = np.zeros(len(absorbed.sum))
            for site in survivors:
                number = numbers[site, run, record["round"], record["attempt"]]
                counted[number] += 1
                expected += vector_of(cohort, site, number, length=len(expected))
            assert np.array_equal(absorbed.sum, expected), (absorbed.sum, expected)
            total += expected
        if world.core is not None and world.core.run == run and sums:
            model = load_file(world.folder / "aggregator" / "runs" / run.hex() / "state.safetensors")["D"]
            assert np.array_equal(model.ravel(), total), "the model is not the sum of all recorded rounds"
    assert not [number for number, times in counted.items() if times > 1], "an answer was counted twice"


def records_of(world: SimulatedWorld, run: bytes) -> Iterator[dict[str, Any]]:
    """The run's records of attempts, in order."""
    file = world.folder / "aggregator" / "runs" / run.hex() / "rounds.jsonl"
    if file.exists():
        for line in file.read_text().splitlines():
            yield json.loads(line)


def check_budget(world: SimulatedWorld, name: str) -> None:
    """The ledger's chain holds, and every answer that was ever given is paid for."""
    if not world.ledger(name).exists():
        assert not [answer for answer in world.answers.values() if answer.site == name]
        return
    with Ledger(world.ledger(name)) as ledger:
        ledger.verify()
        answers = [answer for answer in world.answers.values() if answer.site == name]
        void = {entry.reservation for entry in ledger.history() if entry.state == "VOID"}
        paid = Counter(
            (entry.run, entry.round, entry.attempt)
            for entry in ledger.history()
            if entry.state == "RESERVED" and entry.reservation not in void
        )
        given = Counter((answer.run.hex(), answer.round, answer.attempt) for answer in answers)
        assert given <= paid, given - paid
        if paid:
            assert len(ledger.spent(f"{name}-train", "train")) == paid.total()


def check_progress(world: SimulatedWorld) -> int:
    """Once faults stop, two more sums come out within :data:`PROGRESS_STEPS`; returns after how many steps."""
    world.heal()
    before, start = len(world.absorbed_sums), world.steps
    while len(world.absorbed_sums) < before + 2:
        assert world.steps - start <= PROGRESS_STEPS, f"no progress: {world.waiting()}"
        world.step()
        assert not world.stage.surprises, world.stage.surprises
        assert not world.surprises, world.surprises
    return world.steps - start
