"""Another server takes Redis's place between two commands, and nobody sees a connection break while it is used."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as LostConnection

from fastworker.edge.embedded import EmbeddedRedis, free_port
from fastworker.errors import Reason, StreamUnavailable
from fastworker.process.board import Heartbeats
from fastworker.stream.client import connect
from fastworker.stream.consumer import SetAside, Tally, WorkerStream
from fastworker.stream.keys import GROUP, STREAM, USUAL
from fastworker.stream.lineage import lineage_of
from fastworker.worker.intake import Intake
from tests import replies
from tests.rig.proxy import Proxy
from tests.servers import RedisUnderTest

COMMITTED = Tally("committed", "#commit")


class Pair:
    """Two servers: the second follows the first. Clients go to `proxy`, which leads to one of them."""

    def __init__(self, servers: list[EmbeddedRedis], clients: list[Redis], proxy: Proxy) -> None:
        self.first, self.second = clients
        self.url = f"redis://127.0.0.1:{proxy.port}"
        self._servers = servers
        self._proxy = proxy
        self.ports = [server.port or 0 for server in servers]

    async def in_step(self) -> None:
        """What the first was told so far, the second has."""
        assert await self.first.wait(1, 5_000) == 1

    async def apart(self) -> None:
        """From here on the second gets nothing more, and is a master like the first."""
        await self.in_step()
        await self.second.replicaof("NO", "ONE")

    async def switch(self, client: Redis | None = None) -> None:
        """New connections lead to the second; those of the client, idle just now, are gone."""
        self._proxy.target = "127.0.0.1", self._servers[1].port or 0
        if client is not None:
            await client.connection_pool.disconnect()
            with pytest.raises(LostConnection, match="another server"):
                await client.ping()


@pytest.fixture
async def pair(server_dir: Path) -> AsyncIterator[Pair]:
    async with contextlib.AsyncExitStack() as stack:
        ports = free_port(), free_port()
        servers = []
        for number, port in enumerate(ports):
            settings = {"repl-diskless-sync-delay": "0"}
            servers.append(stack.enter_context(RedisUnderTest(server_dir / str(number), port=port, settings=settings)))
        clients = [await stack.enter_async_context(connect(server.url)) for server in servers]
        proxy = await stack.enter_async_context(Proxy(("127.0.0.1", ports[0])))
        await clients[1].replicaof("127.0.0.1", str(ports[0]))
        async with asyncio.timeout(30):
            while (await clients[1].info("replication"))["master_link_status"] != "up":
                await asyncio.sleep(0.05)
        yield Pair(servers, clients, proxy)


@pytest.fixture
async def through(pair: Pair) -> AsyncIterator[Redis]:
    async with connect(pair.url) as client:
        yield client


async def add(redis: Redis, count: int) -> list[str]:
    return [replies.text(await redis.xadd(STREAM, {"type": "commit", "data": "{}", "seq": "1"})) for _ in range(count)]


async def counted(redis: Redis) -> dict[str, int]:
    return replies.counts(await redis.hgetall(USUAL.ledger))


def texts(reply: Any) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in reply.items()}


async def pending(redis: Redis) -> list[str]:
    found: Any = await redis.xpending_range(STREAM, GROUP, "-", "+", 100)
    return [one["message_id"].decode() for one in found]


async def test_an_ack_that_the_new_master_never_got_is_given_again(pair: Pair, through: Redis) -> None:
    stream = WorkerStream(through, consumer_id="w")
    await stream.acquire()
    intake = Intake(stream, Heartbeats(1)[0])
    ids = await add(pair.first, 5)
    assert [one for one, _ in await intake.next(100)] == ids
    await pair.apart()
    assert await stream.ack({COMMITTED: ids}) == 5
    await pair.switch(through)
    again: list[str] = []
    for _ in range(3):  # nothing new comes
        again += [one for one, _ in await intake.next(10)]
    assert again == ids
    assert await stream.ack({COMMITTED: again}) == 5
    assert await pending(pair.second) == []
    assert await counted(pair.second) == {"committed": 5}


async def test_what_the_new_master_never_gave_is_not_held_there(
    pair: Pair, through: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that dies then did not lose it: the group does not go back, and nothing is counted twice."""
    dead = WorkerStream(through, consumer_id="w")
    await dead.acquire()
    ids = await add(pair.first, 5)
    await pair.apart()
    assert [one for one, _ in await dead.read(100)] == ids
    await dead.tell_held()
    assert texts(await pair.first.hgetall(USUAL.held)) == {"w-0": ids[0]}
    await pair.switch(through)
    await dead.renew()
    await dead.tell_held()
    other = WorkerStream(through, consumer_id="v")
    await other.acquire()
    assert [one for one, _ in await other.read(100)] == ids  # it was not given here
    assert await other.ack({COMMITTED: ids}) == 5
    await pair.second.delete(USUAL.consumer_lease("w-0"))  # it died
    with caplog.at_level(logging.WARNING):
        assert (await other.claim("w-0", idle_ms=0)).entries == []
    assert caplog.messages == []
    assert await other.read(1) == []
    assert await counted(pair.second) == {"committed": 5}


