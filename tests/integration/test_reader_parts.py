"""The reader's parts one by one: addresses, errors, waiting, silence, and the Redis scripts."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, NoReturn

import pytest
from aiohttp import WSServerHandshakeError
from multidict import CIMultiDict, CIMultiDictProxy
from redis import exceptions
from redis.asyncio import Redis

from fastworker.errors import ConfigError, StreamUnavailable
from fastworker.process.backoff import Backoff, pause
from fastworker.reader import outbox as outbox_module
from fastworker.reader.outbox import Outbox
from fastworker.reader.relay import PATH, RelayAddress, _at_least
from fastworker.reader.silence import SilenceWatch
from fastworker.redact import redact
from fastworker.stream.chunk import Chunk
from fastworker.stream.client import connect, error_code, translate, translating
from fastworker.stream.feed import Feed, trim_finished
from fastworker.stream.keys import USUAL, Keys
from fastworker.stream.slot import ReaderLeaseLost, StreamBroken
from tests import replies
from tests.servers import RedisUnderTest

STREAM, CURSOR = "firehose:events", "firehose:python_cursor"


# Redis client


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("redis://:s3cret@host:6379", "redis://:***@host:6379"),
        ("rediss://user:s3cret@host", "rediss://user:***@host"),
        ("redis://user:s3c/r@et@host", "redis://user:***@host"),
        ("unix:///run/redis.sock?db=1&password=s3cret", "unix:///run/redis.sock?db=1&password=***"),
        ("cannot reach wss://u:s3cret@relay/x, sorry", "cannot reach wss://u:***@relay/x, sorry"),
        ("a@b.example wrote", "a@b.example wrote"),
    ],
)
def test_redact(url: str, shown: str) -> None:
    assert redact(url) == shown


@pytest.mark.parametrize("url", ["", "host:6379", "http://h", "redis://:s3c/ret@h", "redis://h:port"])
def test_a_redis_url_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match="not a Redis URL") as caught:
        connect(url)
    assert "s3c" not in str(caught.value)


def test_options_in_a_url_do_not_change_the_replies() -> None:
    options = connect("redis://h?decode_responses=true").connection_pool.connection_kwargs
    assert (options["decode_responses"], options["protocol"]) == (False, 2)


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (exceptions.OutOfMemoryError("command not allowed"), "OOM", StreamUnavailable),
        (exceptions.BusyLoadingError("Redis is loading"), "LOADING", StreamUnavailable),
        (exceptions.ReadOnlyError("You can't write against a read only replica."), "READONLY", StreamUnavailable),
        (
            exceptions.ResponseError(
                "Error running script (call to f_1): @user_script:7: @user_script: 7: -OOM command not allowed"
            ),
            "OOM",
            StreamUnavailable,
        ),
        (exceptions.ResponseError("MISCONF Redis is configured to save"), "MISCONF", StreamUnavailable),
        (exceptions.ResponseError("UNBLOCKED the stream key no longer exists"), "UNBLOCKED", StreamUnavailable),
        (
            exceptions.ResponseError("Command # 1 (SET a b) of pipeline caused error: MISCONF Redis"),
            "MISCONF",
            StreamUnavailable,
        ),
        (exceptions.ConnectionError("Connection refused"), "", StreamUnavailable),
        (exceptions.TimeoutError("Timeout reading"), "", StreamUnavailable),
        (ConnectionResetError("reset"), "", StreamUnavailable),
        (exceptions.AuthenticationError("invalid username-password pair"), "WRONGPASS", StreamUnavailable),
        (exceptions.NoPermissionError("this user has no permissions to run"), "NOPERM", StreamUnavailable),
        (exceptions.ResponseError("ACL failure in script: User x has no permissions to"), "NOPERM", StreamUnavailable),
        (
            exceptions.ResponseError(
                "Error running script (call to f_1): @user_script:1: @user_script: 1: The user executing the script "
                "can't run this command or subcommand"
            ),
            "NOPERM",
            StreamUnavailable,
        ),
        (exceptions.ResponseError("WRONGTYPE Operation against a key"), "WRONGTYPE", StreamUnavailable),
        (exceptions.MovedError("1 127.0.0.1:1"), "MOVED", StreamUnavailable),
        (exceptions.ResponseError("NOGROUP No such key"), "NOGROUP", StreamUnavailable),
        (exceptions.ResponseError("no such key"), "", StreamUnavailable),
        (
            exceptions.ResponseError("Command # 2 (XINFO GROUPS x) of pipeline caused error: no such key"),
            "",
            StreamUnavailable,
        ),
        (exceptions.ResponseError("wrong number of arguments"), "", exceptions.ResponseError),
        (
            exceptions.ResponseError("unknown command 'TIME', with args beginning with:"),
            "",
            StreamUnavailable,
        ),  # a Sentinel
    ],
)
def test_errors_say_what_to_do(error: Exception, code: str, kind: type[Exception]) -> None:
    if isinstance(error, exceptions.RedisError):
        assert error_code(error) == code
    assert type(translate(error)) is kind


@pytest.mark.parametrize("code", ["LOADING", "READONLY", "MISCONF", "OOM", "NOPERM", "WRONGPASS"])
async def test_a_refusal_names_the_server_and_no_password(code: str) -> None:
    redis = connect("redis://user:hunter2@10.0.0.7:6380")
    with pytest.raises(StreamUnavailable, match=r"^Redis at 10\.0\.0\.7:6380 ") as caught:
        async with translating(redis):
            raise exceptions.ResponseError(f"{code} something")
    assert "hunter2" not in str(caught.value)


async def test_a_command_is_never_sent_twice(redis_url: str) -> None:
    client = connect(redis_url)
    await client.set("n", 0)
    other = connect(redis_url)
    for _ in range(20):
        sent = asyncio.ensure_future(client.incr("n"))
        await asyncio.sleep(0)
        await other.client_kill_filter(_type="normal", skipme=True)
        await asyncio.gather(sent, return_exceptions=True)
    assert replies.number(await client.get("n")) <= 20
    await client.aclose()
    await other.aclose()


# Waiting


async def test_backoff_grows_to_its_cap_and_starts_again() -> None:
    backoff = Backoff(first=1.0, cap=10.0)
    ceilings = [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    assert all(ceiling / 2 <= backoff.next() <= ceiling for ceiling in ceilings)
    assert backoff.elapsed > 0
    backoff.reset()
    assert backoff.next() <= 1.0
    assert 0 <= Backoff().elapsed == 0


async def test_a_stop_ends_a_pause() -> None:
    stop = asyncio.Event()
    assert not await pause(0.001, stop)
    asyncio.get_running_loop().call_later(0.01, stop.set)
    begun = time.monotonic()
    assert await Backoff(60.0, 60.0).wait(stop)
    assert time.monotonic() - begun < 5


# Relay addresses


@pytest.mark.parametrize(
    ("text", "host", "url"),
    [
        ("bsky.network", "bsky.network", f"wss://bsky.network{PATH}"),
        ("wss://bsky.network", "bsky.network", f"wss://bsky.network{PATH}"),
        ("https://Bsky.Network:443/", "bsky.network", f"wss://bsky.network{PATH}"),
        (" ws://127.0.0.1:8080 ", "127.0.0.1:8080", f"ws://127.0.0.1:8080{PATH}"),
        ("relay.test:8443", "relay.test:8443", f"wss://relay.test:8443{PATH}"),
        ("wss://relay.test/firehose?key=1", "relay.test", "wss://relay.test/firehose?key=1"),
        (f"wss://relay.test{PATH}", "relay.test", f"wss://relay.test{PATH}"),
    ],
)
def test_relay_addresses(text: str, host: str, url: str) -> None:
    assert RelayAddress.parse(text) == RelayAddress(host, url)


@pytest.mark.parametrize("text", ["", "ftp://relay", "wss://", "wss://relay:99999", "wss://u:s3cret@"])
def test_what_is_no_relay_address(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a relay") as caught:
        RelayAddress.parse(text)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "retry_after", "low", "high"),
    [
        (429, "7", 7, 7),
        (429, "86400", 900, 900),
        (429, "in a minute", 50, 60),
        (429, "soon", 30, 30),
        (429, None, 30, 30),
        (501, None, 900, 900),
        (503, "3", 3, 3),
        (503, None, 0, 0),
        (404, None, 10, 10),
    ],
)
def test_how_long_a_relay_wants_us_away(status: int, retry_after: str | None, low: float, high: float) -> None:
    if retry_after == "in a minute":
        retry_after = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    headers = CIMultiDictProxy(CIMultiDict({} if retry_after is None else {"Retry-After": retry_after}))
    error = WSServerHandshakeError(None, (), status=status, headers=headers)  # type: ignore[arg-type]
    assert low <= _at_least(error) <= high


# Silence


def test_a_busy_relay_is_silent_after_the_floor_and_a_quiet_one_is_left_in_peace() -> None:
    busy = SilenceWatch(30)
    busy.opened(0)
    for second in range(1, 100):
        busy.saw(second, 500)
    assert busy.limit_s() == 30
    quiet = SilenceWatch(30)
    quiet.opened(0)
    for minute in range(1, 10):
        quiet.saw(minute * 60, 1)
    assert quiet.limit_s() == pytest.approx(6000)
    assert quiet.silent_for(600) == 60


def test_a_relay_that_fell_quiet_is_replaced_ever_more_rarely() -> None:
    watch = SilenceWatch(30)
    watch.opened(0)
    for second in range(1, 100):
        watch.saw(second, 500)
    now, limits = 99.0, []
    for _ in range(3):
        limits.append(watch.limit_s())
        now += watch.limit_s() + 1
        watch.gave_up(now)
        watch.opened(now)
    assert limits[0] == 30
    assert limits[1] > 300
    assert limits[2] > 3000


def test_before_any_data_nothing_is_known() -> None:
    watch = SilenceWatch(30)
    watch.opened(0)
    assert watch.limit_s() == SilenceWatch.UNKNOWN_S


# Outbox


async def test_the_outbox_keeps_order_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "OUTBOX_ITEMS", 30)
    outbox = Outbox(10, 1000)

    async def fill() -> None:
        for seq in range(100):
            outbox.filling.entry([(b"n", str(seq).encode())])
            outbox.filling.seq = seq
            await outbox.put()

    filling = asyncio.create_task(fill())
    await asyncio.sleep(0.01)
    assert (outbox.items, outbox.blocked) == (30, True)
    taken: list[int] = []
    draining = asyncio.create_task(outbox.drained())
    while len(taken) < 100:
        await asyncio.sleep(0)
        chunk = await outbox.take()
        assert chunk.items <= 10
        taken += [int(number) for number in re.findall(rb"n.\0\0\0(\d+)", chunk.body)]
        assert chunk.seq == taken[-1]
        assert not draining.done()
    assert taken == list(range(100))
    waiting = asyncio.create_task(outbox.take())
    await asyncio.wait_for(draining, 1)
    await filling
    waiting.cancel()


async def test_a_seq_without_an_entry_is_taken_too() -> None:
    outbox = Outbox(10, 1000)
    outbox.filling.seq = 7
    await outbox.put()
    chunk = await asyncio.wait_for(outbox.take(), 1)
    assert (chunk.items, chunk.seq) == (0, 7)


# The append script


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    client = connect(redis_url)
    yield client
    await client.aclose()


def feed_on(
    redis: Redis, limit: int = 1000, limit_bytes: int | None = None, keep_s: float = 0.0, group: str = ""
) -> Feed:
    return Feed(
        redis,
        stream_key=STREAM,
        cursor_key=CURSOR,
        max_stream_len=limit,
        stream_bytes_max=limit_bytes,
        keep_s=keep_s,
        group=group,
    )


def chunk_of(*seqs: int) -> Chunk:
    chunk = Chunk()
    for seq in seqs:
        chunk.entry([(b"type", b"commit"), (b"data", b"{}"), (b"seq", str(seq).encode())])
        chunk.seq = seq
    return chunk


async def test_a_chunk_given_again_is_put_down_once(redis: Redis) -> None:
    feed = feed_on(redis)
    assert await feed.acquire()
    await feed.go_to("relay.test")
    assert await feed.append(chunk_of(1, 2))
    again = feed_on(redis)  # as after a reply that was lost: same token, cursor not known to have moved
    again._slots.first._token = feed._slots.first._token
    again._host = "relay.test"
    assert await again.append(chunk_of(1, 2))
    assert await redis.xlen(STREAM) == 2
    assert await again.append(chunk_of(3))
    assert await redis.get(CURSOR) == b"3"


@pytest.mark.parametrize("has_entries", [True, False])
async def test_a_cursor_that_an_unanswered_append_moved_is_our_own(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has_entries: bool
) -> None:
    """A term that ends in the middle of an append does not hear of it."""
    feed = feed_on(redis)
    assert await feed.acquire()
    await feed.go_to("relay.test")
    assert await feed.append(chunk_of(1))
    run = feed._slots.first._append

    async def unheard(**told: Any) -> NoReturn:
        await run(**told)
        raise asyncio.CancelledError

    for seq in (2, 3):
        with monkeypatch.context() as patch, pytest.raises(asyncio.CancelledError):
            patch.setattr(feed._slots.first, "_append", unheard)
            await feed.append(chunk_of(seq) if has_entries else _moved_to(seq))
        if seq == 2:
            assert (await feed.go_to("relay.test")).seq == 2
    assert await feed.go_back(1, b"")
    assert await redis.get(CURSOR) == b"1"
    assert (await feed.go_to("relay.test")).seq == 1
    assert "Somebody" not in caplog.text
    assert await feed.append(chunk_of(2))
    await redis.set(CURSOR, "9")
    assert not await feed.go_back(1, b"")  # that one is somebody's
    assert (await feed.go_to("relay.test")).seq == 2


@pytest.mark.parametrize(("entries", "between"), [(1, 0), (1, 1), (0, 0)])
async def test_a_cursor_that_comes_back_with_its_entries_is_our_own(
    redis: Redis, caplog: pytest.LogCaptureFixture, entries: int, between: int
) -> None:
    """Two masters in turn: the reader leaves one at 3, goes on at 1 on the other, and is brought back to the first one."""
    feed = feed_on(redis)
    assert await feed.acquire()
    await feed.go_to("relay.test")
    assert await feed.append(chunk_of(1))
    at_first = await _kept(redis)
    assert await feed.append(chunk_of(2, 3) if entries else _moved_to(3))
    further = await _kept(redis)
    await _restore(redis, at_first)  # the other master had got no more
    await feed.begin_term()
    assert (await feed.go_to("relay.test")).seq == 1
    if between:  # an entry with a newer id than those of the first one
        assert await feed.append(chunk_of(2))
    await _restore(redis, further)
    with pytest.raises(ReaderLeaseLost):
        await feed.append(chunk_of(4))
    await feed.begin_term()
    found = await feed.go_to("relay.test")
    assert found.seq == 3
    assert "Somebody" not in caplog.text
    await redis.set(CURSOR, "9")  # with the entries that came, too, a hand is told from an append
    assert (await feed.go_to("relay.test")).seq == 3
    assert "Somebody" in caplog.text


async def _kept(redis: Redis) -> dict[Any, Any]:
    return {key: await redis.dump(key) for key in await redis.keys("*")}


async def _restore(redis: Redis, kept: dict[Any, Any]) -> None:
    for key in await redis.keys("*"):
        await redis.delete(key)
    for key, value in kept.items():
        await redis.restore(key, 60_000 if key == b"fastworker:reader" else 0, value)


def _moved_to(seq: int) -> Chunk:
    chunk = Chunk()
    chunk.seq = seq
    return chunk


async def test_a_chunk_that_moves_no_cursor_is_not_taken_for_appended_when_the_cursor_is_gone(redis: Redis) -> None:
    feed = feed_on(redis)
    assert await feed.acquire()
    await feed.go_to("relay.test")
    assert await feed.append(chunk_of(1))
    chunk = chunk_of(2)  # as what was set aside until its key was known
    chunk.seq = None
    await redis.delete(CURSOR)
    with pytest.raises(ReaderLeaseLost, match="holds nothing"):
        await feed.append(chunk)
    await redis.set(CURSOR, "1")
    assert await feed.append(chunk)
    assert await redis.xlen(STREAM) == 2


async def test_what_an_answered_append_left_is_known_when_it_is_given_again(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Then a cursor that somebody moves is still told from one that an append moved."""
    feed = feed_on(redis)
    assert await feed.acquire()
    await feed.go_to("relay.test")
    run = feed._slots.first._append

    async def unheard(**told: Any) -> NoReturn:
        await run(**told)
        raise StreamUnavailable("no answer")

    with monkeypatch.context() as patch, pytest.raises(StreamUnavailable):
        patch.setattr(feed._slots.first, "_append", unheard)
        await feed.append(chunk_of(1))
    assert await feed.append(chunk_of(1))
    assert await redis.xlen(STREAM) == 1
    await redis.set(CURSOR, "9")
    assert (await feed.go_to("relay.test")).seq == 1
    assert "Somebody" in caplog.text


