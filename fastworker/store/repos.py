"""The queue of accounts that are made equal to their repositories: `fastworker.repos`, shared by all processes.

Whoever works on an account holds an advisory lock of its session and a time until which the claim holds: when the
process is killed its accounts are free at once, when it hangs they are free after a while. What a host is asked is
counted in `fastworker.hosts`, one row for each, so that no host sees more than its rate from all of them together.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import asyncpg

from fastworker.errors import StoreUnavailable
from fastworker.store.session import NO_TRANSACTION_TIMEOUT, PATH, translating
from fastworker.store.statements import FOLLOWED
from fastworker.table.chosen import WHOLE, Part

if TYPE_CHECKING:
    from fastworker.store.store import Store

CLAIM_S: Final = 120
RENEW_S: Final = 30.0
HOST_AT_ONCE: Final = 4
RESTS_S: Final = 5
"""A host whose next turn is later than that holds us back."""
AGAIN_S: Final = (30, 120, 600, 3_600)
"""Pauses after each failure that may pass by itself."""
_CONNECT_S: Final = 10.0
_LOCK: Final = 0x66777265  # class of the advisory locks that say which owners live; "fwre"
_CLAIMS: Final = 0x66777263  # and of the one that orders claims

OPERATOR, REPAIR, SAMPLE, CHOSEN, EVERYBODY = range(5)
"""Priorities: the lower is worked on first."""
WIDENED: Final = "widened"
"""The reason of accounts of which more is kept from now on: they are looked at as far back as before."""


class Claim(NamedTuple):
    """`host`: as in a URL, empty where nobody has asked for the account's document yet."""

    did: str
    host: str
    reason: str
    priority: int
    want_rev: str | None
    attempts: int
    part: Part = WHOLE


class Wanted(NamedTuple):
    """An account to be queued; `rev`: what a list says that its repository has by now."""

    did: str
    rev: str | None = None


class Sweep(NamedTuple):
    id: int
    source: str
    collection: str
    host: str
    since_rev: str
    cursor: str | None
    is_done: bool


class Left(NamedTuple):
    """What is not at its end. `next_s`: until the next may be claimed."""

    waiting: int
    fetching: int
    next_s: float


