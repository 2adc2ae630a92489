"""The signed roster that a run began with, kept in the run's folder.

Keys and contexts of a run are those of one roster. A site that takes up a newer one meanwhile, as a renewal brings it,
and then starts again goes on with the run by the roster kept here; new runs begin with the newest.
"""

from __future__ import annotations

import logging
from pathlib import Path

from fedsecure.errors import IdentityError
from fedsecure.files import write_whole
from fedsecure.identity import keys
from fedsecure.identity.provision import Identity
from fedsecure.identity.roster import Roster

log = logging.getLogger("fedsecure.client")

FILE = "roster.json"
# A run's end leaves its report there.
_OVER = "privacy-report.json"
_MOST = 16


def keep(run: Path, identity: Identity, *, folder: Path) -> None:
    """Keep the roster in force in the run's folder, where none is kept yet.

    Args:
        run: the run's folder at this site.
        identity: of this site, with the roster that the run was joined with.
        folder: its identity folder, whose file has the coordinator's signature.
    """
    if (run / FILE).exists():
        return
    try:
        sealed = keys.read(folder / FILE)
        current = Roster.opened(sealed, identity.coordinator_key)
    except IdentityError as error:
        log.warning("the run's roster is not kept: %s", error)
        return
    # The folder may have changed over since this process began.
    if current.hash == identity.roster.hash:
        write_whole(run / FILE, sealed, mode=0o644)


def kept(runs: Path, identity: Identity) -> list[tuple[Roster, set[bytes]]]:
    """Rosters of the runs that are not over here, the latest first, each with its runs; what is no roster of the
    coordinator's is passed over."""
    files = [file for file in runs.glob(f"*/{FILE}") if not (file.parent / _OVER).exists()]
    found: dict[bytes, tuple[Roster, set[bytes]]] = {}
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)[:_MOST]:
        try:
            run, roster = bytes.fromhex(file.parent.name), Roster.load(file, identity.coordinator_key)
        except (ValueError, IdentityError) as error:
            log.warning("%s is passed over: %s", file, error)
            continue
        if roster.federation == identity.roster.federation and roster.hash != identity.roster.hash:
            found.setdefault(roster.hash, (roster, set()))[1].add(run)
    return list(found.values())


__all__ = ["FILE", "keep", "kept"]
