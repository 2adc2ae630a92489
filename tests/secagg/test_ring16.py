"""The ring of 16 bits: exact sums modulo 2^16, half the bytes, wrapping refused, records bounded exactly."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from epoch_world import EpochWorld, SlotRun
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_world import BASE, CONFIG, Run, federation, make_client, make_descriptor, make_query

from fedsecure.errors import PrivacyError, ProtocolError
from fedsecure.messages import Query, Segment
from fedsecure.privacy import grid
from fedsecure.privacy.noise import SeededRng
from fedsecure.privacy.ring16 import clip_room, ring16_segment, round_records, sum_records
from fedsecure.privacy.rotation import rotation
from fedsecure.secagg import prg, ring
from fedsecure.secagg.descriptor import RoundDescriptor, hash_query
from fedsecure.secagg.policy import RoundPolicy, check, wrap_log2
from fedsecure.secagg.server import Phase
from fedsecure.secagg.thresholds import Mode

SEED = bytes(range(32))


def query16(n: int, *, length: int = 5, **changes: object) -> Query:
    segments = (Segment("delta", length, 2.0**-10, 500, 1000, Fraction(400**2), SEED),)
    return replace(make_query(n, **changes), ring_bits=16, segments=segments)


class Run16(Run):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.vectors = {site: vector.astype(np.uint16) for site, vector in self.vectors.items()}

    def expected(self, survivors: object) -> np.ndarray:
        total = sum((self.vectors[site].astype(object) for site in survivors), np.zeros(1, dtype=object))  # type: ignore[attr-defined]
        return ((total + 2**15) % 2**16 - 2**15).astype(np.int64)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), mode=st.sampled_from(list(Mode)), n=st.integers(3, 7), length=st.integers(1, 300))
def test_sums_are_exact_modulo_65536(data: st.DataObject, mode: Mode, n: int, length: int) -> None:
    descriptor = make_descriptor(n, query=query16(n, length=length), mode=mode)
    sites = list(descriptor.cohort)
    spare = n - descriptor.min_survivors
    lost = data.draw(st.lists(st.sampled_from(sites), max_size=spare, unique=True))
    phases = [Phase.ADVERTISE, Phase.SHARES, Phase.MASKED]
    when = {site: data.draw(st.sampled_from(phases)) for site in lost}
    run = Run16(descriptor, {phase: [s for s in lost if when[s] is phase] for phase in phases}, seed=length)
    result = run.complete()
    np.testing.assert_array_equal(result.total, run.expected(set(sites) - set(lost)))
    for site, (_, payload) in run.uploads.items():
        assert len(payload) == 2 * length
        assert bytes(payload) != run.vectors[site].astype("<u2").tobytes()


def test_an_epoch_serves_rings_of_either_width() -> None:
    world = EpochWorld(4, slots=2).set_up()
    wide, narrow = world.round(0), None
    run = SlotRun(world, wide)
    assert run.masked().survivors().unmask().server.finish().total.dtype == np.int64
    narrow = RoundDescriptor.from_query(
        query16(4, round=1),
        roster=federation(4).roster,
        config_hash=CONFIG,
        base_hash=BASE,
        epoch=world.descriptor.ctx,
        slot=1,
    )
    run = SlotRun(world, narrow)
    run.vectors = {site: vector.astype(np.uint16) for site, vector in run.vectors.items()}
    result = run.masked().survivors().unmask().server.finish()
    np.testing.assert_array_equal(result.total, Run16.expected(run, result.survivors))  # type: ignore[arg-type]


def test_masks_are_the_little_endian_words_of_the_same_stream() -> None:
    key = bytes(range(32))
    narrow = np.zeros(1001, dtype="<u2")
    prg.add_masks(narrow, [key], [])
    wide = np.zeros(501, dtype="<u4")
    prg.add_masks(wide, [key], [])
    assert wide.tobytes()[:2002] == narrow.tobytes()
    prg.add_masks(narrow, [], [key])
    assert not narrow.any()


def test_a_vector_of_the_other_width_is_not_masked() -> None:
    for bits, dtype in ((16, np.uint32), (32, np.uint16)):
        query = query16(3) if bits == 16 else make_query(3)
        run = Run(make_descriptor(3, query=query))
        run.advertise().shares()
        client = run.clients["site-00"]
        client.receive_shares(run.broadcast["shares"]["site-00"])
        with pytest.raises(ProtocolError, match="FS-1303"):
            client.mask(np.zeros(run.descriptor.length, dtype=dtype))


def test_the_server_refuses_twice_the_bytes() -> None:
    run = Run16(make_descriptor(3, query=query16(3)))
    run.advertise().shares()
    client = run.clients["site-00"]
    client.receive_shares(run.broadcast["shares"]["site-00"])
    masked = client.mask(run.vectors["site-00"])
    room = run.server.buffer("site-00", masked.header)
    assert room is not None
    assert len(room) == 2 * run.descriptor.length
    with pytest.raises(ProtocolError, match="FS-1329"):
        run.server.receive_masked("site-00", masked.header, bytes(masked.payload) * 2)
    assert run.server.receive_masked("site-00", masked.header, masked.payload)


@given(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1, max_size=30))
def test_integers_come_back(values: list[int]) -> None:
    array = np.array(values, dtype=np.int64)
    words = ring.to_ring(array, 16)
    assert words.dtype == np.uint16
    np.testing.assert_array_equal(ring.lift(words), array)
    np.testing.assert_array_equal(ring.lift(words.astype("<u2")), array)


@pytest.mark.parametrize("value", [2**15, -(2**15) - 1])
def test_nothing_wraps_silently(value: int) -> None:
    with pytest.raises(ProtocolError, match="FS-1302"):
        ring.to_ring(np.array([0, value]), 16)
    assert len(ring.to_ring(np.array([0, value]), 32)) == 2


def test_the_width_is_in_the_context_and_in_the_query_only_where_it_is_16() -> None:
    wide = make_query(3)
    narrow = replace(wide, ring_bits=16)
    assert "ring_bits" not in json.loads(wide.to_json())
    assert Query.from_json(wide.to_json()) == wide
    assert json.loads(narrow.to_json())["ring_bits"] == 16
    assert Query.from_json(narrow.to_json()) == narrow
    assert hash_query(wide) != hash_query(narrow)
    descriptor = make_descriptor(3, query=query16(3))
    assert descriptor.ring_bits == 16
    assert RoundDescriptor.parse(descriptor.canonical()) == descriptor
    for bits in (8, 24, 64):
        with pytest.raises(AssertionError):
            replace(wide, ring_bits=bits)


def test_a_site_refuses_a_width_other_than_the_querys() -> None:
    f, query = federation(5), query16(5)
    good = make_descriptor(5, query=query)
    arguments = {
        "policy": RoundPolicy(),
        "roster": f.roster,
        "site": f.sites[0],
        "config_hash": CONFIG,
        "base_hash": BASE,
    }
    check(good, query, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match="FS-1340"):
        check(replace(good, ring_bits=32), query, **arguments)  # type: ignore[arg-type]
    louder = replace(query.segments[0], noise_variance=Fraction(3000**2))
    loud = replace(query, segments=(louder,))
    with pytest.raises(ProtocolError, match="FS-1341"):
        check(make_descriptor(5, query=loud), loud, **arguments)  # type: ignore[arg-type]
    bigger = replace(query, segments=(replace(query.segments[0], clamp=7000),))
    assert wrap_log2(make_descriptor(5, query=bigger)) == 0.0
    with pytest.raises(ProtocolError, match="FS-1341"):
        check(make_descriptor(5, query=bigger), bigger, **arguments)  # type: ignore[arg-type]


def segment(length: int = 5120, **changes: object) -> Segment:
    base = {
        "clip_norm": 0.1,
        "noise_multiplier": 2.0,
        "honest": 2,
        "sites": 3,
        "units": 20,
        "rotation_seed": SEED,
        "rounding": "record",
    }
    return ring16_segment("gradient", length, **{**base, **changes})  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 1_000_000),
    z=st.floats(0.3, 8),
    sites=st.integers(3, 20),
    units=st.integers(1, 100),
    rounding=st.sampled_from(["sum", "record"]),
)
def test_what_is_made_never_wraps_and_what_would_is_refused(
    length: int, z: float, sites: int, units: int, rounding: str
) -> None:
    honest = max(1, sites // 2)
    try:
        made = segment(length, noise_multiplier=z, sites=sites, honest=honest, units=units, rounding=rounding)
    except PrivacyError as error:
        assert error.code in ("FS-1211", "FS-1214")  # noqa: PT017
        return
    # The bound of secagg.md §4.2, worked out here again.
    room = 2**15 - 1 - sites * made.clamp
    exponent = room**2 / (2 * sites * float(made.noise_variance))
    assert math.log2(2 * length) - exponent / math.log(2) <= -40 + 1e-9
    assert made.noise_variance * honest >= (Fraction(z) * made.bound) ** 2
    assert made.grid * clip_room(made.bound, length, rounding=rounding) == pytest.approx(0.1)  # type: ignore[arg-type]
    if rounding == "sum":
        assert grid.segment_clip_norm(made) >= 0.1 * (1 - 1e-12)
    grid.check_segment(made, sites, 16)


def test_a_wrap_and_a_rotation_out_of_place_are_refused() -> None:
    made = segment()
    with pytest.raises(PrivacyError, match="FS-1206"):
        grid.check_segment(replace(made, noise_variance=made.noise_variance * 2), 3, 16)
    with pytest.raises(PrivacyError, match="FS-1206"):
        grid.check_segment(replace(made, clamp=2 * made.clamp + 4000), 3, 16)
    with pytest.raises(PrivacyError, match="FS-1212"):
        grid.check_segment(made, 3)
    with pytest.raises(PrivacyError, match="FS-1214"):
        segment(10_000_000)
    with pytest.raises(PrivacyError, match="FS-1211"):
        segment(honest=4)


def test_the_door_turns_rounds_and_decodes() -> None:
    made = segment(3000, rounding="sum")
    values = np.random.default_rng(0).normal(size=3000)
    values *= 0.1 / np.linalg.norm(values)
    steps = grid.round_to_grid(values, made)
    assert np.abs(grid.from_grid(steps, made) - values).max() < 5 * made.grid
    np.testing.assert_array_equal(steps, np.rint(rotation(SEED, 3000).forward(values) / made.grid).astype(np.int64))
    huge = grid.round_to_grid(np.full(3000, 1e308), made)
    assert np.abs(huge).max() == made.clamp


@settings(max_examples=60, deadline=None)
@given(
    d=st.integers(1, 400),
    bound=st.integers(1, 5000),
    length=st.sampled_from([0.0, 0.5, 0.99, 1.0, 1.5, 1e9, 1e300]),
    seed=st.integers(0, 2**32),
)
def test_no_rounded_record_is_longer_than_the_bound(d: int, bound: int, length: float, seed: int) -> None:
    """Exact integers, whatever comes in: small bounds, corners, vectors far beyond the bound."""
    rng = np.random.default_rng(seed)
    rows = rng.choice([rng.normal(size=(4, d)), np.ones((4, d)), np.eye(4, d)])
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9) * bound * length
    out = round_records(rows, bound=bound, rng=SeededRng(seed))
    assert out.dtype == np.int64
    for row in out:
        assert sum(int(v) ** 2 for v in row) <= bound**2


def test_rounding_has_no_bias_where_the_bound_leaves_room() -> None:
    d, bound = 50, 200
    row = np.linspace(-20, 20, d)
    many = round_records(np.tile(row, (20_000, 1)), bound=bound, rng=SeededRng(5))
    assert set(np.unique(many - np.floor(row).astype(np.int64))) <= {0, 1}
    np.testing.assert_allclose(many.mean(axis=0), row, atol=6 * 0.5 / math.sqrt(20_000))
    whole = np.arange(10.0)[None]
    np.testing.assert_array_equal(round_records(whole, bound=100, rng=SeededRng(1)), whole.astype(np.int64))


def test_the_cut_is_reached_and_holds() -> None:
    """Every draw is too long: v = (0 or 1)·ones has norm at least √(d/2) or so, far beyond 3."""
    rows = np.full((5, 400), 3 / 20)
    out = round_records(rows, bound=3, rng=SeededRng(2))
    assert (np.einsum("ij,ij->i", out, out) <= 9).all()


def test_records_rounded_one_by_one_pass_the_door_unchanged() -> None:
    made = segment(3000)
    rng = np.random.default_rng(1)
    records = rng.normal(size=(20, 3000))
    records *= 0.1 / np.linalg.norm(records, axis=1, keepdims=True)
    values = sum_records(records, made, rng=SeededRng(3))
    steps = grid.round_to_grid(values, made)
    turned = rotation(SEED, 3000).forward(records) / made.grid
    rows = round_records(turned, bound=made.bound, rng=SeededRng(3))
    again = rows.sum(axis=0)
    np.testing.assert_array_equal(steps, np.clip(again, -made.clamp, made.clamp))
    assert np.linalg.norm(values - records.sum(axis=0)) < 20 * made.grid * math.sqrt(3000) / 2
    # One record more or less moves the integers by its own row: at most Δ.
    assert (np.einsum("ij,ij->i", rows, rows) <= made.bound**2).all()


def test_values_that_are_no_numbers() -> None:
    with pytest.raises(PrivacyError, match="FS-1207"):
        round_records(np.array([[np.nan]]), bound=3, rng=SeededRng(0))


def test_a_lone_client_of_a_narrow_ring_has_half_the_upload() -> None:
    narrow, wide = (Run(make_descriptor(3, query=q)) for q in (query16(3), make_query(3)))
    assert narrow.descriptor.word_bytes * 2 == wide.descriptor.word_bytes
    assert make_client(narrow.descriptor, "site-00").ctx != make_client(wide.descriptor, "site-00").ctx
