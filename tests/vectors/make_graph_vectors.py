"""Writes the frozen vector of a round on a k-regular graph: ``python tests/vectors/make_graph_vectors.py``.

As ``make_vectors``, with the fewest sites that a sparse graph is allowed for and a degree that is forced, not searched
for. What the sites drew is there in full; of what follows from it, which is large, the digests.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import lru_cache
from typing import Any

from make_vectors import (
    FOLDER,
    Replay,
    as_json,
    descriptor_fields,
    dump,
    identity,
    make_roster,
    names,
    private_values,
)
from make_vectors import make_descriptor as make_complete

from fedsecure.secagg import transcript
from fedsecure.secagg.descriptor import HARARY, RoundDescriptor
from fedsecure.secagg.graph import Graph, ring_seed
from fedsecure.secagg.thresholds import MAX_SITES, Mode
from fedsecure.wire import secagg_pb2 as pb

# Sites, k, t, u_min, drop-outs of each phase.
GRAPHS: dict[str, tuple[int, int, int, int, dict[str, list[str]]]] = {
    "graph-n129-k8": (
        MAX_SITES + 1,
        8,
        4,
        123,
        {"advertise": ["site-007"], "shares": ["site-021"], "masked": ["site-040", "site-128"], "unmask": ["site-099"]},
    ),
}


def make_descriptor(name: str) -> RoundDescriptor:
    n, k, t, least, _ = GRAPHS[name]
    few = make_complete(3, Mode.HBC)
    return replace(
        few,
        roster_hash=make_roster(n).hash,
        cohort=names(n),
        threshold=t,
        min_survivors=least,
        colluders=1,
        graph=HARARY,
        neighbours=k,
    )


def digest(value: Any) -> str:
    """Of bytes, or of anything that JSON holds."""
    raw = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(raw).hexdigest()


@lru_cache
def build(name: str) -> dict[str, Any]:
    replay = Replay(name, make_descriptor(name), GRAPHS[name][-1]).run()
    result = replay.server.finish()
    d = replay.descriptor
    ads = {d.index(s): pb.ClientMessage.FromString(m).advertisement for s, m in replay.messages["advertise"].items()}
    t1 = transcript.advertisements_hash(d.ctx, ads)
    graph = Graph(tuple(sorted(ads)), d.neighbours, ring_seed(d.ctx, t1))
    messages = {
        phase: {site: digest(b"".join(m) if isinstance(m, tuple) else m) for site, m in sent.items()}
        for phase, sent in replay.messages.items()
    }
    uploads = {s: pb.ClientMessage.FromString(m[0]).masked_input for s, m in replay.messages["masked"].items()}
    return as_json(
        {
            "name": name,
            "drops": replay.drops,
            "descriptor": descriptor_fields(d),
            "canonical": d.canonical(),
            "ctx": d.ctx,
            "identity": identity(replay.n),
            "sites": private_values(replay),
            "t1": t1,
            "peers": {str(i): list(graph.peers(i)) for i in graph.members},
            "t2": digest({site: upload.headers_hash.hex() for site, upload in uploads.items()}),
            "messages": messages,
            "broadcasts": {phase: {s: digest(m) for s, m in sent.items()} for phase, sent in replay.broadcasts.items()},
            "result": result.result_message,
            "sum": [int(x) for x in result.total],
        }
    )


def main() -> None:
    for name in GRAPHS:
        (FOLDER / f"{name}.json").write_text(dump(build(name)))


if __name__ == "__main__":
    main()
