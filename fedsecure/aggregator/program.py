"""``fedsecure serve`` as a program: one run or several, from listening to the last goodbye. Never imports torch.

Killed at any point and started again, it takes up what is not over. New runs begin once all of the command are over.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsecure.aggregator.coordinator import Coordinator
from fedsecure.aggregator.database import open_database
from fedsecure.aggregator.enrolment import members
from fedsecure.aggregator.house import House
from fedsecure.aggregator.listening import listening
from fedsecure.aggregator.metrics import Metrics
from fedsecure.aggregator.service import Service, start
from fedsecure.aggregator.step_worker import check_encoder_file
from fedsecure.aggregator.store import begin, unfinished
from fedsecure.config import FederationConfig
from fedsecure.errors import ConfigError, FedsecureError, RunError
from fedsecure.files import make_folder, write_whole
from fedsecure.identity import certificates
from fedsecure.identity.provision import Identity, load_identity
from fedsecure.identity.roster import Roster
from fedsecure.identity.standing import Standing

Announce = Callable[[str, bytes], None]
Watch = Callable[[dict[str, Any]], None]
# How often it looks whether the operator wants something else.
_OBEY_SECONDS = 1.0
_LOOK_SECONDS = 0.25
# How often it looks whether a day has gone by since it looked at its certificates.
_WARN_SECONDS = 60.0
log = logging.getLogger("fedsecure.aggregator")


def serve(configs: Sequence[FederationConfig], *, announce: Announce, watch: Watch) -> list[dict[str, Any]]:
    """Serve one run of each file to its end, all on the first file's port and under its identity.

    Args:
        configs: ``federation.toml``, one or more with names of their own.
        announce: called for each run with the address listened on and the run's id.
        watch: called about four times a second with the status of each run.

    Returns:
        Each run's summary: rounds, attempts with survivors and reasons, evaluations.

    Raises:
        ConfigError: FS-1022 two files name the same federation or place for metrics, or another address or identity.
        RunError: FS-1701 not enough sites came, FS-1702 a round failed too often, FS-1712 stopped by a signal, FS-1731
            to FS-1735 the run that is not over cannot be taken up.
        ModelError: FS-1640 a method will compute at the aggregator, from a file that is not named.
        EnvironmentProblem: FS-1801 the address cannot be listened on, FS-1802 the state folder cannot be written,
            FS-1830 to FS-1832 the database cannot be used.
        IdentityError: the aggregator's identity folder is not in order.
    """
    _check_together(configs)
    for config in configs:
        check_encoder_file(config)
    return asyncio.run(_serve(configs, announce, watch))


async def _serve(configs: Sequence[FederationConfig], announce: Announce, watch: Watch) -> list[dict[str, Any]]:
    identity = load_identity(configs[0].identity)
    warning = asyncio.create_task(_warn(identity))
    try:
        with ExitStack() as held:
            for folder in sorted({config.state for config in configs}):
                held.enter_context(only_one(make_folder(folder)))
            newcomers = {site for config in configs if not _goes_on(config) for site in config.sites}
            async with members(configs[0], identity, newcomers) as standing:
                return await _serve_runs(
                    held, configs, replace(identity, roster=standing.roster), standing, announce, watch
                )
    finally:
        warning.cancel()


async def _warn(identity: Identity) -> None:
    """Say, now and once a day, that the aggregator's certificate or the federation's ends soon."""
    notices = certificates.Notices(identity.certificate, identity.ca)
    while True:
        for sentence in notices.due():
            log.warning("%s", sentence)
        await asyncio.sleep(_WARN_SECONDS)


async def _serve_runs(
    held: ExitStack,
    configs: Sequence[FederationConfig],
    identity: Identity,
    standing: Standing,
    announce: Announce,
    watch: Watch,
) -> list[dict[str, Any]]:
    pairs = [held.enter_context(_run(config, identity, standing)) for config in configs]
    runs, metrics = [core for core, _ in pairs], [one for _, one in pairs]
    house = House(runs)
    for core, one in pairs:
        if one:
            one.certificate(
                "aggregator", certificates.parse(identity.certificate, "own").not_valid_after_utc.timestamp()
            )
            answering = one.serve(core.config.metrics)
            held.callback(answering.close)
    server, service, port = await start(house, identity, configs[0].listen, standing=standing)
    for one in metrics:
        if one:
            one.readiness.ready()
    address = f"{configs[0].listen.rpartition(':')[0]}:{port}"
    for core in runs:
        write_whole(core.config.state / "address", address.encode())
        announce(address, core.run)

    def look() -> None:
        for core, one in pairs:
            status = core.status(time.monotonic())
            watch(status)
            if one:
                one.update(status, core.attempts)

    try:
        await _until_the_end(service, runs, look)
    finally:
        for one in metrics:
            if one:
                one.readiness.not_ready("the aggregator ends")
        look()
        await server.stop(grace=0.5)
    return _ended(runs)


def _ended(runs: Sequence[Coordinator]) -> list[dict[str, Any]]:
    """The summaries; raises the failure of a run that did not complete, first of one that can go on."""
    if all(core.over for core in runs):
        # A run closed before the others would be begun anew by the command that goes on with them.
        for core in runs:
            core.close()
    failures = [core.failure for core in runs if core.failure is not None]
    if failures:
        raise min(failures, key=lambda failure: failure.final)
    return [core.outcome for core in runs if core.outcome is not None]


async def _until_the_end(service: Service, runs: Sequence[Coordinator], look: Callable[[], None]) -> None:
    async def show() -> None:
        while True:
            look()
            await asyncio.sleep(_LOOK_SECONDS)

    async def obey() -> None:
        while True:
            for core in runs:
                try:
                    core.obey(core.wanted(), time.monotonic())
                except FedsecureError as error:
                    log.warning("the operator's wishes cannot be read: %s", error)
            await asyncio.sleep(_OBEY_SECONDS)

    beside = [asyncio.create_task(show()), asyncio.create_task(obey())]
    main = asyncio.create_task(service.run())
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, main.cancel)
    try:
        await main
    except asyncio.CancelledError:
        raise RunError(
            "FS-1712",
            "the aggregator was told to stop before the run was over",
            expected="a run that ends by itself",
            cure="start it again: the run goes on after its last sum; the sites' charges stand",
        ) from None
    finally:
        for task in beside:
            task.cancel()


def _goes_on(config: FederationConfig) -> bool:
    """Whether the file's run has begun: it keeps the roster it began with, and waits for no member."""
    database = open_database(config)
    try:
        store = unfinished(database, config)
        return store is not None and store.begun
    finally:
        database.close()