@pytest.mark.parametrize("seq", [1, None])
async def test_going_back_again_after_no_answer_is_done_once(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, seq: int | None
) -> None:
    feed = feed_on(redis)
    assert await feed.acquire()
    await feed.go_to("relay.test")
    assert await feed.append(chunk_of(1, 2))
    run, gap = feed._slots.first._go_back, b"" if seq else b"a gap"

    async def unheard(**told: Any) -> NoReturn:
        await run(**told)
        raise ConnectionError("the connection was closed while it was used")

    with monkeypatch.context() as patch, pytest.raises(StreamUnavailable):
        patch.setattr(feed._slots.first, "_go_back", unheard)
        await feed.go_back(seq, gap)
    assert await feed.go_back(seq, gap)
    assert await redis.get(CURSOR) == (b"1" if seq else b"2")
    assert replies.number(await redis.llen(USUAL.gaps)) == (0 if seq else 1)
    await redis.set(CURSOR, "9")
    assert not await feed.go_back(seq, gap)


async def test_append_refuses_without_the_lease_or_with_a_moved_cursor(redis: Redis) -> None:
    first, second = feed_on(redis), feed_on(redis)
    assert await first.acquire()
    assert not await second.acquire()
    await first.go_to("relay.test")
    await second.go_to("relay.test")
    with pytest.raises(ReaderLeaseLost):
        await second.append(chunk_of(1))
    assert await first.append(chunk_of(1))
    await redis.set(CURSOR, "5")
    with pytest.raises(ReaderLeaseLost, match="holds 5 where this reader had left 1"):
        await first.append(chunk_of(2))
    await first.release()
    assert await second.acquire()
    with pytest.raises(ReaderLeaseLost):
        await first.renew()
    await first.release()
    assert await redis.get(USUAL.reader_lease) is not None
    assert await redis.xlen(STREAM) == 1


