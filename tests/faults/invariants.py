"""What holds in the simulated world at every moment, and what has to come once faults stop."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from faults.basis import Vector, vector_of
from faults.ground import PARAMETERS
from faults.world import SimulatedWorld
from safetensors.numpy import load

from fedsecure.audit_log import PURPOSE, entries, verify
from fedsecure.identity import keys
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
    for name in (*world.names, "aggregator"):
        check_audit_log(world, name)


def check_sums(world: SimulatedWorld) -> None:
    """Each sum is the exact sum of the answers of its recorded survivors, and no answer is in two of them.

    What is recorded is read past the aggregator's code, as a process that takes the run up would find it.
    """
    numbers = {(a.site, a.run, a.round, a.attempt): a.number for a in world.answers.values()}
    assert len(numbers) == len(world.answers), "a site answered one attempt twice"
    counted = Counter[int]()
    released = set[tuple[str, bytes, int, int]]()
    for run, (model, records) in recorded(world).items():
        sums = [absorbed.sum for absorbed in world.absorbed_sums if absorbed.run == run]
        total: Vector | None = None
        for record in records:
            survivors = record["outcome"].get("survivors")
            if survivors is None:
                continue
            expected = np.zeros(PARAMETERS)
            for site in survivors:
                answer = (site, run, record["round"], record["attempt"])
                counted[numbers[answer]] += 1
                released.add(answer)
                expected += vector_of(tuple(record["cohort"]), site, numbers[answer], length=PARAMETERS)
            # A sum that came out and was not recorded, since the process was killed, is no sum.
            while sums and not np.array_equal(sums[0], expected):
                sums.pop(0)
            assert sums, f"no sum like round {record['round']}, attempt {record['attempt']}"
            total = expected if total is None else total + expected
        if total is not None:
            assert model is not None
            assert np.array_equal(model, total), "the model is not the sum of all recorded rounds"
    assert not [number for number, times in counted.items() if times > 1], "an answer was counted twice"
    for site, run, receipt in world.receipts:
        if receipt.released:
            assert (site, run, receipt.round, receipt.attempt) in released, (
                "a site was told of a sum that is not recorded"
            )


def recorded(world: SimulatedWorld) -> dict[bytes, tuple[Vector | None, list[dict[str, Any]]]]:
    """run → its model and its attempts, as they are on the aggregator's disk."""
    home = world.folder / "aggregator"
    if not (home / "aggregator.db").exists():
        return {}
    connection = sqlite3.connect(f"file:{home / 'aggregator.db'}?mode=ro", uri=True)
    try:
        if not connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'attempts'").fetchone()[0]:
            return {}
        found: dict[bytes, tuple[Vector | None, list[dict[str, Any]]]] = {}
        for run, name, digest in connection.execute("SELECT id, model, model_hash FROM runs").fetchall():
            model = None
            if name:
                data = (home / "runs" / run / name).read_bytes()
                assert hashlib.sha256(data).hexdigest() == digest
                model = load(data)["D"].ravel().astype(np.float64)
            rows = connection.execute(
                "SELECT round, attempt, cohort, outcome FROM attempts WHERE run = ? ORDER BY id", (run,)
            ).fetchall()
            records = [
                {"round": r, "attempt": a, "cohort": json.loads(cohort), "outcome": json.loads(outcome)}
                for r, a, cohort, outcome in rows
            ]
            found[bytes.fromhex(run)] = model, records
        return found
    finally:
        connection.close()


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


def check_audit_log(world: SimulatedWorld, name: str) -> None:
    """The log's chain holds, its checkpoints are the member's, and no line that was once there is gone."""
    file = world.audit_log(name)
    if file.exists():
        public = keys.public_bytes(world.ground.identities[name].signing_key)

        def signed(body: bytes, signature: bytes) -> bool:
            return keys.verify(public, PURPOSE, body, signature)

        world.heads[name] = verify(file, head=world.heads.get(name), check=signed).head
        if name == "aggregator":
            check_told(world, file)


def check_told(world: SimulatedWorld, file: Path) -> None:
    """Of each run's attempts that are over, the last one at most is not in the audit log yet."""
    told = defaultdict[Any, set[tuple[Any, Any]]](set)
    for entry in entries(file):
        facts, last = entry.facts, "last." if entry.event == "run-resumed" else ""
        if last or entry.event in ("attempt-summed", "attempt-aborted"):
            told[facts["run"]].add((facts.get(f"{last}round"), facts.get(f"{last}attempt")))
    for run, (_, records) in recorded(world).items():
        over = [(record["round"], record["attempt"]) for record in records if record["outcome"]]
        untold = [where for where in over[:-1] if where not in told[run.hex()]]
        assert not untold, f"the audit log lacks {untold}"


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
