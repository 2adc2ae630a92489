"""A whole federation in one process: the coordinator, clients, secure aggregation and ledgers of a deployment.

Only the transport is the in-memory twin, and where a seed is given the noise comes from it, so that a run can be
repeated; its reports then say that they protect nobody.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from fedsecure.aggregator.coordinator import Coordinator
from fedsecure.aggregator.database import Database
from fedsecure.aggregator.store import begin
from fedsecure.client import Client, Moment
from fedsecure.config import FederationConfig, SiteConfig
from fedsecure.errors import RunError
from fedsecure.extras import require
from fedsecure.files import make_folder
from fedsecure.identity.provision import load_identity
from fedsecure.learning.encoding import Encoded
from fedsecure.transport.memory import MemoryTransport
from fedsecure.wire import federation_pb2 as pb

Watch = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class MemoryRun:
    """What a run left behind: each site's privacy report and traffic, and how long it took.

    Attributes:
        reports: site → privacy report.
        bytes_up: site → bytes it sent.
        wall_seconds: from the first join to the last report.
    """

    reports: Mapping[str, Mapping[str, Any]]
    bytes_up: Mapping[str, int]
    wall_seconds: float


class _Leash(MemoryTransport):
    """Lets go of a site whose run has failed elsewhere, so that nobody waits for it."""

    def __init__(self, core: Coordinator, site: str, gate: threading.Condition, failed: threading.Event) -> None:
        super().__init__(core, site, gate)
        self._coordinator = core
        self._failed = failed

    def next(self, request: pb.NextRequest) -> pb.Directive:
        failure = self._coordinator.failure
        # Where an aggregator cannot go on, sites wait for its next process.
        if self._failed.is_set() or (failure is not None and not failure.final):
            raise RunError(
                "FS-1709",
                f"the simulated run was given up{'' if failure is None else f': {failure}'}",
                expected="a run that completes",
                cure="see the error it ended with",
            )
        return super().next(request)


def run_in_memory(
    config: FederationConfig,
    sites: Mapping[str, SiteConfig],
    *,
    seed: int | None,
    watch: Watch,
    encoding: Callable[[Encoded], None] = lambda _: None,
) -> MemoryRun:
    """One run from the first join to the last report, a thread for each site.

    Args:
        config: as ``federation.toml``; its address is not used.
        sites: each site's ``site.toml``.
        seed: of all noise; ``None`` draws it from the operating system.
        watch: called with (round, rounds) from a site's thread.
        encoding: called from there now and then while the site encodes images.

    Raises:
        FedsecureError: the first that a site or the coordinator ended with.
    """
    database = Database("", make_folder(config.state))
    store = begin(database, config, os.urandom(16))
    coordinator = Coordinator(config, load_identity(config.identity), store=store, now=time.monotonic())
    gate, failed = threading.Condition(), threading.Event()
    reports: dict[str, Mapping[str, Any]] = {}
    traffic: dict[str, int] = {}
    errors: list[BaseException] = []
    first = min(sites)

    def show(moment: Moment) -> None:
        if moment.rounds:
            watch(moment.round, moment.rounds)
        elif (far := Encoded.read(moment.what)) is not None:
            encoding(far)

    def take_part(site: str) -> None:
        transport = _Leash(coordinator, site, gate, failed)
        try:
            with Client(
                sites[site],
                transport=transport,
                simulation_seed=seed,
                progress=show if site == first else None,
            ) as client:
                client.run()
                reports[site] = client.privacy_report()
            traffic[site] = transport.bytes_up
        except BaseException as error:
            errors.append(error)
            failed.set()

    # They read signatures with `ast` while they are imported, which two threads cannot do at once (data.features);
    # NumPy's masked arrays come with the first `numpy.unique`.
    modules = ["torch"]
    if config.encoder.model != "features":
        modules += ["open_clip", "opacus"]
    elif any(site.engine == "opacus" for site in sites.values()):
        modules += ["opacus"]
    require(*modules)
    for module in ("numpy.ma", *modules):
        import_module(module)
    begun = time.monotonic()
    threads = [threading.Thread(target=take_part, args=(site,), name=site, daemon=True) for site in sorted(sites)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        failed.set()
    if errors:
        raise errors[0]
    return MemoryRun(reports=reports, bytes_up=traffic, wall_seconds=time.monotonic() - begun)
