"""Each hazard that `fastworker check` knows and a real server can be made to have: seen there, and not elsewhere."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest
from redis.asyncio import Redis

from fastworker.commands import check as checks
from fastworker.commands import grants as rights
from fastworker.config import parse_config
from fastworker.edge.embedded import EmbeddedPostgres, EmbeddedRedis, free_port
from fastworker.errors import ExitCode, Unreachable
from fastworker.store.migrate import migrate
from fastworker.store.tuning import Server
from tests import replies
from tests.rig.histories import random_history, to_entry
from tests.rig.proxy import Proxy

STREAM, GROUP = "firehose:events", "firehose-processors"


class House:
    """A healthy setup: durable Redis, a running reader and worker as far as Redis can tell."""

    def __init__(self, redis: Redis, redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.redis = redis
        self.env = {"REDIS_URL": redis_url}
        self._capsys = capsys
        self.tuning: list[str] = []
        """What it said of the server's settings, which are a new server's in most tests."""

    async def begin(self) -> None:
        await self.redis.flushall()
        for event in random_history(1, 20).events:
            await self.redis.xadd(STREAM, replies.to_add(to_entry(event)))
        await self.redis.xgroup_create(STREAM, GROUP, id="0")
        await self.redis.set("fastworker:consumer:python-worker-0", "token")
        await self.redis.sadd("fastworker:consumers", "python-worker-0")
        found = replies.read(await self.redis.xreadgroup(GROUP, "python-worker-0", {STREAM: ">"}))
        await self.redis.xack(STREAM, GROUP, *(entry_id for entry_id, _ in found))
        await self.redis.set("fastworker:reader", "token")
        await self.redis.set("firehose:status", json.dumps({"connected": True, "reader": "fastworker"}))
        await self.redis.hset("fastworker:reader:stats", "last_frame_at", str(time.time()))
        await self.redis.set("firehose:python_cursor", "31527015322")

    async def check(self, **env: str) -> list[str]:
        """What is not in order, as `verdict about: sentence`."""
        code = await checks.check(parse_config({**self.env, **env}), as_json=True)
        findings = json.loads(self._capsys.readouterr().out)
        failed = any(one["verdict"] == "fail" for one in findings)
        assert code is (ExitCode.NO if failed else ExitCode.DONE)
        self.tuning = [one["sentence"] for one in findings if one["about"] == "tuning"]
        wrong = [one for one in findings if one["verdict"] != "ok" and one["about"] != "tuning"]
        return [f"{one['verdict']} {one['about']}: {one['sentence']}" for one in wrong]

    async def says(self, verdict: str, words: str, **env: str) -> None:
        """That one hazard, and no other."""
        found = [one for one in await self.check(**env) if "DATABASE_URL is not set" not in one]
        assert len(found) == 1, found
        assert found[0].startswith(f"{verdict}: "), found
        assert words in found[0], found

    async def is_well(self, **env: str) -> None:
        assert [one for one in await self.check(**env) if "DATABASE_URL is not set" not in one] == []


@pytest.fixture(scope="module")
def durable(servers_dir: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(servers_dir / "checked", port=0, settings={"repl-diskless-sync-delay": "0"}) as server:
        yield server


@pytest.fixture
async def house(
    durable: EmbeddedRedis, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[House]:
    monkeypatch.setattr("fastworker.store.admin.LOOKS", 2)  # whom a test lets write holds on to it
    async with Redis.from_url(durable.url) as redis:
        house = House(redis, durable.url, capsys)
        await house.begin()
        yield house
        for name, value in SETTINGS.items():
            await redis.config_set(name, value)


SETTINGS = {"maxmemory-policy": "noeviction", "maxmemory": "0", "appendonly": "yes", "appendfsync": "everysec"}


async def test_settings_of_redis(house: House) -> None:
    await house.is_well()
    config_set = house.redis.config_set
    await config_set("maxmemory-policy", "allkeys-lru")
    await house.says("fail redis", "CONFIG SET maxmemory-policy noeviction")
    await config_set("maxmemory-policy", "volatile-lru")
    await house.says("warn redis", "leases may vanish")
    await config_set("maxmemory-policy", "noeviction")
    used = (await house.redis.info("memory"))["used_memory"]
    await config_set("maxmemory", int(used * 1.05))
    await house.says("warn redis", "% of maxmemory is in use")
    await config_set("maxmemory", "0")
    await config_set("appendfsync", "no")
    await house.says("warn redis", "Set it to everysec")
    await config_set("appendfsync", "everysec")
    await config_set("appendonly", "no")
    await house.says("warn redis", "a crash loses stream, group and cursor")
    await config_set("save", "3600 1")
    await house.says("warn redis", "a crash loses all since the last snapshot")
    await config_set("save", "")
    await config_set("appendonly", "yes")
    await house.is_well()


async def test_a_stream_that_cannot_grow_to_its_limit(house: House) -> None:
    pipe = house.redis.pipeline(transaction=False)
    for event in random_history(2, 1_500).events:
        pipe.xadd(STREAM, replies.to_add(to_entry(event)))
    await pipe.execute()
    found = replies.read(await house.redis.xreadgroup(GROUP, "python-worker-0", {STREAM: ">"}))
    await house.redis.xack(STREAM, GROUP, *(entry_id for entry_id, _ in found))
    await house.redis.config_set("maxmemory", "100mb")
    await house.says("warn redis", "maxmemory is 0.1 GB: set REDIS_MAX_STREAM_LEN to ")
    await house.is_well(REDIS_MAX_STREAM_LEN="50000")
    await house.is_well(FASTWORKER_STREAM_BYTES_MAX="50mb")


async def test_a_replica(house: House, durable: EmbeddedRedis, server_dir: Path) -> None:
    settings = {"replicaof": f"127.0.0.1 {durable.port}"}
    with EmbeddedRedis(server_dir, settings=settings) as server:
        async with Redis.from_url(server.url) as redis, asyncio.timeout(60):
            while (await redis.info("replication"))["master_link_status"] != "up":
                await asyncio.sleep(0.05)
        await house.says("fail redis", "This is a replica: set REDIS_URL to the master", REDIS_URL=server.url)


async def test_a_cluster(server_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with EmbeddedRedis(server_dir, settings={"cluster-enabled": "yes"}) as server:
        async with Redis.from_url(server.url) as redis:
            await redis.cluster("addslotsrange", 0, 16383)
            async with asyncio.timeout(60):
                while (await redis.cluster("info"))["cluster_state"] != "ok":
                    await asyncio.sleep(0.05)
            await House(redis, server.url, capsys).says("fail redis", "set REDIS_URL to redis+cluster://")


async def test_a_save_that_fails(server_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with EmbeddedRedis(server_dir, settings={"dbfilename": "taken"}) as server:
        async with Redis.from_url(server.url) as redis:
            (server.files / "taken").mkdir()
            await redis.bgsave()
            async with asyncio.timeout(60):
                while (await redis.info("persistence"))["rdb_last_bgsave_status"] != "err":
                    await asyncio.sleep(0.05)
            await House(redis, server.url, capsys).says("fail redis", "The last save failed")


async def test_other_workers_on_the_group(house: House) -> None:
    await house.redis.xgroup_createconsumer(STREAM, GROUP, "python-worker-3")
    await house.says("warn stream", "Other workers are active in group firehose-processors: python-worker-3.")
    await house.says("warn stream", "CONSUMER_ID=python-worker is theirs too")
    await house.redis.xgroup_createconsumer(STREAM, GROUP, "worker-0-p4")
    await house.says("warn stream", "TypeScript workers also take entries")
    said = await house.check(FASTWORKER_STREAM_FORMAT="native")
    assert any(
        one.startswith("fail stream: FASTWORKER_STREAM_FORMAT is native, which they cannot read") for one in said
    )
    await house.redis.xadd(STREAM, {"n": b"\x01"})
    await house.redis.xreadgroup(GROUP, "python-worker-0", {STREAM: ">"}, noack=True)
    said = await house.check()
    assert any(one.startswith("fail stream: The stream holds native entries") for one in said)


async def test_another_group_and_a_form_that_it_cannot_read(house: House) -> None:
    await house.redis.xgroup_create(STREAM, "osprey-consumers", id="$")
    await house.redis.xgroup_createconsumer(STREAM, "osprey-consumers", "osprey")
    await house.is_well()
    await house.says("fail stream", "osprey-consumers read the stream too", FASTWORKER_STREAM_FORMAT="frame")


async def test_a_group_that_holds_the_stream_back(house: House) -> None:
    await house.redis.delete(STREAM)
    hour_ago = int(time.time() * 1000) - 3_600_000
    await house.redis.xadd(STREAM, {"type": "commit", "data": "{}", "seq": "1"}, id=f"{hour_ago}-0")
    await house.redis.xgroup_create(STREAM, GROUP, id="$")
    await house.redis.xgroup_create(STREAM, "forgotten", id="0")
    await house.says("warn stream", "FASTWORKER_IGNORE_GROUPS=forgotten")
    await house.is_well(FASTWORKER_IGNORE_GROUPS="forgotten")


async def test_entries_that_were_trimmed(house: House) -> None:
    """Pending ones, and ones that nobody was ever given: what a reader with MAXLEN does."""
    for event in random_history(3, 30).events:
        await house.redis.xadd(STREAM, replies.to_add(to_entry(event)))
    await house.redis.xreadgroup(GROUP, "python-worker-0", {STREAM: ">"}, count=10)
    await house.redis.xtrim(STREAM, maxlen=15, approximate=False)
    found = await house.check()
    assert any("10 of the oldest pending entries are not on the stream any more" in one for one in found), found
    assert any("5 entries were trimmed before group firehose-processors was given them" in one for one in found), found
    assert len([one for one in found if "DATABASE_URL" not in one]) == 2, found


async def test_pending_entries_that_nobody_works_at(house: House) -> None:
    await house.redis.xadd(STREAM, replies.to_add(to_entry(random_history(1, 1).events[0])))
    found = replies.read(await house.redis.xreadgroup(GROUP, "worker-9-p0", {STREAM: ">"}))
    [(entry_id, _)] = found
    await house.redis.xclaim(STREAM, GROUP, "worker-9-p0", 0, [entry_id], idle=3_600_000, justid=True)
    said = await house.check()
    assert any("since 60 minutes: look at the worker's log" in one for one in said), said


async def test_nobody_works(house: House) -> None:
    await house.redis.xadd(STREAM, {"type": "commit", "data": "{}", "seq": "1"})
    await house.redis.xgroup_delconsumer(STREAM, GROUP, "python-worker-0")
    await house.says("warn stream", "1 entry waits and no worker is at work")


async def test_readers(house: House) -> None:
    await house.redis.hset("fastworker:reader:stats", "last_frame_at", str(time.time() - 1_200))
    await house.says("warn stream", "the last frame came 20 minutes ago")
    await house.redis.set("firehose:status", json.dumps({"connected": False}))
    await house.says("warn stream", "not connected to its relay")
    await house.redis.delete("fastworker:reader")
    await house.says("warn stream", "Another reader than fastworker's is at work: it trims with MAXLEN")
    await house.redis.set("firehose:status", json.dumps({"connected": True, "reader": "fastworker"}))
    await house.says("warn stream", "No reader is at work")  # ours, which was stopped less than ten seconds ago
    await house.redis.delete("firehose:status")
    await house.says("warn stream", "No reader is at work")
    await house.begin()
    await house.redis.set("firehose:python_cursor", "thirteen")
    await house.says("fail stream", "'thirteen', which is no cursor")
    await house.begin()
    await house.redis.lpush("fastworker:gaps", "{}")
    await house.says("warn stream", "1 stretch was never given by the relay")


async def test_entries_of_the_old_reader(house: House) -> None:
    record = {"py_type": "app.bsky.feed.post", "$type": "app.bsky.feed.post", "text": "x", "created_at": "2026"}
    op = {"action": "create", "path": "app.bsky.feed.post/3k", "cid": "b", "record": record}
    await house.redis.xadd(STREAM, {"type": "commit", "data": json.dumps({"repo": "did:plc:x", "ops": [op]}), "seq": 1})
    await house.redis.xreadgroup(GROUP, "python-worker-0", {STREAM: ">"}, noack=True)
    await house.says("warn stream", "the old Python reader's")


async def test_a_key_that_is_no_stream_and_a_clock_that_nobody_keeps(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    monkeypatch.setattr(
        "fastworker.commands.check.time.time", lambda: now() + 90
    )  # this machine's clock, against the server's
    await house.says("warn redis", "s behind this machine's: run NTP on both")
    monkeypatch.undo()
    await house.redis.set("words", "x")
    await house.says("fail stream", "words is a string, not a stream", REDIS_STREAM_KEY="words")


async def test_a_redis_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastworker.stream.admin.READY_TIMEOUT_S", 0.2)

    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel connects, and nobody answers
        port = silent.getsockname()[1]
        assert await checks.check(parse_config({"REDIS_URL": f"redis://127.0.0.1:{port}"}), as_json=True) is ExitCode.NO
        sentences = [one["sentence"] for one in json.loads(capsys.readouterr().out)]
        assert any("Redis did not answer in time" in sentence for sentence in sentences)


# --- PostgreSQL


async def test_a_second_writer_that_does_not_read_the_stream(
    house: House, postgres_url: str, pg: asyncpg.Connection
) -> None:
    """The old compose file's python-backfill-worker: every event reaches the tables twice."""
    env = {"DATABASE_URL": postgres_url}
    superuser = ["warn postgresql: postgres is a superuser", "warn postgresql: fsync is off"]

    async def found() -> list[str]:
        return [one for one in await house.check(**env) if not any(one.startswith(usual) for usual in superuser)]

    assert await found() == []
    async with pg.transaction():
        await pg.execute("INSERT INTO likes (uri, user_did, post_uri, created_at) VALUES ('u', 'd', 'p', now())")
        assert await found() == [], "the API process writes likes too"
        await pg.execute("INSERT INTO post_aggregations (post_uri, like_count) VALUES ('p', 1)")
        said = await found()
        assert len(said) == 1, said
        assert said[0].startswith("fail postgresql: Somebody else writes post_aggregations or feed_items")
        assert "a client as postgres" in said[0]
        await house.redis.xgroup_createconsumer(STREAM, GROUP, "python-worker-3")
        said = await found()
        assert len(said) == 1, said
        assert said[0].startswith("warn stream: Other workers are active"), "those are explained"


