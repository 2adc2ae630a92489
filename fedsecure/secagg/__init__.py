"""Secure aggregation "fedsecure/secagg/v1": pure state machines, bytes in and bytes out (secagg.md §3)."""
