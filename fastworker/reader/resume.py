"""The reader with a way back: when Redis comes back empty, PostgreSQL knows how far the stream was finished."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from fastworker.config import Config
from fastworker.errors import StoreUnavailable, Unreachable
from fastworker.reader.filter import choosing
from fastworker.reader.reader import run_reader
from fastworker.reader.stats import ReaderStats
from fastworker.store.admin import finished_seq
from fastworker.store.admin import note_floor as store_floor
from fastworker.stream.keys import Keys
from fastworker.stream.limits import PARTITIONS_MAX


async def read_and_resume(
    settings: Config,
    stop: asyncio.Event,
    *,
    stats: ReaderStats | None = None,
    on_tick: Callable[[ReaderStats], None] | None = None,
) -> None:
    """`run_reader`, which asks PostgreSQL for the cursor if there is one to ask and Redis has none."""

    database_url = settings.database_url
    streams = [Keys(settings.stream_key, partition=number).stream for number in range(PARTITIONS_MAX)]

    async def fallback_seq(host: str) -> int | None:
        assert database_url is not None
        try:
            return await finished_seq(database_url, streams, host, settings.partitions)
        except Unreachable as error:
            raise StoreUnavailable(str(error)) from error

    async def note_floor(streams: Iterable[str], seq: int) -> None:
        assert database_url is not None
        try:
            await store_floor(database_url, streams, seq)
        except Unreachable as error:
            raise StoreUnavailable(str(error)) from error

    async with choosing(settings):
        await run_reader(
            settings,
            stop,
            stats=stats,
            on_tick=on_tick,
            fallback_seq=fallback_seq if database_url is not None else None,
            note_floor=note_floor if database_url is not None else None,
        )
