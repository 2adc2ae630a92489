"""The sparse graph above 128 sites: the parameter search, the ring, and whole rounds with drop-outs in every phase."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_world import BASE, CONFIG, Run, client_message, edit, federation, make_descriptor, make_query

from fedsecure.errors import ProtocolError, RoundAborted
from fedsecure.secagg.descriptor import HARARY, RoundDescriptor
from fedsecure.secagg.graph import (
    MAX_NEIGHBOURS,
    Graph,
    correctness_log2,
    ring_seed,
    search,
    security_log2,
    tail_log2,
)
from fedsecure.secagg.policy import RoundPolicy, check
from fedsecure.secagg.server import Phase
from fedsecure.secagg.thresholds import Mode, Thresholds

N = 132

# secagg.md §3.8, honest-but-curious rows: n → (k, t) for 5 % corrupt and 5 % missing, 10/10, 20/10, 33/10.
TABLE = {
    200: [(20, 11), (34, 19), (46, 30), (66, 47)],
    500: [(28, 16), (42, 24), (60, 39), (90, 64)],
    1000: [(30, 17), (48, 27), (68, 44), (102, 72)],
    2000: [(30, 18), (50, 28), (70, 45), (112, 79)],
}
SHARES = [(0.05, 0.05), (0.10, 0.10), (0.20, 0.10), (0.33, 0.10)]


@pytest.mark.parametrize(("sites", "column"), list(product(TABLE, range(4))))
def test_the_table_of_parameters(sites: int, column: int) -> None:
    corrupt, missing = (int(part * sites) for part in SHARES[column])
    k, t = search(sites, colluders=corrupt, missing=missing)
    wanted = TABLE[sites][column]
    assert abs(k - wanted[0]) <= 2
    assert abs(t - wanted[1]) <= 2
    assert security_log2(sites, k, threshold=t, colluders=corrupt, missing=missing) <= -40
    assert correctness_log2(sites, k, threshold=t, missing=missing) <= -20


@settings(max_examples=40, deadline=None)
@given(sites=st.integers(129, 3000), corrupt=st.floats(0.01, 0.35), missing=st.floats(0, 0.15))
def test_the_search_finds_the_least(sites: int, corrupt: float, missing: float) -> None:
    c, gone = max(1, int(corrupt * sites)), int(missing * sites)
    try:
        k, t = search(sites, colluders=c, missing=gone)
    except ValueError:
        return
    assert security_log2(sites, k, threshold=t, colluders=c, missing=gone) <= -40
    assert correctness_log2(sites, k, threshold=t, missing=gone) <= -20
    if t > 1:
        assert security_log2(sites, k, threshold=t - 1, colluders=c, missing=gone) > -40


def test_a_degree_too_large_to_be_reckoned_with_is_refused() -> None:
    """The bounds add up a term for each neighbour, with numbers of thousands of digits: a hostile context must not ask
    for half a minute of them."""
    n, c, most = 10_000, 1000, MAX_NEIGHBOURS
    assert Thresholds(n, c, 600, 9000, Mode.HBC, most).neighbours == most
    with pytest.raises(ProtocolError, match=f"FS-1301.*even k <= {most}"):
        Thresholds(n, c, 600, 9000, Mode.HBC, most + 2)
    assert search(n, colluders=n // 3, missing=n // 10) == (126, 88)


def test_too_many_corrupt_sites_have_no_graph() -> None:
    with pytest.raises(ValueError, match="no graph"):
        search(200, colluders=180, missing=60)
    with pytest.raises(ProtocolError, match="FS-1301"):
        Thresholds.choose(200, mode=Mode.HBC, colluders=180, min_survivors=182)


def test_the_tail_is_that_of_the_hypergeometric_law() -> None:
    """Against counting by hand in a small population, and against drawing."""
    assert tail_log2(5, 2, 2, 2) == pytest.approx(math.log2(1 / 10))
    assert tail_log2(5, 2, 2, 0) == 0.0
    assert tail_log2(5, 2, 2, 3) == -math.inf
    draw = random.Random(1)
    hits = sum(sum(x < 30 for x in draw.sample(range(100), 20)) >= 8 for _ in range(20_000)) / 20_000
    assert 2 ** tail_log2(100, 30, 20, 8) == pytest.approx(hits, abs=0.01)


def test_what_the_bound_on_falling_apart_counts() -> None:
    """Harary's ring falls apart only where two gaps of k/2 or more are lost: checked on a small ring, all subsets."""
    n, k = 12, 4
    graph = Graph(tuple(range(1, n + 1)), k, bytes(32))
    ring = graph._ring
    apart = total = 0
    for lost in product([False, True], repeat=n):
        if sum(lost) != 4:
            continue
        total += 1
        left = {ring[i] for i in range(n) if not lost[i]}
        seen, todo = set(), [next(iter(left))]
        while todo:
            at = todo.pop()
            if at not in seen:
                seen.add(at)
                todo += [peer for peer in graph.peers(at) if peer in left]
        apart += seen != left
    assert total == math.comb(12, 4)
    assert apart > 0
    bound = n * n / 2 * math.comb(4, k) / math.comb(n, k)
    assert apart / total <= bound


