"""The key under which a job was submitted, and the hash of what was asked for with it."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the two columns; jobs from before have neither."""
    op.add_column("job", sa.Column("idempotency_key", sa.String(200), nullable=True))
    op.add_column("job", sa.Column("spec_hash", sa.String(64), nullable=True))
    op.create_index("ix_job_idempotency_key", "job", ["idempotency_key"], unique=True)


def downgrade() -> None:
    """Drop them."""
    op.drop_index("ix_job_idempotency_key", "job")
    op.drop_column("job", "spec_hash")
    op.drop_column("job", "idempotency_key")
