"""The worker's side of Redis on a real server: every way an entry can come and end, and that nothing counts twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from fastworker.errors import Reason, StoreUnavailable, StreamUnavailable
from fastworker.process.board import Heartbeats
from fastworker.stream.chunk import Chunk
from fastworker.stream.client import connect
from fastworker.stream.consumer import (
    REPLY_BYTES,
    ConsumerLeaseLost,
    Entry,
    SetAside,
    Tally,
    WorkerStream,
    original_fields,
)
from fastworker.stream.feed import Feed, trim_finished
from fastworker.stream.ids import id_order
from fastworker.stream.keys import USUAL, Keys
from fastworker.stream.skipped import CONSUMER, give_skipped
from fastworker.worker.intake import Intake
from tests import replies
from tests.rig.proxy import Proxy
from tests.servers import counts_reads

KEY, GROUP = "firehose:events", "firehose-processors"
COMMITTED = Tally("committed", "#commit")


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    client = connect(redis_url)
    yield client
    await client.aclose()


async def consumer(redis: Redis, **options: Any) -> WorkerStream:
    stream = WorkerStream(redis, consumer_id="w", **options)
    await stream.acquire()
    return stream


async def add(redis: Redis, count: int, first: int = 0) -> list[str]:
    return [
        replies.text(await redis.xadd(KEY, {"type": "commit", "data": f"{{{n}}}", "seq": str(n)}))
        for n in range(first, first + count)
    ]


async def put(redis: Redis, *seqs: int) -> list[str]:
    """As a reader of ours does; the ids."""
    feed = Feed(redis, stream_key=KEY, cursor_key="firehose:python_cursor", max_stream_len=10_000)
    assert await feed.acquire()
    await feed.go_to("relay.test")
    newest = (await redis.xinfo_stream(KEY))["last-generated-id"] if await redis.exists(KEY) else b"0"
    chunk = Chunk()
    for seq in seqs:
        chunk.entry([(b"type", b"commit"), (b"data", b"{}"), (b"seq", str(seq).encode())])
        chunk.seq = seq
    assert await feed.append(chunk)
    await feed.release()
    return [one.decode() for one, _ in replies.entries(await redis.xrange(KEY, b"(" + newest))]


async def ledger(redis: Redis) -> dict[str, int]:
    return replies.counts(await redis.hgetall(USUAL.ledger))


async def pending(redis: Redis) -> int:
    return replies.number((await redis.xpending(KEY, GROUP))["pending"])


async def test_a_small_batch_size_still_reads_a_burst(redis: Any) -> None:
    stream = await consumer(redis, batch_size=10)
    ids = await add(redis, 2_500)
    reads = []
    while entries := await stream.read(block_ms=1):
        reads.append([entry_id for entry_id, _ in entries])
    assert [entry_id for read in reads for entry_id in read] == ids
    assert [len(read) for read in reads] == [100, 200, 400, 800, 1_000]  # the first ones are acked sooner


async def test_big_entries_make_small_bursts(redis: Any) -> None:
    stream = await consumer(redis, batch_size=10)
    for _ in range(200):
        await redis.xadd(KEY, {"f": b"x" * 100_000})
    await stream.read(block_ms=1)
    assert 40 <= len(await stream.read(block_ms=1)) <= 50  # 4 MB


@pytest.mark.parametrize("batch_size", [1, 300])
async def test_no_piece_has_more_bytes_than_a_worker_can_hold(redis: Any, batch_size: Any) -> None:
    """Whatever comes after small entries: new ones, our own that are read back, those of the dead."""
    stream = await consumer(redis, batch_size=batch_size)
    await add(redis, 400)
    ids = [(await redis.xadd(KEY, {"f": b"x" * 2_000_000})).decode() for _ in range(60)]

    async def pieces(read: Any) -> Any:
        found = []
        while piece := await read():
            assert sum(len(value) for _, fields in piece for value in fields.values()) <= 130_000_000
            found += [entry_id for entry_id, _ in piece]
        return found

    intake = Intake(stream, Heartbeats(1)[0])

    async def new() -> list[Entry]:
        async with asyncio.timeout(30):
            while not (piece := await intake.next(1)) and intake.backlog:
                pass
        return piece

    assert list(dict.fromkeys(await pieces(new)))[400:] == ids
    at = "0"

    async def own() -> Any:
        nonlocal at
        entries, following = await stream.read_own(at)
        at = following or at
        return entries

    assert (await pieces(own))[400:] == ids
    other = await consumer(redis)
    await redis.delete("fastworker:consumer:w-0")
    found = []
    while (claimed := await other.claim("w-0", idle_ms=0)).found:
        assert sum(len(fields.get(b"f", b"")) for _, fields in claimed.entries) <= 130_000_000
        found += [entry_id for entry_id, _ in claimed.entries]
        await other.ack({COMMITTED: found[-len(claimed.entries) :]})
    assert found[400:] == ids


async def test_a_reply_that_grows_too_large_is_given_up_and_read_again_in_pieces(redis: Any) -> None:
    """Small entries make reads of many; what comes then may be large. Nothing of it stays pending unseen."""
    stream = await consumer(redis, batch_size=300)
    await add(redis, 600)
    ids = [(await redis.xadd(KEY, {"f": b"x" * 200_000})).decode() for _ in range(300)]
    intake = Intake(stream, Heartbeats(1)[0])
    before = (await redis.info("stats"))["total_connections_received"]
    found: list[str] = []
    async with asyncio.timeout(30):
        while (piece := await intake.next(1)) or intake.backlog:
            assert sum(len(value) for _, fields in piece for value in fields.values()) <= REPLY_BYTES + 10 * 200_000
            found += [entry_id for entry_id, _ in piece if entry_id not in found]
    assert found[600:] == ids
    assert (await redis.info("stats"))["total_connections_received"] > before, "no reply was given up"


async def test_names_are_leased_lowest_first_and_given_back(redis: Any) -> None:
    first, second = await consumer(redis), await consumer(redis)
    assert (first.name, second.name) == ("w-0", "w-1")
    await first.release()
    assert (await consumer(redis)).name == "w-0"
    await first.release()  # the name has another owner: nothing happens
    assert await redis.exists("fastworker:consumer:w-0")


async def test_a_released_consumer_goes_only_when_it_holds_nothing(redis: Any) -> None:
    await add(redis, 1)
    idle, busy = await consumer(redis), await consumer(redis)
    await busy.read(block_ms=1)
    await idle.read(block_ms=1)
    await idle.release()
    await busy.release()
    assert [c["name"] for c in await redis.xinfo_consumers(KEY, GROUP)] == [b"w-1"]
    assert await redis.smembers(USUAL.consumers) == {b"w-1"}


async def test_losing_the_lease_is_told_and_a_lease_that_redis_lost_comes_back(redis: Any) -> None:
    stream = await consumer(redis)
    await redis.flushall()
    await stream.renew()
    assert await redis.exists("fastworker:consumer:w-0")
    await redis.set("fastworker:consumer:w-0", "another")
    with pytest.raises(ConsumerLeaseLost):
        await stream.renew()


async def test_an_ack_counts_what_was_pending_once(redis: Any) -> None:
    stream = await consumer(redis)
    ids = await add(redis, 3_000)
    while await stream.read(block_ms=1):
        pass
    dropped = Tally("nothing_to_store", "#commit", ("bad_did", "bad_did", "too_long"))
    tallies = {COMMITTED: ids[:2_500], dropped: ids[2_500:2_502], Tally("committed", "#identity"): ids[2_502:]}
    assert await stream.ack(tallies, ["forbidden"]) == 3_000
    assert await stream.ack(tallies, ["forbidden"]) == 0
    assert await ledger(redis) == {
        "committed": 2_998,
        "nothing_to_store": 2,
        "drop:bad_did": 4,
        "drop:too_long": 2,
        "drop:forbidden": 1,
    }
    assert await redis.hgetall("cluster:metrics") == {
        b"totalEvents": b"3000",
        b"#commit": b"2502",
        b"#identity": b"498",
    }


@pytest.mark.parametrize(
    "fields",
    [
        {b"type": b"commit", b"data": b"{\xff", b"seq": b"7"},
        {b"n": b"\x00\xff"},
        {b"f": b"\xa1", b"relay": b"relay.example"},
        {b"f": b"\xa1"},
        {b"odd": b"\xff", b"": b"1"},
    ],
)
async def test_setting_aside_is_idempotent_and_reversible(redis: Any, fields: Any) -> None:
    stream = await consumer(redis)
    entry_id = await redis.xadd(KEY, fields)
    [entry] = await stream.read(block_ms=1)
    letters = [SetAside(entry[0], entry[1], Reason.BAD_JSON, "why \ud800")]
    assert await stream.set_aside(letters, now_ms=5) == 1
    assert await stream.set_aside(letters, now_ms=6) == 0
    [(_, letter)] = await redis.xrange(USUAL.dead_letters)
    assert list(letter)[:5] == [b"type", b"data", b"seq", b"origId", b"deliveries"]
    assert (letter[b"origId"], letter[b"deliveries"], letter[b"reason"]) == (entry_id, b"1", b"bad_json")
    assert original_fields(letter) == fields
    assert await ledger(redis) == {"set_aside": 1, "drop:bad_json": 1}
    assert await pending(redis) == 0


async def test_acks_and_dead_letters_pass_at_maxmemory(redis: Any) -> None:
    stream = await consumer(redis)
    await add(redis, 2)
    [first, second] = await stream.read(block_ms=1)
    await redis.config_set("maxmemory", "100kb")
    try:
        with pytest.raises(ResponseError, match="maxmemory"):
            await add(redis, 1)
        assert await stream.ack({COMMITTED: [first[0]]}) == 1
        assert await stream.set_aside([SetAside(*second, Reason.BAD_JSON, "")], now_ms=1) == 1
        assert await ledger(redis) == {"committed": 1, "set_aside": 1, "drop:bad_json": 1}
        await stream.renew()
        assert (await consumer(redis)).name == "w-1"  # a worker that is started again is who makes room
    finally:
        await redis.config_set("maxmemory", "0")


async def test_own_pending_entries_are_read_back_and_ghosts_acked(redis: Any) -> None:
    before = await consumer(redis)
    ids = await add(redis, 5)
    await before.read(block_ms=1)
    await redis.xdel(KEY, ids[1], ids[3])
    await before.release()
    after = await consumer(redis)
    assert after.name == before.name
    entries, at = await after.read_own("0", count=2)
    assert at is not None
    more, end = await after.read_own(at)
    assert end is not None
    assert [e for e, _ in entries + more] == [ids[0], ids[2], ids[4]]
    assert await after.read_own(end) == ([], None)
    assert await ledger(redis) == {"ghosts": 2}
    assert await pending(redis) == 3


async def test_entries_are_claimed_from_the_dead_only(redis: Any) -> None:
    alive = await consumer(redis)
    ids = await add(redis, 5)
    await alive.read(block_ms=1)
    other = await consumer(redis)
    assert (await other.claim("w-0", idle_ms=0)).found == 0
    await redis.delete("fastworker:consumer:w-0")
    assert (await other.claim("w-0", idle_ms=60_000)).found == 0  # renewed or read a moment ago
    await redis.xdel(KEY, ids[0])
    piece = await other.claim("w-0", idle_ms=0, count=2)
    assert (piece.found, piece.ghosts, [e for e, _ in piece.entries]) == (2, 1, [ids[1]])
    rest = await other.claim("w-0", idle_ms=0)
    assert [e for e, _ in rest.entries] == ids[2:]
    assert {c["name"] for c in await redis.xinfo_consumers(KEY, GROUP)} == {b"w-0", b"w-1"}
    await other.claim("w-0", idle_ms=0)  # holds nothing, has no lease, is ours: it goes
    assert [c["name"] for c in await redis.xinfo_consumers(KEY, GROUP)] == [b"w-1"]
    assert await other.ack({COMMITTED: [e for e, _ in piece.entries + rest.entries]}) == 4
    assert await ledger(redis) == {"ghosts": 1, "committed": 4}


async def test_a_lease_without_an_end_is_given_one(redis: Any) -> None:
    """As after a move to another Redis by a tool that copies no expiry: its owner is dead, and does not come back."""
    alive = await consumer(redis)
    [entry_id] = await add(redis, 1)
    await alive.read(block_ms=1)
    await redis.persist("fastworker:consumer:w-0")
    other = await consumer(redis, lease_ms=100)
    assert (await other.claim("w-0", idle_ms=0)).found == 0
    async with asyncio.timeout(10):
        while not (piece := await other.claim("w-0", idle_ms=0)).found:
            await asyncio.sleep(0.02)
    assert [e for e, _ in piece.entries] == [entry_id]


async def test_a_foreign_consumer_is_emptied_but_never_deleted(redis: Any) -> None:
    stream = await consumer(redis)
    [entry_id] = await add(redis, 1)
    await redis.xreadgroup(GROUP, b"worker-0-p\xff", {KEY: ">"})
    [foreign] = await stream.consumers()
    assert (foreign.pending, foreign.name in await stream.known_names()) == (1, False)
    assert [e for e, _ in (await stream.claim(foreign.name, idle_ms=0)).entries] == [entry_id]
    await stream.claim(foreign.name, idle_ms=0)
    assert len(await stream.consumers()) == 1


async def idle_of(redis: Redis) -> dict[str, int]:
    return {
        replies.text(one["message_id"]): replies.number(one["time_since_delivered"])
        for one in await redis.xpending_range(KEY, GROUP, "-", "+", 5_000)
    }


async def test_renewing_keeps_old_workers_from_claiming(redis: Any) -> None:
    """All that we hold; nobody else's, and not what was taken from us."""
    stream, other = await consumer(redis), await consumer(redis)
    ids = await add(redis, 2_500)
    while await stream.read(block_ms=1):
        pass
    [theirs] = await add(redis, 1)
    await other.read(block_ms=1)
    await redis.xclaim(KEY, GROUP, "worker-3", 0, [ids[7]])
    while min((await idle_of(redis)).values()) < 60:
        await asyncio.sleep(0.02)
    await stream.renew()
    after = await idle_of(redis)
    assert max(after[entry_id] for entry_id in ids if entry_id != ids[7]) <= after[theirs] - 50
    assert after[ids[7]] >= 60
    [first] = await redis.xpending_range(KEY, GROUP, "-", "+", 1)
    assert first["times_delivered"] == 1
    assert await ledger(redis) == {}


