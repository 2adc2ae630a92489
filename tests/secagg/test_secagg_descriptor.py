"""Thresholds, the round descriptor's canonical bytes, and a site's policy."""

from __future__ import annotations

from dataclasses import fields, replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from secagg_world import BASE, CONFIG, federation, make_descriptor, make_query

from fedsecure.errors import PrivacyError, ProtocolError
from fedsecure.messages import Event, Segment
from fedsecure.secagg.canonical import pack_number
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.policy import RoundPolicy, check, wrap_log2
from fedsecure.secagg.thresholds import Mode, Thresholds, minimum_threshold


@pytest.mark.parametrize(
    ("n", "c", "t", "missing", "honest"),
    [
        (3, 1, 3, 0, 2),
        (4, 1, 3, 1, 2),
        (5, 1, 4, 1, 3),
        (7, 2, 5, 2, 3),
        (10, 3, 7, 3, 4),
        (20, 6, 14, 6, 8),
        (50, 16, 34, 16, 18),
        (100, 33, 67, 33, 34),
    ],
)
def test_the_table_of_thresholds(n: int, c: int, t: int, missing: int, honest: int) -> None:
    chosen = Thresholds.choose(n)
    assert (chosen.colluders, chosen.threshold) == (c, t)
    assert n - chosen.min_survivors == missing
    assert chosen.min_survivors - c == honest


@given(n=st.integers(3, 128), c=st.integers(1, 60))
def test_two_signed_sets_always_share_an_honest_signer(n: int, c: int) -> None:
    """Why t > (n+c)/2: two sets of t signers overlap in more than c sites."""
    assert 2 * minimum_threshold(n, c) - n > c


@pytest.mark.parametrize("n", [0, 1, 2, 129])
def test_cohorts_out_of_range(n: int) -> None:
    with pytest.raises(ProtocolError, match="FS-1300"):
        Thresholds(n, 1, 3, 3)


@pytest.mark.parametrize(
    ("n", "c", "t", "u"), [(5, 0, 3, 4), (5, 1, 3, 4), (5, 1, 6, 6), (5, 1, 4, 3), (5, 1, 4, 6), (3, 2, 3, 3)]
)
def test_inconsistent_thresholds(n: int, c: int, t: int, u: int) -> None:
    with pytest.raises(ProtocolError, match="FS-1301"):
        Thresholds(n, c, t, u)


def test_honest_but_curious_thresholds() -> None:
    assert minimum_threshold(3, 1, mode=Mode.HBC) == 2
    assert Thresholds.choose(3, mode=Mode.HBC).min_survivors == 3


OTHER = {
    "mode": Mode.HBC,
    "run_id": bytes(16),
    "roster_hash": bytes(32),
    "round": 1,
    "attempt": 1,
    "model_hash": bytes(32),
    "base_hash": bytes(32),
    "config_hash": bytes(32),
    "segments": (Segment("x", 5, 1.0, 1, 1),),
    "query_hash": bytes(32),
    "cohort": ("a", "b", "c", "d", "e"),
    "threshold": 5,
    "min_survivors": 5,
    "colluders": 2,
    "ring_bits": 16,
    "epoch": bytes(32),
}


def test_every_field_changes_the_context() -> None:
    base = make_descriptor(7)
    contexts = {base.ctx}
    for name, value in OTHER.items():
        more = {"threshold": 5, "cohort": tuple("abcdefg"), "colluders": 1, "min_survivors": 6}
        value = more.get(name, value) if name != "threshold" else 6
        other = {"threshold": value, "min_survivors": 7} if name == "threshold" else {name: value}
        contexts.add(replace(base, **other).ctx)
    assert len(contexts) == len(OTHER) + 1
    first, second = (replace(base, epoch=bytes(32), slot=slot) for slot in (0, 1))
    assert first.ctx != second.ctx
    not_alone = {"prg_id", "graph", "neighbours", "slot"}
    assert {f.name for f in fields(RoundDescriptor)} == set(OTHER) | not_alone


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"length": 4},
        {"grid": 2.0**-9},
        {"bound": 1},
        {"clamp": 1},
        {"noise_variance": Fraction(1, 3)},
        {"rotation_seed": None},
    ],
)
def test_every_segment_field_changes_the_context(change: dict[str, object]) -> None:
    base = make_descriptor(3)
    first = base.segments[0]
    assert replace(base, segments=(replace(first, **change), base.segments[1])).ctx != base.ctx