@settings(max_examples=50, deadline=None)
@given(
    members=st.lists(st.integers(1, 500), min_size=3, max_size=120, unique=True),
    half=st.integers(1, 30),
    seed=st.binary(min_size=32, max_size=32),
)
def test_the_graph_is_regular_symmetric_and_the_same_for_all(members: list[int], half: int, seed: bytes) -> None:
    members.sort()
    graph, again = (Graph(tuple(members), 2 * half, seed) for _ in range(2))
    for member in members:
        peers = graph.peers(member)
        assert peers == again.peers(member)
        assert member not in peers
        assert len(set(peers)) == min(2 * half, len(members) - 1)
        assert all(member in graph.peers(peer) for peer in peers)
    complete = Graph(tuple(members))
    assert complete.holders(members[0]) == tuple(members)
    assert len(complete.peers(members[0])) == len(members) - 1


def test_another_seed_is_another_ring() -> None:
    members = tuple(range(1, 200))
    rings = {Graph(members, 4, ring_seed(bytes(32), bytes([k]) * 32))._ring for k in range(5)}
    assert len(rings) == 5
    # Every site is anybody's neighbour about equally often.
    counts = np.zeros(200)
    for k in range(200):
        for peer in Graph(members, 20, ring_seed(bytes(32), k.to_bytes(32, "big"))).peers(1):
            counts[peer] += 1
    assert counts[1] == 0
    assert abs(counts[2:].mean() - 200 * 20 / 198) < 1e-9
    assert counts[2:].max() < 45


def sparse(**changes: object) -> RoundDescriptor:
    options = {"colluders": 6, "min_survivors": 122, "mode": Mode.HBC, **changes}
    return make_descriptor(N, query=make_query(N, length=40), **options)  # type: ignore[arg-type]


def test_the_active_mode_is_refused_with_the_reason() -> None:
    for attempt in (lambda: sparse(mode=Mode.ACTIVE), lambda: replace(sparse(), mode=Mode.ACTIVE)):
        with pytest.raises(ProtocolError, match=r"FS-1313.*try out graphs"):
            attempt()


def test_few_sites_keep_the_complete_graph() -> None:
    small = make_descriptor(20, mode=Mode.HBC)
    assert small.graph == "complete"
    with pytest.raises(ProtocolError, match="FS-1313"):
        replace(small, graph=HARARY, neighbours=10)


def test_the_descriptor_comes_back_and_its_numbers_must_fit() -> None:
    d = sparse()
    assert d.graph == HARARY
    assert (d.neighbours, d.threshold) == search(N, colluders=6, missing=N - 122)
    assert RoundDescriptor.parse(d.canonical()) == d
    other = replace(d, neighbours=d.neighbours + 2)
    assert other.ctx != d.ctx
    weaker: list[dict[str, object]] = [
        {"threshold": d.threshold - 2},
        {"neighbours": d.neighbours - 1},
        {"threshold": d.neighbours + 1},
        {"colluders": 60},
        {"neighbours": N},
    ]
    for change in weaker:
        with pytest.raises(ProtocolError, match="FS-1301"):
            replace(d, **change)  # type: ignore[arg-type]
    for change in ({"neighbours": 0}, {"epoch": bytes(32)}):
        with pytest.raises(ProtocolError, match="FS-1312"):
            replace(d, **change)  # type: ignore[arg-type]


