"""TLS to Redis and PostgreSQL with generated certificates: everything runs over it, and the wrong ones are refused.

The wheels' servers speak no TLS, so a proxy of this file does it for them; test_servers_of_their_own has none.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import re
import shutil
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import asyncpg
import pytest
import trustme

from fastworker.commands.check import preflight
from fastworker.config import parse_config
from fastworker.edge.embedded import free_port
from fastworker.errors import ConfigError, StoreUnavailable, Unreachable
from fastworker.law.compare import diff, dump, report
from fastworker.law.model import Model
from fastworker.reader.relay import RelayAddress, RelayRefused, subscribe
from fastworker.simulator.network import Network
from fastworker.store.migrate import migrate
from fastworker.store.store import Store
from fastworker.stream.client import connect
from tests.e2e.house import House
from tests.servers import POSTGRES_BIN, REDIS_BIN, PostgresUnderTest, RedisUnderTest, connected

SSL_REQUEST = (8).to_bytes(4, "big") + (80877103).to_bytes(4, "big")


class Authority:
    """A certificate authority, what it issued for this machine and for another, as files."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        ca = trustme.CA()
        self.ca = folder / "ca.pem"
        ca.cert_pem.write_to_path(str(self.ca))
        self.contexts = {}
        for name in ("localhost", "elsewhere.test"):
            issued = ca.issue_cert(name)
            self.contexts[name] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            issued.configure_cert(self.contexts[name])
            issued.private_key_pem.write_to_path(str(folder / f"{name}.key"))
            (folder / f"{name}.pem").write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        self.key, self.certificate = folder / "localhost.key", folder / "localhost.pem"


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "theirs")


@contextlib.asynccontextmanager
async def tls(path: str, context: ssl.SSLContext, *, postgres: bool) -> AsyncIterator[int]:
    """TLS on a port of localhost for what listens on a socket; PostgreSQL is asked for it before."""
    tasks: set[asyncio.Task[Any]] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(65_536):
                writer.write(piece)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            if postgres:
                assert await reader.readexactly(8) == SSL_REQUEST
                writer.write(b"S")
                await writer.start_tls(context)
            behind = await asyncio.open_unix_connection(path)
            try:
                await asyncio.gather(copy(reader, behind[1]), copy(behind[0], writer))
            finally:  # what is cancelled before it began closes nothing
                behind[1].close()
                writer.close()
        tasks.discard(task)

    async with await asyncio.start_server(serve, "localhost", 0, ssl=None if postgres else context) as server:
        yield server.sockets[0].getsockname()[1]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def path_of(url: str) -> str:
    parts = urlsplit(url)
    return parts.path if parts.scheme == "unix" else f"{parse_qs(parts.query)['host'][0]}/.s.PGSQL.5432"


@contextlib.asynccontextmanager
async def both(
    redis_url: str, postgres_url: str, shown: Authority, trusted: Path | None, *, name: str = "localhost"
) -> AsyncIterator[tuple[str, str]]:
    """(REDIS_URL, DATABASE_URL) of TLS proxies with certificates of `shown`; clients trust `trusted`."""
    context = shown.contexts[name]
    database = urlsplit(postgres_url).path.strip("/")
    async with (
        tls(path_of(redis_url), context, postgres=False) as first,
        tls(path_of(postgres_url), context, postgres=True) as second,
    ):
        yield (
            f"rediss://localhost:{first}" + (f"?ssl_ca_certs={quote(str(trusted))}" if trusted else ""),
            f"postgresql://postgres@localhost:{second}/{database}?sslmode=verify-full"
            + (f"&sslrootcert={quote(str(trusted))}" if trusted else ""),
        )


async def test_everything_runs_over_tls(
    redis_url: str, postgres_url: str, pg: asyncpg.Connection, authority: Authority
) -> None:
    async with both(redis_url, postgres_url, authority, authority.ca) as (redis_tls, postgres_tls):
        await runs(redis_tls, postgres_tls, pg)