_ALIVE: Final = (
    "SELECT objid::bigint FROM pg_locks WHERE locktype = 'advisory' AND granted AND "
    f"database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND classid = {_LOCK}"
)
# Of each host at most so many at a time, whoever has them; the first of what waits there, by priority.
_CLAIM: Final = f"""
WITH RECURSIVE hosts (host) AS (
    (SELECT host FROM fastworker.repos WHERE state = 'waiting' ORDER BY host LIMIT 1)
    UNION ALL
    SELECT (SELECT r.host FROM fastworker.repos AS r WHERE r.state = 'waiting' AND r.host > h.host
        ORDER BY r.host LIMIT 1)
    FROM hosts AS h WHERE h.host IS NOT NULL
), open AS (
    SELECT h.host, CASE WHEN h.host = '' THEN $3::int ELSE $4::int END - (
        SELECT count(*) FROM fastworker.repos AS r WHERE r.state = 'fetching' AND r.host = h.host) AS room
    FROM hosts AS h LEFT JOIN fastworker.hosts AS t ON t.host = h.host
    WHERE h.host IS NOT NULL AND coalesce(t.next_at, '-infinity') <= clock_timestamp() + interval '2 seconds'
), chosen AS (
    SELECT r.did FROM open AS o, LATERAL (
        SELECT w.did, w.priority, w.next_at FROM fastworker.repos AS w
        WHERE w.state = 'waiting' AND w.host = o.host AND w.priority <= $2 AND w.next_at <= now()
            AND (w.priority < {CHOSEN} OR NOT (SELECT is_paused FROM fastworker.backfill))
        ORDER BY w.priority, w.next_at LIMIT greatest(o.room, 0) FOR UPDATE SKIP LOCKED
    ) AS r ORDER BY r.priority, r.next_at LIMIT $3::int
)
UPDATE fastworker.repos AS r SET state = 'fetching', owner = $1, claimed_until = now() + interval '{CLAIM_S} seconds'
FROM chosen AS c WHERE r.did = c.did AND r.state = 'waiting'
RETURNING r.did, r.host, r.reason, r.priority, r.want_rev, r.attempts, r.since_rev, r.collections
"""
_FREE: Final = f"""
UPDATE fastworker.repos SET state = 'waiting', owner = NULL
WHERE state = 'fetching' AND (claimed_until < now() OR owner NOT IN ({_ALIVE}))
"""
_MOVED: Final = f"""
UPDATE fastworker.repos AS r SET host = $3, state = CASE WHEN n.many < {HOST_AT_ONCE} THEN 'fetching' ELSE 'waiting' END
FROM (SELECT count(*) AS many FROM fastworker.repos WHERE state = 'fetching' AND host = $3::text) AS n
WHERE r.did = $1 AND r.owner = $2 AND r.state = 'fetching' RETURNING r.state = 'fetching'
"""
_END: Final = """
UPDATE fastworker.repos SET state = $3, error = $4, rev = coalesce($5, rev), seq = coalesce($6, seq),
    records = coalesce($7, records), bytes = coalesce($8, bytes), differences = coalesce($9, differences),
    owner = NULL, ended_at = now()
WHERE did = $1 AND owner = $2 AND state = 'fetching'
"""
_AGAIN: Final = """
UPDATE fastworker.repos SET state = 'waiting', error = $4, attempts = attempts + $5::int, owner = NULL,
    next_at = now() + make_interval(secs => $3::float8)
WHERE did = $1 AND owner = $2 AND state = 'fetching'
"""
# What is fetched just now may be older than what is asked for: it is done once more. Who is asked for in part ($8 the
# oldest key of what is dated, $9 collections), and then for more, is looked at for both.
_WIDER: Final = (
    "(r.since_rev IS NOT NULL AND (excluded.since_rev IS NULL OR excluded.since_rev < r.since_rev) "
    "OR r.collections IS NOT NULL AND NOT coalesce(excluded.collections <@ r.collections, false))"
)
_PUT: Final = f"""
INSERT INTO fastworker.repos AS r (did, host, reason, priority, sweep, want_rev, since_rev, collections, next_at)
SELECT DISTINCT ON (w.did) w.did, $3::text, $4::text, $5::smallint, $6::bigint, nullif(w.rev, ''), $8::text, $9::text[],
    CASE WHEN $10::float8 > 0 THEN now() + make_interval(secs => $10::float8) ELSE '-infinity' END
FROM unnest($1::varchar[], $2::text[]) AS w (did, rev) ORDER BY w.did, w.rev DESC
ON CONFLICT (did) DO UPDATE SET reason = excluded.reason, sweep = coalesce(excluded.sweep, r.sweep),
    priority = CASE WHEN r.state IN ('waiting', 'fetching') THEN least(r.priority, excluded.priority)
        ELSE excluded.priority END,
    host = coalesce(nullif(excluded.host, ''), r.host), want_rev = greatest(r.want_rev, excluded.want_rev),
    since_rev = CASE WHEN excluded.reason = '{WIDENED}' THEN r.since_rev
        WHEN excluded.since_rev IS NOT NULL AND r.since_rev IS NOT NULL
        THEN least(r.since_rev, excluded.since_rev) END,
    collections = CASE WHEN excluded.collections IS NOT NULL AND r.collections IS NOT NULL
        THEN ARRAY(SELECT DISTINCT c FROM unnest(r.collections || excluded.collections) AS u (c) ORDER BY c) END,
    state = 'waiting', attempts = 0, next_at = excluded.next_at, error = NULL, owner = NULL, queued_at = now()
WHERE $7::boolean OR CASE r.state WHEN 'done' THEN coalesce(excluded.want_rev > r.rev, false) OR {_WIDER}
    WHEN 'refused' THEN true WHEN 'gone' THEN r.ended_at < now() - interval '1 day'
    ELSE excluded.priority < r.priority OR excluded.sweep IS DISTINCT FROM r.sweep OR {_WIDER} END
"""
_LEFT: Final = """
SELECT count(*) FILTER (WHERE state = 'waiting'), count(*) FILTER (WHERE state = 'fetching'),
    coalesce(extract(epoch FROM min(next_at) FILTER (WHERE state = 'waiting' AND next_at > now()) - now())::float8, 0)
FROM fastworker.repos WHERE state IN ('waiting', 'fetching') AND priority <= $1
"""
_TURN: Final = """
INSERT INTO fastworker.hosts AS h (host, next_at) VALUES ($1, clock_timestamp() + make_interval(secs => $2::float8))
ON CONFLICT (host) DO UPDATE SET
    next_at = greatest(h.next_at, clock_timestamp()) + make_interval(secs => $2::float8)
RETURNING extract(epoch FROM h.next_at - clock_timestamp())::float8 - $2::float8
"""
_REST: Final = """
INSERT INTO fastworker.hosts AS h (host, next_at) VALUES ($1, clock_timestamp() + make_interval(secs => $2::float8))
ON CONFLICT (host) DO UPDATE SET next_at = greatest(h.next_at, excluded.next_at)
"""
_SWEEP: Final = "SELECT id, source, collection, host, since_rev, cursor, done_at IS NOT NULL FROM fastworker.sweeps"
_BEGIN: Final = """
INSERT INTO fastworker.sweeps (source, collection, host, reason, priority, since_rev) VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (source, collection, reason) WHERE done_at IS NULL DO NOTHING
"""
_TURNED: Final = """
UPDATE fastworker.sweeps SET cursor = $3::text, listed = listed + $4::bigint, queued = queued + $5::bigint,
    done_at = CASE WHEN $3::text IS NULL THEN now() END
WHERE id = $1 AND cursor IS NOT DISTINCT FROM $2 AND done_at IS NULL
"""


