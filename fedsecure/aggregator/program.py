"""``fedsecure serve`` as a program: one run, from listening to the last goodbye. Never imports torch."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from fedsecure.aggregator.coordinator import Coordinator
from fedsecure.aggregator.metrics import Metrics
from fedsecure.aggregator.service import start
from fedsecure.config import FederationConfig
from fedsecure.errors import RunError
from fedsecure.files import make_folder, write_whole
from fedsecure.identity.provision import load_identity

Announce = Callable[[str, bytes], None]
Watch = Callable[[dict[str, Any]], None]


def serve(config: FederationConfig, *, announce: Announce, watch: Watch) -> dict[str, Any]:
    """Run one run to its end.

    Args:
        config: ``federation.toml``.
        announce: called once with the address listened on and the run's id.
        watch: called about four times a second with the coordinator's status.

    Returns:
        The run's summary: rounds, attempts with survivors and reasons, evaluations.

    Raises:
        RunError: FS-1701 not enough sites came, FS-1702 a round failed too often, FS-1712 stopped by a signal.
        EnvironmentProblem: FS-1801 the address cannot be listened on, FS-1802 the state folder cannot be written.
        IdentityError: the aggregator's identity folder is not in order.
    """
    return asyncio.run(_serve(config, announce, watch))


async def _serve(config: FederationConfig, announce: Announce, watch: Watch) -> dict[str, Any]:
    identity = load_identity(config.identity)
    make_folder(config.state)
    run = os.urandom(16)
    coordinator = Coordinator(config, identity, run=run, now=time.monotonic())
    metrics = Metrics(run.hex()) if config.metrics else None
    answering = metrics.serve(config.metrics) if metrics else None
    try:
        server, service, port = await start(coordinator, identity, config.listen)
    except BaseException:
        if answering:
            answering.close()
        raise
    address = f"{config.listen.rpartition(':')[0]}:{port}"
    write_whole(config.state / "address", address.encode())
    announce(address, run)

    def look() -> None:
        status = coordinator.status(time.monotonic())
        watch(status)
        if metrics:
            metrics.update(status, coordinator.attempts)

    async def show() -> None:
        while True:
            look()
            await asyncio.sleep(0.25)

    main, shown = asyncio.create_task(service.run()), asyncio.create_task(show())
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
            cure="start it again; the sites' charges stand",
        ) from None
    finally:
        shown.cancel()
        look()
        await server.stop(grace=0.5)
        if answering:
            answering.close()
    outcome = coordinator.outcome
    assert outcome is not None
    if not outcome["complete"]:
        raise coordinator.failure or AssertionError(outcome)
    return outcome
