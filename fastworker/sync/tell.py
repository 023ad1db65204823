"""What the syncer tells, put together from PostgreSQL: gaps, repairs, and how true the tables are."""

from __future__ import annotations

import time
from typing import Final

import msgspec

from fastworker.store.repos import SAMPLE, Queue
from fastworker.sync.hosts import without_port
from fastworker.sync.sampling import truth_of
from fastworker.sync.told import Mended, RepairStatus, TableTruth

EXAMPLES: Final = 5
_GAPS: Final = (
    "SELECT count(*)::int, coalesce(extract(epoch FROM now() - min(seen_at)), 0)::float8 FROM fastworker.gaps "
    "WHERE closed_at IS NULL"
)
_WAITING: Final = """
SELECT count(*) FILTER (WHERE state = 'waiting')::int, count(*) FILTER (WHERE state = 'fetching')::int,
    count(*) FILTER (WHERE state = 'refused')::int,
    coalesce(extract(epoch FROM now() - min(queued_at) FILTER (WHERE state <> 'refused')), 0)::float8
FROM fastworker.repos WHERE state IN ('waiting', 'fetching', 'refused') AND priority <= $1
"""
_MENDED: Final = """
SELECT reason, count(*)::int, coalesce(sum(differences), 0)::int FROM fastworker.repos
WHERE state = 'done' AND ended_at > now() - interval '1 day' GROUP BY reason ORDER BY reason
"""
_SAMPLES: Final = """
SELECT host, tables::text, examples::text FROM fastworker.samples WHERE at > now() - interval '1 day' ORDER BY at DESC
"""
_OWN: Final = ".host.bsky.network"


async def repair_status(queue: Queue, resting: list[str], error: str = "") -> RepairStatus:
    """Raises StoreUnavailable."""
    gaps = (await queue.rows(_GAPS))[0]
    waiting = (await queue.rows(_WAITING, SAMPLE))[0]
    mended = {row[0]: Mended(accounts=row[1], differences=row[2]) for row in await queue.rows(_MENDED)}
    samples = [
        (row[0], msgspec.json.decode(row[1], type=dict[str, list[int]]), msgspec.json.decode(row[2], type=list[str]))
        for row in await queue.rows(_SAMPLES)
    ]
    by_table: dict[str, list[int]] = {}
    by_host: dict[str, list[int]] = {}
    for host, tables, _ in samples:
        for table, counts in tables.items():
            _add(by_table, table, counts)
            _add(by_host, "bsky.network" if without_port(host).endswith(_OWN) else "others", counts)
    return RepairStatus(
        at=time.time(),
        gaps_open=gaps[0],
        gap_oldest_s=gaps[1],
        waiting=waiting[0],
        fetching=waiting[1],
        refused=waiting[2],
        oldest_s=waiting[3],
        mended=mended,
        samples=len(samples),
        tables={table: one for table, counts in sorted(by_table.items()) if (one := _truth(counts)) is not None},
        hosts={group: one.truth for group, counts in sorted(by_host.items()) if (one := _truth(counts)) is not None},
        examples=[line for _, _, lines in samples for line in lines][:EXAMPLES],
        resting=resting[:EXAMPLES],
        error=error,
    )


def _add(sums: dict[str, list[int]], key: str, counts: list[int]) -> None:
    held = sums.setdefault(key, [0, 0, 0, 0])
    sums[key] = [a + b for a, b in zip(held, counts, strict=True)]


def _truth(counts: list[int]) -> TableTruth | None:
    one = truth_of(*counts)
    if one.truth is None or one.low is None:
        return None
    return TableTruth(
        truth=one.truth,
        low=one.low,
        compared=one.compared + one.extra,
        differing=one.missing + one.different + one.extra,
    )