async def test_what_a_deleted_consumer_holds_is_kept_until_it_is_settled(redis: Any) -> None:
    """XGROUP DELCONSUMER: pending for nobody. Nothing is trimmed, progress waits, and the ledger counts no guess."""
    stream = await consumer(redis)
    ids = await add(redis, 10)
    await stream.read(block_ms=1)
    await stream.ack({COMMITTED: ids[:2]})
    assert await redis.xgroup_delconsumer(KEY, GROUP, stream.name) == 8
    await stream.renew()
    await stream.give_skipped()
    await trim_finished(redis, KEY, group=GROUP)
    assert [e.decode() for e, _ in await redis.xrange(KEY)] == ids[2:]
    assert (await stream.lowest_pending(), await stream.is_finished()) == (ids[2], False)
    assert await stream.ack({COMMITTED: ids[2:]}) == 0
    assert await ledger(redis) == {"committed": 2}
    assert await stream.is_finished()


async def test_what_two_hold_is_counted_once(redis: Any) -> None:
    """Redis came back with older data, so an entry is delivered again: the second holder's renewal brings nothing back."""
    first, second = await consumer(redis), await consumer(redis)
    ids = await add(redis, 3)
    await first.read(block_ms=1)
    await redis.xgroup_delconsumer(KEY, GROUP, first.name)
    await redis.xgroup_setid(KEY, GROUP, "0")
    assert [e for e, _ in await second.read(block_ms=1)] == ids
    assert await first.ack({COMMITTED: ids}) == 3
    await second.renew()
    assert await second.ack({COMMITTED: ids}) == 0
    assert (await pending(redis), await ledger(redis)) == (0, {"committed": 3})


