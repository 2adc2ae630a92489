"""A site that takes up a newer roster during a run, as a renewal brings it, can start again and go on with the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from federation_world import World

from fedsecure.errors import IdentityError
from fedsecure.files import write_whole
from fedsecure.identity import keys
from fedsecure.identity.provision import load_identity
from fedsecure.identity.roster import Roster
from fedsecure.privacy.ledger import Ledger
from fedsecure.site import rosters


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path, sites=3, rounds=4)
    made.start()
    return made


def take_up_a_newer_roster(world: World, name: str) -> Roster:
    """As ``fedsecure renew`` and ``fedsecure enroll --refresh`` leave the identity folder."""
    folder = world.site_config(name).identity
    coordinator = keys.load_private_key(world.folder / "keys" / "ca" / "coordinator.key")
    current = load_identity(folder).roster
    newer = replace(current, version=current.version + 1)
    write_whole(folder / "roster.json", newer.sealed(coordinator), mode=0o644)
    return newer


def leave_after_a_question(world: World, name: str) -> Path:
    """Take part once, as a process that then ends; the folder of the run at this site."""
    with world.client(name) as client:
        for query in client.queries():
            client.answer(query)
            break
        return client._folder.path


def test_it_goes_on_with_the_run_by_the_roster_it_was_begun_with(world: World) -> None:
    old = load_identity(world.site_config("site-2").identity).roster

    def renews() -> None:
        leave_after_a_question(world, "site-2")
        newer = take_up_a_newer_roster(world, "site-2")
        with world.client("site-2") as client:
            assert client._identity.roster == old != newer
            client.run()
            world.reports["site-2"] = client.privacy_report()

    world.run(renews, world.take_part("site-1"), world.take_part("site-3"))
    assert not world.errors
    assert sorted(world.reports) == world.names
    with Ledger(world.folder / "site-2" / "ledger.db") as ledger:
        assert len(ledger.spent("site-2-train", "train")) >= world.rounds


def test_without_a_kept_roster_it_is_refused(world: World) -> None:
    """Also who has never taken part in the run: a newer roster is for the next one."""
    take_up_a_newer_roster(world, "site-2")
    with pytest.raises(IdentityError, match="FS-1452"):
        world.take_part("site-2")()


@pytest.mark.parametrize("spoiled", ["altered", "another coordinator's", "another run's", "of a run that is over"])
def test_only_the_runs_own_roster_counts(world: World, spoiled: str) -> None:
    with world.client("site-2") as client:
        folder = client._folder.path
    file = folder / rosters.FILE
    sealed = file.read_bytes()
    take_up_a_newer_roster(world, "site-2")
    if spoiled == "altered":
        file.write_bytes(sealed.replace(b'"train"', b'"evaluate"', 1))
    elif spoiled == "another coordinator's":
        file.write_bytes(load_identity(world.site_config("site-1").identity).roster.sealed(keys.generate()))
    elif spoiled == "another run's":
        folder.rename(folder.with_name(bytes(16).hex()))
    else:
        (folder / "privacy-report.json").write_text("{}")
    with pytest.raises(IdentityError, match="FS-1452"):
        world.take_part("site-2")()


def test_an_earlier_run_of_the_same_roster_that_never_ended_is_in_nobodys_way(world: World) -> None:
    with world.client("site-2") as client:
        folder = client._folder.path
    abandoned = folder.with_name(bytes(16).hex())
    abandoned.mkdir()
    (abandoned / rosters.FILE).write_bytes((folder / rosters.FILE).read_bytes())
    take_up_a_newer_roster(world, "site-2")
    with world.client("site-2") as client:
        assert client._folder.path == folder


def test_a_folder_that_changed_over_meanwhile_is_not_kept_as_the_runs(world: World) -> None:
    identity = load_identity(world.site_config("site-1").identity)
    take_up_a_newer_roster(world, "site-1")
    rosters.keep(world.folder, identity, folder=world.site_config("site-1").identity)
    assert not (world.folder / rosters.FILE).exists()
