"""Opening the job database: SQLite (WAL) or PostgreSQL, brought up to date by alembic when it is not.

An up-to-date database costs two small queries: alembic is imported only where a migration is due. What has to be
done once (SQLite's switch to its write-ahead log, which waits for nobody, and migrations) is done under a file
lock, so that any number of processes may open a new database at once.

Every error of the database leaves `reading` and `writing` as a ClusterError that says what to do.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError

from escala.contract.errors import ClusterError, SpecError, VersionError
from escala.contract.files import make_private, no_room, private_directory
from escala.jobs import tables
from escala.jobs.rows import dump_json, load_json
from escala.storage.locks import locked

log = logging.getLogger("escala.database")
HEAD = "0002"
"""The revision that this program reads and writes (the last file in migrations/versions)."""

BUSY_SECONDS = 30.0  # a writer waits this long for another one; transactions here take milliseconds
BUSY_TRIES = 4  # and then so often again: SQLite does not always wait
MIGRATION_LOCK = 0x65736361  # "esca": PostgreSQL's advisory lock for migrations
_REVISION_TABLE = "alembic_version"


def open_engine(url: str, home: Path | None = None) -> Engine:
    """An engine on `url` (sqlite:///PATH or postgresql://...), its tables up to date.

    Args:
        home: whose jobs it holds; None: for SQLite, the directory that the database is in.

    Raises SpecError for an address that cannot be used, ClusterError for a database that does not answer, is
    damaged, or has no jobs although HOME/jobs has some; VersionError for one that a newer escala has written.
    """
    address = _parse(url)
    sqlite_file = Path(address.database or "") if address.get_backend_name() == "sqlite" else None
    home = home or (sqlite_file.parent if sqlite_file else None)
    if sqlite_file is not None and _is_empty(
        sqlite_file
    ):  # before one is made, which a backup would have to replace
        _refuse_an_orphaned_home(home, str(sqlite_file))
    engine = _postgresql(address) if sqlite_file is None else _sqlite(address, sqlite_file)
    try:
        with _explained(engine):
            _bring_up_to_date(engine, sqlite_file)
            with reading(engine) as connection:
                empty = connection.execute(text("SELECT 1 FROM job LIMIT 1")).first() is None
        if empty:
            _refuse_an_orphaned_home(home, _shown(engine))
    except BaseException:
        engine.dispose()
        raise
    return engine


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that will write. SQLite takes its write lock at once: upgrading a read lock may fail.

    Raises ClusterError for what the database says.
    """
    with _explained(engine), _begun(engine, writes=True) as connection:
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A transaction that only reads. Raises ClusterError for what the database says."""
    with _explained(engine), _begun(engine, writes=False) as connection:
        yield connection


@contextmanager
def _begun(engine: Engine, writes: bool) -> Iterator[Connection]:
    """A connection in a transaction: committed after the block, rolled back where that raises."""
    with _begin(engine, writes) as connection:
        yield connection
        connection.commit()


def _begin(engine: Engine, writes: bool) -> Connection:
    """Begin a transaction; where others keep SQLite's lock it is tried again."""
    for left in reversed(range(BUSY_TRIES)):
        connection = engine.connect().execution_options(escala_writes=writes)
        try:
            connection.begin()
            return connection
        except OperationalError as error:
            connection.close()
            if not left or "locked" not in str(error):
                raise
            time.sleep(0.05 * (1 + os.getpid() % 10))  # not all at the same moment
    raise AssertionError("the last try returns or raises")


# What an error means


@contextmanager
def _explained(engine: Engine) -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, UnicodeEncodeError) as error:
        raise _explain(error, _shown(engine), _file(engine)) from error