async def test_an_older_redis_is_not_judged_by_what_was_on_the_newer_one(redis: Redis) -> None:
    """A replica took the master's place: what it had not got is gone with its cursor, and is no loss."""
    feed = feed_on(redis, group="workers")
    await redis.xgroup_create(STREAM, "workers", id="0", mkstream=True)
    assert await feed.acquire()
    await feed.go_to("relay.test")
    assert await feed.append(chunk_of(1))
    await feed.watch()
    replica: Any = {key: await redis.dump(key) for key in await redis.keys()}
    assert await feed.append(chunk_of(2))  # noted in Redis by the next look
    for key in await redis.keys():
        await redis.delete(key)
    for key, value in replica.items():
        await redis.restore(key, 0, value)
    with pytest.raises(ReaderLeaseLost, match="holds 1 where this reader had left 2"):
        await feed.watch()
    await feed.begin_term()
    await feed.watch()
    assert (await feed.go_to("relay.test")).seq == 1
    assert await feed.append(chunk_of(2))
    await feed.watch()
    await redis.delete(STREAM)
    with pytest.raises(StreamBroken):  # that one is a loss
        await feed.watch()


@pytest.mark.parametrize("partitions", [1, 3])
async def test_the_numbers_in_ids_go_on_from_entry_to_entry(redis: Redis, partitions: int) -> None:
    """So that who reads two of them knows how many there were between them, whoever removed them."""
    feed = feed_on(redis)
    assert await feed.acquire()
    await feed.open_partitions(partitions)
    await feed.go_to("relay.test")
    keys = [Keys(STREAM, partition=number).stream for number in range(partitions)]
    seqs = iter(range(1, 1000))

    async def put(count: int) -> list[list[int]]:
        chunk = Chunk()
        for seq in itertools.islice(seqs, count * partitions):
            chunk.entry([(b"n", b"x")], seq % partitions)
            chunk.seq = seq
        assert await feed.append(chunk)
        found = [await redis.xrevrange(key, count=count) for key in keys]
        return [[int(replies.text(one).partition("-")[2]) for one, _ in replies.entries(some)] for some in found]

    assert await put(3) == [[3, 2, 1]] * partitions
    await asyncio.sleep(0.002)
    assert await put(2) == [[5, 4]] * partitions
    for key in keys:
        newest = replies.entries(await redis.xrevrange(key, count=1))[0][0]
        await redis.xdel(key, newest)
    assert await put(2) == [[7, 6]] * partitions
    for key in keys:
        await redis.xtrim(key, maxlen=0, approximate=False)
    assert await put(1) == [[8]] * partitions
    await asyncio.sleep(0.002)
    for key in keys:
        await redis.xadd(key, {"n": "another reader's"})  # begins at 0 again
    await asyncio.sleep(0.002)
    assert await put(2) == [[2, 1]] * partitions
    ahead = 2 * int(time.time() * 1000)
    for key in keys:
        await redis.xadd(key, {"n": "x"}, id=f"{ahead}-7")
    assert await put(1) == [[8]] * partitions
    for key in keys:
        await redis.xadd(key, {"n": "x"}, id=f"{ahead}-{2**63}")
    assert await put(1) == [[2**63 + 1]] * partitions  # as Redis counts


