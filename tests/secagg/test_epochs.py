"""Prepared epochs: exact sums with drop-outs, single-use slots, restarts, and what a hostile aggregator may try."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from epoch_world import EpochWorld, SlotRun, make_epoch
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_world import CONFIG, client_message, edit, federation, make_client, server_message

from fedsecure.errors import ProtocolError, RoundAborted
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.epoch import EpochClient
from fedsecure.secagg.epoch_descriptor import EpochDescriptor
from fedsecure.secagg.latch import FileLatch
from fedsecure.secagg.policy import RoundPolicy, check_epoch
from fedsecure.secagg.server import Phase
from fedsecure.secagg.spool import MemorySpool
from fedsecure.secagg.thresholds import Mode


def complete(run: SlotRun) -> None:
    result = run.masked().survivors().unmask().server.finish()
    np.testing.assert_array_equal(result.total, run.expected(result.survivors))
    assert set(result.survivors) == set(run.uploads)
    for site in run.live:
        run.clients[site].finished(result.result_message)


@pytest.mark.parametrize("mode", [Mode.ACTIVE, Mode.HBC])
def test_every_slot_gives_an_exact_sum(mode: Mode) -> None:
    world = EpochWorld(5, slots=3, mode=mode).set_up()
    uploads = []
    for number in range(3):
        run = SlotRun(world, world.round(number))
        assert run.server.phase is Phase.MASKED
        complete(run)
        uploads.append(bytes(run.uploads["site-00"][1]))
    assert len(set(uploads)) == 3
    assert world.server.next_slot is None


@settings(max_examples=25, deadline=None)
@given(data=st.data(), mode=st.sampled_from(list(Mode)), n=st.integers(4, 8))
def test_sums_are_exact_for_every_pattern_of_drop_outs(data: st.DataObject, mode: Mode, n: int) -> None:
    sites = list(federation(n).sites)
    d = make_epoch(n, mode=mode)
    spare = n - d.min_survivors
    lost = data.draw(st.lists(st.sampled_from(sites), max_size=spare, unique=True), label="lost")
    when = {site: data.draw(st.sampled_from(["advertise", "shares", "ask", "upload"])) for site in lost}
    drops = {phase: [s for s in lost if when[s] == phase] for phase in ("advertise", "shares")}
    world = EpochWorld(n, slots=2, mode=mode, drops=drops).set_up()
    assert set(world.server.members) == set(sites) - set(drops["advertise"]) - set(drops["shares"])
    for number in range(2):
        run = SlotRun(world, world.round(number), absent=[s for s in lost if when[s] == "ask"])
        run.drops[Phase.MASKED] = [s for s in lost if when[s] == "upload"]
        complete(run)
        assert set(run.uploads) == set(sites) - set(lost)


def test_sites_may_leave_before_signing_and_before_unmasking() -> None:
    world = EpochWorld(7, slots=1).set_up()
    run = SlotRun(world, world.round())
    run.drops = {Phase.SURVIVORS: ["site-00"], Phase.UNMASK: ["site-01"]}
    run.masked().survivors().unmask()
    result = run.server.finish()
    np.testing.assert_array_equal(result.total, run.expected(federation(7).sites))


def test_an_aborted_attempt_costs_its_slot_and_the_next_one_works() -> None:
    world = EpochWorld(4, slots=2).set_up()
    first = SlotRun(world, world.round(0))
    first.drops[Phase.MASKED] = ["site-00", "site-01"]
    with pytest.raises(RoundAborted, match="FS-1352"):
        first.masked()
    again = world.round(0, slot=0, attempt=1)
    with pytest.raises(ProtocolError, match="FS-1356"):
        world.server.round(again, spool=MemorySpool())
    for site in world.sites.values():
        with pytest.raises(ProtocolError, match="FS-1356"):
            site.round(again)
    complete(SlotRun(world, world.round(0, attempt=1)))


def test_two_rounds_on_one_slot_are_refused_and_change_nothing() -> None:
    world = EpochWorld(5, slots=3).set_up()
    run = SlotRun(world, world.round(0))
    epochs = world.sites["site-00"]
    for twice in (world.round(0, slot=0), world.round(7, slot=0)):
        with pytest.raises(ProtocolError, match="FS-1356"):
            epochs.round(twice)
    complete(run)
    complete(SlotRun(world, world.round(1)))


def test_a_replayed_round_does_not_cost_a_slot() -> None:
    """The round's own counter refuses it first."""
    world = EpochWorld(5, slots=3).set_up()
    complete(SlotRun(world, world.round(4)))
    for number in (3, 4):
        with pytest.raises(ProtocolError, match="FS-1345"):
            world.sites["site-00"].round(world.round(number, slot=1))
    complete(SlotRun(world, world.round(5, slot=1)))


