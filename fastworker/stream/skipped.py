"""Entries that the group passed over, so that nobody would ever be given them: they are given out after all.

`XGROUP SETID group $`, and a group destroyed and made again at `$`, move the group's place past unread entries. Every
consumer of ours tells what it was given, so that these are found (stream/lua/give_skipped.lua), and not trimmed before.
"""

from __future__ import annotations

import logging
from typing import Final, Literal, cast

from redis.asyncio import Redis

from fastworker.stream.client import translating
from fastworker.stream.cluster import node_of
from fastworker.stream.keys import Keys
from fastworker.stream.scripts import script

log = logging.getLogger(__name__)

CONSUMER: Final = "fastworker-skipped"
"""Nobody's: what is pending for it is adopted by whoever looks for dead consumers next."""
PIECE: Final = 1_000
"""Entries that one run of the script looks at."""
PIECES_MAX: Final = 20
"""Runs in a row; the rest comes with the next look."""


async def give_skipped(redis: Redis, keys: Keys, group: str, *, who: Literal["reader", "worker"] = "worker") -> None:
    """Make pending what was skipped, and note up to where all was given. Raises StreamUnavailable.

    Where somebody removed entries that nobody was given, a reader of ours is asked to go back. It gives nothing out.
    """
    redis = node_of(redis, keys.stream)
    run = redis.register_script(script("give_skipped"))
    names = [
        keys.stream,
        keys.given,
        keys.reads,
        keys.tellers,
        keys.consumers,
        keys.ledger,
        keys.tail,
        keys.go_back,
        keys.held,
    ]
    total, first, last = 0, "", ""
    async with translating(redis):
        for _ in range(PIECES_MAX):
            answer = await run(keys=names, args=[group, keys.consumer_lease(), PIECE, CONSUMER, who])
            count, begin, end, more = cast("tuple[int, bytes, bytes, int]", answer)
            if count:
                first, last, total = first or begin.decode(), end.decode(), total + count
            if not more:
                break
    if total:
        log.error(
            "%d entries of %s, from %s to %s, were given to nobody: somebody moved the group %s past them (XGROUP "
            "SETID, or destroyed and made again). They are given out now", total, keys.stream, first, last, group,
        )  # fmt: skip