async def test_what_is_pending_on_the_new_master_is_held_there(pair: Pair, through: Redis) -> None:
    """If somebody deletes the consumer then, it is still known what it held (go_back.lua)."""
    stream = WorkerStream(through, consumer_id="w")
    await stream.acquire()
    ids = await add(pair.first, 5)
    assert [one for one, _ in await stream.read(100)] == ids
    await stream.tell_held()
    await pair.apart()
    await stream.ack({COMMITTED: ids[:2]})
    await pair.switch(through)
    await stream.renew()
    assert stream.lost_reply
    own, _ = await stream.read_own("0")
    assert [one for one, _ in own] == ids
    await stream.ack({COMMITTED: ids[:2]})
    assert texts(await pair.second.hgetall(USUAL.held)) == {"w-0": ids[2]}


@pytest.mark.parametrize("first", ["a renewal", "the ack"])
async def test_what_was_read_is_told_to_the_new_master_too(pair: Pair, through: Redis, first: str) -> None:
    """Else what it knows as read and acked looks like skipped by XGROUP SETID, and is given out again."""
    stream = WorkerStream(through, consumer_id="w")
    await stream.acquire()
    ids = await add(pair.first, 5)
    assert [one for one, _ in await stream.read(100)] == ids
    await pair.apart()
    await stream.tell_held()  # the new master does not get it
    await pair.switch(through)
    if first == "a renewal":
        await stream.renew()
    assert await stream.ack({COMMITTED: ids}) == 5
    await stream.tell_held()
    for _ in range(2):
        await stream.give_skipped()
    assert await pending(pair.second) == []
    assert await counted(pair.second) == {"committed": 5}


async def test_a_connection_in_use_that_leads_to_the_old_master_is_left(pair: Pair, through: Redis) -> None:
    """Neither is anything sent on it, nor is the reply believed that it waited for."""
    lineage = lineage_of(through)
    pool: Any = through.connection_pool
    first, second, third = [await pool.get_connection() for _ in range(3)]
    await third.send_command("XREAD", "BLOCK", 0, "STREAMS", STREAM, "$")
    await pair.apart()
    await pair.switch()
    await first.disconnect()
    with pytest.raises(LostConnection, match="another server"):
        await first.connect()
    await first.connect()
    assert lineage.changes == 1
    with pytest.raises(LostConnection, match="another server"):
        await second.send_command("SET", "told", "1")
    assert await pair.first.get("told") is None
    await add(pair.first, 1)
    with pytest.raises(LostConnection, match="another server"):
        await third.read_response()
    for one in (second, third):
        await one.connect()
    assert lineage.changes == 1
    for one in (first, second, third):
        await pool.release(one)


async def test_what_was_made_up_for_the_old_master_is_not_sent_to_the_new_one(pair: Pair, through: Redis) -> None:
    """Killed between the two, a worker would hold for good what it was never given there: the group would go back."""
    stream = WorkerStream(through, consumer_id="w")
    await stream.acquire()
    await pair.apart()
    ids = await add(pair.first, 5)
    assert [one for one, _ in await stream.read(100)] == ids
    await pair.switch()
    await through.connection_pool.disconnect()
    with pytest.raises(StreamUnavailable):
        await stream.ack({COMMITTED: ids[:2]})
    assert await pair.second.hgetall(USUAL.held) == {}
    assert await stream.ack({COMMITTED: ids[:2]}) == 0
    assert await pair.second.hgetall(USUAL.held) == {}


