"""Lays out a federation on disk: identities, ``federation.toml`` and one ``site.toml`` a site.

Used by ``fedsecure init`` and by the demo. The keys of all sites are made in one place, which suits a trial; or none
are, and each site enrols (docs/enrolment.md).

    <folder>/aggregator/{federation.toml, identity/, state/}
    <folder>/sites/<site>/{site.toml, identity/, state/, ledger.db}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsecure.config import DatasetConfig, EncoderChoice, PolicyConfig, RunSettings, parse_settings, read_toml
from fedsecure.errors import IdentityError
from fedsecure.files import make_folder, write_whole
from fedsecure.identity.provision import provision

# Stands in for what loading the encoder will tell.
# A federation that is to last: its CA outlives the members' certificates, which are renewed every year.
AUTHORITY_DAYS = 3650
_UNMEASURED = {"dimension": 2, "fingerprint": "0" * 64}


@dataclass(frozen=True, slots=True)
class SitePlan:
    """One site's own side of the layout: its data sets, limits and engine."""

    train: DatasetConfig | None
    evaluation: DatasetConfig | None
    policy: PolicyConfig
    encoder_file: Path | None = None
    target_file: Path | None = None
    engine: str = "auto"
    device: str = "auto"
    connect_seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything was written."""

    folder: Path
    federation: Path
    sites: Mapping[str, Path]
    roles: Mapping[str, str]
    site_keys: bool = True


def lay_out(
    folder: Path,
    settings: RunSettings,
    *,
    sites: Mapping[str, SitePlan],
    listen: str,
    hosts: Sequence[str],
    encoder_file: Path | None = None,
    target_file: Path | None = None,
    site_keys: bool = True,
    enrolment: str = "",
) -> Layout:
    """Make identities and configuration files.

    Args:
        folder: made if missing.
        settings: the run's public settings.
        sites: one plan for each site of ``settings``.
        listen: the aggregator's ``host:port``.
        hosts: DNS names and addresses its certificate is for.
        encoder_file: the aggregator's copy of what the sites' ``encoder_file`` names, for methods that need it there.
        target_file: the same of the target.
        site_keys: make the sites' keys here; else the roster has no sites, and each enrols with its own keys.
        enrolment: ``host:port`` of the enrolment desk; empty for none.

    Raises:
        IdentityError: there are identities in the folder already.
        EnvironmentProblem: FS-1802, the folder cannot be written.
    """
    make_folder(folder)
    roles = {site: entry.role for site, entry in settings.sites.items()}
    years = None if site_keys else AUTHORITY_DAYS
    provision(folder, federation=settings.name, sites=roles if site_keys else {}, hosts=hosts, authority_days=years)
    federation = folder / "aggregator" / "federation.toml"
    public = settings.model_dump(mode="json", exclude_none=True)
    own = {
        "listen": listen,
        **({"enrolment": enrolment} if enrolment else {}),
        "state": "state",
        "identity": "identity",
    }
    for key, file in (("encoder_file", encoder_file), ("target_file", target_file)):
        if file is not None:
            own[key] = str(file.resolve())
    write_whole(federation, to_toml({**own, **public}).encode())
    written = {}
    for site, plan in sites.items():
        home = folder / "sites" / site
        written[site] = make_folder(home) / "site.toml"
        content: dict[str, Any] = {
            "site": site,
            "aggregator": listen,
            "identity": "identity",
            "state": "state",
            "ledger": "ledger.db",
            "engine": plan.engine,
            "device": plan.device,
            "connect_seconds": plan.connect_seconds,
            "policy": plan.policy.model_dump(mode="json"),
        }
        for key, file in (("encoder_file", plan.encoder_file), ("target_file", plan.target_file)):
            if file is not None:
                content[key] = str(file.resolve())
        for name, section in (("train", plan.train), ("evaluation", plan.evaluation)):
            if section is not None:
                content[name] = section.model_dump(mode="json", exclude_none=True)
                # A file that travels to its site names its records from there.
                content[name]["path"] = str(section.path.resolve()) if site_keys else section.path.name
        write_whole(written[site], to_toml(content).encode())
    return Layout(folder=folder, federation=federation, sites=written, roles=roles, site_keys=site_keys)


def initialise(
    folder: Path, file: Path, *, listen: str, hosts: Sequence[str], site_keys: bool = True, enrolment: str = ""
) -> Layout:
    """A new federation from a TOML file with the run's public settings.

    Where ``[encoder]`` gives no ``dimension`` and ``fingerprint``, the encoder is loaded here and they are filled in.
    Each site's file then names ``data/`` beside it as its training records, and the run's ε as its limit.

    Raises:
        ConfigError: FS-1001 to FS-1003, the settings; FS-1004 no such method.
        ModelError: the encoder cannot be loaded.
        PrivacyError, ProtocolError: no plan or no secure sum is possible with these numbers.
        IdentityError: FS-1403, there is something in the folder already.
        EnvironmentProblem: as :func:`lay_out`.
    """
    from fedsecure.methods.cohorts import cohort_of
    from fedsecure.methods.registry import load_training_method

    raw = read_toml(file)
    encoder = raw.get("encoder", {})
    if isinstance(encoder, dict) and not {"dimension", "fingerprint"} <= set(encoder):
        # Everything else is checked before the encoder is loaded, which takes a while.
        parse_settings({**raw, "encoder": {**encoder, **_UNMEASURED}}, file)
        named = {key: encoder[key] for key in ("model", "pretrained") if key in encoder}
        raw["encoder"] = {**encoder, **measure_encoder(EncoderChoice(**named))}
    settings = parse_settings(raw, file)
    _, cohort = cohort_of(settings, trainers_only=True)
    load_training_method(settings.method.name).plan(settings, cohort)
    _check_new(folder)
    plans = {}
    for site, entry in settings.sites.items():
        home = folder / "sites" / site
        policy = PolicyConfig(
            max_epsilon=settings.privacy.target_epsilon,
            delta=settings.privacy.delta,
            unit=settings.privacy.unit,
            methods=(settings.method.name, "evaluate"),
        )
        train = DatasetConfig(name=f"{site}-training", path=home / "data")
        evaluation = DatasetConfig(name=f"{site}-evaluation", path=home / "evaluation", public=entry.evaluation_public)
        plans[site] = SitePlan(
            train=train if entry.role == "train" else None,
            evaluation=evaluation if entry.evaluation_units else None,
            policy=policy,
        )
    return lay_out(folder, settings, sites=plans, listen=listen, hosts=hosts, site_keys=site_keys, enrolment=enrolment)


def _check_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise IdentityError(
            "FS-1403",
            f"{folder} is not empty",
            expected="a new folder: keys are never overwritten",
            cure="name another folder",
        )


def measure_encoder(choice: EncoderChoice) -> dict[str, Any]:
    """Width and fingerprint of an encoder, by loading it."""
    from fedsecure.vision.encoder import load_encoder

    encoder = load_encoder(choice.model, choice.pretrained)
    return {"dimension": encoder.dimension, "fingerprint": encoder.fingerprint}


def to_toml(table: Mapping[str, Any], prefix: str = "") -> str:
    """A nested table of strings, numbers, booleans and flat lists as TOML 1.0."""
    plain = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    nested = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    lines = [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
    text = "\n".join(lines) + ("\n" if lines else "")
    for key, value in nested.items():
        name = f"{prefix}{_key(key)}"
        body = to_toml(value, f"{name}.")
        text += f"\n[{name}]\n{body}" if any(not isinstance(v, Mapping) for v in value.values()) or not value else body
    return text


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else json.dumps(key)


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    # JSON's strings, numbers and booleans are TOML's; DEL is the one character that TOML forbids and JSON does not.
    return json.dumps(value).replace("\x7f", "\\u007f")
