"""A stream in several partitions, from the relay to the tables: real servers, and everything that comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest
from redis.asyncio import Redis

from fastworker.commands.compare import compare
from fastworker.commands.dlq import Wanted, retry_letters
from fastworker.commands.reapply import reapply
from fastworker.config import Config
from fastworker.errors import ExitCode
from fastworker.event import Account
from fastworker.event.entry import encode_native
from fastworker.law.compare import Tables, diff, dump, report
from fastworker.law.model import Model
from fastworker.monitor.facts import collect
from fastworker.process.board import Heartbeats, Slot
from fastworker.reader import reader as reader_module
from fastworker.reader.resume import read_and_resume
from fastworker.reader.stats import ReaderStats
from fastworker.simulator.network import Network
from fastworker.simulator.relay import SimRelay
from fastworker.simulator.repo import SimFrame
from fastworker.store.store import Store
from fastworker.stream.admin import RedisAdmin
from fastworker.stream.client import connect
from fastworker.stream.consumer import Entry, WorkerStream
from fastworker.stream.ids import id_order
from fastworker.stream.keys import CLUSTERED, CURSOR, GROUP, STREAM, Keys
from fastworker.stream.partitions import partition_of
from fastworker.worker import worker as worker_module
from fastworker.worker.worker import work
from tests.servers import counts_reads
from tests.services import Service

MEMBER_MS = 1_000


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "FOLLOW_S", 0.1)
    monkeypatch.setattr(worker_module, "MAINTAIN_S", 0.2)
    monkeypatch.setattr(reader_module, "TICK_S", 0.1)


def model_of(frames: list[SimFrame]) -> Tables:
    model = Model()
    for frame in frames:
        if frame.event is not None:
            model.apply(frame.event)
    return model.tables()


def last_of(frames: list[SimFrame]) -> int:
    return max(frame.seq or 0 for frame in frames)


class Process:
    """A worker process, as a task."""

    def __init__(self, settings: Config) -> None:
        self.slot: Slot = Heartbeats(1)[0]
        self.slot.open("worker-0")
        self.stopping = asyncio.Event()
        self.task = asyncio.create_task(work(settings, self.slot, self.stopping))

    @property
    def reads(self) -> set[int]:
        """Its partitions, as it tells them."""
        return {int(name.partition("@")[2] or 0) for name in self.slot.snapshot().consumers.split()}

    async def kill(self) -> None:
        """Nothing is given back."""
        self.task.cancel()
        await asyncio.wait([self.task])


class Bench:
    def __init__(
        self, redis: Redis, redis_url: str, postgres_url: str, pg: asyncpg.Connection[Any], stream: str, cursor: str
    ) -> None:
        self.redis = redis
        self.pg = pg
        self.settings = Config(
            redis_url=redis_url,
            database_url=postgres_url,
            stream_key=stream,
            cursor_key=cursor,
            stream_format="native",
            resolve_handles=False,
            consumer_id="w",
            processes=2,
            pool_size=9,
            lease_ms=1_500,
            scan_s=0.2,
        )
        self.processes: list[Process] = []

    def keys(self, partition: int = 0) -> Keys:
        return Keys(self.settings.stream_key, partition=partition)

    @contextlib.asynccontextmanager
    async def reader(self, relay: SimRelay, *, resume: bool = True, **changes: Any) -> AsyncIterator[ReaderStats]:
        """`resume` False: it does not know PostgreSQL."""
        database_url = self.settings.database_url if resume else None
        settings = msgspec.structs.replace(self.settings, relay_urls=(relay.url,), database_url=database_url, **changes)
        stats, stop = ReaderStats(), asyncio.Event()
        task = asyncio.create_task(read_and_resume(settings, stop, stats=stats))
        try:
            yield stats
            stop.set()
            async with asyncio.timeout(30):
                await task
        finally:
            task.cancel()
            await asyncio.wait([task])

    def start(self, **changes: Any) -> Process:
        process = Process(msgspec.structs.replace(self.settings, **changes))
        self.processes.append(process)
        return process

    async def until(self, condition: Callable[[], Any], seconds: float = 60) -> None:
        async with asyncio.timeout(seconds):
            while True:
                found = condition()
                if await found if asyncio.iscoroutine(found) else found:
                    return
                for process in self.processes:
                    if process.task.done() and not process.task.cancelled():
                        process.task.result()
                await asyncio.sleep(0.02)

    async def unfinished(self, partitions: int) -> int:
        """Entries of all partitions that are not settled."""
        total = 0
        for number in range(partitions):
            stream = self.keys(number).stream
            if not await self.redis.exists(stream):
                continue
            info: Any = await self.redis.xinfo_stream(stream)
            groups: Any = await self.redis.xinfo_groups(stream)
            ours = next((group for group in groups if group["name"] == GROUP.encode()), None)
            if ours is None:
                total += int(info["length"])
            else:
                total += int(ours["pending"]) + (ours["last-delivered-id"] != info["last-generated-id"])
        return total

    async def appended(self, stats: ReaderStats, last_seq: int) -> None:
        await self.until(lambda: (stats.last_seq or 0) >= last_seq)

    async def settled(self, stats: ReaderStats, last_seq: int, partitions: int) -> None:
        async def is_settled() -> bool:
            return (stats.last_seq or 0) >= last_seq and not await self.unfinished(partitions)

        await self.until(is_settled)

    async def stop(self) -> None:
        for process in self.processes:
            process.stopping.set()
        living = [process.task for process in self.processes if not process.task.done()]
        if living:
            await asyncio.wait(living, timeout=30)

    async def assert_lawful(self, frames: list[SimFrame]) -> None:
        store = await Store.connect(self.settings.require_database_url("test"))
        try:
            while await store.maintain(owed_age_s=0):
                pass
        finally:
            await store.close()
        differences = diff(model_of(frames), await dump(self.pg))
        assert not differences, report(differences)
        assert not await RedisAdmin(self.redis, self.settings.stream_key).letters.count()

    async def ledger(self) -> int:
        found = await RedisAdmin(self.redis, self.settings.stream_key).ledger()
        return sum(value for name, value in found.items() if not name.startswith("drop:"))

    async def given(self, partitions: int) -> int | None:
        """Entries ever put on the stream; None where the server does not count them: before Redis 7."""
        if not await counts_reads(self.redis):
            return None
        infos: list[Any] = [
            await self.redis.xinfo_stream(self.keys(number).stream)
            for number in range(partitions)
            if await self.redis.exists(self.keys(number).stream)
        ]
        return sum(int(info["entries-added"]) for info in infos)


@pytest.fixture(params=[(STREAM, CURSOR), CLUSTERED], ids=["in one script", "each in its slot"])
async def bench(
    request: pytest.FixtureRequest, redis_url: str, postgres_url: str, pg: asyncpg.Connection[Any]
) -> AsyncIterator[Bench]:
    redis = connect(redis_url)
    bench = Bench(redis, redis_url, postgres_url, pg, *request.param)
    try:
        yield bench
    finally:
        await bench.stop()
        for process in bench.processes:
            await process.kill()
        await redis.aclose()


@pytest.mark.parametrize(
    ("processes", "partitions"),
    [(3, 4), (6, 1), *(pytest.param(*pair, marks=pytest.mark.extended) for pair in ((1, 1), (1, 4), (3, 1), (6, 4)))],
)
async def test_the_same_tables_however_it_is_cut(bench: Bench, partitions: int, processes: int) -> None:
    frames = list(Network(5, mix="adversarial", accounts=30).frames(800))
    async with SimRelay(frames, start="oldest", wait_for_client=True) as relay:
        for _ in range(processes):
            bench.start(processes=processes)
        async with bench.reader(relay, partitions=partitions) as stats:
            await bench.settled(stats, last_of(frames), partitions)
            counts = [await bench.redis.exists(bench.keys(number).stream) for number in range(5)]
            assert sum(counts) == partitions
            assert await bench.ledger() == stats.entries
            assert await bench.given(partitions) in (stats.entries, None)
        await bench.stop()
    await bench.assert_lawful(frames)


async def test_one_partition_leaves_nothing_of_partitions(bench: Bench) -> None:
    frames = list(Network(5, accounts=30).frames(50))
    async with SimRelay(frames, start="oldest", wait_for_client=True) as relay:
        bench.start()
        async with bench.reader(relay) as stats:
            await bench.settled(stats, last_of(frames), 1)
        await bench.stop()
    keys = {key.decode() async for key in bench.redis.scan_iter()}
    assert not {
        key for key in keys if key.startswith(("fastworker:members", "fastworker:owners", bench.keys().partitions))
    }
    assert not {key for key in keys if key.startswith(f"{bench.settings.stream_key}:")}


async def test_the_number_is_changed_while_everything_runs(bench: Bench) -> None:
    frames = list(Network(7, mix="adversarial", accounts=30).frames(1_500))
    async with SimRelay(frames[:300], start="oldest", wait_for_client=True) as relay:
        for _ in range(2):
            bench.start()
        for number, (upto, partitions) in enumerate([(300, 1), (700, 4), (1_100, 2), (1_500, 3)]):
            if number:
                relay.emit(*frames[[300, 700, 1_100][number - 1] : upto])
            # the reader is replaced while what it appended is not read yet
            async with bench.reader(relay, partitions=partitions) as stats:
                await bench.appended(stats, last_of(frames[:upto]))
        await bench.until(lambda: _none_left(bench, 4))
        assert (await bench.redis.get(bench.keys().partitions)) == b"3 4"
        # what is not written any more is given back when it is empty
        await bench.until(lambda: _owned(bench, {b"0", b"1", b"2"}))
        assert await bench.given(4) in (await bench.ledger(), None)
        await bench.stop()
    await bench.assert_lawful(frames)


async def _none_left(bench: Bench, partitions: int) -> bool:
    return not await bench.unfinished(partitions)


async def _owned(bench: Bench, partitions: set[bytes]) -> bool:
    found: Any = await bench.redis.hgetall(bench.keys().owners)
    return set(found) == partitions


async def test_a_killed_process_is_followed_within_seconds(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastworker.stream.members.MEMBER_MS", MEMBER_MS)
    frames = list(Network(8, mix="adversarial", accounts=30).frames(600))
    async with SimRelay(frames[:200], start="oldest", wait_for_client=True) as relay:
        first, second = bench.start(), bench.start()
        async with bench.reader(relay, partitions=4) as stats:
            await bench.until(
                lambda: len(first.reads) == len(second.reads) == 2 and first.reads | second.reads == {0, 1, 2, 3}
            )
            await first.kill()
            relay.emit(*frames[200:])
            await bench.until(lambda: second.reads == {0, 1, 2, 3}, 15)
            await bench.settled(stats, last_of(frames), 4)
            third = bench.start()
            await bench.until(lambda: len(third.reads) == len(second.reads) == 2, 15)
            assert await bench.ledger() == stats.entries
        await bench.stop()
    await bench.assert_lawful(frames)


async def test_two_owners_cost_no_row(bench: Bench) -> None:
    """The owners' key is overwritten all the time: everybody reads everything, or thinks that nobody does."""
    frames = list(Network(9, mix="adversarial", accounts=10).frames(1_000))
    async with SimRelay(frames, start="oldest", wait_for_client=True) as relay:
        processes = [bench.start(lease_ms=15_000) for _ in range(3)]  # no lease runs out on a loaded machine
        async with bench.reader(relay, partitions=3) as stats:

            async def disturb() -> None:
                turn = 0
                while True:
                    members: Any = await bench.redis.hgetall(bench.keys().members)
                    tokens = sorted(members)
                    if tokens and turn % 2:
                        await bench.redis.hset(
                            bench.keys().owners, mapping={n: tokens[(turn + n) % len(tokens)] for n in range(3)}
                        )
                    else:
                        await bench.redis.delete(bench.keys().owners)
                    turn += 1
                    await asyncio.sleep(0.03)

            disturbing = asyncio.create_task(disturb())
            seen: set[frozenset[int]] = set()

            async def is_settled() -> bool:
                seen.update(frozenset(process.reads) for process in processes)
                return (stats.last_seq or 0) >= last_of(frames) and not await bench.unfinished(3)

            await bench.until(is_settled)
            disturbing.cancel()
            assert len(seen) > 3
            assert await bench.ledger() == stats.entries
        await bench.stop()
    await bench.assert_lawful(frames)


