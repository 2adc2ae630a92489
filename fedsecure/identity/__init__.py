"""Who is who: long-term keys, TLS certificates, and the roster that the coordinator signs (secagg.md §3)."""
