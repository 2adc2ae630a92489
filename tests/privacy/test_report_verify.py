"""A report checked offline: any figure that its events do not give is found, and only its site's key can sign it."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import audit_result, evaluator, first_format, network, trainer, validate

from fedsecure.errors import PrivacyError
from fedsecure.privacy.report import network_report
from fedsecure.privacy.report_html import load_report
from fedsecure.privacy.report_verify import PURPOSE, Verdict, attach_audit, sign_report, signed_body, verify_report

KEYS = {site: Ed25519PrivateKey.generate() for site in ("north", "south", "west", "rest")}


def sign(report: dict[str, Any], site: str | None = None, key: str | None = None) -> dict[str, Any]:
    site = site or report["site"]
    return sign_report(report, lambda body: KEYS[key or site].sign(PURPOSE.encode() + b"\0" + body), site=site)


def holds(site: str, body: bytes, signature: bytes) -> bool:
    if site not in KEYS:
        return False
    try:
        KEYS[site].public_key().verify(signature, PURPOSE.encode() + b"\0" + body)
    except InvalidSignature:
        return False
    return True


def check(report: dict[str, Any]) -> Verdict:
    return verify_report(json.loads(json.dumps(report)), verify=holds)


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return sign(trainer(tmp_path_factory.mktemp("signed")))


def test_a_signed_report_holds_and_survives_its_file(signed: dict[str, Any], tmp_path: Path) -> None:
    validate(signed)
    (tmp_path / "report.json").write_text(json.dumps(signed, indent=2, sort_keys=True))
    verdict = verify_report(load_report(tmp_path / "report.json"), verify=holds)
    assert verdict.ok, verdict.findings
    assert verdict.signatures == {"north": "valid"}
    assert verdict.figures > 100


def test_a_network_without_one_of_its_training_sites_is_said_to_be_partial(tmp_path: Path) -> None:
    whole = network(tmp_path)
    parts = [sign(site) for site in whole["sites"]]
    assert check(network_report(parts)).absent == ()
    for site in ("north", "south", "west"):
        verdict = check(network_report([part for part in parts if part["site"] != site]))
        assert verdict.absent == (site,)
        assert verdict.ok, "what is there is as it should be"


@pytest.mark.parametrize(
    "privacy", [{"sampling_rate": 0.3, "noise_multiplier": 2.0}, {"noise": "local"}, {"unit": "record"}]
)
def test_other_mechanisms_hold_as_well(tmp_path: Path, privacy: dict[str, Any]) -> None:
    verdict = check(sign(trainer(tmp_path, **privacy)))
    assert verdict.ok, verdict.findings
    assert check(sign(trainer(tmp_path, "south", seeded=True))).ok


def test_sites_that_only_evaluate(tmp_path: Path) -> None:
    assert check(sign(evaluator(tmp_path))).ok
    (tmp_path / "public").mkdir()
    assert check(sign(evaluator(tmp_path / "public", dataset=None))).ok


def test_without_a_signature_or_a_verifier_nothing_is_vouched_for(signed: dict[str, Any]) -> None:
    bare = {key: value for key, value in signed.items() if key != "signature"}
    missing, unchecked = check(bare), verify_report(signed)
    assert (missing.consistent, missing.ok, missing.signatures) == (True, False, {"north": "missing"})
    assert (unchecked.consistent, unchecked.ok, unchecked.signatures) == (True, False, {"north": "unchecked"})


@pytest.mark.parametrize(
    "change",
    [
        {"site": "south"},
        {"value": "00" * 64},
        {"value": "no hex"},
        {"value": "ab"},
        {"algorithm": "none"},
        {"site": None},
        {"value": None},
    ],
)
def test_signatures_that_do_not_hold(signed: dict[str, Any], change: dict[str, Any]) -> None:
    verdict = check(signed | {"signature": signed["signature"] | change})
    assert verdict.signatures == {"north": "invalid"}
    assert not verdict.ok


def test_another_site_s_key_or_a_stranger_s_does_not_do(signed: dict[str, Any]) -> None:
    assert check(sign(signed, key="south")).signatures == {"north": "invalid"}
    assert check(sign(signed | {"site": "nobody"}, key="south")).signatures == {"nobody": "invalid"}
    with pytest.raises(PrivacyError, match=r"FS-1268.*'south'.*'north'"):
        sign(signed, site="south")


def test_a_field_that_no_figure_depends_on_is_signed_too(signed: dict[str, Any]) -> None:
    """The positive control of the signature: the figures alone would not notice."""
    verdict = check(signed | {"not_protected": ["nothing to worry about"]})
    assert verdict.consistent
    assert verdict.signatures == {"north": "invalid"}


def test_the_signed_bytes_do_not_depend_on_order_or_spaces(signed: dict[str, Any]) -> None:
    turned = json.loads(json.dumps(dict(reversed(signed.items())), indent=7))
    assert signed_body(turned) == signed_body(signed)
    assert b"signature" not in signed_body(signed)
    assert signed_body({"a": float("nan"), "ε": (1, 2.5)}) == b'{"a":null,"\\u03b5":[1,2.5]}'


def numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        for key in value:
            yield from numbers(value[key], (*path, key))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from numbers(each, (*path, index))
    elif isinstance(value, float):
        yield path


def test_every_figure_of_a_budget_and_every_headline_is_computed_again(signed: dict[str, Any]) -> None:
    """Each one, one by one, made 1 % smaller: found without any signature."""
    told = [("epsilon",), ("mu",), ("statement",), ("stamp",), *numbers(signed["budgets"], ("budgets",))]
    assert len(told) > 100
    # A sampling rate of 1 is the largest there is: made smaller it is another mechanism, and dearer to compute.
    for path in [path for path in told if "sampling_rate" not in path]:
        edited = copy.deepcopy(signed)
        place = edited
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = place[path[-1]] * 0.99 if isinstance(place[path[-1]], float) else "Nothing was used."
        assert not check(edited).consistent, path


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 10**9), st.integers(1, 255))
def test_any_edited_byte_of_the_file_is_found(signed: dict[str, Any], position: int, flip: int) -> None:
    """Unless the file means the same afterwards: 1e-05 and 1E-05."""
    raw = bytearray(json.dumps(signed, indent=2, sort_keys=True).encode())
    raw[position % len(raw)] ^= flip
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        file.write_bytes(raw)
        try:
            report = load_report(file)
        except PrivacyError as error:
            assert error.code in ("FS-1232", "FS-1233")  # noqa: PT017
            return
        assert verify_report(report, verify=holds).ok == (report == signed)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"delta": 1e-05', '"delta": 0.1, "delta": 1e-05'),
        ('"outcome": {', '"outcome": {"rounds": 9,'),
        ('"aborted": null', '"aborted": NaN'),
        ('"aborted": null', '"aborted": Infinity'),
    ],
)
def test_what_two_readers_would_read_differently_is_no_report(
    signed: dict[str, Any], tmp_path: Path, old: str, new: str
) -> None:
    text = json.dumps(signed)
    assert old in text
    file = tmp_path / "report.json"
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(PrivacyError, match="FS-1232"):
        load_report(file)
    # Nor is it valid for whoever reads the file in another way.
    if "N" in new or "I" in new:
        assert verify_report(json.loads(file.read_text()), verify=holds).signatures == {"north": "invalid"}


def test_releases_that_are_dropped_or_voided_are_found(signed: dict[str, Any]) -> None:
    for change in ("drop", "void", "delta", "left"):
        edited = copy.deepcopy(signed)
        rows = edited["budgets"]["train"]["releases"]
        if change == "drop":
            del rows[0]
        elif change == "void":
            rows[0]["state"] = "VOID"
        elif change == "left":
            edited["budgets"]["train"]["limits"][0]["epsilon"] += 1
        else:
            edited["delta"] = 1e-3
        verdict = check(edited)
        assert not verdict.consistent
        assert any("the events give" in finding for finding in verdict.findings)


def test_all_runs_may_not_cost_less_than_one(signed: dict[str, Any]) -> None:
    """Everything else made to fit: the events of all runs are those of a cheaper one, figures included."""
    other = copy.deepcopy(signed)
    budget = other["budgets"]["train"]
    from fedsecure.messages import Event
    from fedsecure.privacy.report_figures import price

    budget["all_runs_events"][0]["steps"] = 1
    row = budget["all_runs_events"][0]
    events = [Event("train", "", row["noise_multiplier"], row["local_noise_multiplier"])]
    parties = {"colluders": other["secagg"]["colluders"], "survivors": other["secagg"]["min_survivors"]}
    budget["all_runs"] = price(events, other["delta"], **parties)
    budget["limits"] = []
    assert [f for f in check(other).findings if "no less" in f] == list(check(other).findings)


@pytest.mark.parametrize(
    "broken",
    [
        {"budgets": None},
        {"budgets": {"train": {}}},
        {"budgets": {"train": []}},
        {"secagg": {}},
        {"site": 7, "delta": "small"},
        {"delta": 2.0},
    ],
)
def test_a_report_that_cannot_be_computed_says_so(signed: dict[str, Any], broken: dict[str, Any]) -> None:
    verdict = check(signed | broken)
    assert not verdict.ok
    assert any("cannot be computed" in finding for finding in verdict.findings)


def test_what_is_no_report(signed: dict[str, Any]) -> None:
    with pytest.raises(PrivacyError, match="FS-1232"):
        verify_report({"schema": "other"})
    with pytest.raises(PrivacyError, match="FS-1233"):
        verify_report(signed | {"schema_version": 3})


def test_a_network_s_report_is_checked_site_by_site(tmp_path: Path) -> None:
    whole = network_report([sign(site) for site in network(tmp_path)["sites"]])
    validate(whole)
    verdict = check(whole)
    assert verdict.ok, verdict.findings
    assert set(verdict.signatures) == {"north", "south", "west", "rest"}
    assert not check(whole | {"epsilon": 0.1}).consistent
    assert not check(whole | {"federation": "another"}).consistent
    twice = whole | {"sites": [*whole["sites"], whole["sites"][0]]}
    assert any("different sites" in finding for finding in check(twice).findings)
    edited = copy.deepcopy(whole)
    edited["sites"][2]["unit"] = "record"
    assert check(edited).signatures == verdict.signatures | {"south": "invalid"}
    assert check(sign(whole, site="rest")).signatures == verdict.signatures | {"network": "valid"}
    assert not check(whole | {"sites": []}).ok


def test_whatever_a_network_s_report_adds_or_leaves_out_is_found(tmp_path: Path) -> None:
    """Only sites sign: each word of the federation's part has to follow from theirs."""
    whole = network_report([sign(site) for site in reversed(network(tmp_path)["sites"])])
    assert check(whole).ok
    edited = {"rounds": [], "accuracy": None, "not_protected": ["nothing to worry about"], "assumptions": ["none"]}
    edited |= {"secagg": whole["secagg"] | {"colluders": 2}, "mechanism": whole["mechanism"] | {"clip_norm": 7.5}}
    edited |= {"versions": {}, "max_records_per_unit": 1, "no_privacy": "consent", "surprise": 1, "delta": 1e-9}
    for key, value in edited.items():
        assert not check(whole | {key: value}).consistent, key
    assert not check({key: value for key, value in whole.items() if key != "not_protected"}).consistent
    # An audit follows from nothing, so somebody has to stand for it.
    audited = attach_audit(whole, audit_result())
    assert (check(audited).consistent, check(audited).ok) == (True, False)
    assert check(audited).signatures["network"] == "missing"
    assert check(sign(audited, site="rest")).ok