def test_slots_that_were_passed_over_are_gone() -> None:
    world = EpochWorld(5, slots=4).set_up()
    complete(SlotRun(world, world.round(0, slot=2)))
    for slot in (0, 1, 2):
        with pytest.raises(ProtocolError, match="FS-1356"):
            world.sites["site-00"].round(world.round(1, slot=slot))
    assert world.server.next_slot == 3


def test_there_is_nothing_beyond_the_last_slot() -> None:
    world = EpochWorld(3, slots=1).set_up()
    beyond = world.round(0, slot=1)
    with pytest.raises(ProtocolError, match="FS-1359"):
        world.sites["site-00"].round(beyond)
    with pytest.raises(ProtocolError, match="FS-1359"):
        world.server.round(beyond, spool=MemorySpool())
    complete(SlotRun(world, world.round(0)))
    assert not world.server.serves(federation(3).sites, federation(3).sites)


def test_a_restarted_site_says_so_and_a_new_set_up_follows() -> None:
    world = EpochWorld(5, slots=4).set_up()
    complete(SlotRun(world, world.round(0)))
    world.sites["site-02"] = world.start("site-02")
    descriptor = world.round(1)
    with pytest.raises(ProtocolError, match="FS-1358"):
        world.sites["site-02"].round(descriptor)
    everyone = federation(5).sites
    assert world.server.serves(everyone, [s for s in everyone if s != "site-02"])
    assert not world.server.serves(everyone, everyone[:3])
    assert not world.server.serves(everyone[:4], everyone)
    # The same epoch is never begun twice, not even by a process that knows nothing of the first time.
    with pytest.raises(ProtocolError, match="FS-1345"):
        world.sites["site-02"].set_up(world.descriptor).advertise()
    following = EpochWorld(5, slots=4, epoch=1)
    following.sites, following.latches = world.sites, world.latches
    following.set_up()
    complete(SlotRun(following, following.round(1)))
    for site in everyone:
        with pytest.raises(ProtocolError, match="FS-1358"):
            world.sites[site].round(world.round(2, slot=3))


def test_a_copy_of_a_process_cannot_answer_with_the_same_slot(tmp_path: object) -> None:
    """The latch on disk counts slots too, so that a forked process gets nowhere."""
    world = EpochWorld(3, slots=3)
    world.latches["site-00"] = FileLatch(tmp_path / "latch.json")  # type: ignore[operator, assignment]
    world.sites["site-00"] = world.start("site-00")
    world.set_up()
    epoch = next(iter(world.sites["site-00"]._epochs.values()))
    copied = dict(epoch._slots)
    world.sites["site-00"].round(world.round(0))
    epoch._slots.update(copied)
    with pytest.raises(ProtocolError, match="FS-1345"):
        epoch.round(world.round(1, slot=0))
    assert 0 not in epoch._slots


@pytest.mark.parametrize("change", ["epoch", "cohort", "run", "config", "min_survivors", "colluders", "mode"])
def test_a_round_that_does_not_fit_the_epoch(change: str) -> None:
    world = EpochWorld(7, slots=2).set_up()
    good = world.round(0)
    other: dict[str, object] = {
        "epoch": {"epoch": bytes(32)},
        "cohort": {"cohort": tuple(reversed(good.cohort))},
        "run": {"run_id": bytes(16)},
        "config": {"config_hash": bytes(32)},
        "min_survivors": {"min_survivors": 7},
        "colluders": {"colluders": 1},
        "mode": {"mode": Mode.HBC},
    }
    bad = replace(good, **other[change])  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match="FS-1357"):
        world.server.round(bad, spool=MemorySpool())
    with pytest.raises(ProtocolError, match=r"FS-135[78]"):
        world.sites["site-00"].round(bad)
    complete(SlotRun(world, good))


def test_a_round_of_an_epoch_never_sets_up_keys_of_its_own() -> None:
    world = EpochWorld(3, slots=1).set_up()
    with pytest.raises(ProtocolError, match="FS-1357"):
        make_client(world.round(), "site-00").advertise()


