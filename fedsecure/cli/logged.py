"""What ``serve`` and ``join`` say where stderr is read by machines: JSON lines in place of a live display."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from fedsecure.errors import FedsecureError, exit_status

if TYPE_CHECKING:
    from fedsecure.client import Moment

log = logging.getLogger("fedsecure.cli")


@contextmanager
def serve_lines() -> Iterator[tuple[Callable[[str, bytes], None], Callable[[Mapping[str, Any]], None]]]:
    """As :func:`~fedsecure.cli.progress.serve_progress`: a line for the address, and one for each new stage."""
    said = ""

    def announce(address: str, run: bytes) -> None:
        log.info("listening on %s", address, extra={"run": run.hex(), "event": "listening"})

    def watch(status: Mapping[str, Any]) -> None:
        nonlocal said
        if (stage := str(status["stage"])) != said:
            said = stage
            log.info("%s: %s", stage, str(status["waiting"]), extra={"run": status["run"], "stage": stage})

    with _as_lines():
        yield announce, watch


@contextmanager
def join_lines() -> Iterator[Callable[[Moment], None]]:
    """As :func:`~fedsecure.cli.progress.join_progress`: a line for each new round or reason."""
    said: tuple[str, int] | None = None

    def watch(moment: Moment) -> None:
        nonlocal said
        if (moment.what, moment.round) != said:
            said = moment.what, moment.round
            log.info("%s", moment.what)

    with _as_lines():
        yield watch


@contextmanager
def _as_lines() -> Iterator[None]:
    """An error that ends the command is a line too."""
    try:
        yield
    except FedsecureError as error:
        log.error("%s", error, extra={"code": error.code})
        raise typer.Exit(exit_status(error)) from None
