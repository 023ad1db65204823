"""PostgreSQL goes back: what it lost comes again from stream and relay, or is a recorded gap."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from fastworker.config import Config
from fastworker.edge.embedded import EmbeddedPostgres, free_port
from fastworker.event import Commit
from fastworker.event.entry import decode_entry
from fastworker.reader import reader as reader_module
from fastworker.reader.reader import run_reader
from fastworker.simulator.relay import SimRelay
from fastworker.simulator.repo import Clock, Repo, SimFrame
from fastworker.store.migrate import migrate
from fastworker.store.store import Store
from fastworker.stream.client import connect
from fastworker.stream.ids import id_order
from fastworker.stream.keys import GROUP, USUAL
from fastworker.table.batch import Batch, Progress
from fastworker.table.mapper import map_commit
from fastworker.worker import worker as worker_module
from fastworker.worker.failover import Failover
from tests.e2e.house import House
from tests.runs import usually
from tests.servers import PostgresUnderTest, connected

CID = "bafyreiak664675wz3p7tvpu3eos35tw33b4dfhaod3jt63lat3sw7ralge"
POST = f"at://did:plc:{'b' * 24}/app.bsky.feed.post/3k"
STREAM = "firehose:events"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "MAINTAIN_S", 0.2)
    monkeypatch.setattr(worker_module, "LOOK_S", 0.2)
    monkeypatch.setattr(reader_module, "TICK_S", 0.2)


def likes() -> Iterator[SimFrame]:
    clock = Clock()
    repo = Repo(f"did:plc:{'a' * 24}", clock)
    for number in range(10_000):
        subject = {"uri": f"{POST}{number:011d}", "cid": CID}  # one like of a post and account
        record = {"$type": "app.bsky.feed.like", "subject": subject, "createdAt": clock.iso()}
        yield repo.commit([("create", f"app.bsky.feed.like/3k{number:011d}", record)])


class Pipeline:
    """Relay, reader and worker on a PostgreSQL that can be replaced."""

    def __init__(self, redis: Redis, redis_url: str, postgres: EmbeddedPostgres, relay: SimRelay) -> None:
        self.redis = redis
        self.relay = relay
        self.house = House(redis, redis_url, postgres.url)
        self._postgres = postgres
        self._frames = likes()
        self.sent = 0

    async def send(self, count: int) -> None:
        self.relay.emit(*(next(self._frames) for _ in range(count)))
        self.sent += count

    async def likes(self) -> int:
        async with connected(self._postgres.url) as db:
            return int(await db.fetchval("SELECT count(*) FROM likes"))

    async def stored(self) -> None:
        """Everything is in the tables, finished, trimmed, and remembered with its progress."""
        async with asyncio.timeout(60):
            while await self.likes() < self.sent or await self.redis.xlen(STREAM) > 5:
                await asyncio.sleep(0.05)
            last = (await self.redis.xinfo_stream(STREAM))["last-generated-id"].decode()
            while not await self.is_remembered(last):
                await self.send(1)  # progress goes with a flush
                await asyncio.sleep(0.3)
            while await self.likes() < self.sent:
                await asyncio.sleep(0.05)

    async def is_remembered(self, entry_id: str) -> bool:
        text = await self.redis.get(USUAL.database)
        known = json.loads(text) if text else {}
        return bool(known.get("written")) and id_order(known["entry_id"] or "0") >= id_order(entry_id)


@contextlib.asynccontextmanager
async def running(redis_url: str, postgres: EmbeddedPostgres) -> AsyncIterator[Pipeline]:
    redis = connect(redis_url)
    async with SimRelay(start="oldest") as relay:
        one = Pipeline(redis, redis_url, postgres, relay)
        stop = asyncio.Event()
        settings = Config(relay_urls=(relay.url,), redis_url=redis_url)
        async with one.house.worker():
            reader = asyncio.create_task(run_reader(settings, stop))
            try:
                await relay.connected()
                yield one
                stop.set()
                async with asyncio.timeout(60):
                    await reader
            finally:
                reader.cancel()
                await asyncio.wait([reader])
    await redis.aclose()


def replace(postgres: EmbeddedPostgres, backup: Path) -> None:
    owner, group = postgres.files.owner(), postgres.files.group()
    shutil.rmtree(postgres.files)
    shutil.copytree(backup, postgres.files)
    for path in (postgres.files, *postgres.files.rglob("*")):
        shutil.chown(path, owner, group)


@pytest.mark.parametrize("how", usually(["restored", "promoted"], "promoted"))
async def test_what_a_postgresql_that_went_back_has_lost_comes_again(
    how: str, server_dir: Path, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    postgres = PostgresUnderTest(server_dir / "postgres", port=free_port(), durable=False)
    with postgres:
        await migrate(postgres.url)
        async with running(redis_url, postgres) as one:
            await one.send(200)
            await one.stored()
            early = one.sent
            postgres.stop()
            shutil.copytree(postgres.files, server_dir / "backup")
            postgres.start()
            await one.send(200)
            await one.stored()
            assert await one.redis.xlen(STREAM) < 100  # the stream does not hold what will be lost
            postgres.kill()
            replace(postgres, server_dir / "backup")
            if how == "promoted":
                (postgres.files / "standby.signal").touch()
                shutil.chown(postgres.files / "standby.signal", postgres.files.owner(), postgres.files.group())
            postgres.start()
            if how == "promoted":
                async with connected(postgres.url) as db:
                    assert await db.fetchval("SELECT count(*) FROM likes") <= early
                    await db.execute("SELECT pg_promote()")
            await one.send(50)
            await one.stored()
            assert await one.likes() == one.sent
            assert await one.redis.llen(USUAL.gaps) == 0
            assert not await one.redis.exists(USUAL.go_back)
    assert caplog.text.count("PostgreSQL went back (") == 1


async def test_what_another_server_never_had_and_nobody_keeps_is_a_gap(server_dir: Path, redis_url: str) -> None:
    postgres = PostgresUnderTest(server_dir / "postgres", port=free_port(), durable=False)
    with postgres:
        await migrate(postgres.url)
        async with running(redis_url, postgres) as one:
            await one.send(200)
            await one.stored()
            postgres.kill()
            shutil.rmtree(postgres.files)
            postgres.start()
            await migrate(postgres.url)
            await one.send(50)
            async with asyncio.timeout(60):
                while await one.likes() < 50 or not await one.redis.llen(USUAL.gaps):
                    await asyncio.sleep(0.05)
            [gap] = await one.redis.lrange(USUAL.gaps, 0, -1)
            assert json.loads(gap)["reason"] == "store_lost"
            assert json.loads(gap)["after"] is None


async def test_a_progress_found_out_before_a_new_session_is_not_written(postgres_url: str, pg: Any) -> None:
    store = await Store.connect(postgres_url)
    try:
        for session, expected in ((store.sessions - 1, 0), (store.sessions, 1)):
            batch = Batch()
            frame = next(likes()).event
            assert frame is not None
            data = {"repo": frame["repo"], "ops": frame["ops"]}
            event = decode_entry({b"type": b"commit", b"data": json.dumps(data).encode(), b"seq": b"1"})
            assert isinstance(event, Commit)
            batch.put(map_commit(event, 0))
            batch.settle("1-0", payload_bytes=0)
            batch.progress = Progress(STREAM, "w-0", 1, "1-0", session)
            await store.write(batch)
            assert await pg.fetchval("SELECT count(*) FROM fastworker.progress") == expected
    finally:
        await store.close()


async def test_a_progress_that_a_worker_takes_back_is_no_restore(redis_url: str, postgres_url: str, pg: Any) -> None:
    """Redis went back (a replica took over): what is pending there again is behind what was noted before."""
    await pg.execute(
        "INSERT INTO fastworker.progress (stream, consumer, seq, entry_id, stored_at) "
        "VALUES ($1, 'w-0', 100, '100-0', now() - interval '1 hour')",
        STREAM,
    )
    async with connect(redis_url) as redis:
        failover = Failover(redis, STREAM, GROUP)

        async def known() -> str:
            return str(json.loads(await redis.get(USUAL.database) or b"{}").get("entry_id"))

        for entry_id in ("100-0", "60-0", "60-0"):
            await pg.execute(
                "UPDATE fastworker.progress SET entry_id = $1, stored_at = now() WHERE entry_id <> $1", entry_id
            )
            await failover.meet(pg)
            assert await known() == entry_id
            assert not await redis.exists(USUAL.go_back)
        # An earlier state of the table, and who was given what since: nobody need go back a second time.
        await pg.execute("UPDATE fastworker.progress SET entry_id = '40-0', stored_at = now() - interval '1 minute'")
        await redis.hset(USUAL.held, mapping={"w-0": "30-0", "w-1": "50-0"})
        await redis.xadd(STREAM, {"type": "commit", "data": "{}", "seq": "1"}, id="70-0")
        await redis.xgroup_create(STREAM, GROUP, id="70-0")
        await failover.meet(pg)
        assert await known() == "40-0"
        assert await redis.hgetall(USUAL.held) == {b"w-0": b"30-0"}
        [group] = await redis.xinfo_groups(STREAM)
        assert group["last-delivered-id"] == b"40-0"