def test_rounds_before_the_set_up_is_complete() -> None:
    world = EpochWorld(3, slots=1)
    descriptor = world.round(slot=0)
    with pytest.raises(ProtocolError, match="FS-1358"):
        world.server.round(descriptor, spool=MemorySpool())
    world.sites["site-00"].set_up(world.descriptor)
    with pytest.raises(ProtocolError, match="FS-1358"):
        world.sites["site-00"].round(descriptor)


@pytest.mark.parametrize("phase", ["advertise", "shares"])
def test_a_set_up_with_too_few_sites_ends(phase: str) -> None:
    world = EpochWorld(4, drops={phase: ["site-00", "site-01"]})
    with pytest.raises(RoundAborted, match="FS-1350" if phase == "advertise" else "FS-1351"):
        world.set_up()
    assert world.server.phase is Phase.ABORTED
    assert world.server.next_slot is None


def test_key_substitution_replay_and_missing_shares_in_the_set_up() -> None:
    world = EpochWorld(4, slots=2)
    clients = {site: epochs.set_up(world.descriptor) for site, epochs in world.sites.items()}
    raw = {site: client.advertise() for site, client in clients.items()}
    for site, message in raw.items():
        assert world.server.receive(site, message)
        assert not world.server.receive(site, message)
    with pytest.raises(ProtocolError, match="FS-1322"):
        world.server.receive("stranger", raw["site-01"])
    with pytest.raises(ProtocolError, match="FS-1324"):
        world.server.receive("site-03", raw["site-00"])
    relayed = world.server.close()

    def substitute(message: object) -> None:
        ad = message.advertisements.advertisements[1]  # type: ignore[attr-defined]
        ad.mask_key = ad.mask_key[:32] + bytes(range(32))

    with pytest.raises(ProtocolError, match="FS-1323"):
        clients["site-00"].shares(edit(relayed["site-00"], substitute))
    with pytest.raises(ProtocolError, match="FS-1320"):
        clients["site-00"].shares(relayed["site-00"])

    def shorten(message: object) -> None:
        ad = message.advertisements.advertisements[1]  # type: ignore[attr-defined]
        ad.mask_key = ad.mask_key[:32]

    with pytest.raises(ProtocolError, match="FS-1321"):
        clients["site-01"].shares(edit(relayed["site-01"], shorten))


def test_a_sealed_message_that_does_not_open_is_reported_and_not_fatal() -> None:
    world = EpochWorld(7, slots=2)
    clients = {site: epochs.set_up(world.descriptor) for site, epochs in world.sites.items()}
    for site, client in clients.items():
        world.server.receive(site, client.advertise())
    for site, raw in world.server.close().items():
        world.server.receive(site, clients[site].shares(raw))
    for site, raw in world.server.close().items():
        if site == "site-06":

            def damage(message: object) -> None:
                share = message.routed_shares.shares[0]  # type: ignore[attr-defined]
                share.ciphertext = bytes(len(share.ciphertext))

            raw = edit(raw, damage)
        clients[site].receive_shares(raw)
    for number in range(2):
        run = SlotRun(world, world.round(number))
        result = run.masked().survivors().unmask().server.finish()
        np.testing.assert_array_equal(result.total, run.expected(run.uploads))
        assert result.unopened == {"site-06": ("site-00",)}


def test_a_low_order_key_in_any_slot_is_refused() -> None:
    world = EpochWorld(3, slots=2)
    client = world.sites["site-00"].set_up(world.descriptor)
    message = client_message(client.advertise())
    ad = message.advertisement
    ad.mask_key = ad.mask_key[:32] + bytes(32)
    body = (1).to_bytes(4, "big") + ad.cipher_key + ad.mask_key
    ad.signature = client._party.sign("advertise", body)
    with pytest.raises(ProtocolError, match="FS-1327"):
        world.server.receive("site-00", message.SerializeToString())


def test_split_views_of_one_slot_never_open_a_sum() -> None:
    """Half of the sites are asked one thing on slot 0, half another: neither half reaches t signatures."""
    world = EpochWorld(6, slots=2).set_up()
    halves = federation(6).sites[:3], federation(6).sites[3:]
    for number, half in enumerate(halves):
        descriptor = world.round(number, slot=0)
        clients = {site: world.sites[site].round(descriptor) for site in half}
        for client in clients.values():
            client.mask(np.zeros(descriptor.length, dtype=np.uint32))
        survivors = [k for k, site in enumerate(descriptor.cohort, start=1) if site in half]
        message = server_message(b"")
        message.survivor_list.survivors.extend(survivors)
        for client in clients.values():
            with pytest.raises(ProtocolError, match="FS-1328"):
                client.sign_survivors(message.SerializeToString())


