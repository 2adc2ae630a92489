"""Signing a privacy report and checking one offline: its signature, and every figure from the events it holds.

A signature (Ed25519, RFC 8032, by the site's identity key) covers ``PURPOSE ‖ 0x00 ‖ body``, where the body is the
report without its signature as JSON with sorted keys, no spaces, ASCII only and shortest round-trip numbers. Keys are
the caller's business: this module is given what signs and what verifies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedsecure.errors import FedsecureError, PrivacyError
from fedsecure.messages import Event
from fedsecure.privacy import accounting
from fedsecure.privacy.report import READABLE, SCHEMA, SCHEMA_VERSION, headline, network_report
from fedsecure.privacy.report_figures import by_purpose, events_of, price, remaining, shares
from fedsecure.privacy.report_text import stamp

PURPOSE = "fedsecure/privacy-report/v1"
Signature = Literal["valid", "invalid", "missing", "unchecked"]
Verifier = Callable[[str, bytes, bytes], bool]

# Accountants of two machines agree to rounding; figures that were edited do not.
_RELATIVE, _ABSOLUTE = 1e-6, 1e-12
# Of a network's report: its sites are checked one by one, and an audit follows from nothing.
_NOT_COMPUTED = frozenset({"sites", "audit", "signature"})
_AUDIT: dict[str, type] = {
    "date": str, "passed": bool, "epsilon": float, "delta": float, "facts": dict, "checks": list, "bounds": list,
    "membership": list,
}  # fmt: skip
_MOST_FINDINGS = 50
_MOST_AUDIT = 1 << 24
_KINDS = ("site", "network")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check of a report found.

    Attributes:
        signatures: site → whether its part of the report is signed by its own key; ``"unchecked"`` without a verifier.
        figures: how many figures and sentences were computed again.
        findings: a sentence for each that is not what the events give.
        absent: of a network's report, training sites of the run whose part is not in it. The network's ε is the largest
            of those that are.
    """

    signatures: Mapping[str, Signature]
    figures: int
    findings: tuple[str, ...]
    absent: tuple[str, ...] = ()

    @property
    def consistent(self) -> bool:
        """Whether every figure follows from the events."""
        return not self.findings

    @property
    def ok(self) -> bool:
        """Whether that is so, and every site's part carries that site's valid signature."""
        return self.consistent and bool(self.signatures) and set(self.signatures.values()) == {"valid"}


def check_format(report: Any, where: object) -> None:
    """Whether some JSON is a report in a format this release reads.

    Raises:
        PrivacyError: FS-1232 it is no report, FS-1233 it is of another format.
    """
    if not isinstance(report, Mapping) or report.get("schema") != SCHEMA or report.get("kind") not in _KINDS:
        raise no_report(where, "another kind of JSON")
    if report.get("schema_version") not in READABLE:
        raise _other_format(where, report.get("schema_version"), " or ".join(map(str, READABLE)))


def _other_format(where: object, found: object, expected: str) -> PrivacyError:
    return PrivacyError(
        "FS-1233", f"{where} has report format {found}", expected=expected,
        cure="use the fedsecure release that wrote it, or a newer one",
    )  # fmt: skip


def _no_audit(found: str) -> PrivacyError:
    return PrivacyError(
        "FS-1269", found, expected="what `fedsecure audit --json` printed, whole",
        cure="run `fedsecure audit --json > audit.json` and attach that file",
    )  # fmt: skip


def no_report(where: object, why: str) -> PrivacyError:
    return PrivacyError(
        "FS-1232", f"{where} is not a privacy report ({why})", expected="report.json or privacy-report.json of a run",
        cure="name the file in the run's folder",
    )  # fmt: skip