async def test_an_expired_lease_that_nobody_took_is_ours_again(redis: Redis) -> None:
    feed = feed_on(redis)
    assert await feed.acquire()
    await feed.go_to("relay.test")
    await redis.delete(USUAL.reader_lease)
    assert await feed.append(chunk_of(1))
    assert 0 < await redis.pttl(USUAL.reader_lease) <= 5000


async def test_a_full_stream_takes_nothing(redis: Redis) -> None:
    feed = feed_on(redis, limit=3)
    assert await feed.acquire()
    await feed.go_to("relay.test")
    assert await feed.append(chunk_of(1, 2))
    assert not await feed.append(chunk_of(3, 4))
    assert (await redis.xlen(STREAM), await redis.get(CURSOR)) == (2, b"2")
    passing = Chunk()
    passing.seq = 9  # nothing to store needs no room
    assert await feed.append(chunk_of(3))
    assert await feed.append(passing)
    assert await redis.get(CURSOR) == b"9"


async def test_a_limit_in_bytes_is_measured_when_trimming(redis: Redis) -> None:
    feed = feed_on(redis, limit_bytes=20_000)
    assert await feed.acquire()
    await feed.go_to("relay.test")
    for start in itertools.count(1, 100):
        if not await feed.append(chunk_of(*range(start, start + 100))):
            break
    await feed.trim()
    assert replies.number(await redis.memory_usage(STREAM)) < 40_000
    await redis.xtrim(STREAM, maxlen=0)
    await feed.trim()
    assert await feed.append(chunk_of(start))


