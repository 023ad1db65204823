"""`fastworker replay`: a file of recorded frames onto the stream, in the configured form.

Moves no cursor and takes no lease, so it may run beside the reader: the version guard decides what is new. A full
stream is waited for, like the reader does. The entries say when they happened (`at`): a recording may be of any age.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Final

from fastworker.config import Config
from fastworker.errors import ExitCode, InvalidEvent, Reason, StreamUnavailable, counted
from fastworker.event import ErrorFrame, Event, Info, Unknown, account_of
from fastworker.event.entry import encode_frame_entry, encode_json, encode_native
from fastworker.event.frame import decode_frame
from fastworker.event.recording import FramesFile
from fastworker.process.backoff import Backoff
from fastworker.stream.admin import Addressed, RedisAdmin, open_redis
from fastworker.table.dates import EPOCH, parse_date

log = logging.getLogger(__name__)

Entry = list[tuple[bytes, bytes]]

CHUNK_ENTRIES: Final = 200
CHUNK_BYTES: Final = 2_000_000
ROOM_S: Final = 0.2
PROGRESS_S: Final = 2.0


async def replay(config: Config, path: Path, *, little_endian: bool) -> ExitCode:
    """Bad frames are counted and skipped: their number is in the last line. `path` is a readable file."""
    file = FramesFile(path, little_endian=little_endian)
    skipped: Counter[str] = Counter()
    appended = 0
    started = told = time.monotonic()
    async with open_redis(config.redis_url, config.stream_key, client_name="fastworker-replay") as admin:
        for chunk in _chunks(_entries(file, config.stream_format, skipped), min(CHUNK_ENTRIES, config.max_stream_len)):
            await _append(admin, chunk, config.max_stream_len)
            appended += len(chunk)
            if time.monotonic() - told >= PROGRESS_S:
                told = time.monotonic()
                rate = appended / (told - started)
                log.info("Processed %s events (~%s events/sec)", f"{appended:,}", f"{rate:,.0f}")
    if file.truncated_bytes:
        log.warning("%s ends in the middle of a frame: %d bytes at its end were left", path, file.truncated_bytes)
    reasons = f" ({', '.join(f'{reason} {count:,}' for reason, count in sorted(skipped.items()))})" if skipped else ""
    sys.stdout.write(
        f"{counted(appended, 'entry', 'entries')} appended to {config.stream_key} as {config.stream_format}, "
        f"{counted(skipped.total(), 'frame')} skipped{reasons}, {time.monotonic() - started:.1f} s\n"
    )
    return ExitCode.DONE


def _entries(file: FramesFile, form: str, skipped: Counter[str]) -> Iterator[Addressed]:
    for data in file:
        try:
            event = decode_frame(data, None)
        except InvalidEvent as error:
            skipped[str(error.reason)] += 1
            continue
        if isinstance(event, Info | ErrorFrame | Unknown):
            skipped[str(Reason.UNKNOWN_KIND)] += 1
            continue
        if form == "frame":
            entry: Entry | None = encode_frame_entry(data, None)
        else:
            entry = encode_native(event) if form == "native" else encode_json(event)
        if entry is None:
            skipped["sync_on_json"] += 1
        else:
            yield account_of(event), entry + _received(event)


def _received(event: Event) -> Entry:
    """By its own time, for want of a better one; not in the future."""
    told = parse_date(event.time or "")
    if told is None:
        return []
    told_ms = (told - EPOCH) // timedelta(milliseconds=1)
    return [(b"at", b"%d" % min(max(0, told_ms), time.time_ns() // 1_000_000))]


def _chunks(entries: Iterator[Addressed], entries_max: int) -> Iterator[list[Addressed]]:
    chunk: list[Addressed] = []
    size = 0
    for entry in entries:
        chunk.append(entry)
        size += sum(len(value) for _, value in entry[1])
        if len(chunk) >= entries_max or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


async def _append(admin: RedisAdmin, chunk: list[Addressed], max_stream_len: int) -> None:
    """Until there is room, and while Redis is away. A chunk whose reply was lost goes twice, which is harmless."""
    backoff = Backoff(0.1, 5.0)
    told = False
    while True:
        try:
            if await admin.append_if_room(chunk, max_stream_len):
                return
        except StreamUnavailable as error:
            log.warning("%s; waiting", error)
            await asyncio.sleep(backoff.next())
            continue
        if not told:
            log.info("The stream is full (%s entries): waiting for the workers", f"{max_stream_len:,}")
            told = True
        await asyncio.sleep(ROOM_S)
