"""What a site holds to on its own: floors of its policy, types in its latch, numbers beyond every float."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from secagg_world import BASE, CONFIG, federation, make_descriptor, make_query

from fedsecure.errors import FedsecureError, ProtocolError
from fedsecure.messages import Query, Segment
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.latch import MAX_BYTES, FileLatch
from fedsecure.secagg.policy import RoundPolicy, check, wrap_log2

A = bytes([1] * 32)


def gate(descriptor: RoundDescriptor, query: Query, policy: RoundPolicy) -> None:
    f = federation(5)
    check(descriptor, query, policy=policy, roster=f.roster, site=f.sites[0], config_hash=CONFIG, base_hash=BASE)


@pytest.mark.parametrize(
    "floors",
    [
        {"min_cohort": 2},
        {"min_colluders": 0},
        {"modes": ()},
        {"max_wrap_log2": -39.0},
        {"max_wrap_log2": math.nan},
        {"min_cohort": math.nan},
    ],
)
def test_a_policy_below_the_protocol_is_refused(floors: dict[str, object]) -> None:
    with pytest.raises(ProtocolError, match="FS-1390"):
        RoundPolicy(**floors)  # type: ignore[arg-type]


def test_the_floors_hold_without_assertions() -> None:
    """``python -O`` drops assertions; a floor must not go with them."""
    code = (
        "from fedsecure.errors import ProtocolError\n"
        "from fedsecure.secagg.policy import RoundPolicy\n"
        "try:\n    RoundPolicy(min_cohort=2)\nexcept ProtocolError as error:\n    print(error.code)\n"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "FS-1390", done.stderr


def test_an_own_threshold() -> None:
    query, descriptor = make_query(5), make_descriptor(5)
    gate(descriptor, query, RoundPolicy(min_threshold=4))
    with pytest.raises(ProtocolError, match="FS-1332"):
        gate(descriptor, query, RoundPolicy(min_threshold=5))


def test_noise_beyond_every_float_is_a_ring_that_overflows() -> None:
    query = make_query(5, segments=(Segment("delta", 5, 1.0, 1, 1, Fraction(2**5000)),))
    descriptor = make_descriptor(5, query=query)
    assert wrap_log2(descriptor) == 0.0
    with pytest.raises(ProtocolError, match="FS-1341"):
        gate(descriptor, query, RoundPolicy())


def test_a_tensor_with_a_name_that_no_encoding_knows() -> None:
    query = make_query(5, inputs={"\ud800": bytes(32)})
    with pytest.raises(ProtocolError, match="FS-1338"):
        gate(make_descriptor(5), query, RoundPolicy())


def test_a_segment_with_a_name_that_no_encoding_knows() -> None:
    query = Query.from_json(make_query(5).to_json().replace('"name":"delta"', '"name":"\\ud800"'))
    with pytest.raises(FedsecureError):
        _ = make_descriptor(5, query=query).ctx


@pytest.mark.parametrize(
    "change",
    [
        {"consumed": None},
        {"consumed": 0},
        {"signed": "no"},
        {"attempt": "0"},
        {"round": 1.0},
        {"round": -1},
        {"round": True},
        {"ctx": "zz"},
        {"ctx": 7},
        {"extra": 1},
    ],
)
def test_a_latch_with_a_mark_of_another_type_stops_the_site(change: dict[str, object], tmp_path: Path) -> None:
    """``"consumed": null`` must not read as "not yet given away"."""
    path = tmp_path / "latch.json"
    latch = FileLatch(path)
    latch.begin(bytes(16), 1, 0, A)
    latch.mark_consumed(A)
    raw = json.loads(path.read_text())
    raw["runs"][bytes(16).hex()].update(change)
    path.write_text(json.dumps(raw))
    for act in (lambda: latch.mark_consumed(A), lambda: latch.begin(bytes(16), 2, 0, A)):
        with pytest.raises(ProtocolError, match="FS-1348"):
            act()


def test_a_latch_that_is_huge_or_nested_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latch.json"
    for text in ("[" * 100_000, " " * (MAX_BYTES + 1)):
        path.write_text(text)
        with pytest.raises(ProtocolError, match="FS-1348"):
            FileLatch(path).begin(bytes(16), 0, 0, A)