def test_why_a_run_does_without_privacy_is_part_of_what_is_checked(tmp_path: Path) -> None:
    report = sign(trainer(tmp_path, no_privacy="public data"))
    assert check(report).ok
    for change in ({"no_privacy": None}, {"no_privacy": "data of volunteers"}, {"stamp": None}):
        assert not check(sign(report | change)).consistent, change


def test_a_report_of_the_first_format_can_still_be_checked(tmp_path: Path) -> None:
    older = first_format(network(tmp_path))
    older["sites"] = [sign(site) for site in older["sites"]]
    verdict = check(older)
    assert verdict.ok, verdict.findings
    assert not check(older | {"mu": 0.01}).consistent
    with pytest.raises(PrivacyError, match="FS-1233"):
        attach_audit(older, audit_result())


def test_edited_shares_and_figures_for_several_sites_are_found(tmp_path: Path) -> None:
    whole = network_report([sign(site) for site in network(tmp_path)["sites"]])
    for edit in ("shares", "several_sites", "max_sites_per_patient"):
        other = copy.deepcopy(whole)
        if edit == "shares":
            other["sites"][0]["budgets"]["train"]["shares"]["purposes"][0]["share"] = 0.5
        elif edit == "several_sites":
            other["several_sites"]["figures"][1]["epsilon"] = 0.1
        else:
            other["max_sites_per_patient"] = 7
        assert any("the events give" in finding for finding in check(other).findings), edit


def test_an_attached_audit_is_signed_anew(signed: dict[str, Any]) -> None:
    attached = attach_audit(signed, audit_result())
    assert "signature" not in attached
    assert check(sign(attached)).ok
    forged = sign(attached)
    forged["audit"]["passed"] = False
    assert check(forged).signatures == {"north": "invalid"}