async def test_out_of_memory_in_the_script_is_all_or_nothing(server_dir: Path) -> None:
    with RedisUnderTest(server_dir, aof=False) as server:
        redis = connect(server.url)
        feed = feed_on(redis)
        assert await feed.acquire()
        await feed.go_to("relay.test")
        used = (await redis.info("memory"))["used_memory"]
        outcomes = set()
        for room in range(0, 400_000, 20_000):  # the limit is reached before, within and after the chunk
            await redis.config_set("maxmemory", used + room)
            before = await redis.xlen(STREAM)
            chunk = Chunk()
            for _ in range(100):
                chunk.entry([(b"n", b"x" * 1000)])
            chunk.seq = room + 1
            try:
                assert await feed.append(chunk)
                outcomes.add("all")
                assert await redis.xlen(STREAM) == before + 100
            except StreamUnavailable:
                outcomes.add("nothing")
                assert await redis.xlen(STREAM) == before
        assert outcomes == {"all", "nothing"}
        await redis.aclose()


async def test_a_cursor_is_never_used_on_another_relay(redis: Redis) -> None:
    feed = feed_on(redis)
    assert (await feed.go_to("a.test")).seq is None
    await redis.set(CURSOR, "10")
    assert (await feed.go_to("a.test")).seq == 10  # nobody's: the predecessor's
    assert await feed.acquire()
    assert await feed.append(chunk_of(11))
    assert await redis.get(USUAL.relay) == b"a.test"
    position = await feed.go_to("b.test")
    assert (position.seq, position.switched_from) == (None, "a.test")
    assert await feed.append(chunk_of(5))
    assert (await redis.get(CURSOR), await redis.get(USUAL.cursor_of("a.test"))) == (b"5", b"11")
    position = await feed.go_to("a.test")
    assert (position.seq, position.switched_from) == (11, "b.test")


