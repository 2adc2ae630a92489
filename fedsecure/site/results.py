"""What a site keeps of a run, in the run's folder: the method's own state, and at the end report, adapter and traffic.

<state>/runs/<run>/<method>.safetensors   what a method keeps between rounds
<state>/runs/<run>/draw                   the record of the run's draw, where it draws its cohorts
<state>/runs/<run>/roster.json            the signed roster that the run began with
<state>/runs/<run>/privacy-report.json, adapter.safetensors, usage.json
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file
from safetensors.numpy import save as save_tensors

from fedsecure.errors import PrivacyError, ProtocolError
from fedsecure.files import write_whole
from fedsecure.identity import keys
from fedsecure.learning.artefact import AdapterMetadata, save_adapter
from fedsecure.learning.engines import choose_engine
from fedsecure.messages import SiteState
from fedsecure.methods.base import Tensor
from fedsecure.privacy.ledger import Ledger, Limit
from fedsecure.privacy.plan import paid_by
from fedsecure.privacy.report import site_report
from fedsecure.privacy.report_verify import PURPOSE, load_audit, sign_report
from fedsecure.site.membership import Membership
from fedsecure.transport.base import Transport
from fedsecure.transport.status import printable
from fedsecure.wire import federation_pb2 as pb

log = logging.getLogger("fedsecure.client")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files of one run at one site."""

    path: Path

    def load_state(self, method: str) -> SiteState:
        """What a method kept; empty at first."""
        path = self.path / f"{method}.safetensors"
        return SiteState(tensors=load_file(path)) if path.exists() else SiteState()

    def save_state(self, method: str, state: SiteState) -> None:
        """Keep a method's state, if it has any."""
        if state.tensors:
            write_whole(self.path / f"{method}.safetensors", save_tensors(dict(state.tensors)))

    def load_draw(self) -> bytes | None:
        """The record of the run's draw, if it is known here."""
        path = self.path / "draw"
        return path.read_bytes() if path.exists() else None

    def save_draw(self, record: bytes) -> None:
        """Keep it for this site's next process."""
        write_whole(self.path / "draw", record)

    def write_results(
        self,
        member: Membership,
        *,
        report: Mapping[str, Any],
        outcome: Mapping[str, Any],
        outputs: Mapping[str, Tensor],
        transport: Transport,
        seeded: bool,
    ) -> None:
        """Report, adapter and traffic."""
        write_whole(self.path / "privacy-report.json", json.dumps(report, indent=2, sort_keys=True).encode())
        settings = member.settings
        task = member.method.task(settings, member.features)
        encoder, privacy = settings.encoder, settings.privacy
        metadata = AdapterMetadata(
            model=encoder.model,
            pretrained=encoder.pretrained,
            fingerprint=encoder.fingerprint,
            prompt=encoder.prompt,
            classes=settings.classes,
            temperature=task.temperature,
            epsilon=None if seeded else adapter_epsilon(member, outcome),
            delta=privacy.delta,
            unit=privacy.unit,
            rounds=settings.method.rounds,
            preprocessing=member.features.preprocessing,
            extra={"run": member.run.hex(), "method": member.method.name},
        )
        save_adapter(self.path / "adapter.safetensors", task, tensors=outputs, metadata=metadata)
        usage = {
            "bytes_up": transport.bytes_up,
            "bytes_down": transport.bytes_down,
            "engine": choose_engine(member.config.engine, task),
        }
        write_whole(self.path / "usage.json", json.dumps(usage).encode())


def final_hashes(finished: pb.Finished, member: Membership) -> dict[str, bytes]:
    """The hashes of the final tensors, which must have the names of the first ones; ProtocolError FS-1378."""
    if set(finished.outputs) != set(member.start.tensors):
        raise ProtocolError(
            "FS-1378",
            f"final tensors {[printable(name, limit=40) for name in sorted(finished.outputs)[:10]]}",
            expected=f"{sorted(member.start.tensors)}",
            cure="install the same fedsecure release on both sides",
        )
    return dict(finished.outputs)


def adapter_epsilon(member: Membership, outcome: Mapping[str, Any]) -> float:
    """ε of the site that paid most: aborted attempts are charged like others, to whom they asked."""
    from fedsecure.privacy.accounting import epsilon

    attempts = [attempt for attempt in outcome.get("attempts", ()) if attempt["stage"] == "training"]
    asked = Counter(site for attempt in attempts for site in attempt["cohort"])
    settings = member.settings
    prices = {
        paid_by(site, member.plan.events_of(max(member.plan.asked, asked[site])), settings)
        for site in settings.declared_units()
    }
    return max(epsilon(price, delta=settings.privacy.delta) for price in prices)


def signed_report(
    member: Membership, ledger: Ledger, *, outcome: dict[str, Any] | None, seeded: bool
) -> dict[str, Any]:
    """The site's privacy report, recomputed from the ledger's events and signed by the site.

    What ``fedsecure audit --json`` printed into ``audit.json`` in the site's state is in it.
    """
    config, settings, policy = member.config, member.settings, member.config.policy
    train, evaluation = config.train, config.evaluation
    report = site_report(
        site=config.site,
        role=member.entry.role,
        run=member.run.hex(),
        settings=settings,
        ledger=ledger,
        train_dataset=train.name if train and member.entry.role == "train" else None,
        evaluation_dataset=evaluation.name if evaluation and not member.evaluation_public else None,
        delta=settings.privacy.delta,
        plan=member.plan,
        outcome=outcome,
        seeded=seeded,
        audit=_audit(config.state / "audit.json"),
        limits={
            "train": Limit(policy.max_epsilon, policy.delta),
            "evaluation": Limit(policy.max_evaluation_epsilon, policy.delta),
        },
    )
    key = member.identity.signing_key
    return sign_report(report, lambda body: keys.sign(key, PURPOSE, body), site=config.site)


def _audit(file: Path) -> dict[str, Any] | None:
    """The site's last audit; one that cannot be read never costs a run its report."""
    if not file.exists():
        return None
    try:
        return load_audit(file)
    except PrivacyError as error:
        log.warning("the report goes without an audit: %s", error)
        return None
