"""Sums of mask streams do not depend on how many processes make them; losing a worker loses nothing."""

from __future__ import annotations

import hashlib
import itertools
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsecure.errors import ProtocolError
from fedsecure.secagg import keys, parallel, prg, recovery, shamir

KEYS = [bytes([i]) * 32 for i in range(40)]
LONG = parallel.SLOT_BYTES // 4 + 1001  # words of 32 bits: two tiles, the second of odd length


@pytest.fixture
def two() -> parallel.Crew:
    """This process and one worker, started."""
    assert parallel.warm_up(2) == 2
    with parallel.crew(0, workers=2) as crew:
        assert crew is not None
    return crew


@pytest.fixture(scope="module", autouse=True)
def _end() -> Iterator[None]:
    yield
    parallel.close()


@pytest.fixture
def alone() -> Iterator[None]:
    parallel.close()
    yield
    parallel.close()


def worker_ids(crew: parallel.Crew) -> list[int]:
    return [worker._process.pid for worker in crew._others]


@pytest.mark.parametrize("dtype", ["<u4", "<u2"])
@pytest.mark.parametrize("length", [0, 1, 1000, LONG])
@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (0, 2), (9, 31)])
def test_two_processes_make_the_sum_of_one(
    two: parallel.Crew, dtype: str, length: int, counts: tuple[int, int]
) -> None:
    start = np.arange(length, dtype=np.uint64).astype(dtype)
    plus, minus = KEYS[: counts[0]], KEYS[counts[0] : sum(counts)]
    one, both = start.copy(), start.copy()
    prg.add_masks(one, plus, minus, workers=1)
    prg.add_masks(both, plus, minus, workers=2)
    assert np.array_equal(one, both)
    assert bool(length and sum(counts)) == (not np.array_equal(one, start))
    assert two.alive


