"""Partitions that are in slots of their own, as on a Redis Cluster: no script reaches two of them.

On one server the same code runs; tests/integration/test_cluster.py has a real cluster.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, NoReturn, cast

import pytest
from redis.asyncio import Redis

from fastworker.config import Config
from fastworker.errors import StreamUnavailable, Unreachable
from fastworker.reader.reader import run_reader
from fastworker.reader.stats import ReaderStats
from fastworker.simulator.network import Network
from fastworker.simulator.relay import SimRelay
from fastworker.stream.admin import RedisAdmin
from fastworker.stream.chunk import Chunk, by_partition
from fastworker.stream.client import connect
from fastworker.stream.feed import Feed, StoreWentBack
from fastworker.stream.keys import CLUSTERED, GROUP, Keys, in_slot
from fastworker.stream.partitions import partition_of
from fastworker.stream.slot import ReaderLeaseLost, StreamBroken
from fastworker.stream.slots import PartitionsMayChange
from tests.rig.stage import entries_of
from tests.servers import counts_reads

STREAM, CURSOR = CLUSTERED
HOST = "relay.test"
PARTITIONS = 3


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    client = connect(redis_url)
    yield client
    await client.aclose()


def feed_on(redis: Redis, **limits: Any) -> Feed:
    return Feed(redis, stream_key=STREAM, cursor_key=CURSOR, group=GROUP, **{"max_stream_len": 1_000, **limits})


async def term(redis: Redis, partitions: int = PARTITIONS, host: str = HOST, feed: Feed | None = None) -> Feed:
    """A reader that has taken office after the one before it."""
    feed = feed or feed_on(redis)
    for number in range(9):
        await redis.delete(Keys(STREAM, partition=number).reader_lease)
    assert await feed.acquire()
    await feed.begin_term()
    await feed.open_partitions(partitions)
    await feed.go_to(host)
    return feed


def chunk_of(*seqs: int, partitions: int = PARTITIONS) -> Chunk:
    """Seq 4 of 3 partitions is in the second."""
    chunk = Chunk()
    for seq in seqs:
        chunk.entry([(b"n", b"%d" % seq)], seq % partitions)
        chunk.seq = seq
    return chunk


async def appended(redis: Redis, partition: int) -> list[int]:
    found: Any = await redis.xrange(Keys(STREAM, partition=partition).stream)
    return [int(fields[b"n"]) for _, fields in found]


async def cursors(redis: Redis, partitions: int = PARTITIONS) -> list[int]:
    return [int(await redis.get(in_slot(CURSOR, number)) or -1) for number in range(partitions)]


async def state_of(redis: Redis, tag: str) -> dict[bytes, Any]:
    return {key: await redis.dump(key) async for key in redis.scan_iter(f"*{tag}*")}


async def fail_over(redis: Redis, before: dict[bytes, Any]) -> None:
    """What came since is not known there."""
    await redis.delete(*before)
    for key, value in before.items():
        await redis.restore(key, 0, value)


async def unheard(**_told: Any) -> NoReturn:
    raise ConnectionError("the connection was closed")


def test_a_body_is_cut_by_partition() -> None:
    chunk = Chunk()
    chunk.gap(b"a gap")
    chunk.entry([(b"n", b"one")], 12)
    chunk.hold("a commit", 5)
    chunk.entry([(b"n", b""), (b"at", b"7")], 3)
    chunk.entry([(b"n", b"entry")], 0)
    part = Chunk()
    part.entry([(b"n", b"later")], 12)
    part.repair("did:a", b"{}")
    chunk.fill(chunk.held[0][0], part, 5)
    first, third, twelfth = Chunk(), Chunk(), Chunk()
    first.gap(b"a gap")
    first.repair("did:a", b"{}")
    first.entry([(b"n", b"entry")])
    third.entry([(b"n", b""), (b"at", b"7")])
    twelfth.entry([(b"n", b"one")])
    twelfth.entry([(b"n", b"later")])
    wanted = {0: (first.body, 1), 3: (third.body, 1), 12: (twelfth.body, 2)}
    assert by_partition(chunk.body) == wanted
    assert by_partition(b"") == {}


async def test_each_has_its_part_and_all_have_the_cursor(redis: Redis) -> None:
    feed = await term(redis)
    assert await feed.append(chunk_of(1, 2, 3, 4))
    assert [await appended(redis, number) for number in range(3)] == [[3], [1, 4], [2]]
    assert await feed.append(chunk_of(6))
    assert await cursors(redis) == [6, 6, 6]
    assert feed.places == [6]
    await feed.release()
    assert not await redis.exists(*[Keys(STREAM, partition=number).reader_lease for number in range(3)])


@pytest.mark.parametrize("failing", [0, 1])
async def test_what_a_slot_has_is_passed_over_by_the_next_reader(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    feed = await term(redis)
    assert await feed.append(chunk_of(1, 2, 3))
    with monkeypatch.context() as patch, pytest.raises(StreamUnavailable):
        patch.setattr(feed._slots.all[failing], "_append", unheard)
        await feed.append(chunk_of(4, 5, 6))
    assert await cursors(redis) == ([3, 6, 6] if failing == 0 else [3, 3, 6])  # the one that others know comes last
    feed = await term(redis)
    assert (await feed.go_to(HOST)).seq == 3
    assert feed.places == [3, 6]
    for chunk in (chunk_of(4, 5), chunk_of(6), chunk_of(7, 8, 9)):
        assert await feed.append(chunk)
    assert [await appended(redis, number) for number in range(3)] == [[3, 6, 9], [1, 4, 7], [2, 5, 8]]
    assert await cursors(redis) == [9, 9, 9]


async def test_the_same_chunk_again_is_put_where_it_is_not(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = await term(redis)
    with monkeypatch.context() as patch, pytest.raises(StreamUnavailable):
        patch.setattr(feed._slots.all[2], "_append", unheard)
        await feed.append(chunk_of(1, 2, 3))
    assert await feed.append(chunk_of(1, 2, 3))
    assert [await appended(redis, number) for number in range(3)] == [[3], [1], [2]]


async def test_an_answer_that_was_not_heard(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = await term(redis)
    run = feed._slots.all[1]._append

    async def lost(**told: Any) -> NoReturn:
        await run(**told)
        raise ConnectionError("the connection was closed")

    with monkeypatch.context() as patch, pytest.raises(StreamUnavailable):
        patch.setattr(feed._slots.all[1], "_append", lost)
        await feed.append(chunk_of(1, 2, 3))
    assert await feed.append(chunk_of(1, 2, 3))
    assert [await appended(redis, number) for number in range(3)] == [[3], [1], [2]]


async def test_a_slot_that_went_back_is_caught_up(redis: Redis) -> None:
    """As after a failover: its entries, its cursor and what was told of them are older than the others'."""
    feed = await term(redis)
    assert await feed.append(chunk_of(1, 2, 3))
    before = await state_of(redis, "{firehose:2}")
    assert await feed.append(chunk_of(4, 5, 6))
    await fail_over(redis, before)
    with pytest.raises(ReaderLeaseLost, match="holds 3 where this reader had left 6"):
        await feed.append(chunk_of(7, 8, 9))
    feed = await term(redis, feed=feed)
    assert (await feed.go_to(HOST)).seq == 3
    for chunk in (chunk_of(4, 5, 6), chunk_of(7), chunk_of(8, 9)):  # 7: some had got it, though others refused
        assert await feed.append(chunk)
    assert await cursors(redis) == [9, 9, 9]
    assert [await appended(redis, number) for number in (0, 2)] == [[3, 6, 9], [2, 5, 8]]
    assert sorted(await appended(redis, 1)) == [1, 4, 7]


