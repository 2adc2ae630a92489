"""Attacks on prepared epochs: each fails, and the same attack succeeds once the check that stops it is switched off."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from epoch_world import EpochWorld, SlotRun, make_epoch
from hostile_epochs import HostileEpochs
from secagg_world import federation
from switches import forgetful, stolen, trusting

from fedsecure.errors import ProtocolError
from fedsecure.secagg import keys, transcript
from fedsecure.secagg import latch as latch_module
from fedsecure.secagg.client import SecAggClient, State
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.epoch import EpochClient
from fedsecure.secagg.epoch_descriptor import EpochDescriptor
from fedsecure.secagg.latch import FileLatch

Patch = pytest.MonkeyPatch


def undying(patch: Patch) -> None:
    """Switch single use off: a slot is still there, seed and all, after it was given out."""
    honest = EpochClient.round

    def round(self: EpochClient, descriptor: RoundDescriptor) -> SecAggClient:
        kept = {number: replace(slot, seed=bytearray(slot.seed)) for number, slot in self._slots.items()}
        try:
            return honest(self, descriptor)
        finally:
            self._slots.update(kept)

    patch.setattr(EpochClient, "round", round)


def unfitting(patch: Patch) -> None:
    """Switch off that a round has the sites and thresholds of its epoch."""
    patch.setattr(EpochDescriptor, "require_fit", lambda *_: None)


def test_slot_replay(monkeypatch: Patch) -> None:
    with pytest.raises(ProtocolError, match="FS-1356"):
        HostileEpochs().slot_replay()
    undying(monkeypatch)
    with pytest.raises(ProtocolError, match="FS-1345"):  # the latch alone is enough
        HostileEpochs().slot_replay()
    forgetful(monkeypatch)
    assert stolen(HostileEpochs().slot_replay())


@pytest.mark.parametrize("attack", ["overlapping_survivors", "stale_epoch"])
def test_a_round_asked_for_again_with_other_survivors(attack: str, monkeypatch: Patch) -> None:
    """Over two slots of one epoch, or over a restart and the same epoch once more."""
    with pytest.raises(ProtocolError, match="FS-1345"):
        getattr(HostileEpochs(), attack)()
    forgetful(monkeypatch)
    assert stolen(getattr(HostileEpochs(), attack)())


def test_cohort_changed_inside_an_epoch(monkeypatch: Patch) -> None:
    with pytest.raises(ProtocolError, match="FS-1357"):
        HostileEpochs(colluder=3).changed_cohort()
    unfitting(monkeypatch)
    assert stolen(HostileEpochs(colluder=3).changed_cohort())


def test_threshold_lowered_after_the_set_up(monkeypatch: Patch) -> None:
    with pytest.raises(ProtocolError, match="FS-1357"):
        HostileEpochs().lowered_threshold()
    unfitting(monkeypatch)
    assert stolen(HostileEpochs().lowered_threshold())


def test_another_model_on_the_same_slot(monkeypatch: Patch) -> None:
    """No key depends on the model before the round: its context alone keeps the masks from cancelling."""
    assert not stolen(HostileEpochs().model_inconsistency())
    without_model = property(lambda self: hashlib.sha256(bytes(self.run_id) + bytes([self.round])).digest())
    monkeypatch.setattr(RoundDescriptor, "ctx", without_model)
    assert stolen(HostileEpochs().model_inconsistency())


def test_late_uploads_on_a_slot(monkeypatch: Patch) -> None:
    assert not stolen(HostileEpochs().late_upload())
    # Single masking, as in the protocols that this attack broke.
    monkeypatch.setattr(keys, "self_mask_key", lambda *_, **__: bytes(32))
    assert stolen(HostileEpochs().late_upload())


def test_key_substitution_at_the_set_up(monkeypatch: Patch) -> None:
    with pytest.raises(ProtocolError, match="FS-1323"):
        HostileEpochs().key_substitution()
    trusting(monkeypatch)
    assert stolen(HostileEpochs().key_substitution())


def test_split_view_of_who_advertised(monkeypatch: Patch) -> None:
    """Without T1 in the headers, sites go on with different keys of one peer."""
    with pytest.raises(ProtocolError, match="FS-1326"):
        HostileEpochs().split_advertisements()
    monkeypatch.setattr(transcript, "advertisements_hash", lambda *_: bytes(32))
    assert len(HostileEpochs().split_advertisements()) == 2


def test_split_view_of_who_shared_keys(monkeypatch: Patch) -> None:
    """Without T2 under the survivors' signatures, sites give shares away for different views of one slot."""
    with pytest.raises(ProtocolError, match="FS-1323"):
        HostileEpochs().split_headers()
    monkeypatch.setattr(transcript, "headers_hash", lambda *_: bytes(32))
    assert HostileEpochs().split_headers() == {(1, 2, 3, 4), (1, 2, 3, 4, 5)}