def test_both_processes_take_part(two: parallel.Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    done = {"here": 0, "there": 0}
    here, take = prg._Tile.here, prg._Tile.take

    def counted_here(tile: prg._Tile) -> None:
        done["here"] += 1
        here(tile)

    def counted_take(tile: prg._Tile, answer: bytes, slot: memoryview) -> None:
        done["there"] += 1
        take(tile, answer, slot)

    monkeypatch.setattr(prg._Tile, "here", counted_here)
    monkeypatch.setattr(prg._Tile, "take", counted_take)
    prg.add_masks(np.zeros(4 * LONG, dtype="<u4"), KEYS, [], workers=2)
    assert done["there"] >= 2  # the first jobs go there before one is done here
    assert done["here"] >= 1


@settings(deadline=None, max_examples=30)
@given(
    words=st.integers(0, 400),
    chunk=st.sampled_from([8, 32, 128, None]),
    plus=st.lists(st.sampled_from(KEYS), max_size=3),
    minus=st.lists(st.sampled_from(KEYS), max_size=3),
)
def test_sixteen_bit_words_are_halves_of_the_same_stream(
    words: int, chunk: int | None, plus: list[bytes], minus: list[bytes]
) -> None:
    vector = np.zeros(words, dtype="<u2")
    prg.add_masks(vector, plus, minus, chunk=chunk)
    expected = np.zeros(words, dtype=object)
    for sign, chosen in ((1, plus), (-1, minus)):
        for key in chosen:
            expected = expected + sign * prg.keystream(key, words, dtype="<u2").astype(object)
    assert vector.tolist() == [int(x) % 2**16 for x in expected]
    if words:
        both = prg.keystream(KEYS[1], (words + 1) // 2)
        assert np.array_equal(both.view("<u2")[:words], prg.keystream(KEYS[1], words, dtype="<u2"))


def test_a_part_of_a_stream_starts_where_the_whole_has_it() -> None:
    for dtype, first in (("<u4", 12), ("<u2", 24)):
        part = np.zeros(50, dtype=dtype)
        prg.add_streams(part, KEYS[:1], [], first=first)
        assert np.array_equal(part, prg.keystream(KEYS[0], first + 50, dtype=dtype)[first:])


def test_more_keys_than_ciphers_open_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vector, expected = np.zeros(100, dtype="<u4"), np.zeros(100, dtype="<u4")
    for key in KEYS[:5]:
        expected += prg.keystream(key, 100)
    for key in KEYS[5:12]:
        expected -= prg.keystream(key, 100)
    for batch in (1, 4, 5, 7, 100):
        monkeypatch.setattr(prg, "BATCH", batch)
        vector[:] = 0
        prg.add_masks(vector, KEYS[:5], KEYS[5:12])
        assert np.array_equal(vector, expected)


def test_a_killed_worker_loses_nothing(two: parallel.Crew) -> None:
    expected, vector = np.zeros(LONG, dtype="<u4"), np.zeros(LONG, dtype="<u4")
    prg.add_masks(expected, KEYS, [], workers=1)
    (worker,) = worker_ids(two)
    os.kill(worker, signal.SIGSTOP)  # it takes jobs and answers none
    jobs, killed = prg._tiles(vector, KEYS, []), False

    def killing() -> Iterator[prg._Tile]:
        nonlocal killed
        for number, job in enumerate(jobs):
            if number == parallel.SLOTS:  # its hands are full
                os.kill(worker, signal.SIGKILL)
                killed = True
            yield job

    two.run(killing())
    assert killed
    assert not two.alive
    assert np.array_equal(vector, expected)
    assert parallel.warm_up(2) == 2  # a new one is started for the next sum


def test_a_worker_that_hangs_is_given_up(two: parallel.Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "PATIENCE", 0.1)
    expected, vector = np.zeros(LONG, dtype="<u4"), np.zeros(LONG, dtype="<u4")
    prg.add_masks(expected, KEYS, [], workers=1)
    os.kill(worker_ids(two)[0], signal.SIGSTOP)
    prg.add_masks(vector, KEYS, [], workers=2)
    assert np.array_equal(vector, expected)
    assert not two.alive


def test_without_workers_the_sum_is_made_here(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert parallel.warm_up(2) == 1
    vector = np.zeros(1000, dtype="<u4")
    prg.add_masks(vector, KEYS[:1], [], workers=2)
    assert np.array_equal(vector, prg.keystream(KEYS[0], 1000))


def test_workers_start_by_themselves_only_where_it_pays(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "cores", lambda: 2)

    def hired(size: int) -> bool:
        with parallel.crew(size) as crew:
            return crew is not None

    assert not hired(parallel.USE - 1)
    assert not hired(parallel.START // 2)
    assert hired(parallel.START // 2)
    assert not hired(parallel.USE - 1)
    assert hired(parallel.USE)
    monkeypatch.setattr(parallel, "cores", lambda: 1)
    assert not hired(2 * parallel.START)


def test_a_crew_at_work_is_not_waited_for(two: parallel.Crew) -> None:
    with parallel.crew(0, workers=2) as mine:
        assert mine is two
        with parallel.crew(0, workers=2) as other:
            assert other is None


def test_a_fork_leaves_the_workers_to_its_parent(two: parallel.Crew) -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            vector = np.zeros(100, dtype="<u4")
            prg.add_masks(vector, KEYS[:1], [], workers=1)
            status = int(parallel._crew is not None or not np.array_equal(vector, prg.keystream(KEYS[0], 100)))
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    vector = np.zeros(LONG, dtype="<u4")
    prg.add_masks(vector, KEYS[:1], [], workers=2)
    assert np.array_equal(vector, prg.keystream(KEYS[0], LONG))
    assert two.alive


def test_nothing_secret_is_left_behind_or_on_the_command_line(two: parallel.Crew) -> None:
    key = secrets.token_bytes(32)
    prg.add_masks(np.zeros(LONG, dtype="<u4"), [key], [], workers=2)
    (worker,) = two._others
    assert not any(slot.tobytes().strip(b"\0") for slot in worker._slots)
    for name in ("cmdline", "environ"):
        seen = Path(f"/proc/{worker._process.pid}/{name}").read_bytes()
        assert key not in seen
        assert key.hex().encode() not in seen
    assert b"fedsecure.secagg.worker" in Path(f"/proc/{worker._process.pid}/cmdline").read_bytes()


PROGRAM = """
import numpy as np
from fedsecure.secagg import parallel, prg
assert parallel.warm_up(2) == 2
vector = np.zeros(parallel.SLOT_BYTES, dtype="<u4")
prg.add_masks(vector, [bytes(32)] * 3, [], workers=2)
print(parallel._crew._others[0]._process.pid, flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["", "import os; os._exit(0)", "raise SystemExit(0)"])
def test_workers_end_with_their_parent(end: str) -> None:
    """The program has no main guard: workers are not started by running it again."""
    program = [sys.executable, "-W", "error", "-c", PROGRAM.format(end=end)]
    run = subprocess.run(program, capture_output=True, text=True, timeout=240, check=True)
    assert run.stderr == ""
    (pid,) = map(int, run.stdout.split())
    assert gone(pid)


def gone(pid: int) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        signal.sigtimedwait([], 0.1)
    return False


class Cohort:
    """n sites that have shared a seed and a mask key each with everybody."""

    def __init__(self, n: int, t: int) -> None:
        self.ctx, self.t, self.sites = secrets.token_bytes(32), t, range(1, n + 1)
        self.keys = {i: X25519PrivateKey.generate() for i in self.sites}
        self.seeds = {i: secrets.token_bytes(32) for i in self.sites}
        self.public = {i: key.public_key().public_bytes_raw() for i, key in self.keys.items()}

    def open(
        self, dropped: set[int], *, bad: frozenset[int] | set[int] = frozenset(), workers: int = 1
    ) -> recovery.Masks:
        present = [i for i in self.sites if i not in dropped]
        return recovery.open_masks(
            ctx=self.ctx,
            threshold=self.t,
            survivors=present,
            seed_shares={i: self.shares(self.seeds[i], present, bad) for i in present},
            key_shares={i: self.shares(self.keys[i].private_bytes_raw(), present, bad) for i in dropped},
            commitments={i: keys.commit(self.seeds[i], ctx=self.ctx, index=i) for i in self.sites},
            mask_keys=self.public,
            workers=workers,
        )

    def shares(self, secret: bytes, holders: list[int], bad: frozenset[int] | set[int]) -> dict[int, bytes]:
        dealt = shamir.share(secret, self.t, points=self.sites)
        return {h: secrets.token_bytes(33) if h in bad else dealt[h] for h in holders}


def test_opened_masks_are_those_of_the_survivors(two: parallel.Crew) -> None:
    cohort, dropped = Cohort(9, 5), {1, 4, 9}
    masks = cohort.open(dropped)
    expected = {-1: [], 1: []}
    for i in cohort.sites:
        if i not in dropped:
            expected[-1].append(keys.self_mask_key(cohort.seeds[i], ctx=cohort.ctx, index=i))
        for j in dropped - {i}:
            if i not in dropped:
                pair = keys.pair_mask_key(cohort.keys[i], cohort.public[j], ctx=cohort.ctx, own=i, peer=j)
                expected[-1 if j > i else 1].append(pair)  # i added the stream of a later site
    assert sorted(masks.minus) == sorted(expected[-1])
    assert sorted(masks.plus) == sorted(expected[1])
    assert masks == cohort.open(dropped, workers=2)


@pytest.mark.parametrize("bad", [{1}, {2, 3}, {1, 30}, {28, 29, 30}])
def test_wrong_shares_among_many_are_named(bad: set[int]) -> None:
    """Thirty sites have too many choices of t to try: the decoder finds the secret in one step."""
    masks = Cohort(30, 20).open({5}, bad=bad)
    assert set().union(*masks.wrong.values()) == bad
    assert len(masks.minus) + len(masks.plus) == 2 * 29


def test_more_wrong_shares_than_can_be_told_apart_end_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "MAX_TRIES", 50)
    cohort = Cohort(12, 6)
    with pytest.raises(recovery.Unrecoverable) as caught:
        cohort.open({3}, bad={1, 2, 4, 5, 6, 7})
    assert caught.value.owner == 1


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_the_decoder_corrects_half_the_distance_and_invents_nothing(data: st.DataObject) -> None:
    m, secret = data.draw(st.integers(1, 14)), data.draw(st.binary(min_size=32, max_size=32))
    t = data.draw(st.integers(1, m))
    points = data.draw(st.lists(st.integers(1, 500), min_size=m, max_size=m, unique=True))
    shares = shamir.share(secret, t, points=points)
    wrong = set(data.draw(st.permutations(points))[: data.draw(st.integers(0, m))])
    for point in wrong:
        kind = data.draw(st.integers(0, 2))
        other = b"\0" + hashlib.sha256(secret + bytes([kind, point % 256, point // 256])).digest()
        shares[point] = (b"", b"\xff" * 33, other)[kind]
    decoded = shamir.decode(shares, t)
    if 2 * len(wrong) <= m - t:
        assert decoded == (secret, wrong)
    elif decoded is not None:  # another polynomial that is as near, and an honest account of it
        assert 2 * len(decoded[1]) <= 2 * (m - t)
        line = {x: shares[x] for x in points if x not in decoded[1]}
        assert shamir.reconstruct(dict(itertools.islice(line.items(), t))) == decoded[0]
    assert shamir.agree(shares, t) == (not wrong or m == t)


def test_agreement_needs_every_share() -> None:
    shares = shamir.share(bytes(32), 3, points=range(1, 9))
    assert shamir.agree(shares, 3)
    assert shamir.agree(shares, 4)
    assert not shamir.agree(shares, 2)
    for point in shares:
        assert not shamir.agree({**shares, point: (7).to_bytes(33, "big")}, 3)
        assert not shamir.agree({**shares, point: b"\xff" * 33}, 3)


def test_a_weak_key_fails_as_it_does_alone(two: parallel.Crew) -> None:
    cohort = Cohort(5, 3)
    cohort.public[2] = bytes(32)
    for workers in (1, 2):
        with pytest.raises(ProtocolError, match="FS-1327"):
            cohort.open({4}, workers=workers)