def _explain(error: Exception, shown: str, file: Path | None) -> ClusterError | SpecError:
    if isinstance(error, UnicodeEncodeError):
        return SpecError(f"{error.object!r:.100} is not valid Unicode text", "write names and paths as UTF-8")
    original = getattr(error, "orig", None) or error
    said = next(iter(str(original).splitlines()), "") or type(original).__name__
    what, hint = (
        f"cannot be used: {said}",
        "check ESCALA_DATABASE_URL, and that the database is up and writable",
    )
    if no_room(error) or no_room(original):
        what, hint = "cannot be written: there is no room on its disk", "free some space, then try again"
    elif "locked" in said:
        what = "is busy: another process has held its lock for too long"
        hint = "try again; `fuser FILE` shows who has the database open"
    elif "readonly" in said or "read-only" in said:
        what, hint = "cannot be written: it is read-only for this user", _owner_hint(file)
    elif "unable to open" in said:
        what, hint = "cannot be opened", _owner_hint(file)
    elif any(words in said for words in ("malformed", "not a database", "disk I/O", "encrypted")):
        what = f"is damaged or no SQLite database ({said})"
        hint = "restore it from a backup; or move it away with HOME/jobs, and a new queue is started"
    elif "no such table" in said or "no such column" in said or "UndefinedTable" in type(original).__name__:
        what = f"has not the tables that it should have ({said})"
        hint = "restore it from a backup; or move it away with HOME/jobs, and a new queue is started"
    return ClusterError(f"the job database {shown} {what}", hint)


def _owner_hint(file: Path | None) -> str:
    if file is None:
        return "check ESCALA_DATABASE_URL"
    if os.path.isdir(file):  # of a path that we may not see, no error but False
        return f"{file} is a directory: set ESCALA_DATABASE_URL to a file"
    return f"make {file} and its directory writable for this user, or set ESCALA_HOME to a home of your own"


def _shown(engine: Engine) -> str:
    return engine.url.set(query={}).render_as_string(hide_password=True)


def _file(engine: Engine) -> Path | None:
    return Path(engine.url.database or "") if engine.dialect.name == "sqlite" else None


def _is_empty(file: Path) -> bool:
    try:
        return file.stat().st_size == 0
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _refuse_an_orphaned_home(home: Path | None, shown: str) -> None:
    """A queue without jobs beside directories of jobs is not a new one: its database is lost."""
    if home is None:
        return
    with suppress(OSError):
        for directory in (home / "jobs").iterdir():
            if tables.JOB_ID.fullmatch(directory.name) and directory.is_dir():
                raise ClusterError(
                    f"the job database {shown} has no job, but {home / 'jobs'} has directories of jobs "
                    f"({directory.name}, ...): the database was lost or replaced",
                    "restore it from a backup, its -wal file too; or start a new queue: "
                    f"mv {home / 'jobs'} {home / 'jobs.old'}",
                )


# Opening


def _parse(url: str) -> URL:
    hint = "use sqlite:///PATH or postgresql://USER:PASSWORD@HOST/DATABASE"
    if url.startswith("sqlite:///"):  # a path, whatever is in it: ?, # and % mean nothing there
        address = URL.create("sqlite", database=url.removeprefix("sqlite:///"))
    else:
        address = _network(url, hint)
    if address.get_backend_name() not in ("sqlite", "postgresql"):
        raise SpecError(f"the job database cannot be {address.get_backend_name()}", hint)
    if address.get_backend_name() == "sqlite" and address.database in (None, "", ":memory:"):
        raise SpecError("the job database must be a file: several processes share it", hint)
    return address


def _network(url: str, hint: str) -> URL:
    try:
        return make_url(url)
    except (ArgumentError, ValueError):  # ValueError: a port that is no number
        # the address may hold a password: it is not shown
        raise SpecError("the job database's address is not a URL", hint) from None