# Trimming


async def fill(redis: Redis, count: int = 10) -> list[bytes]:
    return [
        replies.raw(await redis.xadd(STREAM, {"n": number}, id=f"{number}-{number % 3}"))
        for number in range(1, count + 1)
    ]


async def left(redis: Redis) -> list[bytes]:
    return [id_ for id_, _ in replies.entries(await redis.xrange(STREAM))]


async def test_without_a_stream_or_a_group_nothing_is_trimmed(redis: Redis) -> None:
    assert (await trim_finished(redis, STREAM)).trimmed == 0
    ids = await fill(redis)
    assert (await trim_finished(redis, STREAM)).trimmed == 0
    await redis.xgroup_create(STREAM, "osprey-consumers", "$")
    result = await trim_finished(redis, STREAM, group="firehose-processors")
    assert (result.trimmed, result.held_by, result.bound) == (0, "firehose-processors", "")
    assert await left(redis) == ids


async def test_only_what_every_group_has_finished_goes(redis: Redis) -> None:
    ids = await fill(redis)
    await redis.xgroup_create(STREAM, "firehose-processors", "0")
    await redis.xgroup_create(STREAM, "osprey-consumers", "0")
    result = await trim_finished(redis, STREAM)
    assert result.trimmed == 0
    await redis.xreadgroup("firehose-processors", "a", {STREAM: ">"}, count=10)
    await redis.xreadgroup("osprey-consumers", "o", {STREAM: ">"}, count=6, noack=True)
    await redis.xack(STREAM, "firehose-processors", *ids[:3], *ids[4:])
    result = await trim_finished(redis, STREAM)  # processors: 4 is pending; osprey: read up to 6
    assert (result.trimmed, result.held_by, result.bound) == (3, "firehose-processors", ids[3].decode())
    await redis.xack(STREAM, "firehose-processors", ids[3])
    result = await trim_finished(redis, STREAM)
    assert (result.trimmed, result.held_by) == (3, "osprey-consumers")
    assert await left(redis) == ids[6:]
    result = await trim_finished(redis, STREAM, ["osprey-consumers"])
    assert result.trimmed == 4
    assert await left(redis) == []


