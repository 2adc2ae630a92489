"""Who may call now: rosters are taken up while the aggregator runs, and never go back; a signature is what counts."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
from enrolling_world import Coordinated, changed

from fedsecure.config import RunSettings
from fedsecure.errors import IdentityError
from fedsecure.identity import certificates, enrolling, keys
from fedsecure.identity.provision import load_identity
from fedsecure.identity.roster import Roster
from fedsecure.identity.standing import Standing, differences, newer
from fedsecure.methods.cohorts import check_roles


@pytest.fixture
def world(tmp_path: Path) -> Coordinated:
    world = Coordinated(tmp_path / "federation")
    for site in ("ward-a", "ward-b"):
        world.enrol(site)
    (world.aggregator / "roster.json").write_bytes(world.sealed)
    return world


def standing_of(world: Coordinated, **options: Path) -> Standing:
    return Standing(load_identity(world.aggregator), world.aggregator / "roster.json", **options)


def print_of(world: Coordinated, site: str) -> bytes:
    return certificates.fingerprint((world.sites[site] / "certificate.pem").read_bytes())


def test_a_revoked_certificate_is_refused_from_the_next_question_on(world: Coordinated) -> None:
    standing = standing_of(world)
    mine, theirs = print_of(world, "ward-a"), print_of(world, "ward-b")
    assert (standing.site_of(mine), standing.site_of(theirs)) == ("ward-a", "ward-b")
    world.revoke("ward-a")
    assert standing.site_of(mine) == "ward-a", "the new roster has not been brought here"
    (world.aggregator / "roster.json").write_bytes(world.sealed)
    with pytest.raises(IdentityError, match="FS-1460.*ward-a"):
        standing.site_of(mine)
    assert standing.site_of(theirs) == "ward-b"
    for stranger in (b"", bytes(32)):
        with pytest.raises(IdentityError, match="FS-1454"):
            standing.site_of(stranger)
    assert [entry.site for entry in standing.roster.entries] == ["ward-b"]


def test_a_new_member_may_call_without_a_restart(world: Coordinated) -> None:
    standing = standing_of(world)
    identity = world.enrol("ward-c")
    with pytest.raises(IdentityError, match="FS-1454"):
        standing.site_of(print_of(world, "ward-c"))
    assert standing.adopt(world.sealed) == ["ward-c joined as train"]
    assert standing.site_of(print_of(world, "ward-c")) == "ward-c"
    assert (world.aggregator / "roster.json").read_bytes() == world.sealed == standing.sealed
    assert standing.roster == identity.roster
    assert standing.adopt(world.sealed) == []


def test_rosters_never_go_back(world: Coordinated, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, floor = world.aggregator / "roster.json", tmp_path / "floor"
    old = file.read_bytes()
    world.revoke("ward-a")
    new = world.sealed
    mine = print_of(world, "ward-a")
    file.write_bytes(new)
    standing = standing_of(world, floor=floor)
    with caplog.at_level(logging.ERROR):
        file.write_bytes(old)
        for _ in range(3):
            with pytest.raises(IdentityError, match="FS-1454"):
                standing.site_of(mine)
    assert len([record for record in caplog.records if "FS-1473" in record.message]) == 1, "said once"
    with pytest.raises(IdentityError, match="FS-1473"):
        standing.adopt(old)
    # Nor does a restart help.
    with pytest.raises(IdentityError, match="FS-1473"):
        standing_of(world, floor=floor)
    file.write_bytes(new)
    assert standing_of(world, floor=floor).roster.version == Roster.opened(new, keyof(world)).version


def keyof(world: Coordinated) -> bytes:
    return keys.load_public_key(world.folder / "ca" / "coordinator.pub")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[" * 100_000])
def test_a_damaged_file_changes_nothing(world: Coordinated, content: bytes) -> None:
    standing = standing_of(world)
    file = world.aggregator / "roster.json"
    good = file.read_bytes()
    file.write_bytes(content)
    assert standing.site_of(print_of(world, "ward-a")) == "ward-a"
    file.unlink()
    assert standing.site_of(print_of(world, "ward-a")) == "ward-a"
    file.write_bytes(good)
    world.revoke("ward-a")
    file.write_bytes(world.sealed)
    with pytest.raises(IdentityError, match="FS-1460"):
        standing.site_of(print_of(world, "ward-a"))


def test_only_the_pinned_coordinators_signature_counts(world: Coordinated, tmp_path: Path) -> None:
    current, key = world.roster, keyof(world)
    later = replace(current, version=current.version + 1)
    forger = keys.generate()
    with pytest.raises(IdentityError, match="FS-1421"):
        newer(current, later.sealed(forger), key)
    with pytest.raises(IdentityError, match="FS-1421"):
        newer(current, changed(world.sealed, version=current.version + 1), key)
    coordinator = keys.load_private_key(world.folder / "ca" / "coordinator.key")
    assert newer(current, later.sealed(coordinator), key) == later
    with pytest.raises(IdentityError, match="FS-1473"):
        newer(later, current.sealed(coordinator), key)
    with pytest.raises(IdentityError, match="FS-1473"):
        newer(current, replace(later, federation="another").sealed(coordinator), key)
    with pytest.raises(IdentityError, match="FS-1473"):
        newer(current, replace(current, entries=current.entries[:1]).sealed(coordinator), key)


def test_certificates_kept_for_a_renewal_are_signed_and_not_in_the_context(world: Coordinated) -> None:
    world.renew(enrolling.begin_renewal(world.sites["ward-a"]))
    roster = world.roster
    kept = roster.find("ward-a").previous
    assert kept == print_of(world, "ward-a")
    bare = replace(roster, entries=tuple(replace(entry, previous=b"") for entry in roster.entries))
    assert bare.hash == roster.hash, "what a round is bound to are members and their keys"
    assert bare.signed() != roster.signed()
    import json

    raw = json.loads(world.sealed)
    raw["entries"][1]["previous"] = raw["entries"][0].pop("previous")
    with pytest.raises(IdentityError, match="FS-1421"):
        Roster.opened(json.dumps(raw).encode(), keyof(world))
    Roster.opened(world.sealed, keyof(world))


def test_both_certificates_count_during_a_renewal(world: Coordinated) -> None:
    standing = standing_of(world)
    home = world.sites["ward-a"]
    before = print_of(world, "ward-a")
    opened = enrolling.begin_renewal(home)
    answer = world.renew(opened)
    standing.adopt(world.sealed)
    assert standing.site_of(before) == "ward-a"
    enrolling.finish_renewal(home, answer)
    assert print_of(world, "ward-a") != before
    assert standing.site_of(print_of(world, "ward-a")) == "ward-a"
    world.revoke("ward-a")
    standing.adopt(world.sealed)
    for print_ in (before, print_of(world, "ward-a")):
        with pytest.raises(IdentityError, match="FS-1460"):
            standing.site_of(print_)


def test_a_site_says_what_changed(world: Coordinated) -> None:
    home = world.sites["ward-b"]
    before = world.roster
    world.enrol("ward-c")
    world.renew(enrolling.begin_renewal(home))
    world.renew(enrolling.begin_renewal(world.aggregator))
    world.revoke("ward-a")
    _, changes = enrolling.adopt(home, world.sealed)
    assert changes == [
        "ward-c joined as train",
        "ward-a left",
        "ward-b has a new certificate",
        "the aggregator has a new certificate",
    ]
    assert enrolling.adopt(home, world.sealed)[1] == []
    old = before.sealed(keys.load_private_key(world.folder / "ca" / "coordinator.key"))
    with pytest.raises(IdentityError, match="FS-1473"):
        enrolling.adopt(home, old)
    entry = before.entries[0]
    swapped = replace(before, entries=(replace(entry, role="observe", identity_key=bytes([9] * 32)), before.entries[1]))
    assert differences(before, swapped) == [
        "ward-a has another identity key",
        "ward-a: train is now observe",
    ]


def test_a_full_disk_does_not_keep_a_revoked_site_in(world: Coordinated, tmp_path: Path) -> None:
    standing = standing_of(world, floor=tmp_path / "nowhere" / "floor")
    world.revoke("ward-a")
    (world.aggregator / "roster.json").write_bytes(world.sealed)
    with pytest.raises(IdentityError, match="FS-1460"):
        standing.site_of(print_of(world, "ward-a"))


def test_the_same_size_and_time_are_no_hiding_place(world: Coordinated) -> None:
    """A file that is put in another's place is noticed, even with its time stamp."""
    standing = standing_of(world)
    standing.site_of(print_of(world, "ward-a"))
    file = world.aggregator / "roster.json"
    times = file.stat()
    world.revoke("ward-a")
    fresh = file.with_name("fresh")
    fresh.write_bytes(world.sealed)
    os.utime(fresh, ns=(times.st_atime_ns, times.st_mtime_ns))
    fresh.replace(file)
    with pytest.raises(IdentityError, match="FS-1460"):
        standing.site_of(print_of(world, "ward-a"))


def test_an_observer_takes_part_in_no_sum(world: Coordinated) -> None:
    roster = world.enrol("ward-o", "observe").roster
    roster = replace(roster, entries=(*roster.entries, replace(roster.entries[0], site="ward-z", **fresh_keys())))
    entries = {site: {"max_units": 10} for site in ("ward-a", "ward-b", "ward-z")}

    def settings(**sites: dict[str, object]) -> RunSettings:
        encoder = {"dimension": 2, "fingerprint": "0" * 64}
        return RunSettings.model_validate({"classes": ["a", "b"], "encoder": encoder, "sites": {**entries, **sites}})

    check_roles(settings(), roster)
    for asked in ({"max_units": 10}, {"role": "evaluate", "evaluation_units": 5}):
        with pytest.raises(IdentityError, match="FS-1455"):
            check_roles(settings(**{"ward-o": asked}), roster)


def fresh_keys() -> dict[str, bytes]:
    return {"identity_key": os.urandom(32), "tls_fingerprint": os.urandom(32)}
