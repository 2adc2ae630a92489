"""What every section of a configuration file is made of: frozen, without unknown keys, with names that print."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def printable(text: str) -> str:
    # Names travel to other people's terminals and reports.
    if not text.isprintable():
        raise ValueError("control characters are not allowed")
    return text


Label = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(printable)]
SiteId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def first_problem(error: ValidationError) -> str:
    """The first problem of a validation, in one line."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"]) or "the whole"
    more = f", and {error.error_count() - 1} more" if error.error_count() > 1 else ""
    return f"{key} = {str(first.get('input'))[:80]!r}: {first['msg']}{more}"
