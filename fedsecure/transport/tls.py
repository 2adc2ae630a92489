"""Mutual TLS 1.3 for gRPC. Import this module, never ``grpc`` before it.

gRPC cannot set a minimum TLS version. Its cipher list governs TLS 1.2 only; the one suite named here needs an RSA key,
and the federation has none (TLS keys are ECDSA), so that no TLS 1.2 handshake can succeed.
"""

from __future__ import annotations

import os
import sys

# gRPC reads them once, when it is imported.
_SUITES = "GRPC_SSL_CIPHER_SUITES", "ECDHE-RSA-AES256-GCM-SHA384"
_TOO_LATE = "grpc" in sys.modules and os.environ.get(_SUITES[0]) != _SUITES[1]
os.environ[_SUITES[0]] = _SUITES[1]
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc as grpc

from fedsecure.errors import TransportError
from fedsecure.identity.provision import Identity

LIMITS = [("grpc.max_receive_message_length", 8 << 20), ("grpc.max_send_message_length", 8 << 20)]
KEEPALIVE = [
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]
# For strangers and for each connection, before anything is known of the caller. A handshake that is not done within ten
# seconds ends, so that half-open connections hold a descriptor each and no longer; a site has one connection and some
# calls on it.
SERVER_LIMITS = [
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_concurrent_streams", 32),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.absolute_max_metadata_size", 16 << 10),
    ("grpc.http2.max_ping_strikes", 2),
    ("grpc.so_reuseport", 0),
]


def server_credentials(identity: Identity) -> grpc.ServerCredentials:
    """Demands and checks a client certificate of the federation's CA; TransportError FS-1537 without TLS 1.3 alone."""
    _require_suites()
    return grpc.ssl_server_credentials(
        [(identity.tls_key, identity.certificate)],
        root_certificates=identity.ca,
        require_client_auth=True,
    )


def channel_credentials(identity: Identity) -> grpc.ChannelCredentials:
    """Presents the site's certificate; trusts the federation's CA and nothing else."""
    return grpc.ssl_channel_credentials(
        root_certificates=identity.ca, private_key=identity.tls_key, certificate_chain=identity.certificate
    )


def one_sided_credentials(identity: Identity) -> grpc.ServerCredentials:
    """For callers who have no certificate yet: shows the aggregator's, and asks for none; raises as the other."""
    _require_suites()
    return grpc.ssl_server_credentials([(identity.tls_key, identity.certificate)])


def stranger_credentials(ca: bytes) -> grpc.ChannelCredentials:
    """Presents nothing; trusts the CA (PEM) that an invitation pins and nothing else."""
    return grpc.ssl_channel_credentials(root_certificates=ca)


def _require_suites() -> None:
    if _TOO_LATE:
        raise TransportError(
            "FS-1537",
            "grpc was imported in this process before it could be told to speak TLS 1.3 alone",
            expected="fedsecure.transport.tls before any other import of grpc",
            cure=f"import it first, or start the process with {'='.join(_SUITES)}",
        )