async def test_what_is_read_back_was_given_with_all_that_came_with_it(redis: Any) -> None:
    """The first of a read is told twice, the second time alone: the others were given all the same."""
    stream = await consumer(redis)
    ids = await add(redis, 5)
    await stream.read(block_ms=1)
    await stream.give_skipped()
    await stream.ack({COMMITTED: ids[1:]})
    assert [e for e, _ in (await stream.read_own("0"))[0]] == ids[:1]
    await stream.ack({COMMITTED: ids[:1]})
    for _ in range(2):  # what was there at the look before is judged
        await stream.give_skipped()
    assert (await pending(redis), await ledger(redis)) == (0, {"committed": 5})


async def test_a_renewal_that_arrives_after_a_later_ack_brings_nothing_back(redis: Any, redis_url: str) -> None:
    """It was sent on a connection that stood still; the client had given it up."""
    async with Proxy(redis_url.removeprefix("unix://").partition("?")[0]) as proxy:
        late = connect(f"redis://127.0.0.1:{proxy.port}/0", socket_timeout=0.2)
        stream = WorkerStream(late, consumer_id="w")
        await stream.acquire()
        ids = await add(redis, 3)
        await stream.read(block_ms=1)
        calls = (await redis.info("commandstats"))["cmdstat_evalsha"]["calls"]
        proxy.hold()
        with pytest.raises(StreamUnavailable):
            await stream.renew()
        assert await redis.xack(KEY, GROUP, *ids) == 3
        proxy.release()
        async with asyncio.timeout(10):
            while (await redis.info("commandstats"))["cmdstat_evalsha"]["calls"] == calls:
                await asyncio.sleep(0.01)
        assert await pending(redis) == 0
        await late.aclose()