async def test_no_event_comes_twice_where_slots_are_not_as_far(redis: Redis, redis_url: str) -> None:
    """A chunk ends where the slots that are further are: behind it they need everything."""
    frames = list(Network(3, accounts=30).frames(300))
    async with SimRelay(frames[:100], start="oldest", wait_for_client=True) as relay:
        settings = Config(
            redis_url=redis_url, relay_urls=(relay.url,), stream_key=STREAM, cursor_key=CURSOR,
            stream_format="native", partitions=PARTITIONS,
        )  # fmt: skip

        async def read(upto: int) -> None:
            stats, stop = ReaderStats(), asyncio.Event()
            reading = asyncio.create_task(run_reader(settings, stop, stats=stats))
            async with asyncio.timeout(30):
                while (stats.last_seq or 0) < (frames[upto - 1].seq or 0):
                    await asyncio.sleep(0.01)
                stop.set()
                await reading

        await read(100)
        first = await state_of(redis, "{firehose:1}")
        relay.emit(*frames[100:150])
        await read(150)
        second = await state_of(redis, "{firehose:2}")
        relay.emit(*frames[150:200])
        await read(200)
        await fail_over(redis, first | second)
        relay.emit(*frames[200:])
        await read(300)
    found: list[Any] = [
        fields[b"n"]
        for number in range(PARTITIONS)
        for _, fields in cast("Any", await redis.xrange(Keys(STREAM, partition=number).stream))
    ]
    assert len(set(found)) == len(found) == entries_of(frames, "native")


