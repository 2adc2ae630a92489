"""Alembic's entry point: runs the scripts on the connection that :mod:`fedsecure.aggregator.database` hands it."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