@pytest.mark.parametrize("successor", ["the same name", "another"])
async def test_a_deleted_consumer_that_dies_at_once_loses_nothing(redis: Any, successor: Any) -> None:
    """Nothing that it held is trimmed, and the group goes back to it."""
    stream = await consumer(redis)
    ids = await add(redis, 10)
    await stream.read(block_ms=1)
    await stream.ack({COMMITTED: ids[:3]})
    await redis.xgroup_delconsumer(KEY, GROUP, stream.name)
    await stream.give_skipped()
    await trim_finished(redis, KEY, group=GROUP)
    assert [e.decode() for e, _ in await redis.xrange(KEY)] == ids[3:]
    assert await stream.lowest_pending() == ids[3]
    if successor == "another":
        other = await consumer(redis)
        await redis.delete("fastworker:consumer:w-0")
        await other.claim("w-0", idle_ms=0)
        await other.claim("w-0", idle_ms=0)
        assert await other.known_names() == {other.name}
    else:
        await redis.delete("fastworker:consumer:w-0")
        other = await consumer(redis)
        assert other.name == stream.name
    assert [e for e, _ in await other.read(block_ms=1)] == ids[3:]
    assert await other.ack({COMMITTED: ids[3:]}) == 7
    await other.give_skipped()
    await trim_finished(redis, KEY, group=GROUP)
    assert await redis.xlen(KEY) == 0


