"""What the aggregator says when a run ends, as a site may keep, show and report it: known fields, types and lengths.

The summary is the aggregator's word. It decides nothing at a site; damaged or hostile text must not break the report.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fedsecure.errors import ProtocolError
from fedsecure.transport.status import printable

_Text = Annotated[str, AfterValidator(printable)]
_Count = Annotated[int, Field(ge=0, lt=1 << 63)]
_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class _Attempt(_Part):
    round: _Count
    attempt: _Count
    stage: _Text
    method: _Text = ""
    cohort: list[_Text]
    context: _Text = ""
    seconds: _Number = 0.0
    survivors: list[_Text] = []
    aborted: _Text = ""
    code: _Text = ""


class _Counts(_Part):
    hits: list[_Number]
    totals: list[_Number]
    accuracy: _Number | None = None
    balanced_accuracy: _Number | None = None


class _Summary(_Part):
    complete: bool = False
    code: _Text = ""
    error: _Text = ""
    run: _Text = ""
    federation: _Text = ""
    method: _Text = ""
    rounds: _Count = 0
    attempts: Annotated[list[_Attempt], Field(max_length=1_000_000)] = []
    evaluations: dict[Literal["before", "after"], _Counts] = {}


def read_summary(text: str) -> dict[str, Any]:
    """The summary of ``Finished.summary_json``: fields that are not there stay away, unknown ones are dropped.

    Raises:
        ProtocolError: FS-1376, it is not a summary.
    """
    try:
        return _Summary.model_validate_json(text).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise ProtocolError(
            "FS-1376",
            f"the aggregator's summary of the run cannot be read ({error.error_count()} problem(s))",
            expected="the summary of this release",
            cure="install the same fedsecure release on both sides",
        ) from error