@contextmanager
def _run(
    config: FederationConfig, identity: Identity, standing: Standing
) -> Iterator[tuple[Coordinator, Metrics | None]]:
    """The run of a file, the one that is not over or a new one, and its metrics if anybody may ask for them."""
    database = open_database(config)
    try:
        store = unfinished(database, config) or begin(database, config, os.urandom(16))
        sealed = store.roster(standing.sealed)
        roster = Roster.opened(sealed, identity.coordinator_key, name=f"the roster of {store.folder}")
        gone = {entry.site for entry in roster.entries} - {entry.site for entry in standing.roster.entries}
        identity = replace(identity, roster=roster)
        metrics = Metrics(store.run.hex()) if config.metrics else None
        heard = listening(config, identity, run=store.run.hex(), metrics=metrics)
        try:
            now = time.monotonic()
            yield Coordinator(config, identity, store=store, now=now, listener=heard, gone=gone), metrics
        finally:
            heard.close()
    finally:
        database.close()


@contextmanager
def only_one(state: Path) -> Iterator[None]:
    """Holds the state folder; raises RunError FS-1735 where another process does."""
    descriptor = os.open(state / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(
                "FS-1735",
                f"another aggregator uses {state}",
                expected="one `fedsecure serve` for each state folder",
                cure="stop the other one, or name another folder as `state`",
            ) from error
        yield
    finally:
        os.close(descriptor)


def _check_together(configs: Sequence[FederationConfig]) -> None:
    names = [config.name for config in configs]
    for what, values in (
        ("address", {config.listen for config in configs}),
        ("identity", {config.identity for config in configs}),
    ):
        if len(values) > 1:
            raise _apart(f"{len(values)} different values of {what}")
    if len(set(names)) != len(names):
        raise _apart(f"the names {names}")
    # Port 0 is a free one for each.
    ports = [config.metrics for config in configs if config.metrics and not config.metrics.endswith(":0")]
    if len(set(ports)) != len(ports):
        raise _apart(f"the metrics addresses {ports}")


def _apart(found: str) -> ConfigError:
    return ConfigError(
        "FS-1022",
        f"runs served together with {found}",
        expected="one `listen` and one `identity` for all of them, and a `name` and `metrics` of its own for each",
        cure="correct the files, or start an aggregator for each",
    )


__all__ = ["only_one", "serve"]