async def test_who_was_frozen_puts_nothing_back(redis: Any) -> None:
    frozen, other = await consumer(redis), await consumer(redis)
    ids = await add(redis, 3)
    await frozen.read(block_ms=1)
    await redis.delete("fastworker:consumer:w-0")
    await other.claim("w-0", idle_ms=0)
    await other.ack({COMMITTED: ids})
    await frozen.renew()
    await frozen.renew()
    assert (await pending(redis), await ledger(redis)) == (0, {"committed": 3})


async def test_what_somebody_trims_while_we_hold_it_is_a_ghost_once(redis: Any) -> None:
    """Redis 7 drops it from the pending list when it is renewed; its rows are written all the same."""
    stream = await consumer(redis)
    ids = await add(redis, 5)
    await stream.read(block_ms=1)
    await redis.xdel(KEY, ids[1], ids[2])
    await stream.renew()
    await stream.renew()
    # An old Redis keeps it: then it is acknowledged like the others, whose rows are written as well.
    ghosts = 2 if await counts_reads(redis) else 0
    assert await stream.ack({COMMITTED: ids}) == 5 - ghosts
    assert await ledger(redis) == {"committed": 5 - ghosts} | ({"ghosts": ghosts} if ghosts else {})
    assert await pending(redis) == 0


async def test_a_name_under_which_a_predecessor_works_is_not_taken(redis: Any) -> None:
    """It holds no lease; its entries are claimed when it has been idle for long, never read back as ours."""
    await consumer(redis, foreign_idle_ms=100)
    await add(redis, 1)
    await redis.xreadgroup(GROUP, "w-1", {KEY: ">"})
    second = await consumer(redis, foreign_idle_ms=60_000)
    assert second.name == "w-2"
    await second.release()
    await asyncio.sleep(0.15)
    third = await consumer(redis, foreign_idle_ms=100)
    assert third.name == "w-1"
    assert len((await third.read_own("0"))[0]) == 1


async def test_a_lost_group_starts_behind_what_postgresql_knows(redis: Any) -> None:
    stream = await consumer(redis)
    ids = await add(redis, 10)

    async def finished() -> str:
        return ids[3]

    stream = await consumer(redis, last_finished=finished)
    await redis.xgroup_destroy(KEY, GROUP)
    with pytest.raises(StreamUnavailable, match="group"):
        await stream.read(block_ms=1)
    assert [e for e, _ in await stream.read(block_ms=1)] == ids[4:]


async def test_a_lost_group_waits_for_postgresql_which_knows_where_it_begins(redis: Any) -> None:
    """Both servers are in trouble at once: it is the stream that cannot be read, whatever the other one says."""
    stream = await consumer(redis)
    ids = await add(redis, 5)
    is_away = True

    async def finished() -> str:
        if is_away:
            raise StoreUnavailable("All 2 connections are at work, or wait for locks")
        return ids[1]

    stream = await consumer(redis, last_finished=finished)
    await redis.xgroup_destroy(KEY, GROUP)
    for attempt in (stream.read(block_ms=1), stream.lowest_pending()):
        with pytest.raises(StreamUnavailable, match="group is gone.*PostgreSQL: All 2 connections"):
            await attempt
        await redis.delete(USUAL.recreate_lock)
    is_away = False
    with pytest.raises(StreamUnavailable, match="created again"):
        await stream.read(block_ms=1)
    assert [e for e, _ in await stream.read(block_ms=1)] == ids[2:]