async def test_the_schema_and_what_an_earlier_system_left(
    house: House, postgres_url: str, pg: asyncpg.Connection
) -> None:
    async def said(words: str) -> bool:
        return any(words in one for one in await house.check(DATABASE_URL=postgres_url))

    await pg.execute("INSERT INTO firehose_cursor (service, cursor) VALUES ('firehose', '12345')")
    await pg.execute(
        "INSERT INTO users (did, handle, avatar_url) VALUES ('did:plc:a', 'a', '01551220aa'), ('did:plc:b', 'b', 'bafk')"
    )
    assert not await said("firehose_cursor")
    assert await said("1 of 2 avatars")
    await house.redis.delete("firehose:python_cursor")
    assert await said("The TypeScript reader stopped at 12345")
    await pg.execute("SELECT setval('notifications_id_seq', 1600000000)")
    assert await said("warn postgresql: The ids of notifications.id are used up to 75 %: ALTER SEQUENCE")
    await pg.execute("SELECT setval('notifications_id_seq', 2147483647)")
    assert await said(
        "fail postgresql: The ids of notifications.id are used up: ALTER SEQUENCE notifications_id_seq AS"
    )
    await pg.execute("ALTER SEQUENCE notifications_id_seq AS bigint")
    assert await said("ids of notifications.id are used up"), "the column is as narrow as it was"
    await pg.execute("ALTER TABLE notifications ALTER COLUMN id TYPE bigint")
    assert not await said("are used up")
    await pg.execute("DROP INDEX unique_like_user_post")
    assert await said("Table likes has no unique index on (post_uri, user_did): CREATE UNIQUE INDEX CONCURRENTLY")
    await pg.execute("CREATE UNIQUE INDEX CONCURRENTLY ON likes (post_uri, user_did)")
    assert not await said("no unique index")
    await pg.execute("DROP TABLE quotes")
    assert await said("fail postgresql: Table quotes is missing: let the AppView make its schema")


