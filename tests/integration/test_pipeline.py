"""The pipeline on a real Redis, with a store whose faults the test decides."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from redis.asyncio import Redis

from fastworker.edge.tracing import no_span
from fastworker.errors import Reason, RowRejected, StoppedItself, StoreUnavailable
from fastworker.event.entry import decode_entry
from fastworker.process.board import Heartbeats, State, now_ms
from fastworker.store.blame import LockedRow, TooSlow
from fastworker.store.flush import Written
from fastworker.store.session import Time
from fastworker.stream.admin import RedisAdmin
from fastworker.stream.client import connect
from fastworker.stream.consumer import WorkerStream
from fastworker.stream.keys import USUAL
from fastworker.table.batch import Batch, Change, Limits, Progress, Refused
from fastworker.table.mapper import map_commit
from fastworker.worker.intake import Intake
from fastworker.worker.isolate import LETTERS_OF_ACCOUNT_MAX
from fastworker.worker.limits import DeadLetterLimit
from fastworker.worker.overlap import Marks, Overlap, keys_of
from fastworker.worker.pipeline import POSTPONED_MS_MAX, Pipeline
from tests import replies
from tests.servers import counts_reads

KEY, GROUP = "firehose:events", "firehose-processors"
DID = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"


def like(rkey: str) -> dict[str, Any]:
    subject = {
        "uri": f"at://{DID}/app.bsky.feed.post/3kaaaaaaaaa2a",
        "cid": "bafyreiak664675wz3p7tvpu3eos35tw33b4dfhaod3jt63lat3sw7ralge",
    }
    record = {"$type": "app.bsky.feed.like", "subject": subject, "createdAt": "2024-01-01T00:00:00.000Z"}
    return {"action": "create", "path": f"app.bsky.feed.like/{rkey}", "cid": subject["cid"], "record": record}


def commit(seq: int, *ops: dict[str, Any], did: str = DID) -> dict[str, str]:
    data = {"repo": did, "ops": list(ops), "rev": None, "time": "2024-01-01T00:00:00.000Z"}
    return {"type": "commit", "data": json.dumps(data), "seq": str(seq)}


def likes(count: int, poison: frozenset[int] = frozenset(), *, of_many: bool = False) -> list[dict[str, str]]:
    """`of_many`: each of another account."""
    dids = [f"did:plc:{chr(97 + n // 26)}{chr(97 + n % 26)}" if of_many else DID for n in range(count)]
    return [commit(n + 1, like(f"{'poison' if n in poison else 'good'}{n}"), did=did) for n, did in enumerate(dids)]


class MemoryStore:
    """Keeps uris; refuses batches that hold a poisonous one; may be down."""

    sessions = 1
    poison = "poison"

    def __init__(self) -> None:
        self.uris: set[str] = set()
        self.refusal: Exception = RowRejected("poison")
        self.kept: list[Refused] = []
        self.batches: list[Batch] = []
        self.writes = 0
        self.down = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()

    async def absent(self, changes: list[Change]) -> set[str]:  # noqa: ARG002
        return set()

    async def still_locked(self, rows: list[LockedRow]) -> set[LockedRow]:
        return set(rows)

    async def keep(self, refused: Sequence[Refused]) -> None:
        self.kept += refused

    async def write(self, batch: Batch, *, time: Time) -> Written:  # noqa: ARG002
        self.writes += 1
        await self.open.wait()
        if self.down.is_set():
            raise StoreUnavailable("down")
        if any(self.poison in uri for uri in batch.changes):
            raise self.refusal
        self.uris |= set(batch.changes)
        self.batches.append(batch)
        beaten = frozenset(uri for uri in batch.changes if "beaten" in uri)
        return Written(len(batch.changes) - len(beaten), len(beaten), 0, beaten)


class Bench:
    """A pipeline on a stream, and how to wait for what it does."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.store = MemoryStore()
        self.slot = Heartbeats(1)[0]
        self.slot.open("test")
        self.stream = WorkerStream(redis, consumer_id="w", batch_size=10)
        self.limits = Limits()
        self.dead_letters = DeadLetterLimit()
        self.open_span = no_span

        self.overlap: Overlap | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Pipeline]:
        await self.stream.acquire()
        self.pipeline = Pipeline(
            Intake(self.stream, self.slot, own_idle_ms=0),
            self.stream,
            self.store,
            self.slot,
            limits=self.limits,
            dead_letters=self.dead_letters,
            open_span=self.open_span,
            overlap=self.overlap,
        )
        self.stopping = asyncio.Event()
        self.task = asyncio.create_task(self.pipeline.run(self.stopping))
        try:
            yield self.pipeline
            self.stopping.set()
            if not self.task.cancelled():
                async with asyncio.timeout(30):
                    await self.task
        finally:
            self.task.cancel()
            await asyncio.wait([self.task])

    async def add(self, entries: Iterable[dict[str, str]]) -> list[str]:
        pipe = self.redis.pipeline(transaction=False)
        for fields in entries:
            pipe.xadd(KEY, replies.to_add(fields))
        return [entry_id.decode() for entry_id in await pipe.execute()]

    async def until(self, fact: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not fact():
                if self.task.done():
                    self.task.result()
                await asyncio.sleep(0.002)

    async def until_it_waits_for_a_reply(self) -> None:
        async with asyncio.timeout(30):
            while not (await self.redis.info("clients"))["blocked_clients"]:
                await asyncio.sleep(0.002)

    async def until_settled(self, count: int) -> None:
        await self.until(lambda: self.slot.snapshot().acked >= count)

    async def ledger(self) -> dict[str, int]:
        return replies.counts(await self.redis.hgetall(USUAL.ledger))

    async def pending(self) -> int:
        return replies.number((await self.redis.xpending(KEY, GROUP))["pending"])


@pytest.fixture
async def bench(redis_url: str) -> AsyncIterator[Bench]:
    client = connect(redis_url)
    yield Bench(client)
    await client.aclose()


async def test_every_entry_ends_once_and_the_ledger_says_how(bench: Any) -> None:
    account = {"type": "account", "data": json.dumps({"did": DID, "active": False, "status": "odd"}), "seq": "8"}
    identity = {"type": "identity", "data": json.dumps({"did": DID, "handle": None}), "seq": ""}
    bad_op = commit(9, {"action": "create", "path": "no-slash", "cid": None, "record": {}})
    await bench.add([*likes(3), account, identity, bad_op, {"type": "commit", "data": "{", "seq": "1"}, {"odd": "1"}])
    async with bench.running():
        await bench.until_settled(8)
    ledger = await bench.ledger()
    assert ledger == {
        "committed": 6,
        "set_aside": 2,
        "drop:bad_path": 1,
        "drop:bad_json": 1,
        "drop:bad_entry": 1,
    }
    assert await bench.pending() == 0
    snapshot = bench.slot.snapshot()
    assert (snapshot.counters.committed, snapshot.counters.set_aside) == (6, 2)
    assert (snapshot.counters.commits, snapshot.counters.accounts, snapshot.counters.identities) == (4, 1, 1)
    assert {reason: n for reason, n in snapshot.drops.items() if n} == {
        Reason.BAD_PATH: 1,
        Reason.BAD_JSON: 1,
        Reason.BAD_ENTRY: 1,
    }
    assert sum(snapshot.histograms["latency_ms"]) == 6
    assert snapshot.tables["likes"] == 3
    [account_batch] = [batch for batch in bench.store.batches if batch.accounts]
    assert account_batch.accounts[DID][0].at.tzinfo is not None


async def test_no_event_has_a_line_of_its_own_above_debug(bench: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "fastworker")
    bench.store.open.clear()
    await bench.add([commit(1, like("first"))])
    async with bench.running():
        await bench.until(lambda: bench.store.writes == 1)
        await bench.add([{"type": "commit", "data": "{", "seq": str(n)} for n in range(100)] + likes(100))
        await bench.until(lambda: bench.pipeline.held_count == 201)  # one batch, which waits for the first one
        bench.store.open.set()
        await bench.until_settled(201)
    lines = [record for record in caplog.records if record.levelno > logging.DEBUG]
    assert [line.getMessage().partition(";")[0] for line in lines] == ["Set aside 100 entries (bad_json 100)"]
    assert len([record for record in caplog.records if record.msg.startswith("Set aside %s")]) == 100


async def test_the_ledger_balances_at_every_moment(bench: Any) -> None:
    admin, seen = RedisAdmin(bench.redis, KEY), set()
    async with bench.running():
        for _ in range(20):
            await bench.add(likes(40))
            seen.add((await admin.count(GROUP)).unaccounted)
        await bench.until_settled(800)
    assert seen <= {0, None}
    count = await admin.count(GROUP)
    assert (count.ledger, count.unaccounted) == ({"committed": 800}, 0 if await counts_reads(bench.redis) else None)


async def test_what_arrives_during_a_flush_is_the_next_batch(bench: Any) -> None:
    async with bench.running() as pipeline:
        bench.store.open.clear()
        await bench.add(likes(1))
        await bench.until(lambda: bench.store.writes == 1)
        await bench.add(likes(2_000)[1:])
        await bench.until(lambda: pipeline.held_count == 2_000)
        bench.store.open.set()
        await bench.until_settled(2_000)
    assert [len(batch.entries) for batch in bench.store.batches] == [1, 1_999]


async def test_a_full_batch_stops_reading_and_nothing_third_is_held(bench: Any) -> None:
    bench.limits = Limits(entries_max=20)
    async with bench.running() as pipeline:
        bench.store.open.clear()
        await bench.add(likes(100))
        await bench.until(lambda: pipeline.held_count >= 30)
        waiting = len(bench.slot.snapshot().consumers)
        for _ in range(50):  # turns of the loop in which more could be read
            await asyncio.sleep(0.002)
        assert pipeline.held_count <= 10 + 100, waiting
        held = pipeline.held_count
        assert await bench.pending() == held
        bench.store.open.set()
        await bench.until_settled(100)


async def test_poison_is_isolated_and_its_siblings_are_committed(bench: Any) -> None:
    entries = likes(300, poison=frozenset({7, 150, 151}))
    entries.append(commit(400, like("good-a"), like("poison-b"), like("good-c")))
    ids = await bench.add(entries)
    async with bench.running():
        await bench.until_settled(301)
    letters = [letter for _, letter in await bench.redis.xrange(USUAL.dead_letters)]
    assert {letter[b"origId"].decode() for letter in letters} == {ids[7], ids[150], ids[151], ids[300]}
    assert {letter[b"reason"] for letter in letters} == {b"row_rejected"}
    assert len(bench.store.uris) == 297 + 2
    assert await bench.ledger() == {"committed": 297, "set_aside": 4, "drop:row_rejected": 4}
    assert bench.store.writes < 80  # not one by one


async def test_a_flush_is_a_span_and_its_halves_are_children(bench: Any) -> None:
    told = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(told))
    bench.open_span = provider.get_tracer("test").start_as_current_span
    await bench.add(likes(8, poison=frozenset({3})))
    bench.store.open.clear()
    async with bench.running():
        await bench.until(lambda: bench.store.writes == 1)  # some of them are written; the others are the next batch
        bench.store.open.set()
        await bench.until_settled(8)
    spans: Any = told.get_finished_spans()  # whose types allow a span without a context
    assert {span.name for span in spans} == {"flush"}
    roots = [span for span in spans if span.parent is None]
    assert sum(span.attributes["fastworker.entries"] for span in roots) == 8
    [ill] = [span for span in roots if "fastworker.row_rejected" in span.attributes]
    children = [span for span in spans if span.parent is not None]
    assert len({span.context.trace_id for span in [ill, *children]}) == 1
    assert all(span.start_time >= ill.start_time and span.end_time <= ill.end_time for span in children)
    halves = [span.attributes["fastworker.entries"] for span in children if span.parent.span_id == ill.context.span_id]
    assert len(halves) == 2
    assert sum(halves) == ill.attributes["fastworker.entries"]