async def test_an_empty_redis_starts_at_the_beginning(redis: Any) -> None:
    async def finished() -> str:
        return "99999999999999-0"  # an id of the stream that is gone, and the clock went back

    stream = await consumer(redis, last_finished=finished)
    await redis.flushall()
    ids = await add(redis, 3)
    with pytest.raises(StreamUnavailable):
        await stream.read(block_ms=1)
    assert [e for e, _ in await stream.read(block_ms=1)] == ids


async def test_lowest_pending(redis: Any) -> None:
    stream = await consumer(redis)
    assert await stream.lowest_pending() == "0-1"  # the group has delivered nothing
    ids = await add(redis, 3)
    await stream.read(block_ms=1)
    await stream.ack({COMMITTED: [ids[0]]})
    await stream.give_skipped()
    assert await stream.lowest_pending() == ids[1]
    await stream.ack({COMMITTED: ids[1:]})
    await stream.give_skipped()
    assert id_order(await stream.lowest_pending() or "") > id_order(ids[2])
    await redis.xgroup_setid(KEY, GROUP, ids[0])  # it goes back: what is delivered again is not settled
    assert id_order(ids[0]) < id_order(await stream.lowest_pending() or "") <= id_order(ids[1])
    assert id_order("9-1") < id_order("10-0") < id_order("10-12")


@pytest.mark.parametrize(("key", "group"), [("staging:events", GROUP), (KEY, "others")])
async def test_every_stream_and_group_has_its_own_keys(redis: Any, key: Any, group: Any) -> None:
    usual, other = await consumer(redis), WorkerStream(redis, consumer_id="v", keys=Keys(key, group), group=group)
    await other.acquire()
    await add(redis, 2)
    await redis.xadd("staging:events", {"type": "commit", "data": "{", "seq": "1"})
    await usual.read(block_ms=1)
    entries = await other.read(block_ms=1)
    await usual.tell_held()
    await other.tell_held()
    assert await usual.known_names() == {"w-0"}
    assert await other.known_names() == {"v-0"}
    assert list(await redis.hgetall("fastworker:held")) == [b"w-0"]
    await other.ack({COMMITTED: [entry_id for entry_id, _ in entries]})
    if key != KEY:
        assert await ledger(redis) == {}
        assert await redis.hgetall("fastworker:ledger:staging:events") == {b"committed": b"1"}


async def test_a_key_of_the_wrong_type_is_for_the_operator(redis: Any) -> None:
    await redis.set(KEY, "text")
    with pytest.raises(StreamUnavailable, match="wrong type"):
        await consumer(redis)


async def _set_id(redis: Redis) -> None:
    await redis.xgroup_setid(KEY, GROUP, "$")


async def _make_again(redis: Redis) -> None:
    await redis.xgroup_destroy(KEY, GROUP)
    await redis.xgroup_create(KEY, GROUP, id="$")


async def _both(redis: Redis) -> None:
    await _make_again(redis)
    await redis.xgroup_setid(KEY, GROUP, "0")
    await _set_id(redis)


async def worked_off(stream: WorkerStream) -> list[str]:
    """Ids in the order in which they are given, until there are no more; acked one flush after the other."""
    done: list[str] = []
    while True:
        for _ in range(2):  # what was read a moment ago may not be told yet: it is judged by the look after that
            await stream.give_skipped()
        found = await stream.read(block_ms=1)
        for other in await stream.consumers():
            found += (await stream.claim(other.name, idle_ms=0)).entries
        if not found:
            return done
        done += [entry_id for entry_id, _ in found]
        await stream.ack({COMMITTED: [entry_id for entry_id, _ in found]})


@pytest.mark.parametrize("skip", [_set_id, _make_again, _both])
async def test_what_somebody_moves_the_group_past_is_given_all_the_same(
    redis: Any, skip: Any, caplog: pytest.LogCaptureFixture
) -> None:
    stream = await consumer(redis)
    ids = await add(redis, 1_200)
    held = [entry_id for entry_id, _ in await stream.read(block_ms=1)]
    await stream.ack({COMMITTED: held[:90]})
    await stream.tell_held()
    await skip(redis)
    more = await add(redis, 50, first=1_200)
    await stream.read(block_ms=1)
    await trim_finished(redis, KEY, group=GROUP)
    await stream.renew()
    settled = await stream.ack({COMMITTED: [*held[90:], *more]})
    assert settled == len(more) + (len(held[90:]) if skip is _set_id else 0)  # a group's pending list goes with it
    again = await worked_off(stream)
    assert sorted(again, key=id_order) == ids[len(held) :]
    assert "were given to nobody" in caplog.text
    assert await ledger(redis) == {"committed": 90 + settled + len(again)}
    assert (await pending(redis), await stream.is_finished()) == (0, True)
    assert CONSUMER not in {one.name for one in await stream.consumers()}


