"""`--from`: the reader begins where the operator says, whatever the cursors say.

The place becomes the stored cursor before the reader begins, under the reader's own lease; from then on nothing is
special. What is passed over is recorded as a gap.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Final, Literal

import orjson

from fastworker.config import Config
from fastworker.errors import ConfigError, InvalidEvent, Unreachable
from fastworker.event.frame import decode_frame
from fastworker.reader.relay import RelayAddress, RelayLost, RelayRefused, Subscription, subscribe
from fastworker.store.admin import note_gap
from fastworker.stream.chunk import Chunk
from fastworker.stream.client import connect
from fastworker.stream.feed import Feed
from fastworker.stream.slot import LEASE_MS, ReaderLeaseLost
from fastworker.stream.slots import Position

log = logging.getLogger(__name__)

TIP_S: Final = 60.0
"""How long a relay may take to send its first frame."""

Start = int | Literal["live", "oldest"]
"""A seq, which is read itself."""


async def begin_at(settings: Config, start: Start) -> None:
    """Raises Unreachable, and ConfigError while another reader is at work."""
    host, cursor = await _place(RelayAddress.parse(settings.relay_urls[0]), start)
    redis = connect(settings.redis_url, stream_key=settings.stream_key, client_name="fastworker-reader")
    feed = Feed(
        redis, stream_key=settings.stream_key, cursor_key=settings.cursor_key, max_stream_len=settings.max_stream_len
    )
    try:
        await _take_lease(feed, settings.stream_key)
        try:
            before = await feed.go_to(host)
        except ConfigError:  # the stored cursor is no number: what it said is not asked for
            before = Position(None, None)
        feed.pass_over_nothing()
        chunk = Chunk()
        chunk.seq = cursor
        if gap := _gap(host, before, cursor):
            chunk.gap(orjson.dumps(gap))
        try:
            await feed.append(chunk)
        except ReaderLeaseLost as error:
            raise ConfigError(f"The cursor was not moved: {error}") from error
        await feed.release()
    finally:
        await redis.aclose()
    log.info("The cursor of %s was %s and is %d now", host, before.seq, cursor)
    if gap and before.seq is not None and settings.database_url is not None:
        try:
            await note_gap(settings.database_url, host, before.seq, cursor)
        except (ConfigError, Unreachable) as error:
            log.warning("The gap is recorded in Redis only: %s", error)


async def _place(relay: RelayAddress, start: Start) -> tuple[str, int]:
    """The host that answers for the relay, and the cursor that the start means there."""
    try:
        async with asyncio.timeout(TIP_S):
            subscription = await subscribe(relay, None)
            try:
                if start == "live":
                    return subscription.host, await _tip(subscription) - 1
                return subscription.host, 0 if start == "oldest" else max(0, start - 1)
            finally:
                await subscription.close()
    except TimeoutError:
        raise Unreachable(f"{relay.host} sent nothing for {TIP_S:.0f} s, so its live tip is not known") from None
    except (RelayRefused, RelayLost) as error:
        raise Unreachable(f"{relay.host} cannot be asked: {error}") from error


async def _tip(subscription: Subscription) -> int:
    while True:
        try:
            frame = decode_frame(await subscription.receive(), subscription.host)
        except InvalidEvent:
            continue
        seq: Any = getattr(frame, "seq", None)
        if isinstance(seq, int):
            return seq


async def _take_lease(feed: Feed, stream_key: str) -> None:
    ends = time.monotonic() + LEASE_MS / 1000 + 1  # of a reader that was killed
    while not await feed.acquire():
        if time.monotonic() > ends:
            raise ConfigError(f"Another reader is at work on {stream_key}: stop it, --from moves its cursor")
        await asyncio.sleep(0.5)


def _gap(host: str, before: Position, cursor: int) -> dict[str, Any] | None:
    gap = {"relay": host, "reason": "operator", "after": before.seq, "resumed": cursor + 1}
    at = {"at": int(time.time() * 1000)}
    if before.switched_from is not None and before.seq is None:
        return gap | at | {"switched_from": before.switched_from}
    return gap | at if before.seq is not None and cursor > before.seq else None
