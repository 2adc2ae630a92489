"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
Engine = Literal["auto", "opacus", "closed-form"]
LogFormat = Annotated[
    Literal["text", "json"],
    typer.Option(envvar="FEDSECURE_LOG_FORMAT", help="Of stderr: text for people, or JSON objects, one a line."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No live display: plain lines on stderr.")]
