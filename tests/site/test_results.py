"""What a site keeps of a run: its report shows the audit that lies in its state, and is never lost to one."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from federation_world import World

from fedsecure.identity import keys
from fedsecure.privacy.report_html import render_html
from fedsecure.privacy.report_verify import PURPOSE, verify_report

AUDIT: dict[str, Any] = {
    "date": "2026-11-21", "passed": True, "epsilon": 2.0, "delta": 1e-5, "facts": {"noise": "one audit"}, "checks": [],
    "bounds": [], "membership": [],
}  # fmt: skip


def report_with(world: World, content: str | None) -> dict[str, Any]:
    world.start()
    with world.client("site-1") as client:
        if content is not None:
            (client.config.state / "audit.json").write_text(content)
        report = client.privacy_report()
        public = client._identity.roster.find("site-1").identity_key

    def verify(site: str, body: bytes, signature: bytes) -> bool:
        return keys.verify(public, PURPOSE, body, signature)

    assert verify_report(report, verify=verify).ok
    return report


def test_an_audit_in_the_sites_state_is_in_the_signed_report(tmp_path: Path) -> None:
    world = World(tmp_path)
    assert report_with(world, None)["audit"] is None
    report = report_with(world, json.dumps(AUDIT | {"more": "than belongs there"}))
    assert report["audit"] == AUDIT
    assert "one audit" in render_html(report)


def test_the_sites_policy_is_beside_what_its_units_paid(tmp_path: Path) -> None:
    report = report_with(World(tmp_path, max_epsilon=9.5), None)
    (limit,) = report["budgets"]["train"]["limits"]
    assert limit == {"by": "policy", "epsilon": 9.5, "delta": 1e-5, "remaining": 9.5}


@pytest.mark.parametrize("content", ["", "{}", "[1]", json.dumps(AUDIT | {"passed": "yes"})])
def test_a_broken_audit_costs_no_report(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fedsecure.client"):
        assert report_with(World(tmp_path), content)["audit"] is None
    assert "FS-1269" in caplog.text
