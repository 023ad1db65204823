"""Gaps: stretches that a relay did not give. One list of the relay's repositories says who has changed since, and the
directory's log whose handle (sync/handles.py).

A gap is closed when a list that began after it was read to its end, and everybody whom it named is settled.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import msgspec

from fastworker.errors import ExitCode
from fastworker.store.repos import REPAIR
from fastworker.sync.handles import read_handles
from fastworker.sync.lists import GAP, read_repos
from fastworker.table.snapshot import tid_of

if TYPE_CHECKING:
    from fastworker.sync.many import Scene

MARGIN: Final = timedelta(minutes=10)
"""A revision is by the clock of the account's host."""
READ_MAX: Final = 1_000
# Of events up to the gap's first seq the newest that was stored: rows come in about that order.
_SINCE: Final = """
SELECT indexed_at FROM public.posts WHERE commit_seq ~ '^[0-9]{1,18}$' AND commit_seq::bigint <= $1
ORDER BY indexed_at DESC LIMIT 1
"""
_NOTE: Final = """
INSERT INTO fastworker.gaps AS g (relay, from_seq, to_seq, reason) VALUES ($1, $2, $3, $4)
ON CONFLICT (relay, from_seq) DO UPDATE SET to_seq = excluded.to_seq, reason = excluded.reason, seen_at = now(),
    sweep = NULL, closed_at = NULL WHERE g.to_seq < excluded.to_seq
"""
_OPEN: Final = "SELECT relay, from_seq, to_seq, sweep FROM fastworker.gaps WHERE closed_at IS NULL"
_COVER: Final = "UPDATE fastworker.gaps SET sweep = $1 WHERE closed_at IS NULL AND sweep IS NULL"
_READING: Final = (
    "SELECT EXISTS (SELECT FROM fastworker.sweeps WHERE source = $1 AND reason = 'gap' AND done_at IS NULL)"
)
_ONCE_MORE: Final = """
UPDATE fastworker.repos SET state = 'waiting', attempts = 0, next_at = '-infinity'
WHERE state = 'refused' AND sweep IN (SELECT sweep FROM fastworker.gaps WHERE closed_at IS NULL)
    AND ended_at < (SELECT backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid())
"""
_CLOSE: Final = """
UPDATE fastworker.gaps AS g SET closed_at = now() FROM fastworker.sweeps AS s
-- mutant: a gap closes while its list is read
WHERE g.closed_at IS NULL AND s.id = g.sweep AND s.done_at IS NOT NULL AND NOT EXISTS (
    -- mutant: a gap closes while somebody waits
    SELECT FROM fastworker.repos AS r WHERE r.sweep = s.id AND r.state IN ('waiting', 'fetching', 'refused'))
"""


async def read_gaps(scene: Scene, relay: str) -> None:
    """What the reader recorded in Redis is in PostgreSQL; then one list for all gaps that none has covered yet."""
    for text in await scene.admin.newest_gaps(READ_MAX):
        gap = _gap(text)
        if gap is not None:
            await scene.queue.execute(_NOTE, *gap)
    while True:
        unread = await scene.queue.rows(f"{_OPEN} AND sweep IS NULL")
        if unread:
            since = await _since(scene, min(row["from_seq"] for row in unread))
            sweep = await scene.queue.sweep(relay, GAP, REPAIR, since_rev=since)
            # mutant: a list that began before a gap covers it
            if sweep.cursor is None and sweep.since_rev <= since:  # one that has begun does not cover them
                await scene.queue.execute(_COVER, sweep.id)
        if not await scene.queue.value(_READING, relay):
            break
        await read_handles(scene, relay)
        await read_repos(scene, relay, GAP, REPAIR)
    await scene.queue.execute(_ONCE_MORE)


def _gap(text: bytes) -> tuple[str, int, int, str] | None:
    try:
        found: dict[str, Any] = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError:
        return None
    relay, after, resumed = found.get("relay"), found.get("after"), found.get("resumed")
    if type(relay) is not str or type(resumed) is not int:
        return None
    return relay, after if type(after) is int else 0, resumed, str(found.get("reason", ""))[:50]


async def _since(scene: Scene, seq: int) -> str:
    """The lowest revision that may have been lost, empty where nobody knows."""
    moment = await scene.queue.value(_SINCE, seq) if seq else None
    if moment is None:
        return ""
    # mutant: hosts' clocks are ours
    return tid_of(min(moment, datetime.now(UTC).replace(tzinfo=None)) - MARGIN)


async def close_gaps(scene: Scene) -> ExitCode:
    """Those whose repairs are all done. NO while one is open."""
    await scene.queue.execute(_CLOSE)
    closed = {
        (row["relay"], row["from_seq"]): row["to_seq"]
        for row in await scene.queue.rows(
            "SELECT relay, from_seq, to_seq FROM fastworker.gaps WHERE closed_at IS NOT NULL"
        )
    }
    for text in await scene.admin.newest_gaps(READ_MAX):
        gap = _gap(text)
        # mutant: a gap is forgotten before it is closed
        if gap is not None and closed.get(gap[:2], -1) >= gap[2]:
            await scene.admin.forget_gap(text)
    return ExitCode.NO if await scene.queue.rows(_OPEN) else ExitCode.DONE