async def runs(redis_url: str, postgres_url: str, pg: asyncpg.Connection) -> None:
    config = parse_config({"REDIS_URL": redis_url, "DATABASE_URL": postgres_url})
    await preflight(config, "worker")
    frames = list(Network(3, accounts=50).frames(300))
    async with connect(redis_url) as client:
        await House(client, redis_url, postgres_url).ingest(frames, last_seq=max(frame.seq or 0 for frame in frames))
    model = Model()
    for frame in frames:
        if frame.event is not None:
            model.apply(frame.event)
    differences = diff(model.tables(), await dump(pg))
    assert not differences, report(differences)


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("another authority", "unable to get local issuer certificate"),
        ("another name", "Hostname mismatch, certificate is not valid for 'localhost'."),
        ("no authority", "unable to get local issuer certificate"),
    ],
)
async def test_a_certificate_that_is_not_right_is_refused(
    redis_url: str, postgres_url: str, authority: Authority, stranger: Authority, case: str, why: str
) -> None:
    name = "elsewhere.test" if case == "another name" else "localhost"
    trusted = {"another authority": stranger.ca, "another name": authority.ca}.get(case)
    async with both(redis_url, postgres_url, authority, trusted, name=name) as (redis_tls, postgres_tls):
        with pytest.raises(Unreachable) as of_redis:
            await preflight(parse_config({"REDIS_URL": redis_tls}), "reader")
        with pytest.raises(Unreachable if trusted else ConfigError) as of_postgres:
            await preflight(parse_config({"REDIS_URL": redis_url, "DATABASE_URL": postgres_tls}), "worker")
        store = Store.connect(postgres_tls)
        if trusted:
            with pytest.raises(StoreUnavailable, match="sslrootcert=FILE"):
                await store
        store.close()
    said = f"its certificate is refused ({why}); ?ssl_ca_certs=FILE in REDIS_URL names the authority that signed it"
    assert str(of_redis.value).endswith(f"Redis cannot be reached: {said}")
    said = f"its certificate is refused ({why}); sslrootcert=FILE in DATABASE_URL names the authority that signed it"
    if trusted:
        told = re.sub(r"^PostgreSQL at localhost:\d+ cannot be reached: ", "", str(of_postgres.value))
        assert told == said
    else:  # as libpq has it: without a file there is nothing to verify with
        assert "root certificate file" in str(of_postgres.value)
        assert "\n" not in str(of_postgres.value)


async def test_a_port_that_speaks_no_tls_is_called_that() -> None:
    async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(hello, "localhost", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(RelayRefused, match=f"localhost:{port}: this port does not speak TLS"):
            await subscribe(RelayAddress.parse(f"wss://localhost:{port}"), None)
        with pytest.raises(Unreachable, match="this port does not speak TLS"):
            await preflight(parse_config({"REDIS_URL": f"rediss://localhost:{port}"}), "reader")


async def test_servers_of_their_own(server_dir: Path, authority: Authority) -> None:
    """Without a proxy, where the servers under test speak TLS (scripts/test-matrix brings some that do)."""
    if POSTGRES_BIN is None or REDIS_BIN is None:
        pytest.skip("the wheels' servers speak no TLS: scripts/test-matrix brings servers that do")
    server_dir.mkdir()
    folder = authority.ca.parent
    port = free_port()
    settings = {
        "tls-port": str(port),
        "tls-cert-file": str(authority.certificate),
        "tls-key-file": str(authority.key),
        "tls-auth-clients": "no",
    }
    try:
        key = server_dir / "key.pem"  # PostgreSQL wants it to be its own
        shutil.copy(authority.key, key)
        key.chmod(0o600)
        if os.geteuid() == 0:
            account = pwd.getpwnam("postgres" if "postgres" in {one.pw_name for one in pwd.getpwall()} else "nobody")
            os.chown(key, account.pw_uid, account.pw_gid)
            server_dir.chmod(0o755)
        with (
            RedisUnderTest(server_dir / "r", aof=False, settings=settings),
            PostgresUnderTest(
                server_dir / "p",
                durable=False,
                port=free_port(),
                settings={"ssl": "on", "ssl_cert_file": str(folder / "localhost.pem"), "ssl_key_file": str(key)},
            ) as postgres,
        ):
            url = f"postgresql://postgres@localhost:{postgres.port}/atproto?sslmode=verify-full&sslrootcert={authority.ca}"
            await migrate(url)
            async with connected(url) as connection:
                assert await connection.fetchval("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
                await runs(f"rediss://localhost:{port}?ssl_ca_certs={authority.ca}", url, connection)
    except Unreachable as error:
        if any(words in str(error) for words in ("Bad directive", "not supported by this build", "SSL is not")):
            pytest.skip(f"a server under test speaks no TLS: {error}")
        raise