async def test_an_entry_that_is_pending_for_any_consumer_stays(redis: Redis) -> None:
    ids = await fill(redis)
    await redis.xgroup_create(STREAM, "firehose-processors", "0")
    for consumer in ("a", "b"):
        await redis.xreadgroup("firehose-processors", consumer, {STREAM: ">"}, count=3)
    await redis.xack(STREAM, "firehose-processors", *ids[:2])
    assert (await trim_finished(redis, STREAM)).trimmed == 2
    assert await left(redis) == ids[2:]


async def test_large_ids_are_compared_exactly(redis: Redis) -> None:
    big = 2**63 + 1
    for seq in range(4):
        await redis.xadd(STREAM, {"n": seq}, id=f"{big}-{2**63 + seq}")
    await redis.xgroup_create(STREAM, "a", "0")
    await redis.xgroup_create(STREAM, "b", "0")
    await redis.xreadgroup("a", "c", {STREAM: ">"}, count=3, noack=True)
    await redis.xreadgroup("b", "c", {STREAM: ">"}, count=2)
    await redis.xack(STREAM, "b", f"{big}-{2**63}")
    assert (await trim_finished(redis, STREAM)).trimmed == 1
    await redis.xack(STREAM, "b", f"{big}-{2**63 + 1}")
    assert (await trim_finished(redis, STREAM)).trimmed == 0  # an id this large keeps its last entry
    assert len(await left(redis)) == 3


