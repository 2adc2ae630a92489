"""Whole rounds: the sum is exact for every allowed pattern of drop-outs, and nothing comes out below a bound."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_world import Run, client_message, make_descriptor, make_query

from fedsecure.errors import ProtocolError, RoundAborted
from fedsecure.secagg.client import State
from fedsecure.secagg.server import Phase
from fedsecure.secagg.thresholds import Mode

CODES = {
    Phase.ADVERTISE: "FS-1350",
    Phase.SHARES: "FS-1351",
    Phase.MASKED: "FS-1352",
    Phase.SURVIVORS: "FS-1353",
    Phase.UNMASK: "FS-1354",
}


def assert_no_peer_gave_both_kinds(run: Run) -> None:
    """The information ledger: over all sites together, of no owner did both kinds of share leave."""
    seeds, mask_keys = set(), set()
    for (phase, _), raw in run.sent.items():
        if phase == "unmask":
            message = client_message(raw).unmask
            seeds |= {share.owner for share in message.seed_shares}
            mask_keys |= {share.owner for share in message.mask_key_shares}
    assert not seeds & mask_keys
    assert seeds  # the ledger saw something


@st.composite
def patterns(draw: st.DrawFn) -> tuple[int, int, dict[Phase, set[str]], int]:
    """n, d, who drops out in which phase within the thresholds, and a seed."""
    n = draw(st.integers(3, 7))
    d = draw(st.sampled_from([1, 2, 3, 33]))
    descriptor = make_descriptor(n)
    order = draw(st.permutations(descriptor.cohort))
    drops: dict[Phase, set[str]] = {}
    gone = 0
    for phase in CODES:
        early = phase in (Phase.ADVERTISE, Phase.SHARES, Phase.MASKED)
        least = descriptor.min_survivors if early else descriptor.threshold
        more = draw(st.integers(0, max(0, n - gone - least)))
        drops[phase] = set(order[gone : gone + more])
        gone += more
    return n, d, drops, draw(st.integers(0, 2**32 - 1))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(patterns())
def test_the_sum_is_exact_with_drop_outs_in_every_phase(pattern) -> None:
    n, d, drops, seed = pattern
    run = Run(make_descriptor(n, query=make_query(n, length=d)), drops=drops, seed=seed)
    result = run.complete()
    before_upload = drops[Phase.ADVERTISE] | drops[Phase.SHARES] | drops[Phase.MASKED]
    survivors = tuple(s for s in run.descriptor.cohort if s not in before_upload)
    assert result.survivors == survivors
    np.testing.assert_array_equal(result.total, run.expected(survivors))
    assert result.bad_shares == ()
    assert_no_peer_gave_both_kinds(run)


@pytest.mark.parametrize("phase", CODES)
@pytest.mark.parametrize("n", [3, 5])
def test_below_a_bound_the_round_aborts_and_nothing_comes_out(n: int, phase: Phase) -> None:
    descriptor = make_descriptor(n)
    most = n - (descriptor.threshold if phase in (Phase.SURVIVORS, Phase.UNMASK) else descriptor.min_survivors)
    missing = descriptor.cohort[: most + 1]
    run = Run(descriptor, drops={phase: set(missing)})
    with pytest.raises(RoundAborted, match=CODES[phase]) as caught:
        run.complete()
    assert all(site in caught.value.found for site in missing)
    assert run.server.phase is Phase.ABORTED
    with pytest.raises(ProtocolError, match="FS-1320"):
        run.server.finish()
    with pytest.raises(ProtocolError, match="FS-1320"):
        run.server.close()
    assert not run.server.can_close()
    assert not run.server._accumulator.any()


@pytest.mark.parametrize("phase", CODES)
def test_one_fewer_is_still_enough(phase: Phase) -> None:
    descriptor = make_descriptor(5)
    gone = descriptor.cohort[1]
    run = Run(descriptor, drops={phase: {gone}})
    result = run.complete()
    in_sum = phase in (Phase.SURVIVORS, Phase.UNMASK)
    assert (gone in result.survivors) is in_sum
    np.testing.assert_array_equal(result.total, run.expected(result.survivors))


def test_three_sites_tolerate_no_missing_upload() -> None:
    descriptor = make_descriptor(3)
    assert (descriptor.threshold, descriptor.min_survivors) == (3, 3)


def test_honest_but_curious_mode_skips_the_signatures() -> None:
    descriptor = make_descriptor(5, mode=Mode.HBC)
    run = Run(descriptor, drops={Phase.MASKED: {descriptor.cohort[4]}, Phase.UNMASK: {descriptor.cohort[0]}})
    result = run.complete()
    assert result.survivors == descriptor.cohort[:4]
    np.testing.assert_array_equal(result.total, run.expected(result.survivors))
    assert_no_peer_gave_both_kinds(run)


def test_every_survivor_accepts_the_published_result() -> None:
    run = Run(make_descriptor(4))
    result = run.complete()
    words = (result.total % 2**32).astype("<u4")
    for client in run.clients.values():
        assert client.finished(result.result_message) == hashlib.sha256(words.tobytes()).digest()
        assert client.state is State.DONE


def test_masked_vectors_look_nothing_like_their_inputs() -> None:
    """A vector of zeros leaves as words in which each bit is set about half of the time; its masks cancel."""
    n, d = 3, 20_000
    run = Run(make_descriptor(n, query=make_query(n, length=d)))
    run.vectors = {site: np.zeros(d, dtype=np.uint32) for site in run.vectors}
    result = run.complete()
    assert not result.total.any()
    for _, payload in run.uploads.values():
        words = np.frombuffer(payload, dtype="<u4")
        ones = [int(((words >> bit) & 1).sum()) for bit in range(32)]
        assert max(abs(count - d / 2) for count in ones) < 6 * np.sqrt(d / 4)


def test_the_input_vector_is_not_changed_and_the_masked_one_is_read_only() -> None:
    run = Run(make_descriptor(3)).advertise().shares()
    site = run.descriptor.cohort[0]
    before = run.vectors[site].copy()
    run.clients[site].receive_shares(run.broadcast["shares"][site])
    masked = run.clients[site].mask(run.vectors[site])
    np.testing.assert_array_equal(run.vectors[site], before)
    assert masked.payload.readonly


def test_new_attempts_share_no_keys() -> None:
    uploads = []
    for attempt in range(2):
        run = Run(make_descriptor(3, query=make_query(3, attempt=attempt))).advertise().shares().masked()
        uploads.append(run.uploads[run.descriptor.cohort[0]][1])
    assert uploads[0] != uploads[1]


def test_waiting_for_and_can_close() -> None:
    run = Run(make_descriptor(4))
    names = run.descriptor.cohort
    assert run.server.waiting_for() == names
    for k, site in enumerate(names):
        run.server.receive(site, run.clients[site].advertise())
        assert run.server.waiting_for() == names[k + 1 :]
        assert run.server.can_close() is (k + 1 >= run.descriptor.min_survivors)


def test_secrets_are_dropped_when_the_shares_are_given_away() -> None:
    run = Run(make_descriptor(3))
    run.complete()
    for client in run.clients.values():
        assert client._seed is None
        assert client._mask_key is None
        assert client._cipher_key is None
        assert client._shares == {}