class Stuck(set[int]):
    """Partitions in it are not read, by whoever owns them."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[int] = Counter()  # that are on their way

    async def hold(self, partition: int) -> None:
        """Also a read that waits already would take what comes."""
        self.add(partition)
        async with asyncio.timeout(20):
            while self.reads[partition]:
                await asyncio.sleep(0.01)


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Stuck:
    partitions = Stuck()
    read = WorkerStream.read

    async def read_or_not(self: WorkerStream, block_ms: int) -> list[Entry]:
        if self.partition in partitions:
            await asyncio.sleep(block_ms / 1000)
            return []
        partitions.reads[self.partition] += 1
        try:
            return await read(self, block_ms)
        finally:
            partitions.reads[self.partition] -= 1

    monkeypatch.setattr(WorkerStream, "read", read_or_not)
    return partitions


async def _progress(bench: Bench) -> dict[str, int]:
    rows = await bench.pg.fetch("SELECT stream, max(seq) AS seq FROM fastworker.progress GROUP BY stream")
    return {row["stream"]: row["seq"] for row in rows}


async def _all_known(bench: Bench, partitions: int) -> bool:
    return len(await _progress(bench)) == partitions


async def test_an_empty_redis_is_resumed_where_the_last_partition_is(bench: Bench, stuck: Stuck) -> None:
    """What was in one that nobody got on with is read from the relay again."""
    frames = list(Network(12, accounts=30).frames(400))
    behind = bench.keys(2).stream
    async with SimRelay(frames[:200], start="oldest", wait_for_client=True) as relay:
        bench.start()
        async with bench.reader(relay, partitions=4) as stats:
            await bench.settled(stats, last_of(frames[:200]), 4)
            await bench.until(lambda: _all_known(bench, 4))
            await stuck.hold(2)
            relay.emit(*frames[200:])
            await bench.appended(stats, last_of(frames))
            assert await bench.redis.xlen(behind)
            others = [bench.keys(number).stream for number in (0, 1, 3)]

            async def are_done() -> bool:
                told = await _progress(bench)
                return all(told.get(stream, 0) >= last_of(frames) for stream in others)

            await bench.until(are_done)
            assert (await _progress(bench))[behind] < last_of(frames)
        await bench.stop()
        stuck.clear()
        await bench.redis.flushall()
        bench.start()
        async with bench.reader(relay, partitions=4) as stats:
            await bench.settled(stats, last_of(frames), 4)
            assert 0 < stats.entries < 400  # not all of it again
        await bench.stop()
    await bench.assert_lawful(frames)


@pytest.mark.parametrize("bench", [CLUSTERED], ids=["each in its slot"], indirect=True)
@pytest.mark.parametrize("resume", [True, False])
async def test_a_node_that_comes_back_empty(bench: Bench, stuck: Stuck, caplog: Any, *, resume: bool) -> None:
    """Its partition is read again from where PostgreSQL says; without PostgreSQL what was unread there is a gap."""
    frames = list(Network(22, accounts=30).frames(400))
    async with SimRelay(frames[:200], start="oldest", wait_for_client=True) as relay:
        bench.start()
        async with bench.reader(relay, partitions=4) as stats:
            await bench.settled(stats, last_of(frames[:200]), 4)
            await bench.until(lambda: _all_known(bench, 4))
            await stuck.hold(2)
            relay.emit(*frames[200:300])
            await bench.appended(stats, last_of(frames[:300]))
            assert await bench.redis.xlen(bench.keys(2).stream)
        await bench.redis.delete(*[key async for key in bench.redis.scan_iter("*{firehose:2}*")])
        stuck.clear()
        relay.emit(*frames[300:])
        async with bench.reader(relay, partitions=4, resume=resume) as stats:
            await bench.settled(stats, last_of(frames), 4)
            gaps: Any = await bench.redis.lrange(bench.keys().gaps, 0, -1)
            assert stats.gaps == len(gaps) == (0 if resume else 1)
        await bench.stop()
    if resume:
        await bench.assert_lawful(frames)
        assert "going on from what is known to be stored" in caplog.text
    else:
        gap = json.loads(gaps[0])
        assert (gap["reason"], gap["after"], gap["resumed"]) == ("stream_lost", None, frames[300].seq)


async def test_a_partition_that_is_deleted_is_read_again_from_where_it_was(bench: Bench, stuck: Stuck) -> None:
    """Without PostgreSQL: the reader's own marks, of which the lowest counts."""
    frames = list(Network(13, accounts=30).frames(400))
    behind = bench.keys(2).stream
    async with SimRelay(frames[:200], start="oldest", wait_for_client=True) as relay:
        bench.start()
        async with bench.reader(relay, partitions=4, resume=False) as stats:
            await bench.settled(stats, last_of(frames[:200]), 4)
            await asyncio.sleep(0.3)  # two looks of the reader
            await stuck.hold(2)
            relay.emit(*frames[200:])
            await bench.appended(stats, last_of(frames))
            assert await bench.redis.xlen(behind)
            await asyncio.sleep(0.3)
            before = stats.entries
            await bench.redis.delete(behind)
            stuck.clear()
            await bench.until(lambda: stats.entries > before)
            await bench.settled(stats, last_of(frames), 4)
            assert stats.entries - before < 400  # not all of it again
            assert stats.gaps == 0
        await bench.stop()
    await bench.assert_lawful(frames)