async def test_finished_entries_can_be_kept_for_a_while(redis: Redis) -> None:
    await redis.xgroup_create(STREAM, "firehose-processors", "$", mkstream=True)
    now = int(time.time() * 1000)
    for age in (100, 50, 10, 0):
        await redis.xadd(STREAM, {"n": age}, id=f"{now - age * 1000}-0")
    await redis.xreadgroup("firehose-processors", "a", {STREAM: ">"}, noack=True)
    assert (await trim_finished(redis, STREAM, keep_s=60)).trimmed == 1
    assert (await trim_finished(redis, STREAM)).trimmed == 3


async def test_what_is_kept_yields_to_what_comes(redis: Redis) -> None:
    """A stream full of finished entries that are kept for --reapply must not make the reader wait."""
    feed = feed_on(redis, 20, keep_s=3_600.0)
    assert await feed.acquire()
    await feed.go_to("relay.test")
    await redis.xgroup_create(STREAM, "firehose-processors", "0", mkstream=True)
    for start in range(1, 101, 10):
        chunk = chunk_of(*range(start, start + 10))
        while not await feed.append(chunk):
            assert (await feed.trim(make_room=True)).trimmed
        found = replies.read(await redis.xreadgroup("firehose-processors", "a", {STREAM: ">"}))
        await redis.xack(STREAM, "firehose-processors", *(entry_id for entry_id, _ in found))
        assert await redis.xlen(STREAM) >= 10
    await feed.append(chunk_of(*range(101, 111)))
    await redis.xreadgroup("firehose-processors", "a", {STREAM: ">"}, noack=True)
    assert (await redis.xlen(STREAM), (await feed.trim()).trimmed, await redis.xlen(STREAM)) == (20, 2, 18)
    found = replies.entries(await redis.xrange(STREAM))
    await redis.xgroup_create(STREAM, "slow", "0")
    assert (await feed.trim(make_room=True)).trimmed == 0, "what a group has not finished never goes"
    assert replies.entries(await redis.xrange(STREAM)) == found


async def test_errors_are_translated_around_the_scripts(redis: Redis) -> None:
    await redis.set(STREAM, "x")
    with pytest.raises(StreamUnavailable, match="wrong type"):
        await trim_finished(redis, STREAM)
    unreachable = connect("redis://127.0.0.1:1")
    with pytest.raises(StreamUnavailable, match="cannot be reached"):
        async with translating(unreachable):
            await unreachable.ping()
    await unreachable.aclose()
