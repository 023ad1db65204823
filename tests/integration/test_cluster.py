"""A real Redis Cluster of three masters, one with a replica: a master lost and a slot moved, both under load."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from redis import Redis as SyncRedis

from fastworker.commands.grants import COMMANDS, acl
from fastworker.edge.embedded import EmbeddedRedis, free_port
from fastworker.errors import StreamUnavailable
from fastworker.simulator.network import Network
from fastworker.simulator.relay import SimRelay
from fastworker.stream.client import connect, translating
from fastworker.stream.keys import CLUSTERED, slot
from tests.rig.failover import assert_lawful, cursor_at, is_done
from tests.runs import usually
from tests.services import Service, run, until

STREAM, CURSOR = CLUSTERED
SLOT = slot(STREAM)
FRAMES = 3_000


class Nodes(NamedTuple):
    """The first has the slot, and the last is its replica."""

    servers: list[EmbeddedRedis]

    @property
    def url(self) -> str:
        return f"redis+cluster://{','.join(f'127.0.0.1:{server.port}' for server in self.servers[1:3])}"

    def as_user(self, name: str) -> str:
        return self.url.replace("://", f"://{name}:secret@")

    def ask(self, number: int, *words: str | int) -> Any:
        with SyncRedis(port=self.servers[number].port or 0, socket_timeout=5) as client:
            return client.execute_command(*words)

    def ident(self, number: int) -> str:
        return str(self.ask(number, "CLUSTER MYID").decode())

    def owner(self) -> int:
        """The port of the node that has the slot, as the second node says."""
        return next(int(master[1]) for first, last, master, *_ in self.ask(1, "CLUSTER SLOTS") if first <= SLOT <= last)


@pytest.fixture
def nodes(server_dir: Path) -> Iterator[Nodes]:
    with contextlib.ExitStack() as stack:
        servers = []
        for number in range(4):
            settings = {
                "cluster-enabled": "yes", "cluster-port": str(free_port()), "cluster-node-timeout": "1500",
                "cluster-replica-validity-factor": "0", "repl-diskless-sync-delay": "0",
            }  # fmt: skip
            server = EmbeddedRedis(server_dir / str(number), port=free_port(), settings=settings, aof=False)
            servers.append(stack.enter_context(server))
        nodes = Nodes(servers)
        nodes.ask(0, "CLUSTER ADDSLOTSRANGE", SLOT, SLOT + 9)  # a master without any slot would become a replica
        nodes.ask(1, "CLUSTER ADDSLOTSRANGE", 0, SLOT - 1)
        nodes.ask(2, "CLUSTER ADDSLOTSRANGE", SLOT + 10, 16_383)
        for number in range(1, 4):
            bus = nodes.ask(number, "CONFIG GET", "cluster-port")["cluster-port"]
            nodes.ask(0, "CLUSTER MEET", "127.0.0.1", servers[number].port or 0, bus)
        until(lambda: all(nodes.ask(n, "CLUSTER INFO")["cluster_known_nodes"] == "4" for n in range(4)))
        nodes.ask(3, "CLUSTER REPLICATE", nodes.ident(0))
        until(lambda: all(nodes.ask(n, "CLUSTER INFO")["cluster_state"] == "ok" for n in range(4)))
        until(lambda: nodes.ask(3, "INFO", "replication")["master_link_status"] == "up")
        yield nodes


def move(nodes: Nodes, target: int) -> None:
    """The slot from the first node to another, as `valkey-cli --cluster reshard` does it."""
    source_id, target_id = nodes.ident(0), nodes.ident(target)
    nodes.ask(target, "CLUSTER SETSLOT", SLOT, "IMPORTING", source_id)
    nodes.ask(0, "CLUSTER SETSLOT", SLOT, "MIGRATING", target_id)
    port = nodes.servers[target].port or 0
    while keys := nodes.ask(0, "CLUSTER GETKEYSINSLOT", SLOT, 100):
        nodes.ask(0, "MIGRATE", "127.0.0.1", port, "", 0, 5_000, "KEYS", *keys)
    for number in (target, 0, *({1, 2} - {target})):
        nodes.ask(number, "CLUSTER SETSLOT", SLOT, "NODE", target_id)


async def test_commands_go_to_the_node_that_has_the_stream(nodes: Nodes) -> None:
    client = connect(nodes.url, stream_key=STREAM)
    try:
        async with translating(client):
            await client.xadd(STREAM, {"a": "b"})
            assert (await client.info("server"))["tcp_port"] == nodes.servers[0].port
        await asyncio.to_thread(move, nodes, 2)
        with pytest.raises(StreamUnavailable, match="moves to another node"):
            async with translating(client):
                await client.xlen(STREAM)
        with pytest.raises(StreamUnavailable, match="another server"):  # it was made up for the one before
            async with translating(client):
                await client.xlen(STREAM)
        async with translating(client):
            assert await client.xlen(STREAM) == 1
            assert (await client.info("server"))["tcp_port"] == nodes.servers[2].port
    finally:
        await client.aclose()


async def test_a_cluster_that_is_gone_is_named(nodes: Nodes) -> None:
    client = connect(f"redis+cluster://127.0.0.1:{free_port()}", stream_key=STREAM)
    with pytest.raises(StreamUnavailable, match="no node of the cluster can be reached"):
        async with translating(client):
            await client.ping()
    await client.aclose()
    said = run("status", REDIS_URL=f"redis://127.0.0.1:{nodes.servers[1].port}")
    assert said.returncode == 3
    assert "redis+cluster://" in said.stderr


@pytest.mark.parametrize("partitions", [1, 5])
@pytest.mark.parametrize("what", usually(["the master is killed", "the slot moves"], "the master is killed"))
async def test_nothing_is_lost_under_load(
    nodes: Nodes, postgres_url: str, services: Callable[..., Service], what: str, partitions: int
) -> None:
    frames = list(Network("cluster", accounts=200).frames(FRAMES))
    env = {
        "REDIS_URL": nodes.url, "DATABASE_URL": postgres_url, "FASTWORKER_HTTP_PORT": "off",
        "FASTWORKER_STREAM_FORMAT": "native", "FASTWORKER_RESOLVE_HANDLES": "off",
        "FASTWORKER_STREAM_PARTITIONS": str(partitions),
    }  # fmt: skip
    for number, service in itertools.product(range(4), COMMANDS):  # with the rights that they need
        nodes.ask(number, *acl(service, service, CLUSTERED).replace(">PASSWORD", ">secret").split())
    async with SimRelay(frames, rate=1_000, start="oldest", wait_for_client=True) as relay:
        services("worker", **env | {"REDIS_URL": nodes.as_user("worker")}).wait_for("worker-1 .* is ready")
        services("reader", RELAY_URL=relay.url, **env | {"REDIS_URL": nodes.as_user("reader")})
        async with asyncio.timeout(120):
            while await cursor_at(nodes.url, STREAM, CURSOR) < (frames[FRAMES // 3].seq or 0):
                await asyncio.sleep(0.05)
            if what == "the slot moves":
                await asyncio.to_thread(move, nodes, 2)
                assert nodes.owner() == nodes.servers[2].port
            else:
                nodes.servers[0].kill()
                while nodes.owner() != nodes.servers[3].port:
                    await asyncio.sleep(0.05)
            while not await is_done(nodes.url, STREAM, CURSOR, frames[-1].seq or 0):
                await asyncio.sleep(0.05)
        said = run("status", **env)
        assert said.returncode == 0, said.stderr
        assert run("check", **env).returncode in (0, 1)
    await assert_lawful(postgres_url, frames)
