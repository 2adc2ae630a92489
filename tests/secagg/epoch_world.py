"""Epochs in memory for the tests: the set-up, and rounds on its slots."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from secagg_world import CONFIG, RUN, Run, federation, make_query

from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.epoch import Epochs
from fedsecure.secagg.epoch_descriptor import EpochDescriptor
from fedsecure.secagg.epoch_server import EpochServer
from fedsecure.secagg.latch import MemoryLatch
from fedsecure.secagg.server import Phase
from fedsecure.secagg.spool import MemorySpool
from fedsecure.secagg.thresholds import Mode


def make_epoch(n: int, *, slots: int = 4, epoch: int = 0, mode: Mode = Mode.ACTIVE) -> EpochDescriptor:
    f = federation(n)
    return EpochDescriptor.choose(
        f.sites, run_id=RUN, epoch=epoch, slots=slots, roster=f.roster, config_hash=CONFIG, mode=mode
    )


class SlotRun(Run):
    """A round whose keys come from an epoch; ``absent`` sites do not even hear of it."""

    def __init__(self, world: EpochWorld, descriptor: RoundDescriptor, *, absent: Collection[str] = ()) -> None:
        super().__init__(descriptor, seed=descriptor.round)
        self.server = world.server.round(descriptor, spool=MemorySpool())
        self.live = [site for site in world.server.members if site not in absent]
        self.clients = {site: world.sites[site].round(descriptor) for site in self.live}

    def masked(self, *, close: bool = True) -> SlotRun:
        for site in self._leave(Phase.MASKED):
            masked = self.clients[site].mask(self.vectors[site])
            self.uploads[site] = (masked.header, masked.payload)
            assert self.server.receive_masked(site, masked.header, masked.payload)
        if close:
            self._close(Phase.MASKED)
        return self


@dataclass
class EpochWorld:
    """An epoch of n sites; ``drops`` maps "advertise" or "shares" to sites whose message of it never comes."""

    n: int
    slots: int = 4
    mode: Mode = Mode.ACTIVE
    drops: dict[str, Collection[str]] = field(default_factory=dict)
    epoch: int = 0

    def __post_init__(self) -> None:
        f = federation(self.n)
        self.descriptor = make_epoch(self.n, slots=self.slots, epoch=self.epoch, mode=self.mode)
        self.latches = {site: MemoryLatch() for site in f.sites}
        self.sites = {site: self.start(site) for site in f.sites}
        self.server = EpochServer(self.descriptor, roster=f.roster, signing_key=f.aggregator)

    def start(self, site: str) -> Epochs:
        """A site's process, new or again."""
        f = federation(self.n)
        return Epochs(site=site, signing_key=f.keys[site], roster=f.roster, latch=self.latches[site])

    def set_up(self) -> EpochWorld:
        clients = {site: epochs.set_up(self.descriptor) for site, epochs in self.sites.items()}
        messages = {site: client.advertise() for site, client in clients.items()}
        for phase in ("advertise", "shares"):
            for site, raw in messages.items():
                if site not in self.drops.get(phase, ()):
                    assert self.server.receive(site, raw)
            relayed = self.server.close()
            if phase == "advertise":
                messages = {site: clients[site].shares(raw) for site, raw in relayed.items()}
        for site, raw in relayed.items():
            clients[site].receive_shares(raw)
        return self

    def round(self, round: int = 0, *, slot: int | None = None, **changes: object) -> RoundDescriptor:
        number = self.server.next_slot if slot is None else slot
        assert number is not None
        query = make_query(self.n, round=round, **changes)
        return RoundDescriptor.from_query(
            query,
            roster=federation(self.n).roster,
            config_hash=CONFIG,
            base_hash=bytes([8] * 32),
            mode=self.mode,
            epoch=self.descriptor.ctx,
            slot=number,
        )