async def test_the_number_changes_when_all_have_come_as_far(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is 8 of 3 partitions is in another of 4: who passed it over because that one is further would lose it."""
    feed = await term(redis)
    assert await feed.append(chunk_of(1, 2, 3))
    with monkeypatch.context() as patch, pytest.raises(StreamUnavailable):
        patch.setattr(feed._slots.all[2], "_append", unheard)
        await feed.append(chunk_of(4, 5, 6, 7, 8, 9))
    feed = await term(redis, 4)
    assert feed.partitions == 3
    assert await redis.get(Keys(STREAM).partitions) == b"3 3"
    assert await feed.append(chunk_of(4, 5, 6))
    assert await feed.append(chunk_of(7, 8, 9))
    with pytest.raises(PartitionsMayChange):
        await feed.append(chunk_of(10))
    feed = await term(redis, 4, feed=feed)
    assert feed.partitions == 4
    assert await redis.get(Keys(STREAM).partitions) == b"4 4"
    assert await cursors(redis, 4) == [9, 9, 9, 9]
    assert await feed.append(chunk_of(10, 11, 12, partitions=4))
    assert [await appended(redis, number) for number in range(4)] == [
        [3, 6, 9, 12], [1, 4, 7], [2, 5, 8, 10], [11]
    ]  # fmt: skip
    feed = await term(redis, 2)
    assert feed.partitions == 2
    assert await feed.append(chunk_of(13, partitions=2))
    assert await cursors(redis, 4) == [13, 13, 13, 13]  # also where nothing comes any more


@pytest.mark.parametrize("keeps", ["nothing", "what it had before"])
async def test_the_number_waits_for_one_that_is_behind_the_first(redis: Redis, keeps: str) -> None:
    """A term that ends before anything is appended would begin again and again."""
    feed = await term(redis)
    assert await feed.append(chunk_of(1, 2, 3))
    before = await state_of(redis, "{firehose:2}")
    assert await feed.append(chunk_of(4, 5, 6))
    if keeps == "nothing":
        await redis.delete(*before)
    else:
        await fail_over(redis, before)
    feed = await term(redis, 4)
    assert feed.partitions == 3
    assert await feed.append(chunk_of(5, 6))
    with pytest.raises(PartitionsMayChange):
        await feed.append(chunk_of(7))
    assert (await term(redis, 4, feed=feed)).partitions == 4


async def test_cursors_of_another_number_are_not_believed(redis: Redis) -> None:
    """The first slot's node failed over just after the number had changed, and does not know of that."""
    feed = await term(redis, 2)
    assert await feed.append(chunk_of(1, 2, 3, partitions=2))
    before = await state_of(redis, "{firehose}")
    feed = await term(redis, 3)
    assert await feed.append(chunk_of(4, 5, 6))
    await fail_over(redis, before)
    feed = await term(redis, 3)
    assert feed.partitions == 3
    assert await cursors(redis) == [3, 3, 3]
    assert feed.places == [3]
    assert (await feed.go_to(HOST)).seq == 3
    assert await feed.append(chunk_of(4, 5, 6))
    found = Counter(itertools.chain(*[await appended(redis, number) for number in range(3)]))
    assert set(found) == {1, 2, 3, 4, 5, 6}


async def test_a_partition_that_came_back_empty(redis: Redis) -> None:
    feed = await term(redis)
    assert await feed.append(chunk_of(1, 2, 3))
    await redis.delete(*[key async for key in redis.scan_iter("*{firehose:2}*")])
    feed = await term(redis)
    position = await feed.go_to(HOST)
    assert (position.seq, position.is_partial) == (3, True)
    assert await feed.append(chunk_of(2))  # from where PostgreSQL says
    assert await feed.append(chunk_of(3))
    assert [await appended(redis, number) for number in range(3)] == [[3], [1], [2]]
    assert not (await feed.go_to(HOST)).is_partial


@pytest.mark.parametrize("keeps", ["nothing", "what it had before"])
async def test_one_that_gets_nothing_any_more_is_lost_like_any_other(redis: Redis, keeps: str) -> None:
    """What was unread there belongs to others now: they have come further, and do not have it."""
    feed = await term(redis)
    assert await feed.append(chunk_of(1))
    before = await state_of(redis, "{firehose:2}")
    assert await feed.append(chunk_of(2, 3))
    feed = await term(redis, 2)
    assert await feed.append(chunk_of(4, 5, partitions=2))
    if keeps == "nothing":
        await redis.delete(*[key async for key in redis.scan_iter("*{firehose:2}*")])
    else:
        await fail_over(redis, before)
    feed = await term(redis, 2)
    position = await feed.go_to(HOST)
    assert (position.seq, position.is_partial) == ((5, True) if keeps == "nothing" else (1, False))
    assert await feed.append(chunk_of(2, partitions=2))  # PostgreSQL says that 1 is stored
    assert await feed.append(chunk_of(3, 4, 5, 6, partitions=2))
    assert await appended(redis, 0) == [3, 4, 2, 4, 6]
    assert await cursors(redis) == [6, 6, 6]
    assert (await feed.go_to(HOST)).seq == 6


async def test_with_the_first_one_the_others_are_forgotten(redis: Redis) -> None:
    """With it went how many there were: what they have is read again from where PostgreSQL says."""
    feed = await term(redis)
    assert await feed.append(chunk_of(1, 2, 3))
    await redis.delete(*[key async for key in redis.scan_iter("*{firehose}*")])
    feed = await term(redis)
    assert (await feed.go_to(HOST)).seq is None
    assert feed.places == []
    assert await feed.append(chunk_of(2, 3))
    assert [await appended(redis, number) for number in range(3)] == [[3], [1], [2, 2]]
    assert await cursors(redis) == [3, 3, 3]


@pytest.mark.parametrize("to", [1, 9])
@pytest.mark.parametrize("partitions", [3, 4])
async def test_a_cursor_that_was_moved_by_hand_is_that_of_all(redis: Redis, to: int, partitions: int) -> None:
    feed = await term(redis)
    assert await feed.append(chunk_of(1, 2, 3))
    await redis.set(CURSOR, to)
    feed = await term(redis, partitions)
    assert (await feed.go_to(HOST)).seq == to
    assert await feed.append(chunk_of(to + 1, to + 2, partitions=partitions))
    every = itertools.chain(*[await appended(redis, number) for number in range(partitions)])
    assert sorted(every) == sorted([1, 2, 3, to + 1, to + 2])
    assert await cursors(redis, partitions) == [to + 2] * partitions


async def test_each_relay_has_a_place(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = await term(redis)
    assert await feed.append(chunk_of(1, 2, 3))
    assert (await feed.go_to("other.test")).seq is None
    assert await feed.append(chunk_of(70, 71))
    with monkeypatch.context() as patch, pytest.raises(StreamUnavailable):
        patch.setattr(feed._slots.all[0], "_append", unheard)
        await feed.append(chunk_of(72, 73))
    assert await feed.append(chunk_of(72, 73))
    position = await feed.go_to(HOST)
    assert (position.seq, position.switched_from) == (3, "other.test")
    with monkeypatch.context() as patch, pytest.raises(StreamUnavailable):
        patch.setattr(feed._slots.all[0], "_append", unheard)
        await feed.append(chunk_of(4, 5))
    position = await (await term(redis, host="other.test")).go_to("other.test")
    assert position.seq == 73  # the first one never left it
    assert (await (await term(redis)).go_to(HOST)).seq == 3


async def test_only_a_slot_that_lost_something_goes_back(redis: Redis) -> None:
    feed = await term(redis)
    assert await feed.append(chunk_of(1, 2, 3, 5))
    await redis.delete(Keys(STREAM, partition=2).stream)
    with pytest.raises(StreamBroken):
        await feed.append(chunk_of(6))
    assert await feed.go_back(1, b"")
    assert await cursors(redis) == [5, 6, 1]
    feed = await term(redis, feed=feed)
    assert (await feed.go_to(HOST)).seq == 1
    for seq in (2, 3, 5, 6):
        assert await feed.append(chunk_of(seq))
    assert [await appended(redis, number) for number in range(3)] == [[3, 6], [1], [2, 5]]


async def test_the_request_that_goes_furthest_is_told(redis: Redis) -> None:
    feed = await term(redis)
    assert await feed.append(chunk_of(1, 2, 3))
    told = {0: b'{"seq":null,"relay":"","lost":true}', 1: b'{"seq":2,"relay":"relay.test"}', 2: b'{"seq":1,"relay":""}'}
    for number, text in told.items():
        await redis.set(Keys(STREAM, GROUP, number).go_back, text)
    with pytest.raises(StoreWentBack) as went:
        await feed.watch()
    assert went.value.request == told[2]
    assert await feed.go_back(1, b"", went.value.request)
    assert not await redis.exists(*[Keys(STREAM, GROUP, number).go_back for number in told])
    assert await cursors(redis) == [1, 1, 1]


async def test_a_gap_is_in_the_list_whoever_lost_it(redis: Redis) -> None:
    feed = await term(redis)
    assert await feed.append(chunk_of(1, 2, 3))
    await redis.delete(Keys(STREAM, partition=2).stream)
    with pytest.raises(StreamBroken):
        await feed.append(chunk_of(5))
    assert await feed.go_back(None, b"a gap")
    assert await redis.lrange(Keys(STREAM).gaps, 0, -1) == [b"a gap"]


async def test_a_lease_of_one_slot_is_another_readers(redis: Redis) -> None:
    feed = await term(redis)
    assert await feed.append(chunk_of(1))
    await redis.set(Keys(STREAM, partition=2).reader_lease, "another")
    assert not await feed.acquire()
    with pytest.raises(ReaderLeaseLost):
        await feed.append(chunk_of(2, 3))
    assert await cursors(redis) == [1, 3, 1]  # the first one not


async def test_the_sum_has_a_limit(redis: Redis) -> None:
    feed = await term(redis, feed=feed_on(redis, max_stream_len=5))
    assert await feed.append(chunk_of(1, 2, 3, 4))
    assert not await feed.append(chunk_of(5, 6))
    await redis.xtrim(Keys(STREAM, partition=1).stream, maxlen=0)
    await feed.trim()
    assert await feed.append(chunk_of(5, 6))


async def test_partitions_of_an_older_release_are_not_left_behind(redis: Redis) -> None:
    await redis.set(Keys(STREAM).partitions, "2 2")
    await redis.set(CURSOR, 5)
    await redis.xadd(f"{STREAM}:1", {"n": "1"})
    feed = feed_on(redis)
    assert await feed.acquire()
    with pytest.raises(Unreachable, match="FASTWORKER_STREAM_PARTITIONS=1"):
        await feed.open_partitions(2)
    await redis.set(Keys(STREAM).partitions, "1 2")  # as told
    feed = await term(redis, 2)
    assert feed.partitions == 2
    position = await feed.go_to(HOST)
    assert (position.seq, position.is_partial) == (5, False)
    assert await cursors(redis, 2) == [5, 5]
    assert (await term(redis, 2)).partitions == 2


async def test_dead_letters_are_those_of_all(redis: Redis) -> None:
    await term(redis)
    admin = RedisAdmin(redis, STREAM)
    places = {"5-0": 0, "6-0": 1, "6-1": 0, "7-0": 2}
    for letter_id, number in places.items():
        letters = Keys(STREAM, partition=number).dead_letters
        await redis.xadd(letters, {"form": "native", "data": letter_id}, id=letter_id)
    await redis.xadd(Keys(STREAM, partition=2).dead_letters, {"form": "native", "data": "same"}, id="7-1")
    await redis.xadd(Keys(STREAM, partition=1).dead_letters, {"form": "native", "data": "same"}, id="7-1")
    assert await admin.letters.count() == 6
    seen, after = [], None
    while page := await admin.letters.page(after=after, count=2):
        seen += [letter_id for letter_id, _ in page]
        after = page[-1][0]
    assert seen == [*places, "7-1", "7-1"]
    assert [letter_id for letter_id, _ in await admin.letters.newest(3)] == ["7-1", "7-1", "7-0"]
    assert (await admin.letters.one("6-0") or {})[b"data"] == b"6-0"
    assert await admin.letters.one("8-0") is None
    assert await admin.letters.retry("6-0", {b"n": b"6"}, "did:plc:somebody")
    assert not await admin.letters.retry("6-0", {b"n": b"6"}, "did:plc:somebody")
    assert await appended(redis, 1) == [6]  # where it was
    assert await admin.letters.purge(["5-0", "7-1"]) == 3
    assert await admin.letters.count() == 2


async def test_entries_by_hand_go_where_they_belong(redis: Redis) -> None:
    await term(redis)
    admin = RedisAdmin(redis, STREAM)
    did = next(f"did:plc:{n}" for n in range(99) if partition_of(f"did:plc:{n}", PARTITIONS) == 2)
    assert await admin.append_if_room([(did, [(b"n", b"1")]), ("", [(b"n", b"2")])], 2)
    assert not await admin.append_if_room([(did, [(b"n", b"3")])], 2)
    assert [await appended(redis, number) for number in range(3)] == [[2], [], [1]]
    assert (await admin.count(GROUP)).appended == (2 if await counts_reads(redis) else None)