def signed_body(report: Mapping[str, Any]) -> bytes:
    """The bytes a signature covers, without :data:`PURPOSE`: canonical JSON of the report without its signature."""
    bare = {key: value for key, value in report.items() if key != "signature"}
    return json.dumps(_plain(bare), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def sign_report(report: Mapping[str, Any], sign: Callable[[bytes], bytes], *, site: str) -> dict[str, Any]:
    """The report with a signature, as plain JSON values; a number in it that is not finite becomes ``None``.

    Args:
        report: of a site, or of a network.
        sign: makes 64 bytes from a body, for :data:`PURPOSE` and with the identity key of ``site``.
        site: who signs; a site signs its own report only.

    Raises:
        PrivacyError: FS-1268 the report is another site's.
    """
    if report["kind"] == "site" and report["site"] != site:
        raise PrivacyError(
            "FS-1268", f"{site!r} was to sign the report of {report['site']!r}", expected="a site's own report",
            cure="let each site sign its report with its own identity key",
        )  # fmt: skip
    plain: dict[str, Any] = json.loads(signed_body(report))
    signature = {"algorithm": "Ed25519", "site": site, "value": sign(signed_body(plain)).hex()}
    return plain | {"signature": signature}


def load_audit(path: Path | str) -> dict[str, Any]:
    """Read what ``fedsecure audit --json`` printed.

    Raises:
        PrivacyError: FS-1269 the file cannot be read, or is no audit.
    """
    try:
        with Path(path).open("rb") as file:
            found = json.loads(file.read(_MOST_AUDIT))
    except (OSError, ValueError, RecursionError) as error:
        raise _no_audit(f"{path} cannot be read ({error})") from error
    return _parts_of_audit(found, str(path))


def _parts_of_audit(audit: Any, where: str) -> dict[str, Any]:
    if not isinstance(audit, Mapping) or {name: type(audit.get(name)) for name in _AUDIT} != _AUDIT:
        raise _no_audit(f"{where} is no audit")
    return {name: audit[name] for name in _AUDIT}


def attach_audit(report: Mapping[str, Any], audit: Any) -> dict[str, Any]:
    """The report with an audit in place of what it had, and without a signature, which covered something else.

    Args:
        report: of a site, or of a network.
        audit: what ``fedsecure audit --json`` printed.

    Raises:
        PrivacyError: FS-1269 it is no audit; FS-1233 the report is of a format that has no room for one.
    """
    parts = _parts_of_audit(audit, "what was to be attached")
    if report["schema_version"] != SCHEMA_VERSION:
        raise _other_format("the report", report["schema_version"], str(SCHEMA_VERSION))
    bare = {key: value for key, value in report.items() if key != "signature"}
    return bare | {"audit": parts}


def verify_report(report: Mapping[str, Any], *, verify: Verifier | None = None) -> Verdict:
    """Compute every figure of a report again from its events, and check the signatures of its sites.

    That the events are the ledger's, only the site's ledger can tell (``ledger.head``); the signature says who vouches.

    Args:
        report: as read from JSON.
        verify: whether a site (by name) made a signature over a body for :data:`PURPOSE`; an unknown site is ``False``.
            Without it signatures are not checked.

    Raises:
        PrivacyError: FS-1232 it is no report, FS-1233 it is of another format.
    """
    check_format(report, "the JSON")
    check = _Check()
    sites: list[Mapping[str, Any]] = []
    absent: tuple[str, ...] = ()
    try:
        sites = list(report["sites"]) if report["kind"] == "network" else [report]
        for site in sites:
            _check_site(site, check)
        names = [str(site["site"]) for site in sites]
        check.same(len(set(names)), len(names), "number of different sites")
        if report["kind"] == "network":
            declared = {name for site in sites for name in site["mechanism"]["declared_units"]}
            absent = tuple(sorted(declared - set(names)))
            expected = network_report(sites)
            if report["schema_version"] == 1:
                expected = {key: value for key, value in expected.items() if key in report} | {"schema_version": 1}
            for key in sorted((set(expected) | set(report)) - _NOT_COMPUTED):
                check.same(report.get(key), expected.get(key), key)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, AssertionError) as error:
        check.findings.append(f"it cannot be computed again ({type(error).__name__}: {error})")
    except FedsecureError as error:
        check.findings.append(f"it cannot be computed again ({error.found})")
    signatures = {str(site["site"]): _signature(site, verify) for site in sites if "site" in site}
    # What a network's report says of its own follows from its sites, but for an audit: somebody has to stand for that.
    if report["kind"] == "network" and ("signature" in report or report.get("audit")):
        signatures["network"] = _signature(report, verify)
    return Verdict(signatures, check.figures, tuple(check.findings[:_MOST_FINDINGS]), absent)