def test_no_secret_of_a_used_slot_stays_behind() -> None:
    world = EpochWorld(4, slots=3).set_up()
    epoch = next(iter(world.sites["site-00"]._epochs.values()))
    seeds = [slot.seed for slot in epoch._slots.values()]
    assert epoch.slots_left == 3
    run = SlotRun(world, world.round(0, slot=1))
    assert epoch.slots_left == 1
    assert not any(seeds[0])
    complete(run)
    assert not any(seeds[1])
    assert any(seeds[2])
    world.sites["site-00"].abort()
    assert not any(seeds[2])
    assert "seed" not in repr(run.clients["site-01"])


def test_the_descriptor_of_an_epoch_comes_back_and_binds_every_field() -> None:
    base = make_epoch(5)
    assert EpochDescriptor.parse(base.canonical()) == base
    changes = [
        {"mode": Mode.HBC},
        {"run_id": bytes(16)},
        {"roster_hash": bytes(32)},
        {"config_hash": bytes(32)},
        {"epoch": 9},
        {"slots": 9},
        {"cohort": tuple("abcde")},
        {"threshold": 5, "min_survivors": 5},
        {"min_survivors": 5},
        {"colluders": 2, "min_survivors": 5},
    ]
    contexts = {replace(base, **change).ctx for change in changes}  # type: ignore[arg-type]
    assert len(contexts | {base.ctx}) == len(changes) + 1


@pytest.mark.parametrize(
    "change", [{"slots": 0}, {"slots": 1025}, {"epoch": -1}, {"run_id": b""}, {"cohort": ("a", "a", "b")}]
)
def test_ill_formed_epochs(change: dict[str, object]) -> None:
    with pytest.raises(ProtocolError, match="FS-1314"):
        replace(make_epoch(3), **change)  # type: ignore[arg-type]


@given(cut=st.integers(0, 400), flip=st.integers(0, 7))
def test_damaged_epoch_bytes_never_parse_to_the_same_epoch(cut: int, flip: int) -> None:
    raw = make_epoch(3).canonical()
    with pytest.raises(ProtocolError):
        EpochDescriptor.parse(raw[: cut % len(raw)])
    for longer in (raw + b"\0", bytes(1 << 17)):
        with pytest.raises(ProtocolError, match="FS-1314"):
            EpochDescriptor.parse(longer)
    bent = bytearray(raw)
    bent[cut % len(raw)] ^= 1 << flip
    try:
        assert EpochDescriptor.parse(bytes(bent)).ctx != make_epoch(3).ctx
    except ProtocolError:
        return


def test_the_round_descriptor_with_a_slot_comes_back() -> None:
    descriptor = EpochWorld(3).round(slot=2)
    assert RoundDescriptor.parse(descriptor.canonical()) == descriptor
    bare = replace(descriptor, epoch=b"", slot=0)
    assert descriptor.canonical().startswith(bare.canonical())


def test_a_sites_floors_hold_for_the_set_up() -> None:
    f, d = federation(5), make_epoch(5)
    arguments = {"policy": RoundPolicy(), "roster": f.roster, "site": f.sites[0], "config_hash": CONFIG}
    check_epoch(d, **arguments)  # type: ignore[arg-type]
    refused = {
        "FS-1330": {"d": make_epoch(5, mode=Mode.HBC)},
        "FS-1331": {"policy": RoundPolicy(min_cohort=6)},
        "FS-1333": {"policy": RoundPolicy(min_survivors=5)},
        "FS-1334": {"policy": RoundPolicy(min_colluders=2)},
        "FS-1336": {"site": "stranger"},
        "FS-1337": {"roster": federation(6).roster},
        "FS-1339": {"config_hash": bytes(32)},
    }
    for code, change in refused.items():
        changed = {**arguments, **change}
        epoch = changed.pop("d", d)
        with pytest.raises(ProtocolError, match=code):
            check_epoch(epoch, **changed)  # type: ignore[arg-type]


def test_another_epochs_advertisement_is_not_accepted() -> None:
    world, other = EpochWorld(3, slots=2), EpochWorld(3, slots=2, epoch=1)
    raw = other.sites["site-00"].set_up(other.descriptor).advertise()
    with pytest.raises(ProtocolError, match="FS-1323"):
        world.server.receive("site-00", raw)
    assert isinstance(other.sites["site-00"].set_up(make_epoch(3, epoch=2)), EpochClient)