def test_the_events_of_the_query_change_the_context() -> None:
    dearer = make_query(3, events=(Event("train", "training", 1.0, 0.75),))
    assert make_descriptor(3, query=dearer).ctx != make_descriptor(3).ctx


@pytest.mark.parametrize("change", [{"ring_bits": 8}, {"ring_bits": 64}, {"prg_id": 2}, {"graph": "ring"}])
def test_what_is_not_supported_yet_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ProtocolError, match="FS-1310"):
        replace(make_descriptor(3), **change)


@pytest.mark.parametrize(
    "change",
    [
        {"run_id": b"short"},
        {"model_hash": b""},
        {"round": -1},
        {"attempt": 1 << 32},
        {"cohort": ("a", "a", "b")},
        {"segments": ()},
        {"segments": (Segment("x", 1, 1.0, 1, 1), Segment("x", 1, 1.0, 1, 1))},
        {"segments": (Segment("x", 1, 1.0, 1, 1 << 64),)},
        {"segments": (Segment("x", 1, 1.0, 1, 1, Fraction(1 << 8192)),)},
        {"segments": (Segment("x", 1, 1.0, 1, 1, Fraction(1, 1 << 8192)),)},
        {"epoch": bytes(31)},
        {"slot": 1},
        {"neighbours": 2},
    ],
)
def test_ill_formed_fields(change: dict[str, object]) -> None:
    with pytest.raises(ProtocolError, match="FS-1312"):
        replace(make_descriptor(3), **change)


def test_canonical_bytes_come_back() -> None:
    for n in (3, 7):
        base = make_descriptor(n)
        again = RoundDescriptor.parse(base.canonical())
        assert again == base
        assert again.ctx == base.ctx
        assert base.length == 5


@given(cut=st.integers(0, 400), flip=st.integers(0, 7))
def test_damaged_bytes_never_parse_to_the_same_round(cut: int, flip: int) -> None:
    base = make_descriptor(3)
    raw = base.canonical()
    with pytest.raises(ProtocolError):
        RoundDescriptor.parse(raw[: cut % len(raw)])
    with pytest.raises(ProtocolError, match="FS-1311"):
        RoundDescriptor.parse(raw + b"\0")
    bent = bytearray(raw)
    bent[cut % len(raw)] ^= 1 << flip
    try:
        other = RoundDescriptor.parse(bytes(bent))
    except ProtocolError:
        return
    assert other.ctx != base.ctx


def test_oversize_bytes_are_refused_before_they_are_read() -> None:
    with pytest.raises(ProtocolError, match="FS-1311"):
        RoundDescriptor.parse(bytes(1 << 22))


def test_numbers_are_bounded_before_they_are_reckoned_with() -> None:
    """To reduce a fraction of two numbers of a megabyte each would hold a site up for minutes."""
    allowed = (1 << 8192) - 1
    segment = Segment("x", 1, 1.0, 1, 1, Fraction(allowed, 2**8191))
    base = replace(make_descriptor(3), segments=(segment,))
    raw = base.canonical()
    assert RoundDescriptor.parse(raw) == base
    numerator = pack_number(allowed)
    assert raw.count(numerator) == 1
    with pytest.raises(ProtocolError, match="FS-1311"):
        RoundDescriptor.parse(raw.replace(numerator, pack_number(allowed << 1)))


def forged(**changes: object) -> RoundDescriptor:
    """A descriptor that a hostile aggregator built without the constructor's checks."""
    base = make_descriptor(5)
    fake = object.__new__(RoundDescriptor)
    for field in fields(RoundDescriptor):
        object.__setattr__(fake, field.name, changes.get(field.name, getattr(base, field.name)))
    return fake


