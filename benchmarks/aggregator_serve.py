"""``fedsecure serve`` for more sites than a run may have, as the process that the load benchmark measures.

A run has at most 128 sites, each of which masks with all others; the k-regular graph for more of them stands in the
protocol, safe against an honest-but-curious aggregator only, and no setting turns it on. Here the settings take up to
10 000 sites and the mode of the protocol is the weaker one; all else is the released program: service, coordinator,
sessions, rounds, files. Never serve with it.

    python -m benchmarks.aggregator_serve FEDERATION_TOML
"""

from __future__ import annotations

import functools
import sys

from annotated_types import MaxLen

from fedsecure.aggregator import account
from fedsecure.aggregator.program import serve
from fedsecure.aggregator.states import FOLLOWING, RunState
from fedsecure.config import FederationConfig, RunSettings, load
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.thresholds import MAX_GRAPH_SITES, Mode, Thresholds


def allow_many() -> None:
    """In this process: up to 10 000 sites, and the mode in which a sparse graph is safe."""
    for model in (RunSettings, FederationConfig):
        field = model.model_fields["sites"]
        field.metadata = [MaxLen(MAX_GRAPH_SITES) if isinstance(rule, MaxLen) else rule for rule in field.metadata]
        model.model_rebuild(force=True)
    # Nobody signs the survivor set in that mode.
    following = {**FOLLOWING, RunState.MASKED: FOLLOWING[RunState.MASKED] | {RunState.UNMASK}}
    account.FOLLOWING = following  # type: ignore[attr-defined]
    choose, from_query = Thresholds.choose, RoundDescriptor.from_query
    Thresholds.choose = staticmethod(functools.partial(choose, mode=Mode.HBC))  # type: ignore[method-assign]
    RoundDescriptor.from_query = staticmethod(functools.partial(from_query, mode=Mode.HBC))  # type: ignore[method-assign]


def main(arguments: list[str]) -> None:
    allow_many()
    serve([load(arguments[0], FederationConfig)], announce=lambda address, run: None, watch=lambda status: None)


if __name__ == "__main__":
    main(sys.argv[1:])
