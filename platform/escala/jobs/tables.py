"""The job database's tables (SQLAlchemy Core). `migrations/` creates them; a contract test compares the two.

job: what was asked for and where it stands. attempt: one start of a job. event: history, only ever appended.
Times are Unix seconds. `revision` counts a job's writes: every change is a compare-and-set on it.
"""

from __future__ import annotations

import re

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData()
JOB_ID = re.compile("[0-9a-z]{1,16}")  # also the name of a directory: no separators
_Counter = BigInteger().with_variant(Integer(), "sqlite")  # SQLite counts only an INTEGER key by itself

job = Table(
    "job",
    metadata,
    Column("order", _Counter, primary_key=True, autoincrement=True),  # submit order: first in, first out
    Column("id", String(16), nullable=False, unique=True),
    Column("name", String(100), nullable=False, index=True),
    Column("workload", String(100), nullable=False),
    Column("entry_point", String(200), nullable=False),
    Column("experiment", String(200), nullable=False),
    Column("config", JSON, nullable=False),
    Column("command", JSON, nullable=False),  # as typed, a list of words
    Column("tags", JSON, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("retries", Integer, nullable=False),
    Column("retries_used", Integer, nullable=False),
    Column("after", String(16), ForeignKey("job.id"), nullable=True, index=True),
    Column("max_flops", Float(53), nullable=True),
    Column("max_seconds", Float(53), nullable=True),
    Column("resume_from", Text, nullable=True),
    Column("parent", String(16), ForeignKey("job.id"), nullable=True),
    Column("submitted_at", Float(53), nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", String(32), nullable=True),
    Column("message", Text, nullable=False),
    Column("hint", Text, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("stop_requested", Boolean, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("changed_at", Float(53), nullable=False),
    Column("train_tokens", BigInteger, nullable=True),  # sums over the attempts (records.Totals)
    Column("compute_flops", Float(53), nullable=True),
    Column("wall_seconds", Float(53), nullable=True),
    Column("energy_joules", Float(53), nullable=True),
    Column("idempotency_key", String(200), nullable=True, unique=True, index=True),
    Column("spec_hash", String(64), nullable=True),  # identity.spec_hash
    Index("job_queue", "state", "priority", "order"),
)

attempt = Table(
    "attempt",
    metadata,
    Column("job_id", String(16), ForeignKey("job.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("claimed_at", Float(53), nullable=False),
    Column("submitted_at", Float(53), nullable=True),  # the backend has it
    Column("running_at", Float(53), nullable=True),
    Column("stopping_at", Float(53), nullable=True),
    Column("ended_at", Float(53), nullable=True),
    Column("outcome", String(32), nullable=True),
    Column("message", Text, nullable=False),
    Column("hint", Text, nullable=False),
    Column("checkpoint", Text, nullable=True),
    Column("progress", JSON(none_as_null=True), nullable=True),  # records.Progress
    Column("record", JSON(none_as_null=True), nullable=True),  # records.RunRecord
    Column("train_tokens", BigInteger, nullable=True),  # by this attempt alone
    Column("compute_flops", Float(53), nullable=True),
    Column("wall_seconds", Float(53), nullable=True),
    Column("energy_joules", Float(53), nullable=True),
    Column("delivered", Boolean, nullable=False),  # all of its tracking has reached the tracker
    Index("attempt_delivery", "delivered"),
)

event = Table(
    "event",
    metadata,
    Column("number", _Counter, primary_key=True, autoincrement=True),
    Column("job_id", String(16), ForeignKey("job.id"), nullable=False, index=True),
    Column("attempt", Integer, nullable=False),
    Column("at", Float(53), nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", String(32), nullable=True),
    Column("message", Text, nullable=False),
)