async def test_settings_of_postgresql(house: House, server_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"max_connections": "20", "autovacuum": "off", "synchronous_commit": "off"}
    with EmbeddedPostgres(server_dir, durable=False, settings=settings, port=free_port()) as server:
        await migrate(server.url)
        owner = await asyncpg.connect(server.url, timeout=10)
        await owner.execute("CREATE ROLE worker LOGIN CONNECTION LIMIT 6")
        url = server.url.replace("postgres@", "worker@")

        async def said(words: str, **env: str) -> bool:
            return any(words in one for one in await house.check(**{"DATABASE_URL": url, **env}))

        found = " ".join(await house.check(DATABASE_URL=url))
        for words in ("fsync is off", "autovacuum is off", "allows 6 connections"):
            assert words in found
        assert "lacks USAGE on schema fastworker" in found
        assert "Others hold" not in found
        assert "synchronous_commit" not in found, "the worker turns it on"
        assert await said("synchronous_commit is off, and FASTW", FASTWORKER_SYNCHRONOUS_COMMIT="keep")
        assert await said("DB_POOL_SIZE=30 exceeds max_connections", DB_POOL_SIZE="30")

        async def until_no_other() -> None:
            """A backend takes a moment to see that its client is gone."""
            clients = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
            async with asyncio.timeout(30):
                while await owner.fetchval(clients) > 1:
                    await asyncio.sleep(0.02)

        await until_no_other()
        others = [await asyncpg.connect(server.url, timeout=10) for _ in range(11)]
        assert await said("Others hold 12 of 17 connections", DATABASE_URL=server.url)
        assert await said("(12 by a client as postgres from 127.0.0.1)", DATABASE_URL=server.url)
        for other in others:
            await other.close(timeout=10)
        await until_no_other()
        own = [
            await asyncpg.connect(server.url, timeout=10, server_settings={"application_name": "fastworker"})
            for _ in range(8)
        ]
        assert not await said("Others hold", DATABASE_URL=server.url), "a worker that runs is not counted twice"
        for other in own:
            await other.close(timeout=10)
        now = time.time
        monkeypatch.setattr("fastworker.store.admin.time.time", lambda: now() - 60)
        heard = " ".join(await house.check(DATABASE_URL=url))
        assert re.search(r"Its clock is (59|60)\.\d s ahead of this machine's", heard)  # an answer takes a while
        monkeypatch.undo()
        await owner.execute(rights.sql("worker", "worker"))
        sentences = await house.check(DATABASE_URL=url, DB_POOL_SIZE="6")
        assert not [one for one in sentences if one.startswith("fail")], "what the worker's own role sees is enough"
        await owner.execute("ALTER ROLE worker SET default_transaction_read_only = on")
        assert await said("Transactions are read-only by default")
        await owner.close(timeout=10)


