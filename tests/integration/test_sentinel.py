"""Redis behind three real Sentinels: the master is found, and its loss under load loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from redis import Redis as SyncRedis

from fastworker.edge.embedded import EmbeddedRedis, free_port
from fastworker.errors import StreamUnavailable
from fastworker.simulator.network import Network
from fastworker.simulator.relay import SimRelay
from fastworker.stream.client import connect, translating
from fastworker.stream.keys import CURSOR, STREAM
from tests.rig.failover import assert_lawful, cursor_at, is_done
from tests.services import Service, run, until

MASTER = "events"
SENTINELS = 3
FRAMES = 3_000


class Watched(NamedTuple):
    """Two servers, the first of which was the master at the start, and who watches them."""

    servers: list[EmbeddedRedis]
    sentinels: list[int]

    @property
    def url(self) -> str:
        return f"redis+sentinel://{','.join(f'127.0.0.1:{port}' for port in self.sentinels)}/{MASTER}"

    def master(self) -> int:
        """Its port, as a Sentinel says."""
        with SyncRedis(port=self.sentinels[0], socket_timeout=5) as client:
            return int(client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER)[1])


@pytest.fixture
def watched(server_dir: Path) -> Iterator[Watched]:
    with contextlib.ExitStack() as stack:
        first, second = free_port(), free_port()
        servers = [stack.enter_context(EmbeddedRedis(server_dir / "first", port=first))]
        settings = {"replicaof": f"127.0.0.1 {first}", "repl-diskless-sync-delay": "0"}
        servers.append(stack.enter_context(EmbeddedRedis(server_dir / "second", port=second, settings=settings)))
        ports = [free_port() for _ in range(SENTINELS)]
        for port in ports:
            stack.enter_context(_sentinel(server_dir, servers[0], port, first))
        watched = Watched(servers, ports)
        until(lambda: all(_sees_all(port) for port in ports))
        yield watched


@contextlib.contextmanager
def _sentinel(folder: Path, server: EmbeddedRedis, port: int, master: int) -> Iterator[None]:
    config = folder / f"sentinel-{port}.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {folder}\nsentinel monitor {MASTER} 127.0.0.1 {master} 2\n"
        f"sentinel down-after-milliseconds {MASTER} 700\nsentinel failover-timeout {MASTER} 4000\n"
    )
    binary = server._binary  # a Sentinel is the same program
    process = subprocess.Popen([binary, config, "--sentinel"], stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _sees_all(port: int) -> bool:
    """Whether this Sentinel knows the replica and the other Sentinels: it cannot fail over before that."""
    with SyncRedis(port=port, socket_timeout=5) as client, contextlib.suppress(OSError):
        state = client.sentinel_master(MASTER)
        return bool(state["num-slaves"] == 1 and state["num-other-sentinels"] == SENTINELS - 1)
    return False


async def test_the_master_is_found_and_found_again(watched: Watched) -> None:
    client = connect(watched.url)
    try:
        async with translating(client):
            await client.set("key", "value")
            assert (await client.info("replication"))["role"] == "master"
        watched.servers[0].kill()
        with pytest.raises(StreamUnavailable):
            async with translating(client):
                await client.get("key")
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with contextlib.suppress(StreamUnavailable):
                async with translating(client):
                    await client.set("key", "other")
                    assert (await client.info("server"))["tcp_port"] == watched.servers[1].port
                    break
            await asyncio.sleep(0.1)
        else:
            pytest.fail("the new master was not found")
    finally:
        await client.aclose()


async def test_an_unknown_master_and_silent_sentinels_are_named(watched: Watched) -> None:
    for url in (watched.url.replace(MASTER, "other"), f"redis+sentinel://127.0.0.1:{free_port()}/{MASTER}"):
        client = connect(url)
        with pytest.raises(StreamUnavailable, match="no Sentinel can be reached that knows a master of this name"):
            async with translating(client):
                await client.ping()
        await client.aclose()


async def test_a_failover_under_load_loses_nothing(
    watched: Watched, postgres_url: str, services: Callable[..., Service]
) -> None:
    """Reader and worker as an operator runs them; the master is killed in the middle of the stream.

    What the new master had not got yet, acks or entries with their cursor, is given again.
    """
    frames = list(Network("sentinel", accounts=200).frames(FRAMES))
    env = {
        "REDIS_URL": watched.url, "DATABASE_URL": postgres_url, "FASTWORKER_HTTP_PORT": "off",
        "FASTWORKER_STREAM_FORMAT": "native", "FASTWORKER_RESOLVE_HANDLES": "off", "FASTWORKER_SYNC": "off",
    }  # fmt: skip
    async with SimRelay(frames, rate=1_000, start="oldest", wait_for_client=True) as relay:
        services("worker", **env).wait_for("worker-1 .* is ready")
        services("reader", RELAY_URL=relay.url, **env)
        async with asyncio.timeout(120):
            while await cursor_at(watched.url, STREAM, CURSOR) < (frames[FRAMES // 3].seq or 0):
                await asyncio.sleep(0.05)
            watched.servers[0].kill()
            while watched.master() == watched.servers[0].port:
                await asyncio.sleep(0.05)
            while not await is_done(watched.url, STREAM, CURSOR, frames[-1].seq or 0):
                await asyncio.sleep(0.05)
        said = run("status", **env)
        assert said.returncode == 0, said.stderr
        assert run("check", **env).returncode in (0, 1)
    await assert_lawful(postgres_url, frames)
