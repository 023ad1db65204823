"""Tombstones are pruned; what they would have beaten is set aside, never revived. Real servers."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from fastworker.event import Action, Commit, Op
from fastworker.event.entry import encode_native
from fastworker.process.board import Heartbeats
from fastworker.store.store import Store
from fastworker.stream.client import connect
from fastworker.stream.consumer import WorkerStream
from fastworker.stream.keys import GROUP, USUAL
from fastworker.stream.members import Members
from fastworker.table.batch import Batch, Limits, Progress
from fastworker.worker import worker
from fastworker.worker.failover import Failover
from fastworker.worker.intake import Intake
from fastworker.worker.limits import DeadLetterLimit
from fastworker.worker.pipeline import Pipeline
from fastworker.worker.readers import Readers
from fastworker.worker.suspects import Quiet

KEY = "firehose:events"
ALICE = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"
NONE = timedelta(0)
NOW = datetime.now(UTC)
OLD = (NOW - timedelta(days=30)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
NEW = (NOW + timedelta(hours=1)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def commit(action: Action, rkey: str, seq: int, time: str, *, rev: bool = True, relay: str = "one") -> Commit:
    record = None if action == "delete" else {"$type": "app.bsky.feed.post", "text": "hi", "createdAt": OLD}
    op = Op(action, "app.bsky.feed.post", rkey, None if record is None else "bafyreia", None, record)
    tid = f"3k{seq:011d}".translate(str.maketrans("0189", "2345")) if rev else None
    return Commit(seq, ALICE, tid, time, [op], [], relay)


class Bench:
    def __init__(self, redis: Any, store: Store) -> None:
        self.redis, self.store = redis, store
        self.slot = Heartbeats(1)[0]
        self.slot.open("test")

    async def ingest(self, *events: Commit, recorded: bool = True) -> None:
        """Through a real stream and a pipeline that knows the ground as it is now, until all is acked."""
        stream = WorkerStream(self.redis, consumer_id="w", batch_size=10)
        await stream.acquire()
        intake = Intake(stream, self.slot, own_idle_ms=0)
        limit = DeadLetterLimit()
        pipeline = Pipeline(intake, stream, self.store, self.slot, limits=Limits(), dead_letters=limit)
        pipeline.follow(await self.store.entry_rules())
        before = self.slot.snapshot().acked
        for event in events:
            at = int(datetime.fromisoformat(event.time or "").timestamp() * 1000)
            await self.redis.xadd(KEY, dict(encode_native(event)) | ({b"at": at} if recorded else {}))
        stopping = asyncio.Event()
        task = asyncio.create_task(pipeline.run(stopping))
        async with asyncio.timeout(60):
            while self.slot.snapshot().acked < before + len(events) and not task.done():
                await asyncio.sleep(0.01)
            stopping.set()
            await task
        await stream.release()

    async def finish(self) -> None:
        """As if the group had finished everything until now."""
        batch = Batch()
        batch.progress = Progress(KEY, "w", 1, f"{int((NOW.timestamp() + 3600) * 1000)}-0")
        await self.store.write(batch)

    async def letters(self) -> list[bytes]:
        return [fields[b"reason"] for _, fields in await self.redis.xrange("firehose:dead-letters")]


@pytest.fixture
async def bench(redis_url: str, postgres_url: str) -> Any:
    redis = connect(redis_url)
    store = await Store.connect(postgres_url, pool_size=2)
    yield Bench(redis, store)
    await store.close()
    await redis.aclose()


async def posts(pg: asyncpg.Connection) -> set[str]:
    return {r[0].rsplit("/", 1)[1] for r in await pg.fetch("SELECT uri FROM public.posts")}


async def tombstones(pg: asyncpg.Connection) -> int:
    return int(await pg.fetchval("SELECT count(*) FROM fastworker.versions WHERE deleted"))


async def test_what_a_forgotten_delete_beat_is_set_aside_and_the_rest_goes_on(
    bench: Bench, pg: asyncpg.Connection
) -> None:
    await bench.ingest(commit("create", "kept", 1, OLD), commit("delete", "gone", 3, OLD))
    await bench.finish()
    assert await tombstones(pg) == 1
    assert await bench.store.prune(keep=NONE, notice=NONE) == 0  # announced
    assert await bench.store.prune(keep=NONE, notice=NONE) == 1  # and gone
    assert await tombstones(pg) == 0
    await pg.execute(
        "UPDATE fastworker.horizon SET pruned_until = pruned_until - interval '20 minutes'"
    )  # clocks differ
    await bench.ingest(
        commit("create", "gone", 2, OLD),
        commit("update", "kept", 4, OLD),
        commit("create", "late", 5, NEW),
        commit("delete", "late", 6, NEW),  # a delete needs no memory
    )
    assert await posts(pg) == {"kept"}  # and late was not refused: it was deleted
    assert await bench.letters() == [b"older_than_tombstones"]
    assert await pg.fetchval("SELECT commit_seq FROM public.posts") == "4"


@pytest.mark.parametrize("claim", [OLD, "0001-01-01T00:00:00Z", "2099-01-01T00:00:00Z"], ids=["late", "zero", "future"])
async def test_a_hosts_clock_sets_nothing_aside(bench: Bench, pg: asyncpg.Connection, claim: str) -> None:
    """The entry's id is of this minute, whatever the commit says."""
    await pg.execute("UPDATE fastworker.horizon SET pruned_until = now() - interval '1 day'")
    await bench.ingest(commit("create", "a", 1, claim), recorded=False)
    assert await posts(pg) == {"a"}
    assert await bench.letters() == []
    created_at = await pg.fetchval("SELECT created_at FROM posts")
    assert created_at.isoformat(timespec="milliseconds") + "Z" == OLD