async def test_a_new_servers_settings_are_named_with_what_they_cost(house: House, postgres_url: str) -> None:
    await house.check(DATABASE_URL=postgres_url)
    names = ("shared_buffers", "max_wal_size", "checkpoint_timeout", "wal_compression", "post_aggregations")
    assert [sentence.split()[0] for sentence in house.tuning] == [*names]
    for sentence in house.tuning:
        assert re.search(r"Set \w+|migrate --tune", sentence), sentence
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert "of this machine's" in house.tuning[0], "the server is on it"
    wanted = re.search(r"Set (\d+)(GB|MB)", house.tuning[0])
    assert wanted is not None
    assert memory / 8 <= int(wanted[1]) << (30 if wanted[2] == "GB" else 20) <= max(memory / 4, 128 << 20) or (
        wanted[0] == "Set 8GB"
    )


def test_settings_that_fit_are_left_in_peace() -> None:
    fit: dict[str, tuple[int | str, str]] = {
        "shared_buffers": ((4 << 30) >> 13, "4GB"),
        "max_wal_size": (8_192, "8GB"),
        "checkpoint_timeout": (900, "15min"),
        "wal_compression": ("lz4", "lz4"),
    }
    gigabytes = 1 << 30
    for memory, disk in ((16 * gigabytes, 100 * gigabytes), (None, None), (512 << 20, gigabytes)):
        assert list(checks.postgres_settings(Server(fit, memory, disk))) == []
    small = fit | {"shared_buffers": ((128 << 20) >> 13, "128MB"), "max_wal_size": (1_024, "1GB")}
    assert [one.sentence.split()[0] for one in checks.postgres_settings(Server(small, 512 << 20, gigabytes))] == []
    said = [one.sentence for one in checks.postgres_settings(Server(small, 6 * gigabytes, 20 * gigabytes))]
    assert "Set 1GB, of this machine's 6.4 GB of memory" in said[0]
    assert "Set 4GB, of this machine's 21.5 GB of free disk" in said[1]
    elsewhere = [one.sentence for one in checks.postgres_settings(Server(small))]
    assert "Set 1GB, or more where its machine has four times that memory" in elsewhere[0]
    assert "Set 8GB, or more where" in elsewhere[1]


async def test_a_service_that_may_not_begin_leaves_nothing_at_work(redis_url: str) -> None:
    """Redis takes its time, PostgreSQL refuses: what asked Redis has ended, too."""
    before = asyncio.all_tasks()
    async with Proxy(redis_url.removeprefix("unix://")) as slow:
        slow.hold()
        urls = {
            "REDIS_URL": f"redis://127.0.0.1:{slow.port}",
            "DATABASE_URL": f"postgresql://nobody@127.0.0.1:{free_port()}/x",
        }
        with pytest.raises(Unreachable, match="PostgreSQL"):
            await checks.preflight(parse_config(urls), "worker")
        left = {task.get_name() for task in asyncio.all_tasks() - before if "preflight" in repr(task.get_coro())}
    assert not left
