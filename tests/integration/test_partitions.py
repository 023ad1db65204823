"""A stream in several partitions, from the relay to the tables: real servers, and everything that comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import msgspec
import pytest
from redis.asyncio import Redis

from fastworker.config import Config
from fastworker.law.compare import Tables, diff, dump, report
from fastworker.law.model import Model
from fastworker.process.board import Heartbeats, Slot
from fastworker.reader import reader as reader_module
from fastworker.reader.reader import run_reader
from fastworker.reader.stats import ReaderStats
from fastworker.simulator.network import Network
from fastworker.simulator.relay import SimRelay
from fastworker.simulator.repo import SimFrame
from fastworker.store.store import Store
from fastworker.stream.client import connect
from fastworker.stream.keys import GROUP, STREAM, USUAL, Keys
from fastworker.worker import worker as worker_module
from fastworker.worker.worker import work

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
    def __init__(self, redis: Redis, redis_url: str, postgres_url: str, pg: asyncpg.Connection[Any]) -> None:
        self.redis = redis
        self.pg = pg
        self.settings = Config(
            redis_url=redis_url,
            database_url=postgres_url,
            stream_format="native",
            resolve_handles=False,
            consumer_id="w",
            processes=2,
            pool_size=9,
            lease_ms=1_500,
            scan_s=0.2,
        )
        self.processes: list[Process] = []

    @contextlib.asynccontextmanager
    async def reader(self, relay: SimRelay, **changes: Any) -> AsyncIterator[ReaderStats]:
        settings = msgspec.structs.replace(self.settings, relay_urls=(relay.url,), **changes)
        stats, stop = ReaderStats(), asyncio.Event()
        task = asyncio.create_task(run_reader(settings, stop, stats=stats))
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
            stream = Keys(partition=number).stream
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
        assert not await self.redis.exists(USUAL.dead_letters)

    async def ledger(self) -> int:
        found: Any = await self.redis.hgetall(USUAL.ledger)
        return sum(int(value) for name, value in found.items() if not name.startswith(b"drop:"))

    async def given(self, partitions: int) -> int:
        """Entries ever put on the stream."""
        infos: list[Any] = [
            await self.redis.xinfo_stream(Keys(partition=number).stream)
            for number in range(partitions)
            if await self.redis.exists(Keys(partition=number).stream)
        ]
        return sum(int(info["entries-added"]) for info in infos)


@pytest.fixture
async def bench(redis_url: str, postgres_url: str, pg: asyncpg.Connection[Any]) -> AsyncIterator[Bench]:
    redis = connect(redis_url)
    bench = Bench(redis, redis_url, postgres_url, pg)
    try:
        yield bench
    finally:
        await bench.stop()
        for process in bench.processes:
            await process.kill()
        await redis.aclose()


@pytest.mark.parametrize("partitions", [1, 4])
@pytest.mark.parametrize("processes", [1, 3, 6])
async def test_the_same_tables_however_it_is_cut(bench: Bench, partitions: int, processes: int) -> None:
    frames = list(Network(5, mix="adversarial", accounts=30).frames(800))
    async with SimRelay(frames, start="oldest", wait_for_client=True) as relay:
        for _ in range(processes):
            bench.start(processes=processes)
        async with bench.reader(relay, partitions=partitions) as stats:
            await bench.settled(stats, last_of(frames), partitions)
            counts = [await bench.redis.exists(Keys(partition=number).stream) for number in range(5)]
            assert sum(counts) == partitions
            assert await bench.ledger() == stats.entries == await bench.given(partitions)
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
    assert not {key for key in keys if key.startswith(("fastworker:members", "fastworker:owners", USUAL.partitions))}
    assert not {key for key in keys if key.startswith(f"{STREAM}:")}


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
        assert (await bench.redis.get(USUAL.partitions)) == b"3 4"
        # what is not written any more is given back when it is empty
        await bench.until(lambda: _owned(bench, {b"0", b"1", b"2"}))
        assert await bench.ledger() == await bench.given(4)
        await bench.stop()
    await bench.assert_lawful(frames)


async def _none_left(bench: Bench, partitions: int) -> bool:
    return not await bench.unfinished(partitions)


async def _owned(bench: Bench, partitions: set[bytes]) -> bool:
    found: Any = await bench.redis.hgetall(USUAL.owners)
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
        processes = [bench.start() for _ in range(3)]
        async with bench.reader(relay, partitions=3) as stats:

            async def disturb() -> None:
                turn = 0
                while True:
                    members: Any = await bench.redis.hgetall(USUAL.members)
                    tokens = sorted(members)
                    if tokens and turn % 2:
                        await bench.redis.hset(
                            USUAL.owners, mapping={n: tokens[(turn + n) % len(tokens)] for n in range(3)}
                        )
                    else:
                        await bench.redis.delete(USUAL.owners)
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
