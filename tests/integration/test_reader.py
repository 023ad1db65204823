"""The reader between a scripted relay (real WebSockets) and a real Redis."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from socket import IPPROTO_TCP, SO_KEEPALIVE, SOL_SOCKET, TCP_KEEPIDLE
from typing import Any

import libipld
import pytest
import uvloop
from aiohttp import web
from redis.asyncio import Redis

from fastworker.config import Config
from fastworker.errors import ConfigError, Reason, StoppedItself, StoreUnavailable, Unreachable
from fastworker.event.entry import decode_entry
from fastworker.process.backoff import Backoff
from fastworker.reader import follow, gate, receive
from fastworker.reader import reader as reader_module
from fastworker.reader import relay as relay_module
from fastworker.reader import start as start_module
from fastworker.reader.reader import run_reader
from fastworker.reader.stats import ReaderStats
from fastworker.stream import feed as feed_module
from fastworker.stream import slot as slot_module
from fastworker.stream.client import connect
from fastworker.stream.consumer import SetAside, WorkerStream, original_fields
from fastworker.stream.keys import USUAL, Keys
from fastworker.stream.scripts import script
from tests import replies
from tests.rig.proxy import Proxy
from tests.runs import usually
from tests.servers import RedisUnderTest, counts_reads

DID = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"
TIME = "2026-01-02T03:04:05.678Z"
STREAM, CURSOR = "firehose:events", "firehose:python_cursor"


def frame(kind: str, payload: dict[str, Any]) -> bytes:
    return libipld.encode_dag_cbor({"op": 1, "t": kind}) + libipld.encode_dag_cbor(payload)


def identity(seq: int) -> bytes:
    return frame("#identity", {"seq": seq, "did": DID, "time": TIME, "handle": f"h{seq}.test"})


def error(name: str) -> bytes:
    return libipld.encode_dag_cbor({"op": -1}) + libipld.encode_dag_cbor({"error": name})


Answer = Callable[["Relay", web.Request], Awaitable[web.StreamResponse]]


class Relay:
    """`frames` (seq, bytes) by the protocol's cursor rules; `answers` are used up first, one per connection."""

    def __init__(self) -> None:
        self.frames: list[tuple[int, bytes]] = []
        self.answers: list[Answer] = []
        self.asked: list[int | None] = []
        self.asked_at: list[float] = []
        self.open = 0
        self._runner: web.AppRunner | None = None
        self.host = ""

    @property
    def url(self) -> str:
        return f"ws://{self.host}"

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/xrpc/com.atproto.sync.subscribeRepos", self._connected)
        app.router.add_get("/elsewhere", self._connected)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", int(self.host.rpartition(":")[2] or 0))
        await site.start()
        self.host = f"127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _connected(self, request: web.Request) -> web.StreamResponse:
        cursor = request.query.get("cursor")
        self.asked.append(None if cursor is None else int(cursor))
        self.asked_at.append(time.monotonic())
        answer = self.answers.pop(0) if self.answers else Relay.serve
        return await answer(self, request)

    async def serve(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        cursor = request.query.get("cursor")
        at = len(self.frames) if cursor is None else 0
        self.open += 1
        try:
            while not socket.closed:
                while at < len(self.frames):
                    seq, data = self.frames[at]
                    at += 1
                    if cursor is None or seq >= int(cursor):
                        await socket.send_bytes(data)
                with suppress(TimeoutError):
                    await socket.receive(timeout=0.02)
        except ConnectionError:
            pass
        finally:
            self.open -= 1
        return socket

    def add(self, *seqs: int) -> None:
        self.frames.extend((seq, identity(seq)) for seq in seqs)


@pytest.fixture
async def relay() -> AsyncIterator[Relay]:
    server = Relay()
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    client = Redis.from_url(redis_url, protocol=2)
    yield client
    await client.aclose()


def settings(redis_url: str, *relays: Relay, **more: Any) -> Config:
    return Config(redis_url=redis_url, relay_urls=tuple(relay.url for relay in relays), **more)


@asynccontextmanager
async def reading(config: Config, **more: Any) -> AsyncIterator[ReaderStats]:
    """A reader beside the test; its end is waited for, its errors are the test's."""
    stop, stats = asyncio.Event(), ReaderStats()
    task = asyncio.create_task(run_reader(config, stop, stats=stats, **more))
    try:
        yield stats
    finally:
        stop.set()
        await asyncio.wait_for(task, 30)


async def until(true: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while True:
        answer = true()
        if asyncio.iscoroutine(answer):
            answer = await answer
        if answer:
            return
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


async def seqs(redis: Redis) -> list[int]:
    return [int(fields[b"seq"]) for _, fields in replies.entries(await redis.xrange(STREAM))]


def cursor_is(redis: Redis, seq: int) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        return await redis.get(CURSOR) == str(seq).encode()

    return check


# What ends where


async def test_frames_reach_the_stream_in_order_and_the_cursor_follows(
    relay: Relay, redis: Redis, redis_url: str
) -> None:
    await redis.set(CURSOR, "0")
    relay.add(*range(1, 1501))
    async with reading(settings(redis_url, relay)) as stats:
        await until(cursor_is(redis, 1500))
    entries = replies.entries(await redis.xrange(STREAM))
    assert [list(fields) for _, fields in entries] == [[b"type", b"data", b"seq"]] * 1500
    assert await seqs(redis) == list(range(1, 1501))
    assert await redis.get(USUAL.cursor_of(relay.host)) == b"1500"
    assert list(await redis.hgetall(USUAL.relays)) == [relay.host.encode()]
    assert (stats.entries, stats.last_seq, stats.identities) == (1500, 1500, 1500)
    assert await redis.exists(USUAL.reader_lease) == 0


@pytest.mark.parametrize(("form", "names"), [("native", [b"n"]), ("frame", [b"f", b"relay"])])
async def test_the_binary_forms(relay: Relay, redis: Redis, redis_url: str, form: str, names: list[bytes]) -> None:
    await redis.set(CURSOR, "0")
    relay.add(1, 2)
    relay.frames.append(
        (3, frame("#sync", {"seq": 3, "did": DID, "rev": "3l3qo2vutsw2b", "blocks": b"", "time": TIME}))
    )
    async with reading(settings(redis_url, relay, stream_format=form)):
        await until(cursor_is(redis, 3))
    entries = replies.entries(await redis.xrange(STREAM))
    assert [list(fields) for _, fields in entries] == [names] * 3
    if form == "frame":
        assert [fields[b"f"] for _, fields in entries] == [data for _, data in relay.frames]


async def test_starts_at_the_tip_without_a_cursor(relay: Relay, redis: Redis, redis_url: str) -> None:
    relay.add(1, 2, 3)
    async with reading(settings(redis_url, relay)):
        await until(lambda: relay.open)
        relay.add(4, 5)
        await until(cursor_is(redis, 5))
    assert relay.asked == [None]
    assert await seqs(redis) == [4, 5]


async def test_starts_at_what_postgresql_says_when_redis_is_empty(relay: Relay, redis: Redis, redis_url: str) -> None:
    async def stored(host: str) -> int:
        assert host == relay.host
        return 2

    relay.add(1, 2, 3)
    async with reading(settings(redis_url, relay), fallback_seq=stored):
        await until(cursor_is(redis, 3))
    assert (relay.asked, await seqs(redis)) == ([2], [3])


async def test_waits_for_postgresql_rather_than_begin_at_the_tip(relay: Relay, redis: Redis, redis_url: str) -> None:
    answers: list[int | Exception] = [StoreUnavailable("down"), StoreUnavailable("still down"), 1]

    async def stored(_host: str) -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    relay.add(1, 2, 3)
    async with reading(settings(redis_url, relay), fallback_seq=stored):
        await until(cursor_is(redis, 3))
    assert (relay.asked, await seqs(redis)) == ([1], [2, 3])


async def test_what_is_not_an_event_moves_the_cursor_and_is_counted(relay: Relay, redis: Redis, redis_url: str) -> None:
    await redis.set(CURSOR, "0")
    sync = {"seq": 3, "did": DID, "rev": "3l3qo2vutsw2b", "blocks": b"", "time": TIME}
    relay.add(1)
    relay.frames += [(2, frame("#new", {"seq": 2})), (3, frame("#sync", sync)), (3, identity(3))]
    async with reading(settings(redis_url, relay)) as stats:
        await until(cursor_is(redis, 3))
    assert await seqs(redis) == [1]
    assert stats.drops["unknown_kind"] == 1
    assert stats.duplicates == 1
    repair = json.loads((await redis.hgetall(USUAL.repairs))[DID.encode()])
    assert repair == {"rev": "3l3qo2vutsw2b", "seq": 3, "relay": relay.host, "time": TIME}


async def test_malformed_frames_are_set_aside_and_good_ones_pass(relay: Relay, redis: Redis, redis_url: str) -> None:
    await redis.set(CURSOR, "0")
    relay.add(1)
    relay.frames += [(2, b"\xff\x00"), (2, b"x" * 5_000_001), (2, identity(2)[:-5])]
    relay.add(3)
    async with reading(settings(redis_url, relay)) as stats:
        await until(cursor_is(redis, 3))
    assert await seqs(redis) == [1, 3]
    letters = [fields for _, fields in replies.entries(await redis.xrange("firehose:dead-letters"))]
    assert [list(letter)[:5] for letter in letters] == [[b"type", b"data", b"seq", b"origId", b"deliveries"]] * 3
    assert base64.b64decode(letters[0][b"data"]) == b"\xff\x00"
    assert [letter[b"reason"] for letter in letters] == [b"bad_frame", b"oversized", b"bad_frame"]
    assert len(letters[1][b"data"]) < 100_000
    assert sum(stats.drops.values()) == stats.set_aside == 3


async def test_many_malformed_frames_in_a_row_do_not_hold_the_reader_for_ever(
    relay: Relay, redis: Redis, redis_url: str
) -> None:
    await redis.set(CURSOR, "1")
    relay.add(1)
    relay.frames += [(2, b"\xff")] * (gate.MALFORMED_IN_A_ROW * 2 - 1)
    relay.add(3)
    async with reading(settings(redis_url, relay)) as stats:
        await until(cursor_is(redis, 3))
    assert relay.asked == [1, 1]
    assert stats.set_aside == receive.SET_ASIDE_PER_MINUTE
    assert stats.drops["bad_frame"] == gate.MALFORMED_IN_A_ROW * 3 - 1


# Connections


async def test_a_restart_replays_inclusively_without_doubling(relay: Relay, redis: Redis, redis_url: str) -> None:
    await redis.set(CURSOR, "0")
    relay.add(1, 2, 3)
    async with reading(settings(redis_url, relay)):
        await until(cursor_is(redis, 3))
    relay.add(4)
    async with reading(settings(redis_url, relay)) as stats:
        await until(cursor_is(redis, 4))
    assert relay.asked == [0, 3]
    assert stats.duplicates == 1
    assert await seqs(redis) == [1, 2, 3, 4]


async def test_a_connection_cut_inside_a_frame(relay: Relay, redis: Redis, redis_url: str) -> None:
    async def cut(self: Relay, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for _, data in self.frames[:20]:
            await socket.send_bytes(data)
        transport = request.transport
        assert transport is not None
        data = self.frames[20][1]
        transport.write(bytes([0x82, len(data)]) + data[: len(data) // 2])
        await asyncio.sleep(0.1)
        transport.abort()
        return socket

    await redis.set(CURSOR, "0")
    relay.add(*range(1, 101))
    relay.answers = [cut]
    async with reading(settings(redis_url, relay)) as stats:
        await until(cursor_is(redis, 100))
    assert relay.asked == [0, 20]
    assert (stats.reconnects, stats.set_aside) == (1, 0)
    assert await seqs(redis) == list(range(1, 101))


@pytest.mark.parametrize("last", ["close", "ConsumerTooSlow", "text"])
async def test_a_relay_that_ends_the_connection_is_called_again(
    relay: Relay, redis: Redis, redis_url: str, last: str
) -> None:
    async def end(self: Relay, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_bytes(self.frames[0][1])
        if last == "text":
            await socket.send_str("what is this?")
        elif last != "close":
            await socket.send_bytes(error(last))
        await socket.close()
        return socket

    await redis.set(CURSOR, "0")
    relay.add(1, 2)
    relay.answers = [end]
    async with reading(settings(redis_url, relay)) as stats:
        await until(cursor_is(redis, 2))
    assert relay.asked == [0, 1]
    assert await seqs(redis) == [1, 2]
    assert stats.drops["bad_frame"] == (last == "text")


async def test_a_future_cursor_stops_the_reader_and_leaves_the_cursor(
    relay: Relay, redis: Redis, redis_url: str
) -> None:
    async def future(self: Relay, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_bytes(error("FutureCursor"))
        await socket.close()
        return socket

    await redis.set(CURSOR, "99")
    relay.answers = [future]
    with pytest.raises(StoppedItself, match=r"99.*--from live"):
        await asyncio.wait_for(run_reader(settings(redis_url, relay), asyncio.Event()), 30)
    assert await redis.get(CURSOR) == b"99"
    assert json.loads(replies.raw(await redis.get("firehose:status")))["connected"] is False
    assert await redis.exists(USUAL.reader_lease) == 0


async def test_an_outdated_cursor_is_recorded_as_a_gap(relay: Relay, redis: Redis, redis_url: str) -> None:
    await redis.set(CURSOR, "10")
    relay.frames = [(10**9, frame("#info", {"name": "OutdatedCursor"}))]
    relay.add(50, 51)
    async with reading(settings(redis_url, relay)) as stats:
        await until(cursor_is(redis, 51))
        await until(lambda: redis.hget(USUAL.reader_stats, "gaps"))
    assert stats.gaps == 1
    (gap,) = [json.loads(text) for text in await redis.lrange(USUAL.gaps, 0, -1)]
    assert gap.pop("at") > 1_700_000_000_000
    assert gap == {"relay": relay.host, "reason": "outdated_cursor", "after": 10, "resumed": 50}


# A seq that cannot be


ABSURD = 2**52


async def test_one_absurd_seq_is_malformed_and_costs_nothing_else(relay: Relay, redis: Redis, redis_url: str) -> None:
    """Believed, it would make everything after it a duplicate, and the cursor one of the future."""
    await redis.set(CURSOR, "1")
    relay.add(2)
    relay.frames.append((2, identity(ABSURD)))
    relay.add(3, 4)
    relay.frames += [(4, identity(ABSURD)), (4, identity(ABSURD - 1))]
    relay.add(5)
    async with reading(settings(redis_url, relay)) as stats:
        await until(cursor_is(redis, 5))
    assert await seqs(redis) == [2, 3, 4, 5]
    assert stats.drops["bad_frame"] == 3
    letters = [fields[b"error"] for _, fields in replies.entries(await redis.xrange("firehose:dead-letters"))]
    assert letters[0] == b"seq 4503599627370496 between 2 and 3"
    assert len(letters) == 3
    assert await redis.llen(USUAL.gaps) == 0


async def test_a_doubted_frame_is_asked_for_again_when_the_connection_ends(
    relay: Relay, redis: Redis, redis_url: str
) -> None:
    async def end(self: Relay, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for _, data in self.frames[:2]:
            await socket.send_bytes(data)
        await socket.close()
        return socket

    await redis.set(CURSOR, "1")
    relay.add(2, 50_000_000, 50_000_001)
    relay.answers = [end]
    async with reading(settings(redis_url, relay)):
        await until(cursor_is(redis, 50_000_001))
    assert relay.asked == [1, 2]
    assert await seqs(redis) == [2, 50_000_000, 50_000_001]


async def test_a_relay_that_goes_on_from_far_ahead_is_followed_and_that_is_a_gap(
    relay: Relay, redis: Redis, redis_url: str
) -> None:
    await redis.set(CURSOR, "1")
    relay.add(2, 50_000_000, 50_000_001, 50_000_003)
    async with reading(settings(redis_url, relay)) as stats:
        await until(cursor_is(redis, 50_000_003))
    assert await seqs(redis) == [2, 50_000_000, 50_000_001, 50_000_003]
    (gap,) = [json.loads(text) for text in await redis.lrange(USUAL.gaps, 0, -1)]
    assert (gap["reason"], gap["after"], gap["resumed"], stats.gaps) == ("seq_jump", 2, 50_000_000, 1)


async def test_a_cursor_beyond_all_that_comes_ends_with_the_relays_word(
    relay: Relay, redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two absurd frames in a row are believed. What follows lies behind the cursor: not for ever, and not silently."""
    monkeypatch.setattr(follow, "BEHIND_S", 1.0)

    async def future(self: Relay, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_bytes(error("FutureCursor"))
        await socket.close()
        return socket

    await redis.set(CURSOR, "1")
    relay.add(2)
    relay.frames += [(2, identity(ABSURD)), (2, identity(ABSURD + 1))]
    relay.answers = [Relay.serve, future]
    stats = ReaderStats()
    run = asyncio.create_task(run_reader(settings(redis_url, relay), asyncio.Event(), stats=stats))
    await until(cursor_is(redis, ABSURD + 1))
    for seq in range(3, 60):
        relay.add(seq)
        await asyncio.sleep(0.05)
    with pytest.raises(StoppedItself, match="lies in its future"):
        await asyncio.wait_for(run, 30)
    assert stats.duplicates >= follow.BEHIND_FRAMES
    (gap,) = [json.loads(text) for text in await redis.lrange(USUAL.gaps, 0, -1)]
    assert (gap["reason"], gap["after"]) == ("seq_jump", 2)  # where to go back to


async def test_a_connection_cut_at_any_byte(
    relay: Relay, redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the handshake, in a WebSocket header, in a frame: every one of the first bytes, then here and there."""
    monkeypatch.setattr(follow, "Backoff", lambda *_: Backoff(0.001, 0.002))
    await redis.set(CURSOR, "0")
    relay.add(*range(1, 4_001))
    host, _, port = relay.host.rpartition(":")
    cuts = [*range(0, 500, 4), *(random.Random(4).randrange(500, 20_000) for _ in range(40))]
    async with Proxy((host, int(port))) as proxy:
        proxy.cut_after = cuts.pop(0)
        config = Config(redis_url=redis_url, relay_urls=(f"ws://127.0.0.1:{proxy.port}",))
        async with reading(config) as stats:
            async with asyncio.timeout(60):
                last = 4_000
                while cuts or proxy.cut_after is not None:
                    if proxy.cut_after is None:
                        proxy.cut_after = cuts.pop(0)
                    if int(await redis.get(CURSOR) or 0) >= last:  # nothing more would come to be cut
                        relay.add(*range(last + 1, last + 201))
                        last += 200
                    await asyncio.sleep(0.001)
            await until(cursor_is(redis, last), 30)
    assert proxy.connections > 150
    assert stats.set_aside == 0
    assert await seqs(redis) == list(range(1, last + 1))


async def test_a_killed_readers_last_append_arrives_after_its_death(relay: Relay, server_dir: Path) -> None:
    """Redis stands still with the script in its socket; the reader dies; Redis wakes up and runs it."""
    append = hashlib.sha1(script("append").encode(), usedforsecurity=False).hexdigest().encode()
    with RedisUnderTest(server_dir, aof=False) as server:
        redis = Redis.from_url(server.url, protocol=2)
        await redis.set(CURSOR, "0")
        relay.add(*range(1, 101))
        async with Proxy(str(server.socket_dir / "redis.sock")) as proxy:
            config = Config(redis_url=f"redis://127.0.0.1:{proxy.port}", relay_urls=(relay.url,))
            child = multiprocessing.get_context("spawn").Process(target=_run_until_killed, args=(config,))
            child.start()
            assert child.pid is not None
            await until(cursor_is(redis, 100), 60)
            pid = (await redis.info("server"))["process_id"]
            os.kill(pid, signal.SIGSTOP)
            proxy.cut_reply, proxy.cut_at = True, append  # to see it pass; nobody will wait for its reply
            relay.add(*range(101, 201))
            await until(lambda: proxy.cut_at is None)
            os.kill(child.pid, signal.SIGKILL)
            await asyncio.to_thread(child.join)
            os.kill(pid, signal.SIGCONT)
            await until(lambda: _cursor_beyond(redis, 100))
        cursor = replies.number(await redis.get(CURSOR))
        assert await seqs(redis) == list(range(1, cursor + 1))
        async with reading(settings(server.url, relay)):
            await until(cursor_is(redis, 200))
        assert await seqs(redis) == list(range(1, 201))
        await redis.aclose()


async def _cursor_beyond(redis: Redis, seq: int) -> bool:
    return replies.number(await redis.get(CURSOR)) > seq


async def test_retry_after_is_honoured(relay: Relay, redis: Redis, redis_url: str) -> None:
    async def too_many(self: Relay, request: web.Request) -> web.StreamResponse:
        return web.Response(status=429, headers={"Retry-After": "2"})

    await redis.set(CURSOR, "0")
    relay.add(1)
    relay.answers = [too_many]
    async with reading(settings(redis_url, relay)):
        await until(cursor_is(redis, 1))
    assert relay.asked_at[1] - relay.asked_at[0] >= 2


async def test_a_redirect_is_followed_to_the_other_hosts_cursor(relay: Relay, redis: Redis, redis_url: str) -> None:
    target = Relay()
    await target.start()

    async def redirect(self: Relay, request: web.Request) -> web.StreamResponse:
        raise web.HTTPFound(f"http://{target.host}{request.path_qs}")

    target.add(*range(1, 11))
    relay.answers = [redirect] * 9
    await redis.set(CURSOR, "100")
    await redis.set(USUAL.relay, target.host)
    await redis.set(CURSOR, "7")
    async with reading(settings(redis_url, relay)) as stats:
        await until(cursor_is(redis, 10))
    assert target.asked == [None, 7]  # what the first host had, then its own
    assert await seqs(redis) == [8, 9, 10]
    assert list(await redis.hgetall(USUAL.relays)) == [target.host.encode()]
    assert stats.gaps == 0
    await target.stop()


async def test_endless_redirects_end(relay: Relay, redis: Redis, redis_url: str) -> None:
    async def redirect(self: Relay, request: web.Request) -> web.StreamResponse:
        raise web.HTTPFound(str(request.rel_url))

    relay.answers = [redirect] * 11
    relay.add(1)
    await redis.set(CURSOR, "0")
    async with reading(settings(redis_url, relay)):
        await until(cursor_is(redis, 1))


async def test_a_frame_too_large_to_receive_is_passed_over(
    relay: Relay, redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastworker.reader.relay.FRAME_MAX", 100_000)
    await redis.set(CURSOR, "0")
    relay.add(1, 2)
    relay.frames.append((5, b"x" * 200_000))
    relay.add(6, 7)
    relay.frames.append((20, b"x" * 200_000))
    relay.add(*range(21, 60))
    async with reading(settings(redis_url, relay)) as stats:
        await until(cursor_is(redis, 59))
    assert await seqs(redis) == [1, 2, 6, 7, *range(21, 60)]
    assert relay.asked == [0, 3, 4, 6, 5, 6, 8, 9, 11, 15, 23, 19, 21, 20, 21]
    assert stats.drops["oversized"] == 2
    gaps = [json.loads(text) for text in await redis.lrange(USUAL.gaps, 0, -1)]
    assert [(gap["reason"], gap["after"], gap["resumed"]) for gap in gaps] == [
        ("oversized", 7, 21),
        ("oversized", 2, 6),
    ]


async def test_a_relay_with_nothing_but_a_frame_too_large_is_left(
    relay: Relay, redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is asked to begin, it sends what we have and then that frame: there is no getting past it."""
    monkeypatch.setattr("fastworker.reader.relay.FRAME_MAX", 10_000)
    monkeypatch.setattr(follow, "SEQ_JUMP", 32)
    monkeypatch.setattr(follow, "FAILURES_BEFORE_NEXT_RELAY", 1)

    async def stuck(self: Relay, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for data in (identity(1), identity(2), b"x" * 20_000):
            await socket.send_bytes(data)
        await socket.receive()
        return socket

    other = Relay()
    await other.start()
    relay.answers = [stuck] * 100
    other.add(5)
    await redis.mset({CURSOR: "0", f"fastworker:cursor:{other.host}": "4"})
    try:
        async with reading(settings(redis_url, relay, other)):
            await until(cursor_is(redis, 5), 10)
    finally:
        await other.stop()


async def test_a_relay_that_never_answers_close_is_closed() -> None:
    """It goes on sending: each message is less than the limit away, the whole is not."""

    async def serve(_self: Relay, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(autoclose=False)
        await socket.prepare(request)
        with suppress(ConnectionError):
            while True:
                await socket.send_bytes(b"hello")
                await asyncio.sleep(0.02)
        return socket

    relay = Relay()
    relay.answers = [serve]
    await relay.start()
    try:
        subscription = await relay_module.subscribe(relay_module.RelayAddress.parse(relay.url), None)
        await subscription.receive()
        used = subscription._socket.get_extra_info("socket")
        assert used.getsockopt(SOL_SOCKET, SO_KEEPALIVE) == 1  # one that vanished is noticed by the kernel
        assert used.getsockopt(IPPROTO_TCP, TCP_KEEPIDLE) == 30
        await asyncio.wait_for(subscription.close(), 5)
    finally:
        await relay.stop()


async def test_a_handshake_byte_by_byte_ends(
    relay: Relay, redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And with another relay at hand the reader goes on to it at once."""
    monkeypatch.setattr(relay_module, "HANDSHAKE_S", 0.5)

    gone = asyncio.Event()
    calls = 0

    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nX-A: ")
        with suppress(ConnectionError):
            while not writer.is_closing():
                writer.write(b"a")
                await writer.drain()
                await asyncio.sleep(0.05)
        writer.close()
        gone.set()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        address = relay_module.RelayAddress.parse(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        with pytest.raises(relay_module.RelayRefused, match="no open connection within"):
            await asyncio.wait_for(relay_module.subscribe(address, None), 5)
        await asyncio.wait_for(gone.wait(), 5)
        calls = 0
        relay.add(1)
        await redis.set(CURSOR, "0")
        await redis.set(USUAL.relay, address.host)
        await redis.set(USUAL.cursor_of(relay.host), "0")
        given = Config(redis_url=redis_url, relay_urls=(address.url, relay.url))
        async with reading(given) as stats:
            await until(lambda: stats.last_seq == 1)
        assert calls == 1


@pytest.mark.usefixtures("quick")
async def test_what_is_no_event_is_no_sign_of_life(relay: Relay, redis: Redis, redis_url: str) -> None:
    """#info for ever: with another relay at hand the reader goes on to it."""

    async def chatter(_self: Relay, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        with suppress(ConnectionError):
            while not socket.closed:
                await socket.send_bytes(frame("#info", {"name": "Hello"}))
                with suppress(TimeoutError):
                    await socket.receive(timeout=0.02)
        return socket

    other = Relay()
    await other.start()
    other.add(1)
    await redis.set(USUAL.cursor_of(other.host), "0")
    await redis.set(CURSOR, "0")
    await redis.set(USUAL.relay, relay.host)
    relay.answers = [chatter] * 10
    try:
        async with reading(settings(redis_url, relay, other, silence_floor_s=0.5)) as stats:
            await until(lambda: stats.last_seq == 1)
            assert stats.relay == other.host
        assert len(relay.asked) == 1
    finally:
        await other.stop()


async def test_retry_after_is_not_waited_out_where_there_is_another_relay(
    relay: Relay, redis: Redis, redis_url: str
) -> None:
    async def busy(_self: Relay, _request: web.Request) -> web.StreamResponse:
        return web.Response(status=503, headers={"Retry-After": "600"})

    other = Relay()
    await other.start()
    other.add(1)
    await redis.set(USUAL.cursor_of(other.host), "0")
    await redis.set(CURSOR, "0")
    await redis.set(USUAL.relay, relay.host)
    relay.answers = [busy] * 10
    try:
        async with reading(settings(redis_url, relay, other)) as stats:
            await until(lambda: stats.last_seq == 1, 20)
        assert len(relay.asked) == 1
    finally:
        await other.stop()


async def test_fails_over_to_the_next_relay_with_a_cursor_of_its_own(
    relay: Relay, redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "FAILURES_BEFORE_NEXT_RELAY", 1)
    other = Relay()
    await other.start()
    await redis.set(CURSOR, "1000")
    await redis.set(USUAL.relay, relay.host)
    await redis.set(USUAL.cursor_of(other.host), "7")
    relay.add(1001, 1002)
    other.add(*range(6, 10))
    async with reading(settings(redis_url, relay, other)):
        await until(cursor_is(redis, 1002))
        await relay.stop()
        await until(cursor_is(redis, 9))
        await relay.start()
        relay.add(1003)
        await other.stop()
        await until(cursor_is(redis, 1003))
    assert other.asked[0] == 7
    assert relay.asked == [1000, 1002]
    assert await seqs(redis) == [1001, 1002, 8, 9, 1003]
    # Each entry names its sequence space, on a JSON stream, too: the worker records both in fastworker.relays.
    relays = [decode_entry(fields).relay for _, fields in replies.entries(await redis.xrange(STREAM))]
    assert relays == [relay.host, relay.host, other.host, other.host, relay.host]
    assert await redis.get(USUAL.cursor_of(other.host)) == b"9"
    assert await redis.llen(USUAL.gaps) == 0


async def test_a_relay_never_read_before_begins_at_its_tip_and_that_is_a_gap(
    relay: Relay, redis: Redis, redis_url: str
) -> None:
    await redis.set(CURSOR, "1000")
    await redis.set(USUAL.relay, "old.test")
    relay.add(1, 2)
    async with reading(settings(redis_url, relay)):
        await until(lambda: relay.open)
        relay.add(3)
        await until(cursor_is(redis, 3))
    assert relay.asked == [None]
    (gap,) = [json.loads(text) for text in await redis.lrange(USUAL.gaps, 0, -1)]
    assert (gap["reason"], gap["switched_from"], gap["after"], gap["resumed"]) == ("relay_switch", "old.test", None, 3)


async def test_a_silent_connection_is_replaced(relay: Relay, redis: Redis, redis_url: str) -> None:
    async def silent(self: Relay, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for _, data in self.frames[:400]:
            await socket.send_bytes(data)
        while not socket.closed:
            with suppress(TimeoutError):
                await socket.receive(timeout=0.05)
            await socket.ping()  # a ping is not data
        return socket

    await redis.set(CURSOR, "0")
    relay.add(*range(1, 501))
    relay.answers = [silent]
    async with reading(settings(redis_url, relay, silence_floor_s=1.5)):
        await until(cursor_is(redis, 500))
    assert relay.asked == [0, 400]


# Redis


async def test_a_full_stream_holds_the_reader_back_and_loses_nothing(
    relay: Relay, redis: Redis, redis_url: str
) -> None:
    count, limit = 1000, 200  # each time that it is full costs a second
    await redis.set(CURSOR, "0")
    await redis.xgroup_create(STREAM, "firehose-processors", "0", mkstream=True)
    relay.add(*range(1, count + 1))
    longest = 0
    read: list[int] = []
    async with reading(settings(redis_url, relay, max_stream_len=limit)) as stats:
        await until(lambda: stats.full)
        while len(read) < count:
            longest = max(longest, await redis.xlen(STREAM))
            answer = await redis.xreadgroup("firehose-processors", "c", {STREAM: ">"}, count=100, block=2000)
            for id_, fields in replies.read(answer):
                read.append(int(fields[b"seq"]))
                await redis.xack(STREAM, "firehose-processors", id_)
    assert read == list(range(1, count + 1))
    assert longest <= limit
    assert stats.waits_full >= 1


GROUP = "firehose-processors"


async def test_what_the_dead_left_at_the_head_of_a_full_stream_is_set_aside(
    relay: Relay, redis: Redis, redis_url: str
) -> None:
    """Old workers read on and never claim: without this their dead sibling's entries would hold the reader for ever."""
    await redis.set(CURSOR, "0")
    await redis.xgroup_create(STREAM, GROUP, "0", mkstream=True)
    relay.add(*range(1, 61))
    read: list[int] = []
    async with reading(settings(redis_url, relay, max_stream_len=200, abandoned_ms=4_000)) as stats:
        # First what the dead one takes: a stream is full, too, that has few entries and no room for a whole chunk.
        await until(cursor_is(redis, 60))
        left = replies.read(await redis.xreadgroup(GROUP, "python-worker-dead", {STREAM: ">"}, count=50))
        assert len(left) == 50
        await redis.xdel(STREAM, left[7][0])
        relay.add(*range(61, 601))
        await until(lambda: stats.full)
        await asyncio.sleep(0.5)  # the other one outlives it
        while len(read) < 550:
            answer = await redis.xreadgroup(GROUP, "python-worker-live", {STREAM: ">"}, count=100, block=500)
            for id_, fields in replies.read(answer):
                read.append(int(fields[b"seq"]))
                await redis.xack(STREAM, GROUP, id_)
        await until(lambda: stats.last_seq == 600)
    assert read == list(range(51, 601))
    del left[7]
    letters = [fields for _, fields in replies.entries(await redis.xrange("firehose:dead-letters"))]
    assert [original_fields(letter) for letter in letters] == [fields for _, fields in left]
    assert [letter[b"origId"] for letter in letters] == [id_ for id_, _ in left]
    assert {(one[b"reason"], one[b"consumer"], one[b"deliveries"], one[b"form"]) for one in letters} == {
        (b"abandoned", b"python-worker-dead", b"1", b"json")
    }
    assert (await redis.xpending(STREAM, GROUP))["pending"] == 0
    ledger = await redis.hgetall("fastworker:ledger")
    aside = str(len(left)).encode()
    assert ledger == {b"set_aside": aside, b"drop:abandoned": aside, b"ghosts": b"1"}
    assert (stats.set_aside, stats.drops["abandoned"]) == (len(left), len(left))


@pytest.mark.parametrize("why", ["a worker of ours adopts", "nobody reads", "no room", "not dead", "an unknown form"])
async def test_what_is_not_abandoned_stays(relay: Relay, redis: Redis, redis_url: str, why: str) -> None:
    await redis.set(CURSOR, "0")
    await redis.xgroup_create(STREAM, GROUP, "0", mkstream=True)
    if why == "an unknown form":
        await redis.xadd(STREAM, {"what": "is this"})
    relay.add(*range(1, 301))
    limits = {"max_stream_len": 100, "abandoned_ms": 30_000 if why == "not dead" else 700}
    if why == "no room":
        await redis.xadd("firehose:dead-letters", {"another": "letter"})
        limits["dead_letter_maxlen"] = 1
    async with reading(settings(redis_url, relay, **limits)) as stats:
        await until(lambda: stats.full)
        left = replies.read(await redis.xreadgroup(GROUP, "python-worker-dead", {STREAM: ">"}, count=50))
        if why == "a worker of ours adopts":
            await redis.set("fastworker:consumer:python-worker-0", "token")
            await redis.xgroup_createconsumer(STREAM, GROUP, "python-worker-0")
        for _ in range(20):
            if why != "nobody reads":
                await redis.xreadgroup(GROUP, "python-worker-live", {STREAM: ">"}, count=1)
            await asyncio.sleep(0.1)
        assert stats.full
    assert await redis.xlen("firehose:dead-letters") == (1 if why == "no room" else 0)
    pending = await redis.xpending_range(STREAM, GROUP, "-", "+", 200, "python-worker-dead")
    assert [one["message_id"] for one in pending] == [id_ for id_, _ in left]
    assert not await redis.exists("fastworker:ledger")


@pytest.mark.parametrize(
    "fields",
    [
        {b"type": b"commit", b"data": b"{}", b"seq": b"7"},
        {b"data": b"{}"},
        {b"n": b"\x00\xff"},
        {b"f": b"\xff"},
        {b"f": b"\xff", b"relay": b"relay.test"},
    ],
    ids=["json", "json without seq", "native", "frame", "frame of a relay"],
)
async def test_an_abandoned_entrys_letter_is_what_a_worker_would_write(
    redis: Redis, fields: dict[bytes, bytes]
) -> None:
    await redis.xgroup_create(STREAM, GROUP, "0", mkstream=True)
    feed = feed_module.Feed(redis, stream_key=STREAM, cursor_key=CURSOR, max_stream_len=10, group=GROUP)
    worker = WorkerStream(redis, keys=Keys(STREAM, GROUP), group=GROUP)
    worker.name = "live"
    _, second = [await redis.xadd(STREAM, replies.to_add(fields)) for _ in range(2)]
    await redis.execute_command("XREADGROUP", "GROUP", GROUP, "dead", "COUNT", 1, "STREAMS", STREAM, ">")
    await asyncio.sleep(0.2)
    await redis.execute_command("XREADGROUP", "GROUP", GROUP, "live", "COUNT", 1, "STREAMS", STREAM, ">")
    assert await feed.set_aside_abandoned(120) == (1, 0)
    assert await worker.set_aside([SetAside(replies.text(second), fields, Reason.ABANDONED, "")], 0) == 1
    (_, ours), (_, theirs) = replies.entries(await redis.xrange("firehose:dead-letters"))
    its_own = {b"origId", b"error", b"consumer", b"setAsideAt"}
    assert {k: v for k, v in ours.items() if k not in its_own} == {k: v for k, v in theirs.items() if k not in its_own}
    assert ours.keys() == theirs.keys()
    assert original_fields(ours) == ({b"type": b"", b"seq": b"", **fields} if b"data" in fields else fields)


async def test_the_limit_in_bytes(relay: Relay, redis: Redis, redis_url: str) -> None:
    await redis.set(CURSOR, "0")
    await redis.xgroup_create(STREAM, "firehose-processors", "0", mkstream=True)
    async with reading(settings(redis_url, relay, stream_bytes_max=200_000)) as stats:
        await until(lambda: relay.open)
        for start in range(1, 8_001, 500):
            relay.add(*range(start, start + 500))
            await asyncio.sleep(0.02)
        await until(lambda: stats.full)
        assert replies.number(await redis.memory_usage(STREAM)) < 600_000
        seen = 0
        while seen < 8_000:
            answer = await redis.xreadgroup("firehose-processors", "c", {STREAM: ">"}, count=5000, block=3000)
            ids = [id_ for id_, _ in replies.read(answer)]
            seen += await redis.xack(STREAM, "firehose-processors", *ids)
    assert stats.last_seq == 8_000


async def test_two_readers_do_no_harm(relay: Relay, redis: Redis, redis_url: str) -> None:
    await redis.set(CURSOR, "0")
    relay.add(*range(1, 11))
    async with reading(settings(redis_url, relay)) as first:
        await until(cursor_is(redis, 10))
        async with reading(settings(redis_url, relay)) as second:
            await asyncio.sleep(1.2)
            relay.add(*range(11, 21))
            await until(cursor_is(redis, 20))
            assert (first.standby, second.standby) == (False, True)
    async with reading(settings(redis_url, relay)) as third:
        await until(lambda: not third.standby)
        relay.add(21)
        await until(cursor_is(redis, 21))
    assert await seqs(redis) == list(range(1, 22))


async def test_two_streams_on_one_redis(relay: Relay, redis: Redis, redis_url: str) -> None:
    """Production and staging: each has its lease, marks and cursors; a cursor that two streams share is refused."""
    relay.add(*range(1, 11))
    staging = settings(redis_url, relay, stream_key="staging:events", cursor_key="staging:cursor")
    for key in (CURSOR, "staging:cursor"):
        await redis.set(key, "0")
    async with reading(settings(redis_url, relay)), reading(staging):
        await until(cursor_is(redis, 10))
        await until(lambda: redis.xlen("staging:events"))
        assert await redis.xlen("staging:events") == 10
        assert await redis.exists("fastworker:reader", "fastworker:reader:staging:events") == 2
        assert await redis.get(f"fastworker:cursor:staging:events:{relay.host}") == b"10"
        other = settings(redis_url, relay, stream_key="test:events")
        with pytest.raises(ConfigError, match=f"{CURSOR} is the cursor of the reader of {STREAM}"):
            await asyncio.wait_for(run_reader(other, asyncio.Event()), 10)


async def test_steps_back_from_a_foreign_reader_and_goes_on_from_its_cursor(
    relay: Relay, redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "SETTLE_S", 4.5)
    await redis.set(CURSOR, "0")
    relay.add(*range(1, 11))
    async with reading(settings(redis_url, relay)) as stats:
        await until(cursor_is(redis, 10))
        for seq in (12, 13, 14):  # the predecessor takes no lease
            await redis.xadd(STREAM, {"type": "identity", "data": "{}", "seq": str(seq)})
            await redis.set(CURSOR, str(seq))
            if seq == 12:
                relay.add(*range(11, 16))
            await until(lambda: stats.standby)
            await asyncio.sleep(0.5)
            assert stats.standby
        await until(cursor_is(redis, 15))
    assert await seqs(redis) == [*range(1, 11), 12, 13, 14, 15]


async def test_a_readers_lease_without_an_end_is_given_one(
    relay: Relay, redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a move to another Redis by a tool that copies no expiry."""
    monkeypatch.setattr(slot_module, "LEASE_MS", 500)
    await redis.set("fastworker:reader", "the token of a reader that is no more")
    await redis.set(CURSOR, "0")
    relay.add(1)
    async with reading(settings(redis_url, relay)):
        await until(cursor_is(redis, 1))


@pytest.mark.parametrize("moved", ["forward", "back", "away"])
async def test_a_cursor_that_somebody_moves_costs_nothing(
    relay: Relay, redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch, moved: str
) -> None:
    """A hand at redis-cli, while the reader is at work: nothing came on the stream."""
    monkeypatch.setattr(reader_module, "SETTLE_S", 0.3)
    await redis.set(CURSOR, "0")
    relay.add(*range(1, 11))
    async with reading(settings(redis_url, relay)) as stats:
        await until(cursor_is(redis, 10))
        await (redis.delete(CURSOR) if moved == "away" else redis.set(CURSOR, {"forward": "14", "back": "5"}[moved]))
        relay.add(*range(11, 21))
        await until(lambda: stats.standby)
        await until(cursor_is(redis, 20))
    assert set(await seqs(redis)) == set(range(1, 21))


async def test_redis_that_restarts_empty(relay: Relay, server_dir: Path) -> None:
    stored = 0

    async def fallback(_host: str) -> int | None:
        return stored

    relay.add(*range(1, 101))
    with RedisUnderTest(server_dir, aof=False) as server:
        redis = Redis.from_url(server.url, protocol=2)
        async with reading(settings(server.url, relay), fallback_seq=fallback) as stats:
            await until(cursor_is(redis, 100))
            stored = 60  # what the workers had finished
            await redis.config_set("save", "")
            await asyncio.to_thread(server.stop)
            await until(lambda: stats.standby)
            for path in list(server_dir.rglob("*.rdb")):
                path.unlink()
            await asyncio.to_thread(server.start)
            relay.add(101)
            await until(cursor_is(redis, 101))
            assert await seqs(redis) == list(range(61, 102))
            await until(lambda: not stats.standby)
        assert stats.last_seq == 101
        await redis.aclose()


async def _delete(redis: Redis) -> None:
    await redis.delete(STREAM)


async def _rename(redis: Redis) -> None:
    await redis.rename(STREAM, "elsewhere")


async def _replace(redis: Redis) -> None:
    """As a worker does that finds its group gone."""
    pipe = redis.pipeline(transaction=True)
    pipe.delete(STREAM)
    pipe.xgroup_create(STREAM, "firehose-processors", id="0", mkstream=True)
    await pipe.execute()


async def _replace_and_use(redis: Redis) -> None:
    await _replace(redis)
    await redis.xadd(STREAM, {"type": "identity", "data": "{}", "seq": "0"})


async def _trim(redis: Redis) -> None:
    await redis.xtrim(STREAM, maxlen=20, approximate=False)


async def _trim_a_little(redis: Redis) -> None:
    await redis.xtrim(STREAM, maxlen=69, approximate=False)


async def _pick(redis: Redis) -> None:
    """In the middle, where no mark is: from Redis 7 on the stream tells."""
    if not await counts_reads(redis):
        pytest.skip("Redis before 7.0 does not say what was removed")
    found = replies.entries(await redis.xrange(STREAM))
    await redis.xdel(STREAM, found[-35][0], found[-34][0])


LOSSES = [_delete, _rename, _replace, _replace_and_use, _trim, _trim_a_little, _pick]


async def _read(redis: Redis, count: int) -> set[int]:
    """As a worker whose entries are all stored; the seqs."""
    found = await redis.xreadgroup("firehose-processors", "w-0", {STREAM: ">"}, count=count)
    entries = replies.read(found)
    if entries:
        await redis.xack(STREAM, "firehose-processors", *[entry_id for entry_id, _ in entries])
    return {int(fields[b"seq"]) for _, fields in entries}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "TICK_S", 0.1)
    monkeypatch.setattr(follow, "LOOK_S", 0.1)
    monkeypatch.setattr(reader_module, "SETTLE_S", 0.5)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("lose", "known"),
    [(lose, "by redis") for lose in LOSSES]
    + [(_delete, "by postgresql"), (_delete, "by nobody"), (_trim, "by postgresql"), (_trim, "by nobody")],
)
async def test_what_somebody_removes_unread_comes_again_or_is_told(
    relay: Relay, redis: Redis, redis_url: str, lose: Callable[[Redis], Awaitable[None]], known: str
) -> None:
    async def fallback(_host: str) -> int | None:
        return 25 if known == "by postgresql" else None

    await redis.xgroup_create(STREAM, "firehose-processors", id="0", mkstream=True)
    await redis.set(CURSOR, "0")
    stored: set[int] = set()
    async with reading(settings(redis_url, relay), fallback_seq=fallback) as stats:
        if known != "by nobody":
            relay.add(*range(1, 31))
            await until(cursor_is(redis, 30))
            await until(lambda: redis.llen(USUAL.marks))
            stored |= await _read(redis, 30)
            await until(lambda: redis.get(USUAL.finished))
        relay.add(*range(31, 101))
        await until(cursor_is(redis, 100))
        await until(lambda: redis.llen(USUAL.marks))
        await lose(redis)
        with suppress(Exception):
            await redis.xgroup_create(STREAM, "firehose-processors", id="0", mkstream=True)
        relay.add(101)
        await until(lambda: len(relay.asked) == 2)
        await until(cursor_is(redis, 101))
        await until(lambda: stats.last_seq == 101)
    while some := await _read(redis, 100):
        stored |= some
    if known == "by nobody":
        [gap] = await redis.lrange(USUAL.gaps, 0, -1)
        assert json.loads(gap)["reason"] == "stream_lost"
        assert json.loads(gap)["resumed"] >= 100
    else:
        assert stored - {0} == set(range(1, 102))
        assert await redis.llen(USUAL.gaps) == 0


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("how", ["trimmed", "trimmed and the consumer deleted", "read back by its successor"])
async def test_what_a_dead_worker_held_and_somebody_trims_comes_again(
    relay: Relay, redis: Redis, redis_url: str, how: str
) -> None:
    """It is pending, so nobody misses it as unread; and whoever takes it over finds nothing."""
    await redis.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
    await redis.set(CURSOR, "0")
    async with reading(settings(redis_url, relay)) as stats, connect(redis_url) as of_worker:
        relay.add(*range(1, 31))
        await until(cursor_is(redis, 30))
        await until(lambda: redis.llen(USUAL.marks))
        stored = await _read(redis, 30)
        await until(lambda: redis.get(USUAL.finished))
        dead = WorkerStream(of_worker, consumer_id="dead")
        await dead.acquire()
        relay.add(*range(31, 101))
        await until(cursor_is(redis, 100))
        assert len(await dead.read(100)) == 70
        await dead.tell_held()
        await redis.delete(USUAL.consumer_lease("dead-0"))
        await redis.xtrim(STREAM, maxlen=0, approximate=False)
        if how == "trimmed and the consumer deleted":
            await redis.xgroup_delconsumer(STREAM, GROUP, "dead-0")
        if how == "read back by its successor":
            heir = WorkerStream(of_worker, consumer_id="dead")
            await heir.acquire()
            assert heir.name == "dead-0"
            assert await heir.read_own("0", 100) != ([], None)
        else:
            heir = WorkerStream(of_worker, consumer_id="heir")
            await heir.acquire()
            await heir.claim("dead-0", idle_ms=0)
        relay.add(101)
        await until(lambda: len(relay.asked) >= 2)  # it may have missed them as unread, too
        await until(cursor_is(redis, 101))
        await until(lambda: stats.last_seq == 101)

        async def has_gone_back() -> bool:
            return not await redis.exists(USUAL.go_back)

        await until(has_gone_back)
        await until(cursor_is(redis, 101))
    while some := await _read(redis, 100):
        stored |= some
    assert stored - {0} == set(range(1, 102))
    assert await redis.llen(USUAL.gaps) == 0


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("is_read_at_once", [False, True])
async def test_an_older_stream_that_takes_the_place_of_ours(
    relay: Relay, redis: Redis, redis_url: str, is_read_at_once: bool
) -> None:
    """RENAME, and back later: what came meanwhile is on neither."""
    await redis.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
    await redis.set(CURSOR, "0")
    stored: set[int] = set()
    async with reading(settings(redis_url, relay)) as stats:
        relay.add(*range(1, 31))
        await until(cursor_is(redis, 30))
        stored |= await _read(redis, 30)
        await until(lambda: redis.get(USUAL.finished))
        await redis.rename(STREAM, "elsewhere")
        relay.add(*range(31, 41))
        await until(cursor_is(redis, 40))
        await redis.rename("elsewhere", STREAM)
        if is_read_at_once:
            stored |= await _read(redis, 100)
        relay.add(41)
        await until(lambda: stats.last_seq == 41)
        await until(cursor_is(redis, 41))

        async def all_are_stored() -> bool:
            stored.update(await _read(redis, 100))
            return stored >= set(range(1, 42))

        await until(all_are_stored)
    assert await redis.llen(USUAL.gaps) == 0


@pytest.mark.usefixtures("quick")
async def test_a_stream_that_is_lost_while_no_reader_runs(relay: Relay, redis: Redis, redis_url: str) -> None:
    await redis.xgroup_create(STREAM, "firehose-processors", id="0", mkstream=True)
    await redis.set(CURSOR, "0")
    relay.add(*range(1, 31))
    async with reading(settings(redis_url, relay)):
        await until(cursor_is(redis, 30))
        await until(lambda: redis.llen(USUAL.marks))
        await _read(redis, 30)
        await until(lambda: redis.get(USUAL.finished))
        relay.add(*range(31, 61))
        await until(cursor_is(redis, 60))
    await redis.delete(STREAM)
    relay.add(61)
    async with reading(settings(redis_url, relay)):
        await until(cursor_is(redis, 61))
    assert await seqs(redis) == list(range(31, 62))


@pytest.mark.usefixtures("quick")
async def test_an_empty_redis_without_postgresql_is_told(relay: Relay, redis: Redis, redis_url: str) -> None:
    await redis.set(CURSOR, "0")
    relay.add(*range(1, 31))
    async with reading(settings(redis_url, relay)) as stats:
        await until(cursor_is(redis, 30))
        await redis.flushall()
        relay.add(*range(31, 61))
        await until(cursor_is(redis, 60))
        assert stats.gaps == 1
    assert await seqs(redis) == list(range(31, 61))
    [gap] = await redis.lrange(USUAL.gaps, 0, -1)
    assert (json.loads(gap)["after"], json.loads(gap)["resumed"]) == (None, 31)


@pytest.mark.usefixtures("quick")
async def test_what_is_finished_may_be_trimmed_by_anybody(relay: Relay, redis: Redis, redis_url: str) -> None:
    await redis.xgroup_create(STREAM, "firehose-processors", id="0", mkstream=True)
    await redis.set(CURSOR, "0")
    async with reading(settings(redis_url, relay, keep_s=600.0)) as stats:
        for first in range(1, 200, 50):
            relay.add(*range(first, first + 50))
            await until(cursor_is(redis, first + 49))
            await _read(redis, 30)
            await redis.xtrim(STREAM, maxlen=await redis.xlen(STREAM) - 25, approximate=False)
            await until(lambda: redis.llen(USUAL.marks))
        await asyncio.sleep(0.3)
        assert stats.gaps == 0
    assert (await seqs(redis))[-1] == 200
    assert len(relay.asked) == 1


async def test_redis_without_memory_takes_all_of_a_chunk_or_nothing(relay: Relay, server_dir: Path) -> None:
    with RedisUnderTest(server_dir, aof=False) as server:
        redis = Redis.from_url(server.url, protocol=2)
        await redis.set(CURSOR, "0")
        relay.add(*range(1, 11))
        async with reading(settings(server.url, relay)) as stats:
            await until(cursor_is(redis, 10))
            await redis.config_set("maxmemory", "1")
            relay.add(*range(11, 2001))
            await until(lambda: "out of memory" in stats.last_error)
            await asyncio.sleep(0.5)
            assert await seqs(redis) == list(range(1, 11))
            await redis.config_set("maxmemory", "0")
            await until(cursor_is(redis, 2000))
            assert await seqs(redis) == list(range(1, 2001))
        await redis.aclose()


async def test_connections_to_redis_cut_at_random(relay: Relay, redis: Redis, redis_url: str) -> None:
    await redis.set(CURSOR, "0")
    async with reading(settings(redis_url, relay)):
        for start in range(1, 3001, 100):
            relay.add(*range(start, start + 100))
            await asyncio.sleep(random.uniform(0, 0.05))
            await redis.client_kill_filter(_type="normal", skipme=True)
        await until(cursor_is(redis, 3000))
    assert await seqs(redis) == list(range(1, 3001))


@pytest.mark.parametrize("kills", usually([2, 4], 2))
async def test_sigkill_at_any_moment(relay: Relay, redis: Redis, redis_url: str, kills: int) -> None:
    await redis.set(CURSOR, "0")
    config = settings(redis_url, relay)
    context = multiprocessing.get_context("spawn")
    for start in range(1, kills + 1):
        relay.add(*range(start * 1000 - 999, start * 1000 + 1))
        child = context.Process(target=_run_until_killed, args=(config,))
        child.start()
        assert child.pid is not None
        await until(lambda: relay.open)
        await asyncio.sleep(random.uniform(0, 0.1))
        os.kill(child.pid, signal.SIGKILL)
        await asyncio.to_thread(child.join)
        await until(lambda: not relay.open)
        await redis.delete(USUAL.reader_lease)  # it would run out in five seconds
        async with redis.pipeline(transaction=True) as both:  # its last append may be on its way
            both.xrange(STREAM)
            both.get(CURSOR)
            entries, cursor = await both.execute()
        assert [int(fields[b"seq"]) for _, fields in replies.entries(entries)] == list(range(1, int(cursor) + 1))
    async with reading(config):
        await until(cursor_is(redis, kills * 1000))
    assert await seqs(redis) == list(range(1, kills * 1000 + 1))


def _run_until_killed(config: Config) -> None:
    uvloop.run(run_reader(config, asyncio.Event()))


async def test_stops_within_seconds_while_the_stream_is_full(relay: Relay, redis: Redis, redis_url: str) -> None:
    await redis.set(CURSOR, "0")
    relay.add(*range(1, 20_001))
    async with reading(settings(redis_url, relay, max_stream_len=100)) as stats:
        await until(lambda: stats.full)
        begun = time.monotonic()
    assert time.monotonic() - begun < 30  # by design 4 at most, of a machine that has time
    assert 0 < await redis.xlen(STREAM) <= 100
    assert int(await redis.get(CURSOR) or 0) == await redis.xlen(STREAM)


# What is wrong from the start


async def test_redis_out_of_reach_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "START_S", 0.1)
    config = Config(redis_url="redis://:secret@127.0.0.1:1", relay_urls=("ws://127.0.0.1:1",))
    with pytest.raises(Unreachable, match=r"redis://:\*\*\*@127.0.0.1:1: Redis cannot be reached"):
        await run_reader(config, asyncio.Event())


async def test_a_stream_key_of_the_wrong_type(redis: Redis, redis_url: str, relay: Relay) -> None:
    await redis.set(STREAM, "x")
    with pytest.raises(Unreachable, match="is a string, not a stream"):
        await run_reader(settings(redis_url, relay), asyncio.Event())


async def test_a_cursor_that_is_no_number(redis: Redis, redis_url: str, relay: Relay) -> None:
    await redis.set(CURSOR, "abc")
    with pytest.raises(ConfigError, match="firehose:python_cursor holds 'abc'"):
        await asyncio.wait_for(run_reader(settings(redis_url, relay), asyncio.Event()), 30)


@pytest.mark.parametrize(
    ("cursor", "where", "after", "gap"),
    [
        ("50", 80, 79, (50, 80)),
        ("50", 40, 39, None),
        ("50", "oldest", 0, None),
        ("50", "live", 90, (50, 91)),
        ("99999999999", 30, 29, None),  # from the future
        ("abc", 30, 29, None),
        (None, 30, 29, None),
    ],
)
async def test_the_operator_says_where_to_begin(
    cursor: str | None, where: start_module.Start, after: int, gap: Any, relay: Relay, redis: Redis, redis_url: str
) -> None:
    """Whatever the cursor says; what is passed over is a gap."""
    if cursor is not None:
        await redis.set(CURSOR, cursor)
    beginning = asyncio.create_task(start_module.begin_at(settings(redis_url, relay), where))
    if where == "live":
        async with asyncio.timeout(60):
            while not relay.open:
                await asyncio.sleep(0.01)
        relay.add(91)
    await beginning
    assert await redis.get(CURSOR) == b"%d" % after
    assert not await redis.exists("fastworker:reader")
    gaps = [json.loads(text) for text in await redis.lrange("fastworker:gaps", 0, -1)]
    assert [(one["after"], one["resumed"]) for one in gaps] == ([] if gap is None else [gap])
    relay.add(*range(1, 100))
    async with reading(settings(redis_url, relay)):
        await until(cursor_is(redis, 99))
    assert await seqs(redis) == list(range(after + 1, 100))


async def test_a_start_is_refused_while_another_reader_is_at_work(
    redis: Redis, redis_url: str, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    await redis.set(CURSOR, "7")
    await redis.set("fastworker:reader", "another")
    monkeypatch.setattr(start_module, "LEASE_MS", 0)
    with pytest.raises(ConfigError, match="Another reader is at work"):
        await start_module.begin_at(settings(redis_url, relay), 1)
    assert await redis.get(CURSOR) == b"7"


# What others see


async def test_the_dashboard(relay: Relay, redis: Redis, redis_url: str) -> None:
    listener = redis.pubsub()
    await listener.subscribe("firehose:events:broadcast")
    await redis.set(CURSOR, "0")
    relay.add(*range(1, 61))
    account = {"seq": 61, "did": DID, "time": TIME, "active": False, "status": "takendown"}
    relay.frames.append((61, frame("#account", account)))

    async def all_told() -> bool:
        """Once a second, and the first time perhaps before the last frame came; these figures come last."""
        return await redis.hget(USUAL.reader_stats, "entries") == b"61"

    async with reading(settings(redis_url, relay)):
        await until(cursor_is(redis, 61))
        await until(all_told)
        status = json.loads(replies.raw(await redis.get("firehose:status")))
        assert status == {
            "connected": True,
            "url": f"ws://{relay.host}/xrpc/com.atproto.sync.subscribeRepos",
            "currentCursor": "61",
            "reader": "fastworker",
        }
        recent = json.loads(replies.raw(await redis.get("firehose:recent_events")))
        assert 0 < await redis.ttl("firehose:recent_events") <= 10
        assert 0 < await redis.ttl("firehose:status") <= 10
        figures = await redis.hgetall(USUAL.reader_stats)
    assert len(recent) == 50
    clock = recent[0].pop("timestamp")
    assert time.strptime(clock, "%H:%M:%S")
    assert recent[0] == {"type": "#account", "lexicon": "com.atproto.account", "did": DID, "action": "inactive"}
    assert recent[1]["action"] == "\u2192 h60.test"
    assert (figures[b"entries"], figures[b"connected"], figures[b"drop:bad_frame"]) == (b"61", b"1", b"0")
    assert json.loads(replies.raw(await redis.get("firehose:status")))["connected"] is False
    heard = []
    while (message := await listener.get_message(timeout=2)) is not None:
        if message["type"] == "message":
            heard.append(json.loads(message["data"]))
    assert 1 <= len(heard) <= 61
    assert list(heard[-1]) == ["type", "lexicon", "did", "action", "timestamp"]
    assert heard[-1]["type"] == "#account"
    await listener.aclose()
