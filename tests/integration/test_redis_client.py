"""The way to Redis: a cancelled task ends, wherever the cancellation meets it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import DataError, ResponseError

from fastworker.errors import StreamUnavailable
from fastworker.stream.client import connect, translating
from fastworker.stream.quick import close_idle

CANCELLATIONS = 400


async def test_one_cancellation_ends_a_loop_of_commands(redis_url: str) -> None:
    """Python 3.11's `wait_for` swallows a cancellation that arrives when the bytes of a command have just left."""
    redis = connect(redis_url)

    async def ping_for_ever() -> None:
        while True:
            with contextlib.suppress(StreamUnavailable):
                async with translating(redis):
                    await redis.ping()

    survivors = 0
    try:
        for turn in range(CANCELLATIONS):
            task = asyncio.create_task(ping_for_ever())
            for _ in range(turn % 23):
                await asyncio.sleep(0)
            task.cancel()
            _, pending = await asyncio.wait([task], timeout=5)
            while pending:
                survivors += 1
                task.cancel()
                _, pending = await asyncio.wait(pending, timeout=5)
            assert task.cancelled()
    finally:
        await redis.aclose()
    assert not survivors


@pytest.mark.parametrize("answer", [None, RedisConnectionError("closed by server")])
async def test_a_swallowed_cancellation_is_raised_after_the_command(redis_url: str, answer: Exception | None) -> None:
    redis = connect(redis_url)
    task = asyncio.current_task()
    assert task is not None

    async def swallow() -> None:
        async with translating(redis):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
            if answer is not None:
                raise answer

    try:
        with pytest.raises(asyncio.CancelledError):
            await swallow()
        async with translating(redis):  # what a cancelled task does to clean up is not disturbed
            assert await redis.ping()
    finally:
        task.uncancel()
        await redis.aclose()


@pytest.mark.parametrize("steps", range(12))
async def test_who_connects_to_a_server_that_says_nothing_can_be_cancelled_at_any_step(steps: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        redis = connect(f"redis://127.0.0.1:{silent.getsockname()[1]}")
        task = asyncio.ensure_future(redis.ping())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait((task,), timeout=8)  # less than the ten seconds of an answer
        await redis.aclose()
    assert done


@pytest.mark.parametrize("value", ["text é", b"\x00\xff", 7, -1, 1.5, bytearray(b"ab"), memoryview(b"cd"), "a b"])
async def test_arguments_arrive_as_the_library_sends_them(redis_url: str, value: Any) -> None:
    redis, theirs = connect(redis_url), Redis.from_url(redis_url)
    try:
        await redis.set("ours", value)
        await theirs.set("theirs", value)
        assert await redis.get("ours") == await theirs.get("theirs") is not None
        with pytest.raises(DataError):
            await redis.set("ours", None)  # type: ignore[arg-type]
    finally:
        await redis.aclose()
        await theirs.aclose()


@pytest.mark.parametrize("size", [1_000, 65_535, 65_536, 30_000_000])
async def test_a_command_of_any_size_is_sent_whole(redis_url: str, size: int) -> None:
    redis = connect(redis_url)
    try:
        await redis.set("large", b"x" * size)
        assert await redis.strlen("large") == size
        async with redis.pipeline(transaction=True) as pipe:
            pipe.set("large", b"y" * size)
            pipe.strlen("large")
            assert (await pipe.execute())[1] == size
    finally:
        await redis.aclose()


async def test_a_server_that_takes_nothing_is_not_waited_for_longer_than_the_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        redis = connect(f"redis://127.0.0.1:{silent.getsockname()[1]}", socket_timeout=0.3)
        for value in (b"x", b"x" * 30_000_000):
            with pytest.raises(StreamUnavailable):
                async with asyncio.timeout(5), translating(redis):
                    await redis.set("large", value)
        await redis.aclose()


async def test_a_command_is_sent_once_and_its_connection_serves_the_next_one(redis_url: str) -> None:
    redis = connect(redis_url, max_connections=1)
    try:
        await redis.set("text", "no number")
        with pytest.raises(ResponseError):
            await redis.incr("text")
        assert await redis.get("text") == b"no number"
        blocked: asyncio.Future[Any] = asyncio.ensure_future(redis.blpop(["never"], timeout=5))
        await asyncio.sleep(0.05)
        blocked.cancel()
        await asyncio.wait([blocked])
        assert await redis.get("text") == b"no number"  # the reply to what was cancelled is nobody's
    finally:
        await redis.aclose()


async def test_a_connection_that_is_being_closed_is_given_to_nobody(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing takes a moment; a command that was on it found nothing to write to, and ended the process."""
    redis = connect(redis_url)
    pool, may_end = redis.connection_pool, asyncio.Event()
    try:
        before = await redis.client_id()
        (idle,) = pool._available_connections
        disconnect = idle.disconnect

        async def slowly(**options: Any) -> None:
            await may_end.wait()
            await disconnect(**options)

        with monkeypatch.context() as patch:
            patch.setattr(idle, "disconnect", slowly)
            closing = asyncio.create_task(close_idle(pool))
            await asyncio.sleep(0)
            assert await redis.client_id() != before
            may_end.set()
            await closing
        assert await redis.client_id() != before
        assert not idle.is_connected
    finally:
        await redis.aclose()