async def test_a_tombstone_stays_while_it_is_young_unannounced_or_unfinished(
    bench: Bench, pg: asyncpg.Connection
) -> None:
    await bench.ingest(commit("delete", "gone", 3, OLD))
    for _ in range(2):
        assert await bench.store.prune(keep=NONE, notice=NONE) == 0  # nobody has finished anything
    await bench.finish()
    for _ in range(2):
        assert await bench.store.prune(keep=timedelta(days=1), notice=NONE) == 0
    for _ in range(2):
        assert await bench.store.prune(keep=NONE, notice=timedelta(hours=1)) == 0
    assert await tombstones(pg) == 1
    assert await bench.store.prune(keep=NONE, notice=NONE) == 1


@pytest.mark.parametrize("off", ["PostgreSQL", "Redis", "this machine", ""])
async def test_no_clock_moves_the_horizon_by_its_own_word(
    bench: Bench, pg: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, off: str
) -> None:
    """A clock that is ten days ahead would make every new record older than tombstones that are gone."""
    await bench.ingest(commit("delete", "gone", 3, OLD))
    await pg.execute("UPDATE fastworker.versions SET written_at = now() - interval '8 days' WHERE deleted")
    await bench.finish()
    members = Members(bench.redis, USUAL.stream, GROUP)
    wrong = datetime.now(UTC) + timedelta(days=10)

    async def ahead() -> datetime:
        return wrong

    class Ahead(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:  # noqa: ARG003
            return wrong

    match off:
        case "PostgreSQL":
            monkeypatch.setattr(bench.store, "now", ahead)
        case "Redis":
            monkeypatch.setattr(members, "time", ahead)
        case "this machine":
            monkeypatch.setattr(worker, "datetime", Ahead)
    for _ in range(2):
        await worker._prune(bench.slot, bench.store, members, [])
    moved = await pg.fetchval("SELECT pruned_until > '-infinity' FROM fastworker.horizon")
    told = bench.slot.snapshot().clocks
    if off:
        assert not moved
        assert told == f"clocks disagree: {off}{chr(39)}s is 240 hours ahead"
        monkeypatch.undo()
        await worker._prune(bench.slot, bench.store, members, [])  # it was set right
        moved = await pg.fetchval("SELECT pruned_until > '-infinity' FROM fastworker.horizon")
        told = bench.slot.snapshot().clocks
    assert moved
    assert told == ""


async def test_ids_that_are_ahead_are_told(bench: Bench) -> None:
    """Redis's clock was ten days ahead for a moment: ids never go back, so all that comes is dated too late."""
    await bench.redis.xadd(KEY, {"n": ""}, id=f"{int((datetime.now(UTC) + timedelta(days=10)).timestamp() * 1000)}-0")
    members = Members(bench.redis, USUAL.stream, GROUP)
    for told in ("the stream's ids are 240 hours ahead of Redis's clock", ""):
        await worker._prune(bench.slot, bench.store, members, [])
        assert bench.slot.snapshot().clocks.startswith(told)
        assert bool(bench.slot.snapshot().clocks) == bool(told)
        await bench.redis.delete(KEY)


async def test_all_clocks_of_a_machine_that_is_ahead_are_bounded_by_the_events(
    bench: Bench, pg: asyncpg.Connection
) -> None:
    await bench.ingest(commit("delete", "gone", 3, OLD))
    await pg.execute("UPDATE fastworker.versions SET written_at = now() - interval '8 days' WHERE deleted")
    await bench.finish()
    events = datetime.now(UTC) - timedelta(days=2)
    for _ in range(2):
        assert await bench.store.prune(notice=NONE, now=events) == 0
    assert await tombstones(pg) == 1
    assert await bench.store.prune(notice=NONE, now=datetime.now(UTC)) == 0  # announced
    assert await bench.store.prune(notice=NONE, now=events) == 1


async def test_a_second_relay_makes_seq_ambiguous(bench: Bench, pg: asyncpg.Connection) -> None:
    await bench.ingest(commit("create", "a", 1, NEW, rev=False))
    await bench.ingest(commit("create", "b", 2, NEW, relay="two"))
    assert (await bench.store.entry_rules()).ambiguous
    await bench.ingest(commit("create", "c", 3, NEW, rev=False), commit("create", "d", 4, NEW))
    assert await posts(pg) == {"a", "b", "d"}
    assert await bench.letters() == [b"ambiguous_seq"]


async def test_upkeep_that_fails_is_told_beside_what_succeeds(bench: Bench, pg: asyncpg.Connection) -> None:
    """There are tombstones to look at again all the time: that one of four parts gets on says nothing of the others."""

    def no_reader(number: int, partition: int) -> Any:
        raise AssertionError((number, partition))

    readers = Readers(Members(bench.redis, USUAL.stream, GROUP), Quiet(), no_reader, 1, 1_000)
    failover, failing = Failover(bench.redis, USUAL.stream, GROUP), dict[str, str]()

    async def maintain(hour: int) -> int:
        await pg.execute(
            "INSERT INTO fastworker.versions (uri, seq, deleted, written_at) "
            "VALUES ('at://' || $1::int, 1, true, now() - interval '1 day' + $1::int * interval '1 hour')",
            hour,
        )
        bench.slot.set(maintained_ms=1)
        await worker._maintain(bench.slot, bench.store, failover, readers, failing)
        return bench.slot.get("maintained_ms")

    await pg.execute("UPDATE fastworker.horizon SET looked_until = now() - interval '2 days'")
    assert await maintain(1) > 1
    await pg.execute("ALTER TABLE fastworker.notes RENAME COLUMN owed_at TO mislaid")
    await maintain(2)
    assert await maintain(3) == 1
    assert "owed_at" in bench.slot.snapshot().maintain_error
    await pg.execute("ALTER TABLE fastworker.notes RENAME COLUMN mislaid TO owed_at")
    assert await maintain(4) > 1
    assert failing == {}
