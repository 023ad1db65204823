"""Real servers for every test that asks for one: started once per pytest process, fresh contents per test."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import asyncpg
import hypothesis
import pytest
import redis

from fastworker.edge.embedded import EmbeddedPostgres, EmbeddedRedis
from fastworker.store.migrate import migrate
from tests.databases import TEMPLATE, Contents
from tests.loop import Loop
from tests.servers import POSTGRES_BIN, REDIS_BIN, PostgresUnderTest, RedisUnderTest
from tests.services import Service

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("FASTWORKER_SYNC", "off")  # nor that; test_syncer.py has servers
os.environ.setdefault("FASTWORKER_RESOLVE_HANDLES", "off")  # no test asks the network; test_resolver.py has servers
os.environ.setdefault("SSL_CERT_FILE", os.devnull)  # aiohttp reads the system's certificates at every start: 0.1 s
_numbers = itertools.count(1)

# What a test finds must not depend on how fast the machine is.
hypothesis.settings.register_profile(
    "any machine",
    hypothesis.settings(),
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("any machine")


def _real_data() -> Path:
    named = os.environ.get("REAL_DATA") or os.environ.get("FASTWORKER_REAL_DATA")
    return Path(named) if named else ROOT.parent / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--extended", action="store_true", help="also the long runs and what needs Debian's packages")


def pytest_report_header() -> list[str]:
    path = _real_data()
    return [
        f"real data: {path if path.is_dir() else f'none at {path} (REAL_DATA names another place): skipped'}",
        f"servers: {POSTGRES_BIN or 'PostgreSQL of the wheel'}, {REDIS_BIN or 'Valkey of the wheel'}",
    ]


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop of production."""
    return {"uvloop": Loop}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_data = pytest.mark.skip(reason=f"no real data at {_real_data()}; set REAL_DATA")
    not_extended = pytest.mark.skip(reason="a long run: ./scripts/test --extended")
    for item in items:
        if item.get_closest_marker("real_data") and not _real_data().is_dir():
            item.add_marker(no_data)
        if item.get_closest_marker("extended") and not config.getoption("--extended"):
            item.add_marker(not_extended)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real frames and repositories; its INDEX.md says what they are."""
    path = _real_data()
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set REAL_DATA")
    return path


@pytest.fixture(scope="session")
def servers_dir() -> Iterator[Path]:
    """Where this pytest process keeps its servers; afterwards none of them may live, and the folder goes."""
    path = Path(tempfile.mkdtemp(prefix="fw-"))
    yield path
    left = _processes_below(path)
    shutil.rmtree(path)
    assert not left, f"servers still run: {left}"


@pytest.fixture
def server_dir(servers_dir: Path) -> Iterator[Path]:
    """A folder, not made yet, for servers of the test's own, which the test stops."""
    path = servers_dir / f"own-{next(_numbers)}"
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_server(servers_dir: Path) -> Iterator[EmbeddedPostgres]:
    """Shared: a test may terminate its own connections here, nothing more. Without fsync."""
    with PostgresUnderTest(servers_dir / "postgres", durable=False, settings={"full_page_writes": "off"}) as server:
        _execute(server.url_of("postgres"), f"CREATE DATABASE {TEMPLATE}")
        _run(lambda: migrate(server.url_of(TEMPLATE)))
        yield server


@pytest.fixture(scope="session")
def redis_server(servers_dir: Path) -> Iterator[EmbeddedRedis]:
    """Shared, like `postgres_server`. Without an append-only file."""
    with RedisUnderTest(servers_dir / "redis", aof=False) as server:
        yield server


@pytest.fixture
def empty_postgres_url(postgres_server: EmbeddedPostgres) -> Iterator[str]:
    """A database without any table."""
    yield from _database(postgres_server, "template1")


@pytest.fixture(scope="session")
def clean_databases() -> list[tuple[str, Contents]]:
    """Those that the next test may have."""
    return []


@pytest.fixture
def postgres_url(postgres_server: EmbeddedPostgres, clean_databases: list[tuple[str, Contents]]) -> Iterator[str]:
    """A database of the test's own, migrated and empty."""
    admin = postgres_server.url_of("postgres")
    if clean_databases:
        name, contents = clean_databases.pop()
    else:
        name = f"test_{next(_numbers)}"
        _execute(admin, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
        contents = _run(lambda: Contents.of(postgres_server.url_of(name)))
    yield postgres_server.url_of(name)
    if _run(lambda: contents.restore(postgres_server.url_of(name))):
        clean_databases.append((name, contents))
    else:
        _execute(admin, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.fixture
async def pg(postgres_url: str) -> AsyncIterator[Connection]:
    """A connection to the database of `postgres_url`."""
    connection = await asyncpg.connect(postgres_url, timeout=10)
    yield connection
    await connection.close(timeout=10)


@pytest.fixture
def redis_url(redis_server: EmbeddedRedis) -> str:
    """A Redis without keys, scripts and other clients."""
    with redis.Redis.from_url(redis_server.url, socket_timeout=10) as client:
        client.client_kill_filter(_type="normal", skipme=True)
        client.flushall()
        client.script_flush()
    return redis_server.url


@pytest.fixture
def services() -> Iterator[Callable[..., Service]]:
    """Starts services, and ends those that the test left."""
    started: list[Service] = []

    def start(*args: str, **env: str) -> Service:
        started.append(Service(*args, **env))
        return started[-1]

    yield start
    for service in started:
        if service.process.poll() is None:
            service.process.kill()
        service.stop()


@pytest.fixture(autouse=True)
def _no_unhandled_loop_errors() -> Iterator[None]:
    """Fail a test whose event loop had nobody to tell of an error (a task's, a callback's)."""
    seen: list[str] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(f"{record.getMessage()} {record.exc_info[1]!r}" if record.exc_info else record.getMessage())

    recorder = Recorder(logging.ERROR)
    logger = logging.getLogger("asyncio")
    logger.addHandler(recorder)
    yield
    logger.removeHandler(recorder)
    assert not seen, f"unhandled in the event loop: {seen}"


def _database(server: EmbeddedPostgres, template: str) -> Iterator[str]:
    name, admin = f"test_{next(_numbers)}", server.url_of("postgres")
    _execute(admin, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield server.url_of(name)
    _execute(admin, f"DROP DATABASE {name} WITH (FORCE)")


def _execute(url: str, statement: str) -> None:
    async def execute() -> None:
        connection = await asyncpg.connect(url, timeout=10)
        await connection.execute(statement)
        await connection.close(timeout=10)

    _run(execute)


def _run(make: Callable[[], Coroutine[object, object, T]]) -> T:
    """Run to the end on a loop of its own, in a thread of its own: the test's loop is none of our business."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(make())).result()


def _processes_below(path: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if f"{path}/" in command:
                found.append(f"{entry.name}: {command}")
    return found