async def test_a_group_that_an_operator_made_is_given_what_waits(redis: Any) -> None:
    """With `$`, before the first worker: nothing of it was read, and a reader's trim leaves it."""
    ids = await add(redis, 30)
    await redis.xgroup_create(KEY, GROUP, id="$")
    for _ in range(2):
        await give_skipped(redis, USUAL, GROUP, who="reader")
        await trim_finished(redis, KEY, group=GROUP)
    assert await redis.xlen(KEY) == 30
    assert sorted(await worked_off(await consumer(redis)), key=id_order) == ids


async def test_what_workers_read_that_do_not_tell_is_not_given_again(redis: Any) -> None:
    """Older releases and others, beside ours, and under a name that one of ours had."""
    stream = await consumer(redis)
    await add(redis, 30)
    for name in ("theirs", stream.name):
        if name == stream.name:
            await redis.set(f"fastworker:consumer:{name}", "another token")
        found = await redis.xreadgroup(GROUP, name, {KEY: ">"}, count=10)
        await redis.xack(KEY, GROUP, *[entry_id for entry_id, _ in found[0][1]])
        await stream.give_skipped()
        await trim_finished(redis, KEY, group=GROUP)
    assert await pending(redis) == 0
    assert await redis.xlen(KEY) == 10


async def _trim(redis: Any, _ids: list[str]) -> None:
    await redis.xtrim(KEY, maxlen=8, approximate=False)


async def _trim_all(redis: Any, _ids: list[str]) -> None:
    await redis.xtrim(KEY, maxlen=0, approximate=False)
    await put(redis, 31)


async def _pick(redis: Any, ids: list[str]) -> None:
    await redis.xdel(KEY, ids[22], ids[23])


async def _skip_and_trim(redis: Any, ids: list[str]) -> None:
    await _make_again(redis)
    await _trim(redis, ids)


@pytest.mark.parametrize("remove", [_trim, _trim_all, _pick, _skip_and_trim])
@pytest.mark.parametrize("read_before", [0, 5])
@pytest.mark.parametrize("who", ["reader", "worker"])
async def test_what_nobody_was_given_and_somebody_removed_is_told_to_the_reader(
    redis: Any, read_before: int, remove: Any, who: Any
) -> None:
    """Also between two looks of the reader: the numbers in the ids tell."""
    stream = await consumer(redis, batch_size=read_before or 10)
    ids = await put(redis, *range(1, 31))
    if read_before:
        stream._burst = read_before
        assert [one for one, _ in await stream.read(1)] == ids[:5]
        await stream.ack({COMMITTED: ids[:5]})
    await give_skipped(redis, USUAL, GROUP, who=who)
    assert not await redis.exists(USUAL.go_back)
    await remove(redis, ids)
    await asyncio.sleep(0.01)
    while found := await stream.read(1):
        await stream.ack({COMMITTED: [one for one, _ in found]})
    for _ in range(3):
        await give_skipped(redis, USUAL, GROUP, who=who)
        await asyncio.sleep(0.5)
    assert b'"lost":true' in (await redis.get(USUAL.go_back) or b"")
    assert await stream.lowest_pending() == "0-0"  # nothing counts as stored until the reader has gone back
    await redis.delete(USUAL.go_back)
    await give_skipped(redis, USUAL, GROUP, who=who)
    assert not await redis.exists(USUAL.go_back)


async def test_what_somebody_holds_was_given_to_him_though_it_is_trimmed(redis: Any) -> None:
    first, second = await consumer(redis, batch_size=10), await consumer(redis, batch_size=10)
    first._burst = second._burst = 10
    ids = await put(redis, *range(1, 31))
    assert [one for one, _ in await first.read(1)] == ids[:10]
    assert [one for one, _ in await second.read(1)] == ids[10:20]
    await redis.xtrim(KEY, maxlen=0, approximate=False)
    await second.ack({COMMITTED: ids[10:20]})
    await give_skipped(redis, USUAL, GROUP, who="reader")
    await first.ack({COMMITTED: ids[:10]})
    await give_skipped(redis, USUAL, GROUP, who="reader")
    assert not await redis.exists(USUAL.go_back)
    await put(redis, 31)  # the other ten nobody held
    third = await second.read(1)
    await second.ack({COMMITTED: [one for one, _ in third]})
    await give_skipped(redis, USUAL, GROUP, who="reader")
    assert await redis.exists(USUAL.go_back)


