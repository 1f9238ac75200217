"""Opening the job database: SQLite (WAL) or PostgreSQL, brought up to date by alembic when it is not.

An up-to-date database costs one small query: alembic is imported only where a migration is due. Two processes
may open a new database at once: the second waits for the first one's transaction, then finds nothing to do.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError, ProgrammingError

from escala.errors import ClusterError, SpecError, VersionError

HEAD = "0002"
"""The revision that this program reads and writes (the last file in migrations/versions)."""

BUSY_SECONDS = 30  # a writer waits this long for another one; transactions here take milliseconds
MIGRATION_LOCK = 0x65736361  # "esca": PostgreSQL's advisory lock for migrations


def open_engine(url: str) -> Engine:
    """An engine on `url` (sqlite:///PATH or postgresql://...), its tables up to date.

    Raises SpecError for an address that cannot be used, ClusterError for a database that does not answer,
    VersionError for one that a newer escala has written.
    """
    address = _parse(url)
    engine = _sqlite(address) if address.get_backend_name() == "sqlite" else _postgresql(address)
    try:
        if _revision(engine) != HEAD:
            _upgrade(engine)
    except (DatabaseError, sqlite3.Error) as error:
        engine.dispose()
        shown = address.render_as_string(hide_password=True)
        raise ClusterError(
            f"the job database {shown} cannot be used: {str(error).splitlines()[0]}",
            "check ESCALA_DATABASE_URL, and that the database is up and writable",
        ) from error
    return engine


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that will write. SQLite takes its write lock at once: upgrading a read lock may fail."""
    with engine.connect().execution_options(escala_writes=True) as connection, connection.begin():
        yield connection


def _parse(url: str) -> URL:
    hint = "use sqlite:///PATH or postgresql://USER:PASSWORD@HOST/DATABASE"
    try:
        address = make_url(url)
    except ArgumentError:
        # the address may hold a password: it is not shown
        raise SpecError("the job database's address is not a URL", hint) from None
    if address.get_backend_name() not in ("sqlite", "postgresql"):
        raise SpecError(f"the job database cannot be {address.get_backend_name()}", hint)
    if address.get_backend_name() == "sqlite" and address.database in (None, "", ":memory:"):
        raise SpecError("the job database must be a file: several processes share it", hint)
    return address


def _sqlite(address: URL) -> Engine:
    Path(address.database or "").parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(address, connect_args={"timeout": BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # we begin transactions ourselves, below
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("escala_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgresql(address: URL) -> Engine:
    try:
        return create_engine(address.set(drivername="postgresql+psycopg"), pool_pre_ping=True)
    except ModuleNotFoundError as error:
        raise SpecError("PostgreSQL needs psycopg", "pip install 'escala[postgres]'") from error


def _revision(engine: Engine) -> str | None:
    """The database's revision; None where there is none yet."""
    try:
        with engine.connect() as connection:
            return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    except (OperationalError, ProgrammingError) as error:  # SQLite's and PostgreSQL's "no such table"
        if "alembic_version" in str(error.orig):
            return None
        raise


def _upgrade(engine: Engine) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    with writing(engine) as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise VersionError(
                f"the job database was written by another version of escala: {error}",
                "use the escala that wrote it, or a newer one",
            ) from error