async def test_a_raised_number_has_a_floor_before_anything_is_in_the_new_ones(bench: Bench) -> None:
    frames = list(Network(14, accounts=30).frames(100))
    async with SimRelay(frames[:50], start="oldest", wait_for_client=True) as relay:
        async with bench.reader(relay) as stats:
            await bench.appended(stats, last_of(frames[:50]))
        relay.emit(*frames[50:])
        async with bench.reader(relay, partitions=3) as stats:
            await bench.appended(stats, last_of(frames))
    told = await _progress(bench)
    assert told == {bench.keys(number).stream: last_of(frames[:50]) for number in (1, 2)}


async def test_the_limit_is_that_of_the_sum(bench: Bench) -> None:
    frames = list(Network(15, accounts=30).frames(300))
    streams = [bench.keys(number).stream for number in range(4)]
    async with SimRelay(frames, start="oldest", wait_for_client=True) as relay:
        async with bench.reader(relay, partitions=4, max_stream_len=50) as stats:
            await bench.until(lambda: stats.full)
            bench.start()
            lengths: set[int] = set()

            async def is_settled() -> bool:
                async with bench.redis.pipeline() as pipe:
                    for stream in streams:
                        pipe.xlen(stream)
                    lengths.add(sum(await pipe.execute()))
                return (stats.last_seq or 0) >= last_of(frames) and not await bench.unfinished(4)

            await bench.until(is_settled)
            assert 25 < max(lengths) <= 50
        await bench.stop()
    await bench.assert_lawful(frames)