class _Check:
    """Compares what is written with what is computed, and counts."""

    def __init__(self) -> None:
        self.figures = 0
        self.findings: list[str] = []

    def same(self, found: Any, expected: Any, where: str) -> None:
        if isinstance(expected, Mapping) and isinstance(found, Mapping) and set(found) == set(expected):
            for key in expected:
                self.same(found[key], expected[key], f"{where}.{key}")
        elif isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
            for index, (one, other) in enumerate(zip(found, expected, strict=True)):
                self.same(one, other, f"{where}[{index}]")
        else:
            self.figures += 1
            if not _equal(found, expected):
                self.findings.append(f"{where} is {found!r}, and the events give {expected!r}")


def _equal(found: Any, expected: Any) -> bool:
    numbers = [isinstance(value, int | float) and not isinstance(value, bool) for value in (found, expected)]
    if all(numbers):
        return math.isclose(found, expected, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)
    return type(found) is type(expected) and bool(found == expected)


def _check_site(site: Mapping[str, Any], check: _Check) -> None:
    name, delta = site["site"], site["delta"]
    parties = {"colluders": site["secagg"]["colluders"], "survivors": site["secagg"]["min_survivors"]}
    for population, budget in site["budgets"].items():
        where = f"{name}, {population} units"
        rows = budget["releases"]
        charges = [events_of(row["events"], population) if row["state"] != "VOID" else [] for row in rows]
        mine = [event for events in charges for event in events]
        whole = events_of(budget["all_runs_events"], population)
        check.same(budget["this_run"], price(mine, delta, **parties), f"{where}: this_run")
        check.same(budget["all_runs"], price(whole, delta, **parties), f"{where}: all_runs")
        for limit in budget.get("limits", ()):
            left = remaining(whole, epsilon=limit["epsilon"], delta=limit["delta"])
            check.same(limit["remaining"], left, f"{where}: what remains of the {limit['by']}'s limit")
        least, most = accounting.epsilon(mine, delta=delta), accounting.epsilon(whole, delta=delta)
        check.same(most >= least * (1 - _RELATIVE), True, f"{where}: that all runs cost no less than this one")
        check.same([row["share"] for row in rows], shares(charges), f"{where}: share")
        if site["schema_version"] > 1:
            check.same(budget["shares"], by_purpose(charges), f"{where}: shares")
        spent: list[Event] = []
        for row, events in zip(rows, charges, strict=True):
            spent += events
            if row["epsilon_after"] is not None:
                after = accounting.epsilon(spent, delta=delta)
                check.same(row["epsilon_after"], after, f"{where}: epsilon_after of round {row['round']}")
    marks = {"seeded": site["seeded"], "no_privacy": site.get("no_privacy")}
    expected = headline(
        site["budgets"],
        role=site["role"],
        site=name,
        unit=site["unit"],
        delta=delta,
        colluders=site["secagg"]["colluders"],
        **marks,
    )
    for key, value in expected.items():
        check.same(site[key], value, f"{name}: {key}")
    check.same(site["stamp"], stamp(**marks), f"{name}: stamp")


def _signature(report: Mapping[str, Any], verify: Verifier | None) -> Signature:
    """A site's report must be signed by that site; a network's by whom it names."""
    if "signature" not in report:
        return "missing"
    if verify is None:
        return "unchecked"
    try:
        signature = report["signature"]
        signer, value = signature["site"], bytes.fromhex(signature["value"])
        whose = report["site"] if report["kind"] == "site" else signer
        body = signed_body(report)
    except (KeyError, TypeError, ValueError, AttributeError):
        return "invalid"
    # What is signed has no number that is not finite; it would be read as null, and so would one put in its place.
    known = signature["algorithm"] == "Ed25519" and signer == whose and _plain(report) == report
    return "valid" if known and verify(signer, body, value) else "invalid"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
