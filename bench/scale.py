"""A full stream and more and more worker processes: what each of them adds, and what PostgreSQL's sessions wait for."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import uvloop
from redis.asyncio import Redis

from bench.corpus import entries
from bench.end_to_end import finished, worker
from bench.report import Figures
from bench.servers import Servers, cpu_s, fill, servers, settled

EVERY_S = 0.02  # between two looks at the sessions
LIMIT_S = 600.0  # of one run, filling the stream included
PAID_LIMIT_S = 120.0
SESSIONS = """
SELECT a.wait_event_type, a.wait_event, left(a.query, 2000),
    (SELECT l.relation::regclass::text FROM pg_locks AS l WHERE a.wait_event_type = 'Lock' AND l.pid = a.pid
        AND l.locktype = 'tuple' LIMIT 1)
FROM pg_stat_activity AS a WHERE a.application_name LIKE 'fastworker%' AND a.state = 'active'
    AND a.backend_type = 'client backend'
"""
OWED = ("debts", "notes", "recheck")  # tables of what committed transactions owe; one that is not there owes nothing


class Sessions:
    """Samples of the sessions at work: how many wait for another session's lock, and with which statement.

    And of what is owed at that moment: the age of the oldest of it, in seconds, by table.
    """

    def __init__(self) -> None:
        self.working = 0
        self.kinds: Counter[str] = Counter()
        self.statements: Counter[str] = Counter()
        self.ages: dict[str, list[float]] = {}

    def owe(self, found: Sequence[Any]) -> None:
        for name, age in found:
            self.ages.setdefault(name, []).append(age)

    def age(self, share: float, *tables: str) -> float:
        """Of the looks: so many found the oldest debt no older than that. 0 where nothing was owed."""
        looks = sorted(max(ages) for ages in zip(*(self.ages[name] for name in tables or self.ages), strict=True))
        return looks[min(len(looks) - 1, int(share * len(looks)))] if looks else 0.0

    def add(self, found: Sequence[Any]) -> None:
        for kind, event, query, relation in found:
            self.working += 1
            self.kinds[kind or "CPU"] += 1
            if kind == "Lock":
                self.statements[f"{statement(query)} [{event}{f' of {relation}' if relation else ''}]"] += 1

    def share(self, kind: str) -> float:
        """Of the samples of working sessions; 0 where there are none."""
        return self.kinds[kind] / max(1, self.working)

    def waits(self) -> dict[str, float]:
        """Share of the samples of working sessions by statement, those that wait most first."""
        return {name: count / max(1, self.working) for name, count in self.statements.most_common(8)}


def statement(query: str) -> str:
    """A short name: the routine, or what it does to which table."""
    if routine := re.search(r"fastworker\.(\w+)\(", query):
        return routine[1]
    words = " ".join(query.split())
    table = re.search(r"(?:INTO|UPDATE|FROM|COPY) ((?:public|fastworker|\"\w+\")\.\"?\w+\"?)", words)
    verb = "SELECT FOR UPDATE" if words.endswith("FOR UPDATE") else words.partition(" ")[0]
    return f"{verb} {table[1]}" if table else words[:40]


def scale(folder: Path, *, form: str, events: int, processes: int, settings: dict[str, Any]) -> Figures:
    """The stream is drained by so many processes with one pipeline each. Raises TimeoutError after `LIMIT_S`."""
    settings = {
        "FASTWORKER_PROCESSES": processes,
        "PARALLEL_CONSUMERS": 1,
        "DB_POOL_SIZE": processes + 1,
        **settings,
    }
    with servers() as running:
        return uvloop.run(asyncio.wait_for(_drain(running, folder, form, events, settings), LIMIT_S))


async def _drain(running: Servers, folder: Path, form: str, events: int, settings: dict[str, Any]) -> Figures:
    partitions = int(settings.get("FASTWORKER_STREAM_PARTITIONS", 1))
    total = await fill(running.redis.url, entries(folder, form, events), partitions=partitions)
    before = {"redis": cpu_s(running.redis.pid), "postgres": cpu_s(running.postgres.pid)}
    async with _watching(running.postgres.url) as (connection, sessions), worker(running, **settings) as process:
        began, ended = await settled(running.redis.url, total, partitions=partitions)
        cost = {
            "worker": cpu_s(process.pid),
            "redis": cpu_s(running.redis.pid) - before["redis"],
            "postgres": cpu_s(running.postgres.pid) - before["postgres"],
        }
        owed = await _owed(connection)
        paid_s = await _paid(connection)
    async with Redis.from_url(running.redis.url) as redis:
        await finished(redis, total)
    connection = await asyncpg.connect(running.postgres.url)
    await right(connection)
    await connection.close()
    seconds = ended - began
    return {
        "events/s": total / seconds,
        "events": total,
        "seconds": seconds,
        **{f"{name} CPU us/event": value / total * 1e6 for name, value in cost.items()},
        "idle share": max(0.0, 1 - sum(cost.values()) / seconds / (os.cpu_count() or 1)),
        "waits for locks": sessions.share("Lock"),
        "waits for LWLocks": sessions.share("LWLock"),
        "samples": sessions.working,
        "owed at the ack": owed,
        "paid after s": paid_s,
        "oldest debt s p50": sessions.age(0.5),
        "oldest debt s p99": sessions.age(0.99),
        "oldest debt s max": sessions.age(1),
        **{f"oldest debt s max, {name}": sessions.age(1, name) for name in sessions.ages},
        "by statement": sessions.waits(),
    }


@contextlib.asynccontextmanager
async def _watching(url: str) -> AsyncIterator[tuple[asyncpg.Connection[Any], Sessions]]:
    """A connection that looks at the sessions until it is left; another one for the caller."""
    sessions = Sessions()
    stop = asyncio.Event()
    eye = await asyncpg.connect(url)
    connection = await asyncpg.connect(url)

    ages = await _ages(eye)

    async def look() -> None:
        while not stop.is_set():
            sessions.add(await eye.fetch(SESSIONS))
            sessions.owe(await eye.fetch(ages))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), EVERY_S)

    looking = asyncio.create_task(look())
    try:
        yield connection, sessions
    finally:
        stop.set()
        await looking
        await eye.close()
        await connection.close()


async def _ages(connection: asyncpg.Connection[Any]) -> str:
    """The query for (table, age of its oldest debt in seconds)."""
    there = [
        name for name in OWED if await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", f"fastworker.{name}")
    ]
    return " UNION ALL ".join(
        f"SELECT '{name}', coalesce(greatest(0, extract(epoch FROM clock_timestamp() - min(owed_at))), 0)::float8 "
        f"FROM fastworker.{name}"
        for name in there
    )


async def _owed(connection: asyncpg.Connection[Any]) -> int:
    count = 0
    for table in OWED:
        if await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", f"fastworker.{table}"):
            count += await connection.fetchval(f"SELECT count(*) FROM fastworker.{table}")
    return count


async def _paid(connection: asyncpg.Connection[Any]) -> float:
    """Seconds until nothing is owed. Raises TimeoutError: then it is never paid."""
    began = time.monotonic()
    async with asyncio.timeout(PAID_LIMIT_S):
        while await _owed(connection):
            await asyncio.sleep(0.05)
    return time.monotonic() - began


async def right(connection: asyncpg.Connection[Any]) -> None:
    """Right before fast: every counter of `post_aggregations` that likes and reposts make is a count."""
    drift = await connection.fetchval(
        "SELECT count(*) FROM post_aggregations AS a WHERE like_count <> "
        "(SELECT count(*) FROM likes AS l WHERE l.post_uri = a.post_uri) OR repost_count <> "
        "(SELECT count(*) FROM reposts AS r WHERE r.post_uri = a.post_uri)"
    )
    if drift:
        raise RuntimeError(f"the counts of {drift} posts are off")


def table(found: Sequence[tuple[int, Figures]]) -> str:
    """One line for each number of processes."""
    names = {
        "events/s": "events/s",
        "efficiency": "efficiency",
        "worker CPU us/event": "worker us",
        "postgres CPU us/event": "PG us",
        "idle share": "idle",
        "waits for locks": "lock waits",
        "waits for LWLocks": "LWLocks",
        "owed at the ack": "owed",
        "paid after s": "paid s",
        "oldest debt s p50": "age p50 s",
        "oldest debt s max": "age max s",
    }
    lines = [f"  {'processes':>9}" + "".join(f"{head:>12}" for head in names.values())]
    for processes, figures in found:
        cells = (figures[name] for name in names)
        lines.append(f"  {processes:>9}" + "".join(f"{_cell(value):>12}" for value in cells))
    for processes, figures in found:
        lines += [f"  {processes:>9} waits {share:6.1%}  {name}" for name, share in figures["by statement"].items()]
    return "\n".join(lines)


def _cell(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or isinstance(value, int) else f"{value:.2f}"