async def test_one_that_lags_is_read_by_several(bench: Bench) -> None:
    """Anybody can make accounts that are all in one partition."""
    all_frames = Network(16, mix="adversarial", accounts=10).frames(1_500)
    frames = [
        frame
        for frame in all_frames
        if frame.event and partition_of(frame.event.get("repo") or frame.event["did"], 4) == 1
    ]
    async with SimRelay(frames, start="oldest", wait_for_client=True) as relay:
        async with bench.reader(relay, partitions=4) as stats:
            await bench.appended(stats, last_of(frames))
            assert await bench.redis.xlen(bench.keys(1).stream) == stats.entries > 200
            processes = [bench.start(batch_size=1, max_stream_len=2_500) for _ in range(4)]
            most = 0

            async def is_settled() -> bool:
                nonlocal most
                most = max(most, sum(1 in process.reads for process in processes))
                return not await bench.unfinished(4)

            await bench.until(is_settled)
            assert most > 1
            await bench.until(
                lambda: sorted(number for process in processes for number in process.reads) == [0, 1, 2, 3]
            )
        await bench.stop()
    await bench.assert_lawful(frames)


async def test_what_an_operator_sees_and_does_is_of_all_partitions(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = list(Network(17, accounts=30).frames(200))
    config = msgspec.structs.replace(bench.settings, partitions=4, keep_s=3_600)
    admin = RedisAdmin(bench.redis, bench.settings.stream_key)
    async with SimRelay(frames, start="oldest", wait_for_client=True) as relay:
        async with bench.reader(relay, partitions=4, keep_s=3_600) as stats:
            await bench.appended(stats, last_of(frames))
            status, _ = await collect(admin, config)
            assert (status.stream_entries, status.lag_entries) == (stats.entries, stats.entries)
            assert sum(one.lag_entries for one in status.partitions) == stats.entries
            assert len(status.partitions) == 4
            bench.start()
            await bench.settled(stats, last_of(frames), 4)
        await bench.stop()
        status, _ = await collect(admin, config)
        assert (status.lag_entries, status.pending_entries) == (0, 0)
        assert status.unaccounted_entries == (0 if await counts_reads(bench.redis) else None)
        assert sum(status.ledger.values()) == stats.entries
        newest = await admin.newest(await admin.ends(), stats.entries)
        assert len({one[:2] for one in newest}) == stats.entries
        assert [one[1] for one in newest] == sorted((one[1] for one in newest), key=id_order)
        assert await admin.newest(await admin.ends(GROUP), 20) == newest[-20:]
        assert await compare(config, entries=stats.entries, seconds=0.1, as_json=True) is ExitCode.DONE
        assert json.loads(capsys.readouterr().out)["entries"] == stats.entries
        await bench.pg.execute("TRUNCATE posts, likes, reposts, follows CASCADE")
        assert await reapply(config, "0") is ExitCode.DONE
    assert f"{stats.entries:,} entries applied again" in capsys.readouterr().out
    # a dead letter goes back to where the account's events are
    did = next(f"did:plc:{number:024}" for number in range(100) if partition_of(f"did:plc:{number:024}", 4) == 3)
    letter = {b"n": encode_native(Account(None, did, True, None, None))[0][1]}
    letter_id: Any = await bench.redis.xadd(
        bench.keys(3).dead_letters, {b"form": b"native", b"data": letter[b"n"], b"reason": b"x"}
    )
    before = await bench.redis.xlen(bench.keys(3).stream)
    assert await retry_letters(config, Wanted(ids=frozenset([letter_id.decode()]))) is ExitCode.DONE
    assert await bench.redis.xlen(bench.keys(3).stream) == before + 1
    # entries that are put there by hand
    fields = [(b"n", letter[b"n"])]
    assert not await admin.append_if_room([(did, fields)], stats.entries + 1)
    assert await admin.append_if_room([(did, fields), ("", fields)], stats.entries + 3)
    assert await bench.redis.xlen(bench.keys(3).stream) == before + 2


async def test_a_host_that_is_killed_is_followed_within_seconds(bench: Bench) -> None:
    """Two supervisors as two hosts; one of them, and its processes, get no chance to say a word."""
    frames = list(Network(18, mix="adversarial", accounts=30).frames(900))
    env = {
        "REDIS_URL": bench.settings.redis_url,
        "DATABASE_URL": bench.settings.require_database_url("test"),
        "FASTWORKER_HTTP_PORT": "off",
        "FASTWORKER_RESOLVE_HANDLES": "off",
        "REDIS_STREAM_KEY": bench.settings.stream_key,
        "REDIS_CURSOR_KEY": bench.settings.cursor_key,
    }
    async with SimRelay(frames[:300], start="oldest", wait_for_client=True) as relay:
        async with bench.reader(relay, partitions=4) as stats:
            hosts = [Service("worker", CONSUMER_ID=name, **env) for name in ("here", "there")]
            try:
                await bench.until(lambda: _owners(bench, partitions=4, processes=4))
                first = hosts[0].process.pid
                children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
                for pid in [first, *map(int, children)]:
                    os.kill(pid, signal.SIGKILL)
                relay.emit(*frames[300:])
                began = time.monotonic()
                await bench.until(lambda: _owners(bench, partitions=4, processes=2))
                assert time.monotonic() - began < 30  # five seconds, on a quiet machine
                await bench.settled(stats, last_of(frames), 4)
            finally:
                for host in hosts:
                    await asyncio.to_thread(host.stop)
        assert await bench.ledger() == stats.entries
    await bench.assert_lawful(frames)


async def _owners(bench: Bench, *, partitions: int, processes: int) -> bool:
    owners: Any = await bench.redis.hgetall(bench.keys().owners)
    members: Any = await bench.redis.hgetall(bench.keys().members)
    return len(owners) == partitions and set(owners.values()) == set(members) and len(members) == processes