class Queue:
    """One connection, one owner."""

    def __init__(self, connection: asyncpg.Connection[Any]) -> None:
        self._connection = connection
        self._one = asyncio.Lock()
        self._owner = random.randrange(1, 1 << 31)

    async def register(self) -> None:
        """Say that this owner lives, for as long as its session does."""
        while not await self.value("SELECT pg_try_advisory_lock($1::int, $2::int)", _LOCK, self._owner):
            self._owner = random.randrange(1, 1 << 31)

    # --- accounts

    async def put(
        self,
        wanted: Sequence[Wanted],
        reason: str,
        priority: int,
        *,
        host: str = "",
        sweep: int | None = None,
        again: bool = False,
        part: Part = WHOLE,
        after_s: float = 0.0,
    ) -> int:
        """How many are to be fetched. `again`: also those that were done; else only those that have changed since, or
        of which less was looked at. `after_s`: not before that."""
        if not wanted:
            return 0
        dids, revs = [one.did for one in wanted], [one.rev or "" for one in wanted]
        return _count(await self.execute(_PUT, dids, revs, host, reason, priority, sweep, again, *part, after_s))

    async def put_selected(self, select: str, arguments: Sequence[Any], reason: str, sweep: int | None = None) -> int:
        """The accounts that a statement finds, as one transaction. It gives one column."""
        dids = [row[0] for row in await self.rows(select, *arguments)]
        return await self.put([Wanted(did) for did in dids], reason, CHOSEN, sweep=sweep)

    async def claim(self, many: int, priority_max: int) -> list[Claim]:
        async with self._one:
            with translating():
                async with self._connection.transaction():
                    await self._connection.execute(f"SELECT pg_advisory_xact_lock({_CLAIMS})")
                    await self._connection.execute(_FREE)
                    rows = await self._connection.fetch(_CLAIM, self._owner, priority_max, many, HOST_AT_ONCE)
        return [Claim(*tuple(row)[:6], _part(*tuple(row)[6:])) for row in rows]  # type: ignore[call-arg]

    async def moved(self, did: str, host: str) -> bool:
        """An account's host is known. Whether it may be fetched at once; else it waits for its turn there."""
        return bool(await self.value(_MOVED, did, self._owner, host))

    async def done(self, did: str, rev: str, seq: int, records: int, size: int, differences: int) -> None:
        await self.execute(_END, did, self._owner, "done", None, rev, seq, records, size, differences)

    async def ended(self, did: str, state: str, error: str) -> None:
        await self.execute(_END, did, self._owner, state, error[:500], None, None, None, None, None)

    async def again(self, did: str, seconds: float, error: str, *, spends: bool) -> None:
        await self.execute(_AGAIN, did, self._owner, seconds, error[:500], int(spends))

    async def renew(self) -> None:
        await self.execute(
            f"UPDATE fastworker.repos SET claimed_until = now() + interval '{CLAIM_S} seconds' "
            "WHERE owner = $1 AND state = 'fetching'",
            self._owner,
        )

    async def give_back(self) -> None:
        """What this process has claimed and not done."""
        await self.execute(
            "UPDATE fastworker.repos SET state = 'waiting', owner = NULL WHERE owner = $1 AND state = 'fetching'",
            self._owner,
        )

    async def left(self, priority_max: int) -> Left:
        rows = await self.rows(_LEFT, priority_max)
        return Left(*rows[0])

    async def unended(self, sweep: int) -> int:
        return int(
            await self.value(
                "SELECT count(*) FROM fastworker.repos WHERE sweep = $1 AND state IN ('waiting', 'fetching')", sweep
            )
        )

    async def followed(self, dids: Sequence[str]) -> list[str]:
        """Whom these accounts follow, as far as the tables know."""
        return [did for (did,) in await self.rows(FOLLOWED, list(dids))]

    # --- hosts

    async def turn(self, host: str, every_s: float) -> float:
        """Take the next turn of a host; in how many seconds it is."""
        return max(0.0, float(await self.value(_TURN, host, every_s)))

    async def rest(self, host: str, seconds: float) -> None:
        """No process sends this host a request until then."""
        await self.execute(_REST, host, seconds)

    # --- lists

    async def sweep(
        self, source: str, reason: str, priority: int, *, collection: str = "", host: str = "", since_rev: str = ""
    ) -> Sweep:
        """The list that is being read, or one from its beginning."""
        await self.execute(_BEGIN, source, collection, host, reason, priority, since_rev)
        where = " WHERE source = $1 AND collection = $2 AND reason = $3 ORDER BY id DESC LIMIT 1"
        return Sweep(*(await self.rows(_SWEEP + where, source, collection, reason))[0])

    async def page(
        self,
        sweep: Sweep,
        wanted: Sequence[Wanted],
        listed: int,
        cursor: str | None,
        reason: str,
        priority: int,
        *,
        again: bool = False,
        part: Part = WHOLE,
    ) -> Sweep:
        """A page of the list, and where it goes on. Nothing when another process was faster."""
        async with self._one:
            with translating():
                async with self._connection.transaction():
                    moved = await self._connection.execute(_TURNED, sweep.id, sweep.cursor, cursor, listed, 0)
                    if _count(moved) and wanted:
                        dids, revs = [one.did for one in wanted], [one.rev or "" for one in wanted]
                        put = await self._connection.execute(
                            _PUT, dids, revs, sweep.host, reason, priority, sweep.id, again, *part, 0.0
                        )
                        await self._connection.execute(
                            "UPDATE fastworker.sweeps SET queued = queued + $2 WHERE id = $1", sweep.id, _count(put)
                        )
        return Sweep(*(await self.rows(f"{_SWEEP} WHERE id = $1", sweep.id))[0])

    # --- how

    async def execute(self, statement: str, *arguments: Any) -> str:
        async with self._one:
            with translating():
                return await self._connection.execute(statement, *arguments)

    async def rows(self, statement: str, *arguments: Any) -> list[Any]:
        async with self._one:
            with translating():
                return await self._connection.fetch(statement, *arguments)

    async def value(self, statement: str, *arguments: Any) -> Any:
        async with self._one:
            with translating():
                return await self._connection.fetchval(statement, *arguments)


