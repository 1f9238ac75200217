"""A real PostgreSQL for the contract tests: its own temporary cluster, on a Unix socket."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest


def _binaries() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


def _run(*command: str | Path) -> None:
    """Run as the postgres user where we are root: initdb and postgres refuse root."""
    words = [str(c) for c in command]
    prefix = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*prefix, *words], cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stdout}")


@pytest.fixture(scope="session")
def postgresql_socket() -> Iterator[Path]:
    """The socket directory of a PostgreSQL that lives for the session."""
    binaries = _binaries()
    if binaries is None:
        reason = "no PostgreSQL on this machine (Debian: apt-get install postgresql)"
        if os.environ.get("CI"):  # there nobody would read that it was skipped
            pytest.fail(reason)
        pytest.skip(reason)
    base = Path(
        tempfile.mkdtemp(prefix="escala-pg-", dir="/tmp")
    )  # a socket's path is at most 107 bytes long
    if os.geteuid() == 0:
        shutil.chown(base, "postgres", "postgres")
    data, log = base / "data", base / "log"
    try:
        _run(binaries / "initdb", "-D", data, "-U", "escala", "-A", "trust", "--no-sync", "-E", "UTF8")
        options = f"-c listen_addresses= -c unix_socket_directories={base} -c fsync=off -c max_connections=40"
        _run(binaries / "pg_ctl", "-D", data, "-l", log, "-w", "-t", "60", "-o", options, "start")
        try:
            yield base
        finally:
            _run(binaries / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def postgresql_url(postgresql_socket: Path) -> str:
    """The address of a new, empty database."""
    import psycopg

    name = f"t{uuid.uuid4().hex[:12]}"
    with psycopg.connect(host=str(postgresql_socket), user="escala", dbname="postgres", autocommit=True) as c:
        c.execute(f"CREATE DATABASE {name}")
    return f"postgresql://escala@/{name}?host={postgresql_socket}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of a new, empty database: each test runs on SQLite and on PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/escala.db"
    url: str = request.getfixturevalue("postgresql_url")
    return url