def test_a_site_takes_part_only_where_its_policy_allows_the_weaker_claim() -> None:
    d, query, f = sparse(), make_query(N, length=40), federation(N)
    arguments = {"roster": f.roster, "site": f.sites[0], "config_hash": CONFIG, "base_hash": BASE}
    with pytest.raises(ProtocolError, match="FS-1330"):
        check(d, query, policy=RoundPolicy(), **arguments)  # type: ignore[arg-type]
    check(d, query, policy=RoundPolicy(modes=(Mode.HBC,)), **arguments)  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match="FS-1332"):
        check(d, query, policy=RoundPolicy(modes=(Mode.HBC,), min_threshold=40), **arguments)  # type: ignore[arg-type]
    forged = object.__new__(RoundDescriptor)
    for name, value in vars(d).items():
        object.__setattr__(forged, name, 2 if name == "threshold" else value)
    with pytest.raises(ProtocolError, match="FS-1301"):
        check(forged, query, policy=RoundPolicy(modes=(Mode.HBC,)), **arguments)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run() -> Run:
    """One round of 132 sites with drop-outs in every phase, up to the last message."""
    sites = federation(N).sites
    drops = {
        Phase.ADVERTISE: sites[:2],
        Phase.SHARES: sites[2:4],
        Phase.MASKED: sites[4:9],
        Phase.UNMASK: sites[9:11],
    }
    return Run(sparse(), drops).advertise().shares().masked().survivors().unmask()


@pytest.mark.slow
def test_the_sum_is_exact_with_drop_outs_in_every_phase(run: Run) -> None:
    sites = federation(N).sites
    k = run.descriptor.neighbours
    seen: dict[int, set[int]] = {}
    for (phase, site), raw in run.sent.items():
        if phase != "unmask":
            continue
        answer = client_message(raw).unmask
        # Only of neighbours, and never both kinds: what keeps a single input hidden.
        seeds = {share.owner for share in answer.seed_shares}
        masks = {share.owner for share in answer.mask_key_shares}
        assert not seeds & masks
        assert answer.index not in seeds | masks
        assert len(seeds | masks) <= k
        seen[answer.index] = seeds | masks
        assert sites.index(site) + 1 == answer.index
    assert len(seen) == N - 11
    shares = client_message(run.sent["shares", sites[20]]).share_keys.shares
    assert len(shares) == k
    result = run.server.finish()
    np.testing.assert_array_equal(result.total, run.expected(sites[9:]))
    assert result.survivors == sites[9:]
    for site in sites[11:14]:
        run.clients[site].finished(result.result_message)


@pytest.mark.slow
def test_a_site_with_too_few_neighbours_left_stops(run: Run) -> None:
    """Its secrets could not be opened if it dropped out, so it does not upload. (One that never read its shares.)"""
    site = run.descriptor.cohort[4]

    def thin(message: object) -> None:
        routed = message.routed_shares  # type: ignore[attr-defined]
        keep = [header for header in routed.headers if header.index == 5]
        rest = [header for header in routed.headers if header.index != 5]
        left = keep + rest[: run.descriptor.threshold - 1]
        senders = {header.index for header in left}
        shares = [share for share in routed.shares if share.sender in senders]
        del routed.headers[:], routed.shares[:]
        routed.headers.extend(left)
        routed.shares.extend(shares)

    with pytest.raises(ProtocolError, match="FS-1344"):
        run.clients[site].receive_shares(edit(run.broadcast["shares"][site], thin))


def test_below_the_bound_no_sum_comes_out() -> None:
    run = Run(sparse(), {Phase.ADVERTISE: federation(N).sites[:11]})
    with pytest.raises(RoundAborted, match="FS-1350"):
        run.advertise()
