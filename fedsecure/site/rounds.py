"""The conversation of one attempt, and of a set-up of keys, with the aggregator (secagg.md §3.4, §3.7)."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass

from fedsecure.errors import ProtocolError, RoundAborted
from fedsecure.methods.registry import load_method
from fedsecure.release import Door
from fedsecure.secagg.client import MaskedInput, SecAggClient, State
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.epoch import Epochs
from fedsecure.secagg.epoch_descriptor import EpochDescriptor
from fedsecure.secagg.latch import RoundLatch
from fedsecure.site.diary import Diary
from fedsecure.site.line import Line, lost, over_at_the_aggregator
from fedsecure.site.membership import Membership
from fedsecure.site.questions import Question
from fedsecure.site.results import RunFolder

log = logging.getLogger("fedsecure.client")


@dataclass(slots=True)
class Rounds:
    """Speaks secure aggregation over one line; keeps the latch, and keys that were set up ahead."""

    member: Membership
    line: Line
    folder: RunFolder
    latch: RoundLatch
    epochs: Epochs
    diary: Diary

    @staticmethod
    def begin(member: Membership, line: Line, *, folder: RunFolder, latch: RoundLatch, diary: Diary) -> Rounds:
        identity = member.identity
        epochs = Epochs(site=member.config.site, signing_key=identity.signing_key, roster=identity.roster, latch=latch)
        return Rounds(member, line, folder, latch, epochs, diary)

    def set_up(self, descriptor: EpochDescriptor) -> None:
        """Set up keys for the next rounds; an aborted set-up is no error, the next one follows."""
        epoch, ctx = self.epochs.set_up(descriptor), descriptor.ctx
        try:
            self.line.send(ctx, epoch.advertise())
            self.line.send(ctx, epoch.shares(self.line.relay(ctx, "shares")))
            epoch.receive_shares(self.line.relay(ctx, "done"))
        except RoundAborted as error:
            log.warning("set-up of keys aborted: %s", error)
            epoch.abort()

    def session(self, descriptor: RoundDescriptor) -> SecAggClient:
        """The state machine of one attempt, with keys of its own or set up ahead.

        Raises:
            RoundAborted: FS-1362 the keys were set up without this site.
        """
        if descriptor.epoch:
            try:
                return self.epochs.round(descriptor)
            except ProtocolError as error:
                if error.code != "FS-1358":
                    raise
                # Its set-up went on without this site: the round is lost for it, and the next set-up is not.
                raise lost(error) from error
        identity = self.member.identity
        return SecAggClient(
            descriptor,
            site=self.member.config.site,
            signing_key=identity.signing_key,
            roster=identity.roster,
            latch=self.latch,
        )

    def converse(self, asked: Question, session: SecAggClient, *, door: Door) -> str:
        """The five messages of one attempt, or three with keys set up ahead, with the door in the middle.

        Returns:
            The ledger entries that paid.
        """
        ctx, line, query = session.ctx, self.line, asked.query
        with over_at_the_aggregator("FS-1704", aborts=True):
            inputs = line.fetch(query.inputs, asked.ask.inputs)
        if session.state is State.NEW:
            line.send(ctx, session.advertise())
            line.send(ctx, session.shares(line.relay(ctx, "shares")))
            session.receive_shares(line.relay(ctx, "masked"))
        method = load_method(query.method)

        def send(sealed: MaskedInput) -> None:
            self.diary.leaves(query, ctx, hashlib.sha256(sealed.header).digest())
            line.upload(ctx, sealed)

        contribution, kept = door.release(
            query,
            method,
            inputs=inputs,
            state=self.folder.load_state(method.name),
            seal=session.mask,
            send=send,
        )
        line.send(ctx, session.sign_survivors(line.relay(ctx, "survivors")))
        line.send(ctx, session.unmask(line.relay(ctx, "unmask")))
        session.finished(line.relay(ctx, "result"))
        self.folder.save_state(method.name, kept)
        return contribution.reservation
