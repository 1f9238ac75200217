"""Alembic's entry: runs in the transaction that `database._upgrade` has opened and locked."""

from alembic import context

from escala.jobs.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
