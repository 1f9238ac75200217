"""Jobs, their attempts, and their history."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_counter = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _sums() -> list["sa.Column[int] | sa.Column[float]"]:
    return [
        sa.Column("train_tokens", sa.BigInteger, nullable=True),
        sa.Column("compute_flops", sa.Float(53), nullable=True),
        sa.Column("wall_seconds", sa.Float(53), nullable=True),
        sa.Column("energy_joules", sa.Float(53), nullable=True),
    ]


def upgrade() -> None:
    """Create the three tables."""
    _create_job()
    op.create_table(
        "attempt",
        sa.Column("job_id", sa.String(16), sa.ForeignKey("job.id"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("claimed_at", sa.Float(53), nullable=False),
        sa.Column("submitted_at", sa.Float(53), nullable=True),
        sa.Column("running_at", sa.Float(53), nullable=True),
        sa.Column("stopping_at", sa.Float(53), nullable=True),
        sa.Column("ended_at", sa.Float(53), nullable=True),
        sa.Column("outcome", sa.String(32), nullable=True),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("hint", sa.Text, nullable=False),
        sa.Column("checkpoint", sa.Text, nullable=True),
        sa.Column("progress", sa.JSON, nullable=True),
        sa.Column("record", sa.JSON, nullable=True),
        *_sums(),
        sa.Column("delivered", sa.Boolean, nullable=False),
    )
    op.create_index("attempt_delivery", "attempt", ["delivered"])
    op.create_table(
        "event",
        sa.Column("number", _counter, primary_key=True, autoincrement=True),
        sa.Column("job_id", sa.String(16), sa.ForeignKey("job.id"), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("at", sa.Float(53), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.String(32), nullable=True),
        sa.Column("message", sa.Text, nullable=False),
    )
    op.create_index("ix_event_job_id", "event", ["job_id"])


def _create_job() -> None:
    op.create_table(
        "job",
        sa.Column("order", _counter, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(16), nullable=False, unique=True),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("workload", sa.String(100), nullable=False),
        sa.Column("entry_point", sa.String(200), nullable=False),
        sa.Column("experiment", sa.String(200), nullable=False),
        sa.Column("config", sa.JSON, nullable=False),
        sa.Column("command", sa.JSON, nullable=False),
        sa.Column("tags", sa.JSON, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("retries", sa.Integer, nullable=False),
        sa.Column("retries_used", sa.Integer, nullable=False),
        sa.Column("after", sa.String(16), sa.ForeignKey("job.id"), nullable=True),
        sa.Column("max_flops", sa.Float(53), nullable=True),
        sa.Column("max_seconds", sa.Float(53), nullable=True),
        sa.Column("resume_from", sa.Text, nullable=True),
        sa.Column("parent", sa.String(16), sa.ForeignKey("job.id"), nullable=True),
        sa.Column("submitted_at", sa.Float(53), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.String(32), nullable=True),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("hint", sa.Text, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("stop_requested", sa.Boolean, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("changed_at", sa.Float(53), nullable=False),
        *_sums(),
    )
    op.create_index("ix_job_name", "job", ["name"])
    op.create_index("ix_job_after", "job", ["after"])
    op.create_index("job_queue", "job", ["state", "priority", "order"])


def downgrade() -> None:
    """Drop the three tables."""
    for table in ("event", "attempt", "job"):
        op.drop_table(table)
