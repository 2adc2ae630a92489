"""What an attempt, or a set-up of keys, begins with: the query, its signed context, and a server for it.

From the run's public settings and the schedule's question alone; every site builds the same context and compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedsecure.aggregator.rounds import Attempt, SetUp
from fedsecure.aggregator.store import RunStore
from fedsecure.config import RunSettings
from fedsecure.identity.provision import Identity
from fedsecure.messages import Query, digest_tensor
from fedsecure.methods.agenda import asked_at
from fedsecure.methods.base import Ask, Tensor
from fedsecure.methods.contexts import epoch_context, round_context
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.draw import Draw
from fedsecure.secagg.epoch_descriptor import EpochDescriptor
from fedsecure.secagg.epoch_server import EpochServer
from fedsecure.secagg.record import RecordingEpochServer, RecordingServer, Write, file_name
from fedsecure.secagg.server import SecAggServer
from fedsecure.secagg.spool import FileSpool, Spool
from fedsecure.transport.tensors import pack_tensor


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Tensors as they are fetched: name → hash, and hash → bytes."""

    hashes: Mapping[str, bytes]
    blobs: Mapping[bytes, bytes]

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Broadcast:
        hashes = {name: digest_tensor(name, value) for name, value in tensors.items()}
        return Broadcast(hashes, {hashes[name]: pack_tensor(name, value) for name, value in tensors.items()})


@dataclass(frozen=True, slots=True)
class Openings:
    """Opens attempts and set-ups of one run."""

    settings: RunSettings
    identity: Identity
    run: bytes
    store: RunStore

    def query(
        self, ask: Ask, *, round: int, attempt: int, inputs: Mapping[str, bytes], draw: Draw | None = None
    ) -> Query:
        """The question of one attempt."""
        sites = asked_at(self.settings, round, draw=draw)
        return Query(
            run=self.run,
            round=round,
            attempt=attempt,
            method=ask.method,
            version=ask.version,
            cohort=sites,
            inputs=inputs,
            segments=ask.segments,
            events=ask.events,
            ring_bits=ask.ring_bits,
        )

    def attempt(
        self, query: Query, *, trainers_only: bool, keys: SetUp | None, now: float, draw: Draw | None = None
    ) -> tuple[Attempt, RoundDescriptor]:
        """An attempt with keys of its own, or with the next slot of ``keys``."""
        descriptor = round_context(
            self.settings,
            query,
            roster=self.identity.roster,
            trainers_only=trainers_only,
            epoch=keys.ctx if keys else b"",
            slot=keys.slot() if keys else 0,
            draw=draw,
        )
        spool = FileSpool(self.store.folder / "spool")
        spool.reserve(descriptor.length * descriptor.word_bytes, uploads=len(descriptor.cohort))
        server = keys.round(descriptor, spool=spool) if keys else self._server(descriptor, spool)
        return Attempt(query, descriptor, server=server, waits=self.settings.rounds, now=now), descriptor

    def set_up(self, number: int, *, tokens: Mapping[str, bytes], now: float) -> tuple[SetUp, bytes]:
        """The run's set-up of keys number ``number`` among the sessions ``tokens``, and its descriptor's bytes."""
        roster = self.identity.roster
        descriptor = epoch_context(self.settings, run=self.run, number=number, roster=roster)
        server = self._epoch_server(descriptor)
        return SetUp(server, tokens=tokens, waits=self.settings.rounds, now=now), descriptor.canonical()

    def _server(self, descriptor: RoundDescriptor, spool: Spool) -> SecAggServer:
        """A round that sets up its own keys, recorded where the settings say so."""
        roster, key = self.identity.roster, self.identity.signing_key
        if not self.settings.rounds.transcripts:
            return SecAggServer(descriptor, roster=roster, signing_key=key, spool=spool)
        return RecordingServer(descriptor, roster=roster, signing_key=key, spool=spool, write=self._write(descriptor))

    def _epoch_server(self, descriptor: EpochDescriptor) -> EpochServer:
        """A set-up of keys, recorded with its rounds where the settings say so."""
        roster, key = self.identity.roster, self.identity.signing_key
        if not self.settings.rounds.transcripts:
            return EpochServer(descriptor, roster=roster, signing_key=key)
        write = self._write(descriptor)
        return RecordingEpochServer(descriptor, roster=roster, signing_key=key, write=write, rounds=self._write)

    def _write(self, descriptor: RoundDescriptor | EpochDescriptor) -> Write:
        return self.store.transcript(file_name(descriptor))


__all__ = ["Broadcast", "Openings"]