async def test_a_group_does_not_go_forward_to_what_a_dead_worker_held_elsewhere(pair: Pair, through: Redis) -> None:
    dead = WorkerStream(through, consumer_id="dead")
    await dead.acquire()
    ids = await add(pair.first, 2)
    await asyncio.sleep(0.01)
    ids += await add(pair.first, 3)
    await pair.apart()
    await pair.second.hset(USUAL.held, "dead-0", ids[3])  # of a release that told it
    await pair.second.delete(USUAL.consumer_lease("dead-0"))
    async with connect(pair.url) as client:
        await pair.switch()
        heir = WorkerStream(client, consumer_id="heir")
        await heir.acquire()
        await heir.claim("dead-0", idle_ms=0)
        assert [one for one, _ in await heir.read(10)] == ids


async def test_no_idle_connection_leads_to_the_old_master(pair: Pair, through: Redis) -> None:
    """What is told to it is told to nobody."""
    pool: Any = through.connection_pool
    first, second = await pool.get_connection(), await pool.get_connection()
    await pool.release(second)
    await pair.apart()
    await pair.switch()
    await first.disconnect()
    with pytest.raises(LostConnection):
        await first.connect()
    await through.set("told", "1")  # by the second one
    await pool.release(first)
    assert await pair.second.get("told") == b"1"


async def test_a_restart_from_the_disk_is_noticed(redis_server_of_its_own: EmbeddedRedis) -> None:
    async with connect(redis_server_of_its_own.url) as redis:
        stream = WorkerStream(redis, consumer_id="w")
        await stream.acquire()
        await redis.connection_pool.disconnect()
        await stream.read(1)
        assert not stream.lost_reply  # the same server, on another connection
        await asyncio.to_thread(redis_server_of_its_own.kill)
        await asyncio.to_thread(redis_server_of_its_own.start)
        await asyncio.sleep(0.1)
        with pytest.raises(StreamUnavailable, match="started again"):
            await stream.read(1)
        await stream.read(1)
        assert stream.lost_reply


@pytest.fixture
async def redis_server_of_its_own(server_dir: Path) -> AsyncIterator[EmbeddedRedis]:
    with RedisUnderTest(server_dir) as server:
        yield server