@pytest.mark.parametrize("how", ["begins", "is sent back", "reads another maker's"])
async def test_no_loss_is_seen_where_none_was(redis: Any, how: str) -> None:
    ids = await put(redis, *range(1, 31))
    await redis.xtrim(KEY, maxlen=8, approximate=False)  # another group had finished these
    stream = await consumer(redis)
    if how == "reads another maker's":
        await stream.read(1)
        await stream.ack({COMMITTED: ids[22:]})
        for number in (0, 1, 0, 7, 8):
            await asyncio.sleep(0.002)
            await redis.xadd(KEY, {"type": "commit", "data": "{}", "seq": "1"})
            await put(redis, 40 + number)
    for _ in range(2):
        while found := await stream.read(1):
            await stream.ack({COMMITTED: [one for one, _ in found]})
        await stream.give_skipped()
        await asyncio.sleep(0.01)
        if how == "is sent back":
            await redis.xgroup_setid(KEY, GROUP, "0")
    await stream.give_skipped()
    assert not await redis.exists(USUAL.go_back)


async def test_a_group_that_two_make_at_once_is_made_once(redis: Any) -> None:
    streams = [WorkerStream(redis, consumer_id="w") for _ in range(8)]
    for _ in range(5):
        await redis.flushall()
        await asyncio.gather(*(stream.acquire() for stream in streams))
        assert len(await redis.xinfo_groups(KEY)) == 1


async def test_what_comes_new_does_not_wait_for_what_was_left_behind(redis: Any) -> None:
    stream = await consumer(redis)
    ids = await add(redis, 1_000)
    await redis.xreadgroup(GROUP, "dead", {KEY: ">"}, count=1_000)
    await redis.xclaim(KEY, GROUP, "dead", 0, ids, idle=3_600_000, justid=True)
    intake = Intake(stream, Heartbeats(1)[0], foreign_idle_ms=0)
    first = await intake.next(1)
    new = await add(redis, 5, first=1_000)
    assert [intake.left_behind, first[0][0]] == [True, ids[0]]
    assert [entry_id for entry_id, _ in await intake.next(1)] == new
    assert [intake.left_behind] == [False]
    assert await redis.hlen(USUAL.reads) == 0  # what is known to be given is not told again
    await stream.ack({COMMITTED: [entry_id for entry_id, _ in first]})
    await stream.give_skipped()
    await stream.ack({COMMITTED: [entry_id for entry_id, _ in await intake.next(1)]})
    assert await redis.hlen(USUAL.reads) == 0


async def test_a_released_name_is_not_renewed(redis: Any) -> None:
    """A renewal that was on its way while the consumer went: its name may be another's by then."""
    first = await consumer(redis)
    await asyncio.gather(first.release(), first.renew())
    assert not await redis.exists(USUAL.consumer_lease("w-0"))
    second = await consumer(redis)
    assert second.name == "w-0"
    await first.renew()


@pytest.mark.parametrize(
    ("whose", "adopted"), [("a dead worker's", 0), ("a dead worker's", 2), ("skipped", 0), ("skipped", 2)]
)
async def test_what_waits_to_be_adopted_survives_its_group(redis: Redis, whose: str, adopted: int) -> None:
    """Somebody destroys the group and makes it again at its end before all of it is adopted."""
    stream = await consumer(redis)
    if whose == "skipped":
        name = "fastworker-skipped"
        ids = await add(redis, 5)
        await redis.xgroup_setid(KEY, GROUP, "$")
        for _ in range(2):
            await stream.give_skipped()
            await asyncio.sleep(1.1)  # who does not tell is believed for a second
    else:
        name = "dead-0"
        dead = WorkerStream(redis, consumer_id="dead")
        await dead.acquire()
        ids = await add(redis, 5)
        assert [one for one, _ in await dead.read(10)] == ids
        await dead.tell_held()
        await redis.delete(USUAL.consumer_lease(name))
    if adopted:
        piece = await stream.claim(name, idle_ms=0, count=adopted)
        assert [one for one, _ in piece.entries] == ids[:adopted]
        assert await stream.ack({COMMITTED: ids[:adopted]}) == adopted
    await redis.xgroup_destroy(KEY, GROUP)
    await redis.xgroup_create(KEY, GROUP, id="$")
    await stream.claim(name, idle_ms=0, count=2)
    assert {one for one, _ in await stream.read(10)} >= set(ids[adopted:])