class PooledTurns:
    """The turns of hosts for who has no queue: over the connections of a store. When the database is away each process
    counts for itself."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def turn(self, host: str, every_s: float) -> float:
        with contextlib.suppress(StoreUnavailable):
            async with self._store.connection() as db:
                return max(0.0, float(await db.fetchval(_TURN, host, every_s)))
        return 0.0

    async def rest(self, host: str, seconds: float) -> None:
        with contextlib.suppress(StoreUnavailable):
            async with self._store.connection() as db:
                await db.execute(_REST, host, seconds)


class Listed:
    """The same for accounts that are only looked at: nothing is stored, and nobody shares them."""

    def __init__(self, dids: Sequence[str]) -> None:
        self._waiting = list(dict.fromkeys(dids))
        self.hosts: dict[str, str] = {}

    async def claim(self, many: int, priority_max: int) -> list[Claim]:  # noqa: ARG002 - as Queue
        claimed, self._waiting = self._waiting[:many], self._waiting[many:]
        return [Claim(did, "", "operator", OPERATOR, None, 0) for did in claimed]

    async def moved(self, did: str, host: str) -> bool:
        self.hosts[did] = host
        return True

    async def done(self, did: str, rev: str, seq: int, records: int, size: int, differences: int) -> None:
        pass

    async def ended(self, did: str, state: str, error: str) -> None:
        pass

    async def again(self, did: str, seconds: float, error: str, *, spends: bool) -> None:
        pass

    async def renew(self) -> None:
        pass

    async def give_back(self) -> None:
        pass

    async def left(self, priority_max: int) -> Left:  # noqa: ARG002
        return Left(len(self._waiting), 0, 0.0)


def _part(since_rev: str | None, collections: Sequence[str] | None) -> Part:
    return Part(since_rev, None if collections is None else tuple(collections))


def _count(tag: str) -> int:
    return int(tag.rpartition(" ")[2])


@contextlib.asynccontextmanager
async def open_queue(database_url: str) -> AsyncIterator[Queue]:
    """Raises StoreUnavailable."""
    with translating():
        connection = await asyncpg.connect(
            database_url,
            timeout=_CONNECT_S,
            command_timeout=330.0,
            server_settings={"application_name": "fastworker-queue"},
        )
    try:
        with translating():
            await connection.execute(
                f"SET statement_timeout = '300s'; {NO_TRANSACTION_TIMEOUT}SET TIME ZONE 'UTC'; SET jit = off; {PATH}"
            )
        queue = Queue(connection)
        await queue.register()
        try:
            yield queue
        finally:
            with contextlib.suppress(StoreUnavailable):
                await queue.give_back()
    finally:
        connection.terminate()
