"""How far history is: put together from PostgreSQL, left in Redis for status, page and metrics (monitor/facts.py)."""

from __future__ import annotations

import time
from typing import Final

import msgspec

from fastworker.store.repos import CHOSEN, RESTS_S, Queue
from fastworker.stream.admin import RedisAdmin
from fastworker.stream.repairs import tell
from fastworker.sync.hosts import without_port
from fastworker.sync.told import HistoryStatus

SHOWN: Final = 5  # hosts
TELL_S: Final = 10.0
COST: Final = 50
"""History is counted so many times its own duration apart, since it may be about millions of accounts."""
_HISTORY: Final = f"""
SELECT count(*) FILTER (WHERE state = 'waiting') AS waiting, count(*) FILTER (WHERE state = 'fetching') AS fetching,
    count(*) FILTER (WHERE state IN ('done', 'spooled')) AS done, count(*) FILTER (WHERE state = 'gone') AS gone,
    count(*) FILTER (WHERE state = 'refused') AS refused,
    coalesce(sum(records) FILTER (WHERE state = 'done'), 0)::bigint AS records
FROM fastworker.repos WHERE priority >= {CHOSEN}
"""
# What was refused for good counts as ended; the window is shorter where it began within it.
_RATE: Final = f"""
SELECT count(*) / w.seconds AS accounts, coalesce(sum(records), 0) / w.seconds AS records,
    coalesce(sum(bytes), 0) / w.seconds AS bytes
FROM fastworker.repos AS r, (
    SELECT greatest(10.0, extract(epoch FROM now() - min(ended_at)))::float8 AS seconds FROM fastworker.repos
    WHERE ended_at > now() - interval '5 minutes' AND priority >= {CHOSEN}
) AS w
WHERE r.ended_at > now() - interval '5 minutes' AND r.priority >= {CHOSEN} AND r.state NOT IN ('waiting', 'fetching')
GROUP BY w.seconds
"""
_BESIDE: Final = """
SELECT (SELECT is_paused FROM fastworker.backfill) AS paused,
    (SELECT count(*) FROM fastworker.sweeps WHERE done_at IS NULL AND reason = 'backfill') AS lists
"""
_RESTING: Final = f"""
SELECT host, extract(epoch FROM next_at - now())::float8 AS seconds, count(*) OVER () AS many FROM fastworker.hosts
WHERE next_at > now() + interval '{RESTS_S} seconds' ORDER BY next_at DESC LIMIT {SHOWN}
"""


async def history_status(queue: Queue) -> HistoryStatus:
    """Raises StoreUnavailable."""
    counts, beside = (await queue.rows(_HISTORY))[0], (await queue.rows(_BESIDE))[0]
    rates = next(iter(await queue.rows(_RATE)), {"accounts": 0.0, "records": 0.0, "bytes": 0.0})
    resting = await queue.rows(_RESTING)
    left, ended = counts["waiting"] + counts["fetching"], counts["done"] + counts["gone"] + counts["refused"]
    return HistoryStatus(
        at=time.time(),
        **dict(counts),
        share=ended / (left + ended) if left + ended else 1.0,
        accounts_per_s=float(rates["accounts"]),
        records_per_s=float(rates["records"]),
        bytes_per_s=float(rates["bytes"]),
        left_s=left / float(rates["accounts"]) if left and rates["accounts"] else None,
        lists_open=beside["lists"],
        paused=beside["paused"],
        resting={without_port(row["host"]): round(row["seconds"], 1) for row in resting},
        resting_hosts=resting[0]["many"] if resting else 0,
    )


class Teller:
    """Of one process; it tells of history no more often than that is cheap."""

    def __init__(self) -> None:
        self._due = 0.0

    async def tell(self, admin: RedisAdmin, queue: Queue, *, at_once: bool = False) -> None:
        """Where history was ever asked for. Raises StoreUnavailable, StreamUnavailable."""
        began = time.monotonic()
        if began < self._due and not at_once:
            return
        status = await history_status(queue)
        self._due = time.monotonic() + max(TELL_S, COST * (time.monotonic() - began))
        if status.open or status.ended:
            await tell(admin, admin.keys.history_status, msgspec.json.encode(status))
