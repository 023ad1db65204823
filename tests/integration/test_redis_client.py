"""The way to Redis: a cancelled task ends, wherever the cancellation meets it."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from fastworker.errors import StreamUnavailable
from fastworker.stream.client import connect, translating

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