async def test_poison_of_many_accounts_stops_nobody(bench: Any) -> None:
    """Accounts cost nothing: what the content of each of them runs into is set aside, and the worker goes on."""
    bench.dead_letters = DeadLetterLimit(run_max=5, window=20)
    await bench.add([*likes(50, poison=frozenset(range(20, 50)), of_many=True), *likes(3)])
    async with bench.running():
        await bench.until_settled(53)
    assert await bench.ledger() == {"committed": 23, "set_aside": 30, "drop:row_rejected": 30}
    assert await bench.pending() == 0


async def test_more_accounts_than_are_remembered_stop_nobody_and_lose_nothing(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten thousand accounts with a refused record each, at small scale: a letter, or at least its name is kept."""
    monkeypatch.setattr("fastworker.worker.limits.REFUSING_ACCOUNTS_MAX", 20)
    bench.dead_letters = DeadLetterLimit(run_max=5, window=20)
    bench.stream = WorkerStream(bench.redis, consumer_id="w", batch_size=50, dead_letter_maxlen=30)
    await bench.add([*likes(300, poison=frozenset(range(300)), of_many=True), *likes(3)])
    async with bench.running():
        await bench.until_settled(303)
    letters = [json.loads(fields[b"data"]) for _, fields in await bench.redis.xrange(USUAL.dead_letters)]
    found = {one["ops"][0]["path"].rpartition("/")[2] for one in letters}
    found |= {one.uri.rpartition("/")[2] for one in bench.store.kept}
    assert found == {f"poison{n}" for n in range(300)}
    assert len(letters) < 200
    assert await bench.ledger() == {"committed": 3, "set_aside": 300, "drop:row_rejected": 300}
    assert await bench.pending() == 0


@pytest.mark.parametrize("is_contents", [True, False], ids=["a trigger", "a lock"])
async def test_what_is_too_slow_waits_alone(bench: Any, monkeypatch: pytest.MonkeyPatch, is_contents: bool) -> None:
    """The others go on. What a trigger of the database's own is slow at is set aside at the third try."""
    monkeypatch.setattr("fastworker.worker.slow.PAUSES_S", (0.0,))
    bench.store.refusal = TooSlow("no() was at work", is_contents=is_contents)
    ids = await bench.add(likes(40, frozenset({3, 30})))
    async with bench.running():
        await bench.until_settled(38)
        if is_contents:
            await bench.until_settled(40)
        else:
            await bench.until(lambda: bench.store.writes > 30)
            await bench.add(likes(50)[40:])
            await bench.until_settled(48)
            assert bench.pipeline.oldest_ms > 0
            assert "no() was at work" in bench.slot.snapshot().locked
            bench.store.refusal = StoreUnavailable("a moment")
            await bench.until(lambda: bench.slot.get("store_retries") > 0)
            bench.store.uris.clear()
            monkeypatch.setattr(MemoryStore, "poison", "none")
            await bench.until_settled(50)
    letters = [fields[b"origId"].decode() for _, fields in await bench.redis.xrange("firehose:dead-letters")]
    assert sorted(letters) == ([ids[3], ids[30]] if is_contents else [])
    assert await bench.pending() == 0
    assert not bench.slot.snapshot().locked
    aside = {"set_aside": 2, "drop:too_slow": 2} if is_contents else {}
    assert await bench.ledger() == {"committed": 38 if is_contents else 50, **aside}


async def test_too_much_garbage_stops_the_worker_before_it_is_set_aside(bench: Any) -> None:
    bench.dead_letters = DeadLetterLimit(run_max=5)
    await bench.add([{"type": "commit", "data": "{", "seq": "1"}] * 50)
    with pytest.raises(StoppedItself):
        async with bench.running():
            await bench.until_settled(50)
    assert await bench.pending() >= 10
    assert (await bench.ledger()).get("set_aside", 0) <= 5


async def test_one_account_neither_stops_the_worker_nor_fills_the_letters(bench: Any) -> None:
    bench.dead_letters = DeadLetterLimit(run_max=5, window=20)
    entries = likes(60, poison=frozenset(range(60)))
    entries.append(commit(400, like("good-a"), like("poison-b"), like("good-c")))
    await bench.add([*entries, *likes(3)])
    async with bench.running():
        await bench.until_settled(64)
    assert len(await bench.redis.xrange(USUAL.dead_letters)) == LETTERS_OF_ACCOUNT_MAX
    assert len(bench.store.kept) == 61 - LETTERS_OF_ACCOUNT_MAX
    [last] = [one for one in bench.store.kept if one.uri == f"at://{DID}/app.bsky.feed.like/poison-b"]
    assert (last.did, last.seq, last.reason, bool(last.cid)) == (DID, 400, "row_rejected", True)
    assert not [one for one in bench.store.kept if "good" in one.uri]
    assert await bench.ledger() == {"committed": 3, "set_aside": 61, "drop:row_rejected": 61}
    assert await bench.pending() == 0


async def test_letters_that_make_room_are_kept_by_name(bench: Any) -> None:
    bench.stream = WorkerStream(bench.redis, consumer_id="w", dead_letter_maxlen=3)
    async with bench.running():
        for n in range(5):
            await bench.add(likes(n + 1, poison=frozenset({n}), of_many=True)[n:])
            await bench.until_settled(n + 1)
    letters = await bench.redis.xrange(USUAL.dead_letters)
    names = {one.uri for one in bench.store.kept}
    assert names >= {"at://did:plc:aa/app.bsky.feed.like/poison0", "at://did:plc:ab/app.bsky.feed.like/poison1"}
    assert len(letters) + len(names) >= 5


async def test_every_reason_counts_at_any_rate_and_size_of_batch(bench: Any) -> None:
    """Entries that are refused one by one, among others that are as many."""
    bench.dead_letters = DeadLetterLimit(run_max=1_000, window=40)
    with pytest.raises(StoppedItself, match=r"2\d of the last 4\d"):
        async with bench.running():
            for n in range(40):
                await bench.add([{"odd": "1"}, commit(n + 1, like(f"good{n}"))])
                await bench.until_settled(2 * n + 2)
    assert await bench.pending() > 0


def test_the_limit_is_that_of_all_processes() -> None:
    limit = DeadLetterLimit(run_max=10)
    for _ in range(2):
        if (child := os.fork()) == 0:
            limit.bad("x", 5)
            os._exit(0)
        os.waitpid(child, 0)
    with pytest.raises(StoppedItself, match="11 in a row"):
        limit.bad("x")


def test_the_limit_by_half_of_the_window() -> None:
    limit = DeadLetterLimit()
    with pytest.raises(StoppedItself, match="2000 of the last 4000"):
        for _ in range(2_000):
            limit.good(10)
            limit.bad("x", 10)


def test_the_limit_by_ratio() -> None:
    limit = DeadLetterLimit(run_max=10, ratio_max=0.5, window=100)

    def mostly_bad() -> None:
        limit.good()
        limit.bad("x")
        limit.bad("x")

    for _ in range(40):
        limit.good(2)
        limit.bad("x")
    with pytest.raises(StoppedItself):
        exhaust(mostly_bad, times=400)


def exhaust(act: Callable[[], None], times: int) -> None:
    for _ in range(times):
        act()


async def test_an_outage_of_the_store_pauses_reading_and_ends_by_itself(bench: Any) -> None:
    bench.store.down.set()
    async with bench.running() as pipeline:
        await bench.add(likes(5))
        await bench.until(lambda: pipeline.state is State.WAITING_FOR_STORE)
        await bench.until(lambda: bench.store.writes >= 2)
        held = pipeline.held_count
        await bench.add(likes(2_000))
        writes = bench.store.writes
        await bench.until(lambda: bench.store.writes > writes)
        assert pipeline.held_count <= held + 1_010  # at most the reads that were under way
        bench.store.down.clear()
        await bench.until_settled(2_005)
        assert pipeline.state is State.RUNNING
    assert "down" in bench.slot.snapshot().error


async def test_a_stop_settles_what_is_held(bench: Any) -> None:
    async with bench.running() as pipeline:
        bench.store.open.clear()
        await bench.add(likes(100))
        await bench.until(lambda: pipeline.held_count > 0)
        bench.stopping.set()
        held = pipeline.held_count
        bench.store.open.set()
    assert len(bench.store.uris) >= held
    assert await bench.pending() == 0


async def test_a_stop_cut_short_leaves_everything_pending(bench: Any) -> None:
    async with bench.running() as pipeline:
        bench.store.open.clear()
        await bench.add(likes(100))
        await bench.until(lambda: pipeline.held_count == 100)
        bench.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await bench.task
    assert await bench.pending() == 100
    assert await bench.ledger() == {}


async def test_entries_whose_reply_was_lost_are_read_back(bench: Any) -> None:
    """A read's reply that never came: the entries are pending in our name, and nobody else may take them."""
    await bench.stream.acquire()
    await bench.add(likes(5))
    await bench.redis.xreadgroup(GROUP, bench.stream.name, {KEY: ">"}, count=3)
    await bench.stream.release()
    async with bench.running():
        await bench.until_settled(5)
        await bench.add(likes(7)[5:])
        await bench.redis.xreadgroup(GROUP, bench.stream.name, {KEY: ">"}, count=1)
        await bench.until_settled(6)
        await bench.until_it_waits_for_a_reply()
        await bench.redis.client_kill_filter(_type="normal", skipme=True)
        await bench.until_settled(7)
    assert await bench.ledger() == {"committed": 7}


async def test_a_group_that_is_moved_back_gives_again_what_changes_nothing(bench: Any) -> None:
    """The ledger counts endings: nobody keeps which ids have ended."""
    await bench.add(likes(5))
    async with bench.running():
        await bench.until_settled(5)
        stored = set(bench.store.uris)
        await bench.redis.xgroup_setid(KEY, GROUP, "0")
        await bench.until_settled(10)
        assert bench.store.uris == stored
    assert (await bench.ledger(), await bench.pending()) == ({"committed": 10}, 0)


async def test_read_back_does_not_repeat_what_is_held(bench: Any) -> None:
    async with bench.running() as pipeline:
        bench.store.open.clear()
        await bench.add(likes(50))
        await bench.until(lambda: pipeline.held_count == 50)
        await bench.until_it_waits_for_a_reply()
        await bench.redis.client_kill_filter(_type="normal", skipme=True)
        await bench.until(lambda: bench.slot.get("stream_retries") > 0)
        await bench.add(likes(51)[50:])
        await bench.until(lambda: pipeline.held_count == 51)
        assert bench.slot.get("read") == 51
        bench.store.open.set()
        await bench.until_settled(51)


async def test_entries_of_a_dead_consumer_are_adopted(bench: Any) -> None:
    dead = WorkerStream(bench.redis, consumer_id="gone")
    await dead.acquire()
    await bench.add(likes(250))
    while await dead.read(block_ms=1):
        pass
    await bench.redis.delete(f"fastworker:consumer:{dead.name}")
    async with bench.running():
        await bench.until_settled(250)
    assert bench.slot.get("claimed") == 250
    assert await bench.ledger() == {"committed": 250}


async def test_progress_is_stored_only_as_far_as_the_group_has_finished(bench: Any) -> None:
    ids = await bench.add(likes(10))
    await bench.stream.acquire()
    await bench.redis.xreadgroup(GROUP, "other", {KEY: ">"}, count=5)
    await bench.stream.release()
    async with bench.running() as pipeline:
        await bench.until_settled(5)
        await pipeline.note_progress()
        [more] = await bench.add([commit(11, like("more"))])
        await bench.until_settled(6)
        waiting: Progress | None = bench.store.batches[-1].progress
        assert waiting is None  # the other one holds everything before ours
        await bench.redis.xack(KEY, GROUP, *ids[:5])
        await bench.stream.give_skipped()
        await pipeline.note_progress()
        await bench.add([commit(12, like("last"))])
        await bench.until_settled(7)
        progress: Progress | None = bench.store.batches[-1].progress
        assert progress is not None
        assert (progress.stream, progress.consumer, progress.seq, progress.entry_id) == (KEY, "w-0", 11, more)
        await bench.add([commit(13, like("once"))])
        await bench.until_settled(8)
    again: Progress | None = bench.store.batches[-1].progress
    assert again is None  # it is stored already


@pytest.fixture
def strangers(bench: Bench) -> Callable[[dict[str, str]], list[int]]:
    """Marks an entry's records as another pipeline of this worker would, and gives the keys."""
    marks = Marks()
    bench.overlap = Overlap(marks, 0)
    stranger = Overlap(marks, 1)

    def mark(entry: dict[str, str]) -> list[int]:
        event = decode_entry({name.encode(): value.encode() for name, value in entry.items()})
        keys = keys_of(map_commit(event, 0))  # type: ignore[arg-type]
        assert stranger.take(keys)
        return keys

    bench.give_back = stranger.give_back  # type: ignore[attr-defined]
    return mark


def other_like(number: int) -> dict[str, str]:
    op = like(f"other{number}")
    op["record"] = {
        **op["record"],
        "subject": {**op["record"]["subject"], "uri": f"at://{DID}/app.bsky.feed.post/{number}"},
    }
    return commit(1_000 + number, op)


async def test_what_another_pipeline_holds_is_postponed_until_it_is_free(bench: Any, strangers: Any) -> None:
    keys = strangers(likes(1)[0])
    async with bench.running() as pipeline:
        await bench.add(likes(1))
        await bench.until(lambda: pipeline.held_count == 1)
        await bench.add([other_like(1)])
        await bench.until_settled(1)
        assert [list(batch.changes) for batch in bench.store.batches] == [[f"at://{DID}/app.bsky.feed.like/other1"]]
        assert pipeline.oldest_ms
        bench.give_back(keys)
        await bench.until_settled(2)
        await bench.until(lambda: pipeline.held_count == 0)
    assert await bench.ledger() == {"committed": 2}


async def test_it_is_not_postponed_for_ever(bench: Any, strangers: Any) -> None:
    strangers(likes(1)[0])
    async with bench.running() as pipeline:
        began = now_ms()
        await bench.add(likes(1))
        await bench.until(lambda: pipeline.held_count == 1)
        await bench.until_settled(1)
        assert now_ms() - began >= POSTPONED_MS_MAX
    assert await bench.ledger() == {"committed": 1}


async def test_a_stop_settles_what_is_postponed(bench: Any, strangers: Any) -> None:
    strangers(likes(1)[0])
    async with bench.running() as pipeline:
        await bench.add(likes(1))
        await bench.until(lambda: pipeline.held_count == 1)
    assert await bench.ledger() == {"committed": 1}
    assert await bench.pending() == 0


async def test_marks_end_with_their_flush(bench: Any, strangers: Any) -> None:
    async with bench.running():
        await bench.add(likes(3))
        await bench.until_settled(3)
        for entry in likes(3)[:1]:
            await bench.until(lambda: not bench.pipeline.held_count)
            strangers(entry)


async def test_what_is_beaten_is_not_counted_as_committed(bench: Bench) -> None:
    """Of an entry with several records some were stored: that one is."""
    entries = [commit(1, like("good1")), commit(2, like("beaten2")), commit(3, like("good3"), like("beaten3"))]
    async with bench.running():
        await bench.add([*entries, commit(4, like("beaten4"), like("beaten5")), commit(5)])
        await bench.until(lambda: bench.slot.snapshot().counters.nothing_to_store == 2)
    ledger = await bench.redis.hgetall(USUAL.ledger)
    assert {name: int(count) for name, count in ledger.items()} == {b"committed": 3, b"nothing_to_store": 2}