async def test_a_server_that_does_not_say_what_it_is_works_all_the_same(pair: Pair) -> None:
    await pair.first.acl_setuser("mute", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-info"])
    async with connect(pair.url.replace("redis://", "redis://mute:x@")) as redis:
        assert await redis.ping()


async def test_what_another_acks_its_first_owner_holds_no_longer(
    pair: Pair, through: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Adopted on the old master; on the new one it is pending for the dead one, and acked by who adopted it."""
    dead = WorkerStream(through, consumer_id="dead")
    await dead.acquire()
    ids = await add(pair.first, 5)
    assert [one for one, _ in await dead.read(100)] == ids
    await dead.tell_held()
    await pair.apart()
    await pair.first.delete(USUAL.consumer_lease("dead-0"))
    heir = WorkerStream(through, consumer_id="heir")
    await heir.acquire()
    assert [one for one, _ in (await heir.claim("dead-0", idle_ms=0)).entries] == ids
    await pair.switch(through)
    stored = {COMMITTED: ids[:1], Tally("nothing_to_store", "#commit"): ids[1:3]}  # two counts, one script
    assert await heir.ack(stored) == 3
    assert texts(await pair.second.hgetall(USUAL.held)) == {"dead-0": ids[3]}
    assert await heir.set_aside([SetAside(ids[3], {b"data": b"{}"}, Reason.BAD_JSON, "")], now_ms=1) == 1
    assert texts(await pair.second.hgetall(USUAL.held)) == {"dead-0": ids[4]}
    assert await heir.ack({COMMITTED: ids[4:]}) == 1
    assert texts(await pair.second.hgetall(USUAL.held)) == {}
    await pair.second.delete(USUAL.consumer_lease("dead-0"))
    with caplog.at_level(logging.WARNING):
        await heir.claim("dead-0", idle_ms=0)
    assert caplog.messages == []


async def test_what_the_old_master_gave_is_not_missed_on_the_new_one(pair: Pair, through: Redis) -> None:
    """Entries that the new one never had: the numbers in their ids say nothing of what is there."""
    stream = WorkerStream(through, consumer_id="w")
    await stream.acquire()
    await pair.first.set(USUAL.tail, "1-1")
    for entry_id in ("1-1", "1-2"):
        await pair.first.xadd(STREAM, {"data": "{}"}, id=entry_id)
    assert len(await stream.read(100)) == 2
    await stream.tell_held()
    await pair.apart()
    for entry_id in ("2-0", "2-1"):  # another reader's, which begins at 0
        await pair.first.xadd(STREAM, {"data": "{}"}, id=entry_id)
    assert len(await stream.read(100)) == 2
    await pair.switch(through)
    for entry_id in ("3-3", "3-4"):
        await pair.second.xadd(STREAM, {"data": "{}"}, id=entry_id)
    await stream.renew()
    assert [one for one, _ in await stream.read(100)] == ["3-3", "3-4"]
    await stream.tell_held()
    assert sorted(one[19:] for one in texts(await pair.second.hgetall(USUAL.reads))) == [
        "1-00000000000000000001",
        "3-00000000000000000003",
    ]
    for _ in range(3):
        await stream.give_skipped()
        await asyncio.sleep(0.5)
    assert not await pair.second.exists(USUAL.go_back)


async def test_what_ends_is_told_to_the_new_master_however_long_ago_it_was_given(pair: Pair, through: Redis) -> None:
    """Acked there, it would look as if nobody had been given it."""
    dead, heir = WorkerStream(through, consumer_id="dead"), WorkerStream(through, consumer_id="heir")
    await dead.acquire()
    await heir.acquire()
    ids = await add(pair.first, 5)
    await pair.first.xreadgroup(GROUP, "dead-0", {STREAM: ">"}, count=5)
    await pair.apart()
    await pair.first.delete(USUAL.consumer_lease("dead-0"))
    assert [one for one, _ in (await heir.claim("dead-0", idle_ms=0)).entries] == ids
    await heir.tell_held()
    late = await add(pair.first, 1)  # which the new one never gets
    assert [one for one, _ in await heir.read(10)] == late
    await pair.switch(through)
    await heir.tell_held()
    assert await heir.ack({COMMITTED: ids + late}) == 5
    assert sorted(texts(await pair.second.hgetall(USUAL.reads))) == sorted(map(padded, ids))
    for _ in range(2):
        await heir.give_skipped()
        await asyncio.sleep(1.1)
    assert await pending(pair.second) == []


def padded(entry_id: str) -> str:
    ms, number = entry_id.split("-")
    return f"{int(ms):020}-{int(number):020}"


async def test_a_replica_is_not_taken_for_the_master_that_it_was(pair: Pair) -> None:
    """Sentinel may not know yet; who only reads would stay with what is no longer true."""

    class Names:
        async def discover_master(self, _name: str) -> tuple[str, int]:
            return "127.0.0.1", pair.ports[1]

        async def aclose(self) -> None:
            pass

    async with connect("redis+sentinel://127.0.0.1:1/events") as client:
        pool: Any = client.connection_pool
        pool.sentinel_manager = Names()
        with pytest.raises(LostConnection, match="no master any more"):
            await client.get("a")
        await pair.apart()
        assert await client.get("a") is None


async def test_of_commands_that_wait_for_a_connection_none_is_sent_to_another_server(
    pair: Pair, through: Redis
) -> None:
    """The first of them finds it out; the others were made up for the old one as well."""
    await asyncio.gather(*(through.set("told", number) for number in range(3)))
    await pair.apart()
    pool = through.connection_pool
    await pair.switch()
    await pool.disconnect()
    found = await asyncio.gather(*(through.set("told", "by the old one") for _ in range(3)), return_exceptions=True)
    assert [str(one) for one in found] == ["it is another server than before, or was started again"] * 3
    assert await pair.second.get("told") != b"by the old one"
    assert await through.set("told", "by the new one")
