"""Certificates, roster and the whole identity folder: each kind of damage has its own error."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509

from fedsecure.errors import IdentityError
from fedsecure.identity import certificates, keys
from fedsecure.identity.provision import Provisioned, load_identity, provision
from fedsecure.identity.roster import Roster, RosterEntry

NOW = dt.datetime.now(dt.UTC)


def test_every_member_of_a_new_federation_loads(original: Provisioned) -> None:
    for site, folder in original.sites.items():
        identity = load_identity(folder)
        assert identity.site == site
        assert identity.roster == original.roster
        assert identity.roster.find(site).identity_key == keys.public_bytes(identity.signing_key)
        assert identity.roster.find(site).tls_fingerprint == certificates.fingerprint(identity.certificate)
    assert load_identity(original.aggregator).site == "aggregator"
    assert {e.site: e.role for e in original.roster.entries}["ward-c"] == "evaluate"


def test_private_files_are_private_and_secrets_are_not_shown(original: Provisioned) -> None:
    private = [p for p in original.folder.rglob("*") if p.name in {"identity.key", "tls-key.pem", "ca-key.pem"}]
    private += [original.folder / "ca" / "coordinator.key"]
    assert len(private) == 4 * 2 + 2
    for path in private:
        assert path.stat().st_mode & 0o077 == 0
        assert path.parent.stat().st_mode & 0o077 == 0
    shown = repr(load_identity(original.aggregator))
    assert "PRIVATE" not in shown
    assert "signing_key" not in shown


def test_certificate_contents(original: Provisioned) -> None:
    server = x509.load_pem_x509_certificate((original.aggregator / "certificate.pem").read_bytes())
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    client = x509.load_pem_x509_certificate((original.sites["ward-a"] / "certificate.pem").read_bytes())
    uris = client.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert uris.get_values_for_type(x509.UniformResourceIdentifier) == ["fedsecure:site:ward-a"]
    assert client.not_valid_before_utc <= dt.datetime.now(dt.UTC) - dt.timedelta(minutes=4)


@pytest.mark.parametrize(
    ("moment", "code"),
    [(NOW + dt.timedelta(days=31), "FS-1411"), (NOW - dt.timedelta(hours=1), "FS-1412")],
)
def test_expired_and_not_yet_valid(site_folder: Path, moment: dt.datetime, code: str) -> None:
    with pytest.raises(IdentityError, match=code):
        load_identity(site_folder, now=moment)
    load_identity(site_folder, now=NOW + dt.timedelta(days=29))


def test_an_expired_federation_is_refused_by_the_real_clock(tmp_path: Path) -> None:
    past = NOW - dt.timedelta(days=10)
    made = provision(tmp_path, federation="old", sites={"a": "train"}, hosts=["localhost"], days=3, now=past)
    with pytest.raises(IdentityError, match="FS-1411"):
        load_identity(made.sites["a"])


def test_foreign_authority(site_folder: Path) -> None:
    foreign = certificates.make_authority("test", days=30)  # same name, other key
    (site_folder / "ca.pem").write_bytes(foreign.certificate)
    with pytest.raises(IdentityError, match="FS-1413"):
        load_identity(site_folder)


def test_certificate_of_another_site_or_reissued(original: Provisioned, site_folder: Path) -> None:
    root = original.folder / "ca"
    authority = certificates.Issued((root / "ca.pem").read_bytes(), (root / "ca-key.pem").read_bytes())
    again = certificates.issue_site(authority, "ward-a", days=30)
    (site_folder / "certificate.pem").write_bytes(again.certificate)
    with pytest.raises(IdentityError, match="FS-1432"):
        load_identity(site_folder)
    (site_folder / "certificate.pem").write_bytes((original.sites["ward-b"] / "certificate.pem").read_bytes())
    with pytest.raises(IdentityError, match="FS-1431"):
        load_identity(site_folder)
    stranger = certificates.issue_site(authority, "ward-z", days=30)
    (site_folder / "certificate.pem").write_bytes(stranger.certificate)
    with pytest.raises(IdentityError, match="FS-1423"):
        load_identity(site_folder)
    nameless = certificates.issue_server(authority, ["ward-a"], days=30)
    assert certificates.check(nameless.certificate, authority.certificate) == "aggregator"


def test_common_name_and_uri_must_agree(original: Provisioned) -> None:
    root = original.folder / "ca"
    authority = certificates.Issued((root / "ca.pem").read_bytes(), (root / "ca-key.pem").read_bytes())
    names = [x509.UniformResourceIdentifier("fedsecure:site:ward-b")]
    purpose = x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH
    forged = certificates._issue(authority, "ward-a", names, purpose, 30, None)
    with pytest.raises(IdentityError, match="FS-1414"):
        certificates.check(forged.certificate, authority.certificate)


def test_keys_that_do_not_match(original: Provisioned, site_folder: Path) -> None:
    shutil.copy(original.sites["ward-b"] / "tls-key.pem", site_folder / "tls-key.pem")
    with pytest.raises(IdentityError, match="FS-1433"):
        load_identity(site_folder)
    shutil.copy(original.sites["ward-b"] / "identity.key", site_folder / "identity.key")
    with pytest.raises(IdentityError, match="FS-1431"):
        load_identity(site_folder)


@pytest.mark.parametrize("name", ["identity.key", "tls-key.pem"])
def test_world_readable_key(site_folder: Path, name: str) -> None:
    (site_folder / name).chmod(0o644)
    with pytest.raises(IdentityError, match="FS-1401"):
        load_identity(site_folder)


@pytest.mark.parametrize("name", ["identity.key", "tls-key.pem", "ca.pem", "certificate.pem", "roster.json"])
def test_a_missing_file_is_named(site_folder: Path, name: str) -> None:
    (site_folder / name).unlink()
    with pytest.raises(IdentityError, match="FS-1400") as caught:
        load_identity(site_folder)
    assert name in caught.value.found


def test_every_altered_roster_field_is_noticed(site_folder: Path) -> None:
    path = site_folder / "roster.json"
    good = json.loads(path.read_text())
    flip = keys.public_bytes(keys.generate()).hex()
    changes = [
        lambda r: r.update(federation="other"),
        lambda r: r.update(version=2),
        lambda r: r["entries"].pop(),
        lambda r: r["entries"][0].update(role="observe"),
        lambda r: r["entries"][1].update(identity_key=flip),
        lambda r: r["entries"][1].update(tls_fingerprint=flip),
        lambda r: r["entries"][2].update(site="ward-d"),
        lambda r: r["aggregator"].update(identity_key=flip),
        lambda r: r["aggregator"].update(tls_fingerprint=flip),
        lambda r: r.update(signature="00" * 64),
    ]
    for change in changes:
        raw = json.loads(json.dumps(good))
        change(raw)
        path.write_text(json.dumps(raw))
        with pytest.raises(IdentityError, match="FS-1421"):
            load_identity(site_folder)
    path.write_text(json.dumps(good))
    load_identity(site_folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"format": "fedsecure-roster-1"}', "[" * 100_000, "\x80"])
def test_a_malformed_roster_is_one_clear_error(site_folder: Path, text: str) -> None:
    (site_folder / "roster.json").write_text(text, encoding="latin-1")
    with pytest.raises(IdentityError, match="FS-1420"):
        load_identity(site_folder)


def test_a_roster_signed_by_another_coordinator(original: Provisioned, tmp_path: Path) -> None:
    original.roster.save(tmp_path / "roster.json", keys.generate())
    with pytest.raises(IdentityError, match="FS-1421"):
        Roster.load(tmp_path / "roster.json", keys.load_public_key(original.folder / "ca" / "coordinator.pub"))


def test_roster_rules(original: Provisioned) -> None:
    roster = original.roster
    first, second = roster.entries[:2]
    for entries in (
        (second, first),
        (first, first),
        (first, replace(second, identity_key=first.identity_key)),
        (first, replace(second, identity_key=roster.aggregator_key)),
        (replace(first, site="Ward"),),
        (replace(first, site="aggregator"),),
        (replace(first, site="../x"),),
        (replace(first, role="admin"),),
        (replace(first, identity_key=b"short"),),
    ):
        with pytest.raises(IdentityError, match="FS-1422"):
            replace(roster, entries=entries)
    assert replace(roster, version=2).hash != roster.hash
    with pytest.raises(IdentityError, match="FS-1423"):
        roster.find("ward-q")


def test_canonical_bytes_of_a_fixed_roster() -> None:
    entry = RosterEntry("a", "train", bytes([1] * 32), bytes([2] * 32))
    roster = Roster("f", 7, (entry,), bytes([3] * 32), bytes([4] * 32))
    expected = (
        b"\0\0\0\x13fedsecure/roster/v1"
        + b"\0\0\0\x01f"
        + b"\0\0\0\x07"
        + bytes([3] * 32 + [4] * 32)
        + b"\0\0\0\x01"
        + b"\0\0\0\x01a"
        + b"\0\0\0\x05train"
        + bytes([1] * 32 + [2] * 32)
    )
    assert roster.canonical() == expected


def test_provision_refuses_bad_arguments(tmp_path: Path) -> None:
    for sites in ({"../evil": "train"}, {"aggregator": "train"}, {"UPPER": "train"}, {"a": "boss"}):
        with pytest.raises(IdentityError, match="FS-1422"):
            provision(tmp_path / "x", federation="f", sites=sites, hosts=["localhost"])
    with pytest.raises(IdentityError, match="FS-1441"):
        provision(tmp_path / "x", federation="f", sites={"a": "train"}, hosts=[])
    with pytest.raises(IdentityError, match="FS-1441"):
        provision(tmp_path / "x", federation="f", sites={"a": "train"}, hosts=["h"], days=0)
    assert not (tmp_path / "x").exists()


def test_provision_never_overwrites(original: Provisioned) -> None:
    before = {p: p.read_bytes() for p in original.folder.rglob("*") if p.is_file()}
    with pytest.raises(IdentityError, match="FS-1403"):
        provision(original.folder, federation="test", sites={"ward-a": "train"}, hosts=["localhost"])
    assert {p: p.read_bytes() for p in original.folder.rglob("*") if p.is_file()} == before