def _sqlite(address: URL, file: Path) -> Engine:
    """Raises ClusterError where the file cannot be made."""
    try:
        private_directory(file.parent)
        if not file.is_file():
            if file.exists():
                raise FileExistsError(f"{file} is no regular file")
            os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        make_private(file)  # its log and index follow it
    except OSError as error:
        why = "there is no room on its disk" if no_room(error) else error.strerror or str(error)
        raise ClusterError(f"the job database {file} cannot be made: {why}", _owner_hint(file)) from error
    options = {"json_serializer": dump_json, "json_deserializer": load_json}
    engine = create_engine(address, connect_args={"timeout": BUSY_SECONDS}, **options)

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # we begin transactions ourselves, below
        connection.text_factory = lambda value: value.decode(errors="replace")  # one bad row stops no listing
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("escala_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
        if not writes:  # takes the read lock now, where it can be tried again
            connection.exec_driver_sql("SELECT 1 FROM sqlite_master LIMIT 1").close()

    return engine


def _postgresql(address: URL) -> Engine:
    options = {"json_serializer": dump_json, "json_deserializer": load_json}
    try:
        return create_engine(address.set(drivername="postgresql+psycopg"), pool_pre_ping=True, **options)
    except ModuleNotFoundError as error:
        raise SpecError("PostgreSQL needs psycopg", "pip install 'escala[postgres]'") from error


def _bring_up_to_date(engine: Engine, sqlite_file: Path | None) -> None:
    if sqlite_file is None:
        if _revision(engine) != HEAD:
            _upgrade(engine)
        return
    if _revision(engine) == HEAD and (_journal(engine) == "wal" or not os.access(sqlite_file, os.W_OK)):
        return
    with _only_here(sqlite_file):
        if _journal(engine) != "wal":
            _journal(engine, "=WAL")
        if _revision(engine) != HEAD:
            _upgrade(engine)


@contextmanager
def _only_here(file: Path) -> Iterator[None]:
    """Hold FILE.lock: what is done once, one process does while the others wait."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(Path(f"{file}.lock")))
        except OSError as error:
            raise ClusterError(
                f"the job database {file} cannot be locked: {error}", _owner_hint(file)
            ) from error
        yield


def _journal(engine: Engine, switch: str = "") -> str:
    """How the SQLite file keeps its journal. Switching it waits for nobody: it is tried until it is done."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                driver: Any = connection.connection.driver_connection
                return str(driver.execute(f"PRAGMA journal_mode{switch}").fetchone()[0])
        except (OperationalError, sqlite3.OperationalError) as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _revision(engine: Engine) -> str | None:
    """The database's revision; None where there is none."""
    try:
        with _begun(engine, writes=False) as connection:
            return connection.execute(text(f"SELECT version_num FROM {_REVISION_TABLE}")).scalar() or None
    except SQLAlchemyError as error:  # SQLite's and PostgreSQL's "no such table"
        if _REVISION_TABLE in str(getattr(error, "orig", "")):
            return None
        raise


def _upgrade(engine: Engine) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    with _begun(engine, writes=True) as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
        _restore_revision(connection)
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise VersionError(
                f"the job database was written by another version of escala: {error}",
                "use the escala that wrote it, or a newer one",
            ) from error


def _restore_revision(connection: Connection) -> None:
    """Where the tables are those of HEAD and only the revision is lost, note it again. Raises ClusterError where
    they are others: nobody could tell what a migration would do to them.
    """
    found = inspect(connection)
    there = set(found.get_table_names())
    noted = text(f"SELECT 1 FROM {_REVISION_TABLE} WHERE version_num <> ''")
    if _REVISION_TABLE in there and connection.execute(noted).first():
        return
    known = there & set(tables.metadata.tables)
    if not known:
        return
    for name, table in tables.metadata.tables.items():
        columns = {column["name"] for column in found.get_columns(name)} if name in there else set()
        missing = {column.name for column in table.columns} - columns
        if missing:
            lacks = (
                f"no table {name}" if not columns else f"no {', '.join(sorted(missing))} in its table {name}"
            )
            raise ClusterError(
                f"the job database {_shown(connection.engine)} says no revision, and has {lacks}",
                "restore it from a backup; or move it away with HOME/jobs, and a new queue is started",
            )
    log.warning(
        "the job database had lost its revision; its tables are those of %s, which is noted again", HEAD
    )
    column = "version_num VARCHAR(32) NOT NULL PRIMARY KEY"
    connection.execute(text(f"CREATE TABLE IF NOT EXISTS {_REVISION_TABLE} ({column})"))
    connection.execute(text(f"DELETE FROM {_REVISION_TABLE}"))
    connection.execute(text(f"INSERT INTO {_REVISION_TABLE} VALUES (:head)"), {"head": HEAD})
