"""Whoever imports gRPC first: an aggregator's port speaks TLS 1.3 alone, or is not opened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = "ECDHE-RSA-AES256-GCM-SHA384"
OFFERS = """
import sys
{first}
from fedsecure.errors import TransportError
from fedsecure.identity.provision import load_identity, provision
from pathlib import Path
import fedsecure.aggregator.service
from fedsecure.transport import tls
home = Path(sys.argv[1])
made = provision(home, federation="x", sites={{"site-1": "train"}}, hosts=("localhost",))
identity = load_identity(home / "aggregator" / "identity")
for credentials in (tls.server_credentials, tls.one_sided_credentials):
    try:
        credentials(identity)
        print("opened")
    except TransportError as error:
        print(error.code)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "answers"),
    [
        ("", ["opened"] * 2),
        ("import fedsecure, fedsecure.aggregator.health", ["opened"] * 2),
        ("import grpc", ["FS-1537"] * 2),
        ("from fedsecure.wire import federation_pb2_grpc", ["FS-1537"] * 2),
        (
            "import os; os.environ['GRPC_SSL_CIPHER_SUITES'] = 'ECDHE-RSA-AES256-GCM-SHA384'; import grpc",
            ["opened"] * 2,
        ),
    ],
)
def test_a_port_that_would_take_tls_12_is_not_opened(tmp_path: Path, first: str, answers: list[str]) -> None:
    home = tmp_path / "federation"
    # This process may have imported it, and told gRPC.
    environ = {name: value for name, value in os.environ.items() if name != "GRPC_SSL_CIPHER_SUITES"}
    command = [sys.executable, "-c", OFFERS.format(first=first), str(home)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ)
    assert done.stdout.split() == answers, done.stderr
