"""From a relay that loses, reorders, cuts and makes up commits to tables that are equal to the accounts' repositories.

The reader (killed on the way) sees what is wrong and queues repairs; the worker writes what passed; `repair --recorded`
settles the accounts that the reader named, and nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import asyncpg
import libipld
import pytest
import redis as sync_redis

from fastworker.commands.repairs import RepairOptions, repair
from fastworker.config import parse_config
from fastworker.errors import ExitCode
from fastworker.law import compare
from fastworker.law.model import Model
from fastworker.simulator.hosts import SimHosts
from fastworker.simulator.keys import SigningKey
from fastworker.simulator.network import Network
from fastworker.simulator.relay import SimRelay
from fastworker.simulator.repo import Repo, SimFrame
from fastworker.sync.hosts import Bounds, Hosts
from tests.integration.test_reader_levels import changed, create
from tests.integration.test_settle import comparable, may_be_lost
from tests.replies import raw
from tests.runs import usually
from tests.services import Service

STREAM, GROUP, CURSOR = "firehose:events", "firehose-processors", "firehose:python_cursor"


class LyingRelay:
    """Of the network's commits some are lost, some too big, some hide an op; others are nobody's.

    `hides`: only the level `full` sees that.
    """

    def __init__(self, network: Network, *, hides: bool) -> None:
        self.network = network
        self.kinds = ("lost", "forged", "too big", *(["hides"] if hides else []))
        self.model = Model()
        self.did: Counter[str] = Counter()
        self.harmed: set[str] = set()
        self.heard: set[str] = set()  # who had a commit

    def frames(self, count: int, *, honest: bool) -> list[SimFrame | bytes]:
        given: list[SimFrame | bytes] = []
        for number, frame in enumerate(self.network.frames(count)):
            if frame.event is None:
                continue
            self.model.apply(frame.event, int(time.time() * 1000))
            if frame.event["kind"] == "commit":
                self.heard.add(frame.event["repo"])
            lie = () if honest or not may_be_lost(frame) else self._lie(number, frame)
            given += lie or (frame,)
        return given

    def _lie(self, number: int, frame: SimFrame) -> tuple[SimFrame | bytes, ...]:
        assert frame.event is not None
        did = frame.event["repo"]
        match number % 12:
            case 0:
                self._note("lost", did)
                account = self.network.world.accounts()[0]
                stranger = Repo(account.did, self.network.clock, key=SigningKey("a stranger"))
                forged = stranger.commit([create(number)])  # takes the place of what is lost
                self._note("forged", account.did)
                return (forged,)
            case 4:
                self._note("too big", did)
                return (changed(frame, tooBig=True, blocks=b"", ops=[]),)
            case 8 if "hides" in self.kinds:
                ops = libipld.decode_dag_cbor_multi(frame.data)[1]["ops"]
                self._note("hides", did)
                return (changed(frame, ops=ops[1:]),)
        return ()

    def _note(self, what: str, did: str) -> None:
        self.did[what] += 1
        self.harmed.add(did)


@pytest.fixture
async def relay() -> AsyncIterator[SimRelay]:
    async with SimRelay((), start="oldest") as relay:
        yield relay


async def reached(client: sync_redis.Redis, seq: int | None) -> None:
    async with asyncio.timeout(90):
        while int(client.get(CURSOR) or b"0") < (seq or 0):
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("level", usually(["chain", "full"], "full"))
async def test_what_a_relay_did_wrong_is_seen_and_mended(
    level: str,
    relay: SimRelay,
    services: Callable[..., Service],
    redis_url: str,
    postgres_url: str,
    pg: asyncpg.Connection,
    tmp_path: Path,
) -> None:
    network = Network(23, accounts=10, signed=True)
    lying = LyingRelay(network, hides=level == "full")
    servers = {"REDIS_URL": redis_url, "DATABASE_URL": postgres_url, "FASTWORKER_HTTP_PORT": "off"}
    with contextlib.closing(sync_redis.Redis.from_url(redis_url)) as client:
        client.xgroup_create(STREAM, GROUP, "0", mkstream=True)
        client.set(CURSOR, 0)
        async with (
            SimHosts(network.world) as sim,
            Hosts(sim.directory.url, own=sim.own, bounds=Bounds(wait_max_s=30), rate=lambda _: 100.0) as hosts,
        ):
            env = {
                **servers,
                "RELAY_URL": relay.url,
                "FASTWORKER_VERIFY": level,
                "FASTWORKER_PLC_URL": sim.directory.url,
                "FASTWORKER_HOME": str(tmp_path),
                "FASTWORKER_CHAIN_BYTES": "1mb",
            }
            services("worker", **servers, FASTWORKER_PROCESSES="1")
            reader = services("reader", **env)
            relay.emit(*lying.frames(300, honest=True))  # everybody has a commit that is known, and a key
            await reached(client, relay.head)
            if level == "full":
                async with asyncio.timeout(60):
                    while len({path for _, path in sim.directory.asked}) < len(lying.heard):
                        await asyncio.sleep(0.05)
                await asyncio.sleep(0.5)  # until the last answer is read
            relay.emit(*lying.frames(400, honest=False))
            await asyncio.sleep(0.2)
            reader.process.kill()
            reader.stop()
            relay.emit(*lying.frames(200, honest=False))
            services("reader", **env)
            relay.emit(*lying.frames(400, honest=True))  # what was the last of an account is followed by another one
            await reached(client, relay.head)
            sim.settle()
            assert min(lying.did[what] for what in lying.kinds) > 3, lying.did
            assert {raw(did).decode() for did in client.hkeys("fastworker:repairs")} >= lying.harmed
            options = RepairOptions((), dry_run=False, recorded=True)
            while client.hlen("fastworker:repairs"):  # what waited for a key may be named while the others are repaired
                assert await repair(parse_config(servers), options, asyncio.Event(), hosts=hosts) == ExitCode.DONE
            for _ in range(60):
                found = compare.diff(comparable(lying.model.tables()), comparable(await compare.dump(pg)))
                if not found:
                    break
                await asyncio.sleep(0.25)
            assert compare.report(found) == "no difference"
            assert client.xlen("fastworker:unverified") == 0