# --- what a hostile aggregator must not be able to break or to leave behind ---------------------------------------


def test_a_replayed_set_up_leaves_the_slots_as_they_are() -> None:
    world = EpochWorld(3, slots=2, epoch=4).set_up()
    for number in (4, 3, 0):
        for site in world.sites.values():
            with pytest.raises(ProtocolError, match="FS-1345"):
                site.set_up(make_epoch(3, slots=2, epoch=number))
    run = SlotRun(world, world.round(0)).masked().survivors().unmask()
    assert run.server.finish().survivors == federation(3).sites


def test_a_site_holds_one_epoch_of_a_run() -> None:
    """However many cohorts it is asked to prepare for, its memory is that of one set-up."""
    f = federation(5)
    epochs = EpochWorld(5).sites["site-00"]
    clients = []
    for number, cohort in enumerate((f.sites, f.sites[:4], f.sites[:3])):
        clients.append(epochs.set_up(epoch_of(cohort, number)))
        clients[-1].advertise()
    assert [client.state for client in clients] == [State.ABORTED, State.ABORTED, State.ADVERTISED]
    assert len(epochs._epochs) == 1


def epoch_of(cohort: tuple[str, ...], number: int) -> EpochDescriptor:
    base = make_epoch(5)
    return EpochDescriptor.choose(
        cohort,
        run_id=base.run_id,
        epoch=number,
        slots=2,
        roster=federation(5).roster,
        config_hash=base.config_hash,
    )


@pytest.mark.parametrize("step", ["advertise", "shares", "receive_shares"])
def test_no_seed_of_an_aborted_set_up_stays_behind(step: str) -> None:
    world = EpochWorld(3, slots=4)
    client = world.sites["site-00"].set_up(world.descriptor)
    client.advertise()
    own = client._own
    assert own is not None
    assert all(any(seed) for seed in own.seeds)
    if step == "advertise":
        world.sites["site-00"].set_up(make_epoch(3, slots=4, epoch=1))
    else:
        client._state = State.ADVERTISED if step == "shares" else State.SHARED
        with pytest.raises(ProtocolError, match="FS-1321"):
            getattr(client, step)(b"\xff")
    assert client.state is State.ABORTED
    assert not any(any(seed) for seed in own.seeds)
    assert client._own is None


def test_a_latch_too_large_to_be_read_again_is_not_written(tmp_path: Path, monkeypatch: Patch) -> None:
    """Or an aggregator that invents runs could make a site refuse every round of every other one."""
    monkeypatch.setattr(latch_module, "MAX_BYTES", 400)
    latch = FileLatch(tmp_path / "latch.json")
    for run in (b"a", b"b"):
        latch.begin(run * 16, 0, 0, bytes(32))
    with pytest.raises(ProtocolError, match="FS-1349"):
        latch.begin(b"c" * 16, 0, 0, bytes(32))
    latch.begin(b"a" * 16, 0, 1, bytes(32))
    with pytest.raises(ProtocolError, match="FS-1345"):
        latch.begin(b"a" * 16, 0, 1, bytes(32))
