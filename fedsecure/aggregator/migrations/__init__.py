"""Alembic's scripts: one file for each form that the aggregator's database has had."""