def verdict(descriptor: RoundDescriptor, **changes: object) -> None:
    arguments: dict[str, object] = {
        "query": make_query(5),
        "policy": RoundPolicy(),
        "roster": federation(5).roster,
        "site": federation(5).sites[0],
        "config_hash": CONFIG,
        "base_hash": BASE,
    }
    arguments.update(changes)
    query = arguments.pop("query")
    check(descriptor, query, **arguments)  # type: ignore[arg-type]


def test_an_honest_round_passes() -> None:
    verdict(make_descriptor(5))
    verdict(make_descriptor(5), policy=RoundPolicy(methods=("linear",), min_cohort=5, min_survivors=4))
    verdict(make_descriptor(5, min_survivors=5), policy=RoundPolicy(min_survivors=5))


CHANGES = [
    ("FS-1330", {"mode": Mode.HBC}),
    ("FS-1331", {"cohort": federation(5).sites[:2]}),
    ("FS-1332", {"threshold": 3}),
    ("FS-1332", {"threshold": 1}),
    ("FS-1332", {"threshold": 6}),
    ("FS-1333", {"min_survivors": 3}),
    ("FS-1333", {"min_survivors": 2}),
    ("FS-1333", {"min_survivors": 6}),
    ("FS-1334", {"colluders": 0}),
    ("FS-1335", {"cohort": (*federation(5).sites[:4], "sybil")}),
    ("FS-1336", {"cohort": federation(5).sites[1:]}),
    ("FS-1337", {"roster_hash": bytes(32)}),
    ("FS-1338", {"model_hash": bytes(32)}),
    ("FS-1339", {"config_hash": bytes(32)}),
    ("FS-1339", {"base_hash": bytes(32)}),
    ("FS-1340", {"query_hash": bytes(32)}),
    ("FS-1340", {"round": 9}),
    ("FS-1340", {"segments": (Segment("delta", 5, 1.0, 1, 1),)}),
]


@pytest.mark.parametrize(("code", "change"), CHANGES)
def test_each_change_to_a_round_is_refused_with_its_own_code(code: str, change: dict[str, object]) -> None:
    if code == "FS-1336":
        change = {**change, "threshold": 3, "min_survivors": 3}
    with pytest.raises(ProtocolError, match=code):
        verdict(forged(**change))


def test_a_changed_tensor_is_refused() -> None:
    """The site's query holds the hashes of the tensors it received; another tensor gives another hash."""
    received = make_query(5, inputs={"adapter": bytes(32)})
    with pytest.raises(ProtocolError, match="FS-1338"):
        verdict(make_descriptor(5), query=received)


def test_own_floors() -> None:
    for code, policy in (
        ("FS-1331", RoundPolicy(min_cohort=6)),
        ("FS-1333", RoundPolicy(min_survivors=5)),
        ("FS-1334", RoundPolicy(min_colluders=2)),
        ("FS-1342", RoundPolicy(methods=("facmic",))),
    ):
        with pytest.raises(ProtocolError, match=code):
            verdict(make_descriptor(5), policy=policy)


def test_a_ring_that_may_overflow() -> None:
    noisy = Segment("delta", 5, 1.0, 2**20, 2**20, Fraction(2**58))
    query = make_query(5, segments=(noisy,))
    descriptor = make_descriptor(5, query=query)
    assert wrap_log2(descriptor) > -40
    with pytest.raises(ProtocolError, match="FS-1341"):
        verdict(descriptor, query=query)
    clamped = make_query(5, segments=(replace(noisy, clamp=2**30, noise_variance=Fraction(0)),))
    with pytest.raises(ProtocolError, match="FS-1341"):
        verdict(make_descriptor(5, query=clamped), query=clamped)


def test_the_noise_floor_is_asked_last_and_may_refuse() -> None:
    def floor(descriptor: RoundDescriptor, query: object) -> None:
        raise PrivacyError("FS-1210", "too little noise", expected="more", cure="ask for more")

    with pytest.raises(PrivacyError, match="FS-1210"):
        verdict(make_descriptor(5), noise_floor=floor)
    with pytest.raises(ProtocolError, match="FS-1338"):
        verdict(forged(model_hash=bytes(32)), noise_floor=floor)
