"""PostgreSQL: one flush is one main transaction. The only importer of asyncpg on the event's path.

A flush (`Store.write`), docs/invariants.md has the proof:

1. look: what tombstones and deleted accounts beat already is not written;
2. prologue, committed before the rows: tombstones of this batch's deletes, new users, accounts, identities;
3. main transaction: rows under the version guard, twins, the gate of the cold tables, derived rows, counters;
4. look back: what overtook us between 1 and 3 is removed the same way;
5. rows that join two records are recomputed, now that this side has committed.

Where there are few rows, and as far as we know all of them new, one call does all of it (`_put_whole`).

Long after, `maintain` looks at every tombstone once more: a process may die with its commit on the way.

The caller acks after `write` returns. Every step may be repeated: a crash anywhere means redelivery.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, Self, TypeVar

import asyncpg
import orjson
from asyncpg.exceptions import (
    DataError,
    DeadlockDetectedError,
    DuplicatePreparedStatementError,
    IntegrityConstraintViolationError,
    InterfaceError,
    InternalClientError,
    InvalidSQLStatementNameError,
    PostgresError,
    ProgramLimitExceededError,
    ReadOnlySQLTransactionError,
    SerializationError,
    UniqueViolationError,
    UnsupportedClientFeatureError,
)
from asyncpg.pool import PoolConnectionProxy
from asyncpg.protocol import protocol

from fastworker.crashpoint import Place, crashpoint
from fastworker.edge.schema_admin import AUTHORITY
from fastworker.errors import RowRejected, StoreUnavailable, Unreachable, words_of
from fastworker.table import derive as derived
from fastworker.table import merge
from fastworker.table.batch import Batch, Change, Progress, Row, TimedAccount, TimedIdentity, newer
from fastworker.table.derive import Effects
from fastworker.table.schema import (
    FEED_GENERATORS,
    FEED_ITEMS,
    LIKES,
    NOTIFICATIONS,
    POSTS,
    PROFILES,
    QUOTES,
    TABLES,
    Table,
    collection_table,
)

Connection = PoolConnectionProxy  # asyncpg's: dead after release
Key = tuple[str, str]
_T = TypeVar("_T")

ATTEMPTS_MAX = 20  # deadlocks and serialisation failures of one transaction; each resolves one writer
ROUNDS_MAX = 100  # of one conflict: each round means that another writer committed in between
KNOWN_USERS_MAX = 32_768  # DIDs a process remembers as committed, about 6 MB
TOMBSTONES_KEPT = timedelta(days=7)  # relays replay three days; bounded by what the stream's group has finished, too
HORIZON_NOTICE = timedelta(minutes=2)  # between announcing a horizon and pruning below it; workers look every 10 s
DEAD_COMMIT = timedelta(
    minutes=2
)  # a commit that a dead process sent is in or lost by then: its session ended long ago
AGAIN_PIECE = 5_000  # tombstones per piece
PING_S = 3.0
PRUNE_PIECE = 5_000  # tombstones per transaction
PURGE_PIECE = 1_000  # rows of a deleted account per transaction
POOLER = (
    "PostgreSQL is reached through a pooler that gives each transaction another session: set it to session mode "
    "(pgbouncer: pool_mode = session) or connect directly"
)
FEW_USERS, SMALL_FLUSH = 50, 200  # so few new ones go with the rows; others who meet them wait for our commit
COPY_ROWS_MIN = 200  # fewer go as one array: a COPY is two round trips more; see docs/performance.md
WARY_MIN, WARY_MAX = 5, 320  # transactions without COPY after somebody else was found to write the same rows
OWED_PIECE = 1_000  # joined rows recomputed per transaction by `maintain`


# The driver asks of each element of an array, through abstract classes, whether it is an array of its own: 0.6 us per
# text, 1 us per row (docs/performance.md). Ours are lists and tuples. Were these names gone, only the speed would be.
for _name, _types in (("IterableABC", (list, tuple)), ("SizedABC", (list, tuple)), ("MappingABC", dict)):
    setattr(protocol, _name, _types)


class _Contended(Exception):
    """What the transaction has read is no longer so, and part of it is written: begin again."""


RETRYABLE = (DeadlockDetectedError, SerializationError, _Contended)

# A plan made while a table was empty must not scan it when it is large: every statement of ours looks up keys.
_SESSION = (
    "SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off; SET jit = off; "
    "SET plan_cache_mode = force_generic_plan; SET TIME ZONE 'UTC'; SET statement_timeout = '60s'; "
    "SET lock_timeout = '30s'; SET idle_in_transaction_session_timeout = '20s'"
)


class Written(NamedTuple):
    """What a flush did: rows inserted, changed or removed in the primary tables; ops that were not the newest."""

    rows: int
    superseded: int
    forbidden: int


class Ground(NamedTuple):
    """What an entry may assume: tombstones up to `pruned_until` are gone; `ambiguous`: seq alone orders nothing."""

    pruned_until: datetime
    ambiguous: bool


class _Look(NamedTuple):
    """What was found about a batch's upserts."""

    kills: dict[str, Change]  # by uri, deletes of those that a tombstone or a deleted account beats
    shadowed: set[str]
    forbidden: set[str]  # DIDs that may not be stored; before the flush
    joined: set[Key]  # joined rows that may have changed; after it


class _Member(NamedTuple):
    """A live record of one unique pair, wherever it is."""

    rkey: str
    uri: str
    row: Row
    rev: str | None
    seq: int | None
    cid: str | None


@contextlib.contextmanager
def translating() -> Iterator[None]:
    """Driver and server errors to ours, by fault. What is left is our own bug and crashes."""
    try:
        yield
    except RETRYABLE:
        raise
    except (
        DataError,
        IntegrityConstraintViolationError,
        ProgramLimitExceededError,
        OverflowError,
        UnicodeError,
    ) as error:
        raise RowRejected(f"{type(error).__name__}: {error}") from error
    except InternalClientError as error:
        # the driver lost count of a connection that the server ended at the same moment; it is gone by now
        raise StoreUnavailable(f"PostgreSQL connection: {error}") from error
    except UnsupportedClientFeatureError:
        raise
    except (DuplicatePreparedStatementError, InvalidSQLStatementNameError) as error:
        raise Unreachable(POOLER) from error
    except PostgresError as error:
        if _is_our_bug(error):
            raise
        raise StoreUnavailable(f"PostgreSQL: {error} (SQLSTATE {error.sqlstate})") from error
    except RuntimeError as error:
        if "handler is closed" not in str(error):  # uvloop's, of a socket that was lost at that moment
            raise
        raise StoreUnavailable("PostgreSQL connection: closed while it was used") from error
    except InterfaceError as error:
        # the pool or the connection is closed under us; what closed it says more than what found it closed
        why = error.__context__ if isinstance(error.__context__, PostgresError | OSError) else error
        words = str(why) or type(why).__name__
        if "connection is closed" in words:  # the driver names the method of its own that found out
            words = "closed while it was used"
        raise StoreUnavailable(f"PostgreSQL connection: {words}") from error
    except (OSError, TimeoutError) as error:
        raise StoreUnavailable(f"PostgreSQL cannot be reached: {words_of(error, AUTHORITY)}") from error


def _is_our_bug(error: PostgresError) -> bool:
    """Syntax errors and cardinality violations are ours; missing tables, columns and rights are a state to wait out."""
    state = error.sqlstate or ""
    if state == "21000":
        return True
    return state.startswith("42") and state not in {"42P01", "42703", "42501", "42883", "3F000"}


class Store:
    """A process's writers: `pool_size` connections, the users it knows, and what is derived."""

    def __init__(self, pool: asyncpg.Pool[Any], derive: frozenset[str]) -> None:
        self._pool = pool
        self._derive = derive
        self._known: dict[str, None] = {}
        self.copy_rows_min = COPY_ROWS_MIN
        self.whole_rows_max = SMALL_FLUSH
        self._wary = 0  # transactions to go without COPY
        self._wary_next = WARY_MIN
        self._relays: set[str] = set()
        self.conflicts = 0  # transactions begun again because another writer came first
        self._recount = merge.recount(derive) if "counts" in derive else None

    @classmethod
    async def connect(
        cls,
        database_url: str,
        *,
        pool_size: int = 1,
        application_name: str = "fastworker",
        derive: frozenset[str] = derived.FULL,
        connect_timeout_s: float = 10.0,
        command_timeout_s: float = 90.0,
    ) -> Self:
        """Raises StoreUnavailable where the server cannot be reached or refuses."""

        async def session(connection: asyncpg.Connection[Any]) -> None:
            await connection.execute(_SESSION)

        async def keep(connection: asyncpg.Connection[Any]) -> None:
            """No reset between flushes: sessions hold nothing but settings, and it costs a round trip."""

        with translating():
            pool = await asyncpg.create_pool(
                database_url,
                min_size=0,  # the pool would keep more alive by itself, and log a traceback for each failure
                max_size=pool_size,
                init=session,
                reset=keep,
                timeout=connect_timeout_s,
                command_timeout=command_timeout_s,
                max_inactive_connection_lifetime=0,
                server_settings={"application_name": application_name},
            )
            try:
                async with contextlib.AsyncExitStack() as stack:
                    first = await stack.enter_async_context(pool.acquire(timeout=connect_timeout_s))
                    if pool_size > 1:
                        second = await stack.enter_async_context(pool.acquire(timeout=connect_timeout_s))
                        await _refuse_pooler(first, second)
                    else:  # for this once
                        another = await asyncpg.connect(database_url, timeout=connect_timeout_s, command_timeout=10)
                        stack.push_async_callback(another.close, timeout=5)
                        await _refuse_pooler(first, another)
            except BaseException:
                pool.terminate()
                raise
        return cls(pool, derive)

    async def close(self) -> None:
        try:
            async with asyncio.timeout(5):
                await self._pool.close()
        except (TimeoutError, OSError, InterfaceError, PostgresError):
            self._pool.terminate()

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        with translating():
            async with self._pool.acquire(timeout=10) as connection:
                try:
                    yield connection
                except Exception as error:
                    # it lost count, leads to what is a replica now, or the server went before the rollback
                    useless = isinstance(error, InternalClientError | ReadOnlySQLTransactionError)
                    if useless or _is_left_open(connection):
                        connection.terminate()
                    raise

    @property
    def connections(self) -> tuple[int, int]:
        """Open, and of these at work."""
        size = self._pool.get_size()
        return size, size - self._pool.get_idle_size()

    async def ping(self) -> None:
        """Raises StoreUnavailable unless the server answers within a moment."""
        with translating():
            async with asyncio.timeout(PING_S), self._connection() as connection:
                try:
                    await connection.fetchval("SELECT 1")
                except BaseException:  # a cancelled query is waited for, which on a hung server has no end
                    connection.terminate()
                    raise

    async def write(self, batch: Batch) -> Written:
        """One flush. Raises StoreUnavailable (write the same batch again later) or RowRejected (halve it)."""
        async with self._connection() as connection:
            if self._may_put_whole(batch) and (whole := await self._put_whole(connection, batch)) is not None:
                return whole
            upserts = [c for c in batch.changes.values() if c.row is not None]
            look = await self._look(connection, upserts, batch.dids)
            forbidden, kills = look.forbidden, look.kills
            if forbidden:
                upserts = [c for c in upserts if c.repo not in forbidden]
                kills = {uri: kill for uri, kill in kills.items() if kill.repo not in forbidden}
            changes = [kills.get(c.uri, c) for c in batch.changes.values() if c.row is None or c.repo not in forbidden]
            refused = len(batch.changes) - len(changes)

            identities = {did: events for did, events in batch.identities.items() if did not in forbidden}
            tombstones = sorted(
                ((c.uri, c.rev, c.seq) for c in batch.changes.values() if c.row is None and c.table.hot),
                key=lambda t: t[0],
            )
            users = sorted(did for did in batch.dids if did not in self._known and did not in forbidden)
            more = bool(batch.accounts or identities or batch.syncs or batch.relays - self._relays)
            if more or len(users) > FEW_USERS or not 0 < len(changes) <= SMALL_FLUSH:
                await self._retry(lambda: self._prologue(connection, batch, tombstones, users, identities))
                users = []
            elif tombstones:
                await self._retry(lambda: connection.execute(merge.TOMBSTONES, *_columns(tombstones)))
                crashpoint(Place.AFTER_TOMBSTONE_COMMIT)
            rows = await self._main(connection, changes, look.shadowed, batch, users)
            return await self._finish(connection, upserts, kills, rows, refused)

    async def _finish(
        self, connection: Connection, upserts: list[Change], kills: dict[str, Change], rows: int, refused: int
    ) -> Written:
        """What overtook the rows between look and commit; then the rows that join two records."""
        superseded = max(0, len(upserts) - len(kills) - rows)
        # Upserts that changed nothing are looked at too: an earlier delivery may have died right here.
        # A record in the shadow may by now be in the table as well, with another pair: settle it again.
        written = [c for c in upserts if c.uri not in kills]
        back = await self._look_back(connection, written, upserts)
        late = back.kills
        if late or back.shadowed:
            again = [late.get(c.uri, c) for c in written if c.uri in late or c.uri in back.shadowed]
            rows += await self._main(connection, again, back.shadowed, None)
            back = await self._look_back(connection, written, upserts)
        crashpoint(Place.AFTER_LOOK_BACK)
        await self._rejoin(connection, upserts, back.joined)
        return Written(rows, superseded + len(kills) + len(late), refused)

    # New rows, few of them, and nothing else: all five steps as one call ---------------------------

    def _may_put_whole(self, batch: Batch) -> bool:
        """Whether nothing speaks against it. What the database knows better, the call finds out, and does nothing."""
        changes = batch.changes
        return (
            0 < len(changes) <= self.whole_rows_max
            and len(changes) < self.copy_rows_min
            and not (batch.accounts or batch.identities or batch.syncs or batch.relays - self._relays)
            and all(c.row is not None and c.table.hot for c in changes.values())
        )

    async def _put_whole(self, connection: Connection, batch: Batch) -> Written | None:
        """None: there is more to do than to insert new rows, and nothing was written."""
        users = sorted(did for did in batch.dids if did not in self._known)
        if len(users) > FEW_USERS:
            return None
        fx = Effects(self._derive)
        upserts = sorted(batch.changes.values(), key=lambda c: c.uri)
        new = {}
        for table, mine in _by_table(upserts):
            derived.add(fx, table, mine)
            new["new_" + table.name] = [c.row for c in mine]
        arguments = {
            "new_users": users or None,
            **new,
            **self._items_of(fx),
            **self._last_of(fx, batch.progress),
            "uris": [c.uri for c in upserts],
            "repos": list({c.repo for c in upserts}),
            "dids": list(batch.dids),
            "with_contexts": "thread_contexts" in self._derive,
            "with_gates": "gate_flags" in self._derive,
            "with_services": "like_counts" in self._derive,
        }
        values = [arguments.get(name) for name in merge.WHOLE_ARGUMENTS]
        crashpoint(Place.BEFORE_MAIN_COMMIT)
        try:
            is_late = await self._retry(lambda: connection.fetchval(merge.PUT_WHOLE, *values))
        except PostgresError as error:
            if error.sqlstate != merge.NOT_NEW:
                raise
            return None
        crashpoint(Place.AFTER_MAIN_COMMIT)
        self._remember(users)
        if is_late:
            return await self._finish(connection, upserts, {}, len(upserts), 0)
        crashpoint(Place.AFTER_LOOK_BACK)
        return Written(len(upserts), 0, 0)

    async def maintain(self, *, owed_age_s: float = 10.0, dead_commit: timedelta = DEAD_COMMIT) -> int:
        """What is still owed (joined rows, purges of deleted accounts, second looks), in one bounded piece.

        Returns how much was done; 0 means that nothing is owed. Called at start and on a slow tick. Where no other
        writer is at work, both ages may be 0.
        """
        async with self._connection() as connection:
            owed = await connection.fetch(merge.OWED, owed_age_s, OWED_PIECE)
            if owed:
                crashpoint(Place.IN_RECHECK)
                await self._recompute(connection, {(r[0], r[1]): r[2] for r in owed}, set())
            return (
                len(owed) + await self._look_again(connection, dead_commit) + await self._purge(connection, dead_commit)
            )

    async def ground(self) -> Ground:
        async with self._connection() as connection:
            row = await connection.fetchrow(merge.GROUND)
        assert row is not None
        # asyncpg reads -infinity as the first naive moment
        return Ground(row[0].replace(tzinfo=UTC) if row[0].tzinfo is None else row[0], row[1])

    async def absent(self, changes: list[Change]) -> set[str]:
        """uris of the changes of which the database knows nothing, not even that they were deleted."""
        by_table: dict[str, tuple[Table, list[str]]] = {}
        for change in changes:
            by_table.setdefault(change.table.name, (change.table, []))[1].append(change.uri)
        async with self._connection() as connection:
            return {
                r[0] for table, uris in by_table.values() for r in await connection.fetch(merge.absent(table), uris)
            }

    async def prune(self, *, keep: timedelta = TOMBSTONES_KEPT, notice: timedelta = HORIZON_NOTICE) -> int:
        """Forget tombstones that nothing can need any more: one bounded piece. Returns how many went."""
        async with self._connection() as connection:
            gone = await connection.execute(merge.PRUNE, notice, PRUNE_PIECE)
            await connection.execute(merge.ANNOUNCE, keep, PRUNE_PIECE)
        return int(gone.rpartition(" ")[2])

    async def finished(self, stream: str) -> Progress | None:
        """The furthest that any consumer saw the stream's group finished: where reader and worker resume."""
        async with self._connection() as connection:
            found = await connection.fetch(merge.FINISHED, stream)
        marks = [Progress(stream, r[0], r[1], r[2]) for r in found]
        return max(marks, key=lambda mark: [int(part) for part in mark.entry_id.split("-")], default=None)

    async def mark_read(self, uris: Sequence[str]) -> None:
        """Notifications that are older than what the user has seen long ago (`is_read` is not the state law's)."""
        if uris:
            async with self._connection() as connection:
                await self._retry(lambda: connection.execute(merge.MARK_READ, list(uris)))

    async def forget_repair(self, did: str, until_seq: int) -> None:
        """What a #sync up to then asked for is done."""
        async with self._connection() as connection:
            await connection.execute(merge.REPAIRED, did, until_seq)

    # Handles that are resolved beside the stream ---------------------------------------------------

    async def unresolved(self, limit: int) -> list[tuple[str, datetime]]:
        """(did, marked at) of identities whose handle nobody told, those that may be asked for now."""
        async with self._connection() as connection:
            return [(r[0], r[1]) for r in await connection.fetch(merge.UNRESOLVED, limit)]

    async def resolved(self, rows: list[tuple[str, str | None, datetime, datetime]]) -> int:
        """(did, its handle or None, asked at, marked at). Not taken where an event came meanwhile; how many were."""
        if not rows:
            return 0

        async def transaction() -> int:
            async with connection.transaction():
                taken = await connection.fetch(merge.RESOLVED, *_columns(sorted(rows, key=lambda row: row[0])))
                if named := sorted((r[0], r[1]) for r in taken if r[1] is not None):
                    await connection.execute(merge.HANDLES, *_columns(named))
                return len(taken)

        async with self._connection() as connection:
            return await self._retry(transaction)

    async def unresolvable(self, dids: list[str]) -> None:
        """Ask later, ever more rarely: from half a minute to a day."""
        async with self._connection() as connection:
            await connection.execute(merge.UNRESOLVABLE, sorted(dids))

    # 1 and 4: what beats this batch -------------------------------------------------------------

    async def _look(self, connection: Connection, upserts: list[Change], dids: Iterable[str]) -> _Look:
        """Before: what is beaten already, and which DIDs are forbidden. The look back has the last word."""
        dids = list(dids)
        if not upserts and not dids:
            return _Look({}, set(), set(), set())
        hot = [c.uri for c in upserts if c.table.hot]
        return _found(upserts, await connection.fetch(merge.LOOK, hot, list({c.repo for c in upserts}), dids))

    async def _look_back(self, connection: Connection, written: list[Change], upserts: list[Change]) -> _Look:
        """After: what overtook those written, and which joined rows the upserts may have changed."""
        if not upserts:
            return _Look({}, set(), set(), set())
        hot = [c.uri for c in written if c.table.hot]
        posts: list[str] = []
        likes: list[tuple[str, str]] = []
        contexts, flags = "thread_contexts" in self._derive, "gate_flags" in self._derive
        for change in upserts:
            if change.table is POSTS and (contexts or flags):
                posts.append(change.uri)
            elif change.table is LIKES and contexts and change.row is not None:
                likes.append((change.row[2], change.row[1]))
        found = await connection.fetch(
            merge.LOOK_BACK,
            hot,
            list({c.repo for c in written}),
            posts,
            [like[0] for like in likes],
            [like[1] for like in likes],
        )
        look = _found(written, found)
        joined = {(kind, key) for kind, key in look.joined if (contexts if kind == "context" else flags)}
        return look._replace(joined=joined)

    async def _look_again(self, connection: Connection, dead_commit: timedelta) -> int:
        """Once for every tombstone, long after it was written: whether it beats a record that is there all the same.

        A process that died with its commit on the way never looked back; if others had settled its entries, nobody did.
        Returns 0 when no tombstone is due.
        """
        piece = await connection.fetchrow(merge.LOOK_AGAIN_PIECE, dead_commit, AGAIN_PIECE)
        if piece is None:
            return 0
        beaten = await connection.fetch(merge.LOOK_AGAIN, *piece)
        kills = {}  # what is in the table and in the shadow is found twice
        for uri, rev, seq in beaten:
            kills[uri] = Change(collection_table(uri), uri, derived.did_of(uri), _rkey(uri), rev, seq, 0, None, None)
        if kills:
            await self._main(connection, list(kills.values()), set(), None)
        await connection.execute(merge.LOOKED_AGAIN, *piece)
        return len(kills) + 1

    # 2: what must be committed before the rows --------------------------------------------------

    async def _prologue(
        self,
        connection: Connection,
        batch: Batch,
        tombstones: list[tuple[str, str | None, int | None]],
        users: list[str],
        identities: dict[str, list[TimedIdentity]],
    ) -> None:
        async with connection.transaction():
            if tombstones:
                await connection.execute(merge.TOMBSTONES, *_columns(tombstones))
            if users:
                await connection.execute(merge.USERS, users)
            if batch.accounts:
                await self._accounts(connection, batch.accounts)
            if identities:
                await self._identities(connection, identities)
            if batch.syncs:
                newest = {s.did: s for s in sorted(batch.syncs, key=lambda s: s.seq or 0)}
                rows = [(s.did, s.rev, s.seq) for _, s in sorted(newest.items())]
                await connection.execute(merge.REPAIRS, *_columns(rows))
            if hosts := batch.relays - self._relays:
                await connection.execute(merge.RELAYS, sorted(hosts))
        self._relays |= batch.relays
        crashpoint(Place.AFTER_TOMBSTONE_COMMIT)
        self._remember(users)

    def _remember(self, users: Sequence[str]) -> None:
        """They are committed."""
        if len(self._known) + len(users) > KNOWN_USERS_MAX:
            self._known.clear()
        self._known.update(dict.fromkeys(users[:KNOWN_USERS_MAX]))

    async def _accounts(self, connection: Connection, accounts: dict[str, list[TimedAccount]]) -> None:
        rows = []
        deleted = []
        for did, events in sorted(accounts.items()):
            newest = _newest(events)
            event = newest.event
            rows.append((did, event.active, event.status, event.relay, event.seq, newest.at))
            seqs = [e.event.seq for e in events if not e.event.active and e.event.status == "deleted" and e.event.seq]
            if seqs:
                deleted.append((did, max(seqs)))
        await connection.execute(merge.ACCOUNTS, *_columns(rows))
        if deleted:
            await connection.execute(merge.ACCOUNTS_DELETED, *_columns(deleted))

    async def _identities(self, connection: Connection, identities: dict[str, list[TimedIdentity]]) -> None:
        rows = []
        unresolved = []
        for did, events in sorted(identities.items()):
            named = [e for e in events if e.event.handle is not None]
            if named:
                newest = _newest(named)
                rows.append((did, newest.event.handle, newest.event.relay, newest.event.seq, newest.at))
            if len(named) < len(events):
                unresolved.append((did, max(e.at for e in events if e.event.handle is None)))
        if rows:
            won = await connection.fetch(merge.IDENTITIES, *_columns(rows))
            if won:
                await connection.execute(merge.HANDLES, *_columns(sorted(tuple(r) for r in won)))
        if unresolved:
            await connection.execute(merge.IDENTITIES_UNRESOLVED, *_columns(unresolved))

    # 3: rows and what derives from them ---------------------------------------------------------

    async def _main(
        self,
        connection: Connection,
        changes: list[Change],
        shadowed: set[str],
        batch: Batch | None,
        users: Sequence[str] = (),
    ) -> int:
        """The main transaction; owed joined rows are recomputed after it. Returns how many rows changed."""
        progress = batch.progress if batch is not None else None
        if not changes and progress is None:
            return 0
        return await self._commit(
            connection, lambda fx: self._apply(connection, changes, shadowed, fx), progress=progress, users=users
        )

    async def _commit(
        self,
        connection: Connection,
        apply: Callable[[Effects], Awaitable[int]],
        *,
        progress: Progress | None = None,
        users: Sequence[str] = (),
    ) -> int:
        """One transaction: primary rows, what derives from them, what is owed; then the owed is paid."""

        async def transaction() -> tuple[int, dict[Key, datetime]]:
            fx = Effects(self._derive)
            async with connection.transaction():
                if users:
                    await connection.execute(merge.USERS, users)
                rows = await apply(fx)
                owed = await self._derived(connection, fx, progress)
                crashpoint(Place.BEFORE_MAIN_COMMIT)
            crashpoint(Place.AFTER_MAIN_COMMIT)
            return rows, owed

        rows, owed = await self._retry(transaction)
        self._remember(users)
        self._trust()
        if owed:
            await self._recompute(connection, owed, set(), wait=False)
        return rows

    async def _put(self, connection: Connection, arguments: dict[str, Any]) -> Any:
        """(uris placed or None if all were, when what is owed was written or None): 0004_one_call.sql."""
        return await connection.fetchrow(merge.PUT, *(arguments.get(name) for name in merge.PUT_ARGUMENTS))

    async def _apply(self, connection: Connection, changes: Iterable[Change], shadowed: set[str], fx: Effects) -> int:
        """Write the changes that are the newest of their records; collect what follows. Returns rows changed.

        In this order, so that what other writers may wait for until our commit is taken as late as can be: new rows and
        their items, existing rows of the hot tables, existing and new ones of the cold tables.
        """
        hot: list[Change] = []
        cold: list[Change] = []
        for change in sorted(changes, key=lambda c: c.uri):
            (hot if change.table.hot else cold).append(change)
        fresh, waiting = await self._insert_hot(connection, hot, shadowed)
        for table, new in fresh:
            derived.add(fx, table, new)
        rows = sum(len(new) for _, new in fresh)
        if (waiting or cold) and len(hot) + len(cold) > SMALL_FLUSH:
            await self._items(connection, fx)
        for table, pending in waiting:
            await self._superseded(connection, table, pending, shadowed)
            rows += await self._settle(connection, table, pending, fx)
        if not cold:
            return rows
        if waiting and len(hot) + len(cold) > SMALL_FLUSH:
            await self._items(connection, fx)
        gate = await connection.fetch(
            merge.GATE, *_columns([(c.uri, c.rev, c.seq, c.cid, c.row is None) for c in cold])
        )
        newest = {r[0] for r in gate}
        cold = [c for c in cold if c.uri in newest]
        twins = [c.uri for c in cold if c.table.pair and c.row is not None]
        if twins:  # under the gate's locks, so that the answer stays true
            shadowed = shadowed.union(r[0] for r in await connection.fetch(merge.SHADOWED, twins))
        for table, mine in _by_table(cold):
            new, pending = _divide(mine, shadowed)
            if new:
                placed = {r[0] for r in await connection.fetch(merge.insert(table), [c.row for c in new])}
                derived.add(fx, table, [c for c in new if c.uri in placed])
                pending.update((c.uri, c) for c in new if c.uri not in placed)
                rows += len(placed)
            rows += await self._settle(connection, table, pending, fx)
        return rows

    async def _insert_hot(
        self, connection: Connection, changes: list[Change], shadowed: set[str]
    ) -> tuple[list[tuple[Table, list[Change]]], list[tuple[Table, dict[str, Change]]]]:
        """Insert what is new: many of a table by COPY, all the others with one call.

        Returns what is in the tables now; and what goes by the rows that are there: refused, in the shadow, deletes.
        """
        fresh: list[tuple[Table, list[Change]]] = []
        waiting: list[tuple[Table, dict[str, Change]]] = []
        few: list[tuple[Table, list[Change], dict[str, Change]]] = []
        for table, mine in _by_table(changes):
            new, pending = _divide(mine, shadowed)
            waiting.append((table, pending))
            if self._may_copy(len(new)):
                new, taken = await self._copy_new(connection, table, new)
                fresh.append((table, new))
                pending.update((c.uri, c) for c in taken)
            elif new:
                few.append((table, new, pending))
        if few:
            rows = {"new_" + table.name: [c.row for c in new] for table, new, _ in few}
            found = (await self._put(connection, rows))["placed"]
            for table, new, pending in few:
                if found is not None:
                    placed = set(found)
                    pending.update((c.uri, c) for c in new if c.uri not in placed)
                fresh.append((table, [c for c in new if c.uri not in pending]))
        return fresh, [(table, pending) for table, pending in waiting if pending]

    async def _settle(self, connection: Connection, table: Table, pending: dict[str, Change], fx: Effects) -> int:
        """Work off `pending` under the locks of the rows that are there. Returns rows changed."""
        settle = self._settle_pairs if table.pair else self._settle_records
        rows = 0
        for _ in range(ROUNDS_MAX):
            if not pending:
                return rows
            rows += await settle(connection, table, pending, fx)
        raise StoreUnavailable(f"{table.name}: {len(pending)} rows were still contended after {ROUNDS_MAX} rounds")

    async def _copy_new(
        self, connection: Connection, table: Table, upserts: list[Change]
    ) -> tuple[list[Change], list[Change]]:
        """By COPY what a look says has room. Returns these, and those whose URI or pair is taken."""
        rows = [c.row for c in upserts]
        keys = [table.index(column) for column in (table.key, *table.pair)]
        found = await connection.fetch(merge.taken(table), *([row[key] for row in rows] for key in keys))  # type: ignore[index]
        taken = {r[0] for r in found}
        if table.pair:
            pairs: set[tuple[str, ...]] = set()
            for change, row in zip(upserts, rows, strict=True):
                if change.uri not in taken:
                    before = len(pairs)
                    pairs.add((row[keys[1]], row[keys[2]]))  # type: ignore[index]
                    if len(pairs) == before:
                        taken.add(change.uri)
        fresh = [c for c in upserts if c.uri not in taken] if taken else upserts
        await self._copy(connection, table, [c.row for c in fresh])
        return fresh, [c for c in upserts if c.uri in taken]

    def _trust(self) -> None:
        """After a transaction: one step nearer to COPY, or nearer to a short wait the next time."""
        if self._wary:
            self._wary -= 1
        elif self._wary_next > WARY_MIN:
            self._wary_next = max(WARY_MIN, self._wary_next - 1)

    def _may_copy(self, rows: int) -> bool:
        return rows >= self.copy_rows_min and not self._wary

    async def _copy(self, connection: Connection, table: Table, rows: list[Any]) -> None:
        """Rows that nobody else should have written. If somebody did, the transaction begins again without COPY."""
        if not rows:
            return
        schema, _, name = merge.qualified(table).rpartition(".")
        try:
            await connection.copy_records_to_table(name, schema_name=schema, columns=table.columns, records=rows)
        except UniqueViolationError as error:
            self._wary, self._wary_next = self._wary_next, min(WARY_MAX, 4 * self._wary_next)
            raise _Contended from error

    async def _superseded(
        self, connection: Connection, table: Table, pending: dict[str, Change], shadowed: set[str]
    ) -> None:
        """Forget upserts whose stored row is not older: most are redeliveries, and need no lock.

        Not what is in the shadow as well: whichever of the two is older has to go.
        """
        upserts = [uri for uri, c in pending.items() if c.row is not None and uri not in shadowed]
        if upserts:
            for uri, rev, seq in await connection.fetch(merge.versions_of(table), upserts):
                change = pending[uri]
                if not newer(change.rev, change.seq, rev, _seq(seq)):
                    del pending[uri]

    async def _settle_records(
        self, connection: Connection, table: Table, pending: dict[str, Change], fx: Effects
    ) -> int:
        """Updates and deletes of rows that exist, under their locks. What vanished meanwhile stays pending."""
        stored = {r[0]: tuple(r) for r in await connection.fetch(merge.lock(table), sorted(pending))}
        updates: list[Row] = []
        deletes: list[str] = []
        again: list[Change] = []
        for uri, change in list(pending.items()):
            old = stored.get(uri)
            if old is None:
                if change.row is None:
                    del pending[uri]  # nothing to delete: the tombstone stands
                    if table is PROFILES and change.rkey == "self":
                        fx.profiles[change.repo] = None  # what another writer may have put into users
                else:
                    again.append(change)
                continue
            del pending[uri]
            rev, seq = _version(table, old)
            foreign = table.hot and rev is None and seq is None
            if table.hot and not _replaces(change, rev, seq):
                continue
            derived.removed(fx, table, old, counted=not foreign)
            if change.row is None:
                deletes.append(uri)
            else:
                derived.added(fx, table, change.row, change.cid)
                updates.append(change.row)
        if updates:
            await connection.execute(merge.update(table), updates)
        if deletes:
            await connection.execute(merge.delete(table), deletes)
        inserted = 0
        if again:
            for row in await connection.fetch(merge.insert(table), [c.row for c in again]):
                change = pending.pop(row[0])
                derived.added(fx, table, change.row, change.cid)  # type: ignore[arg-type]
                inserted += 1
        return len(updates) + len(deletes) + inserted

    async def _settle_pairs(self, connection: Connection, table: Table, pending: dict[str, Change], fx: Effects) -> int:
        """Work out who holds each unique pair, under the lock of the row that holds it now.

        A pair's members are the row in the table and its twins in the shadow table; the lowest rkey belongs
        in the table. Whoever changes the members of a pair holds its winner's row; where a pair has no winner,
        the unique index decides, and the loser comes back here.
        """
        located = await connection.fetch(merge.locate(table), sorted(pending))
        homes: dict[str, list[str]] = {}  # two of them if it changed its pair on the way
        for r in located:
            homes.setdefault(r[0], []).append(r[1])
        for uri in [u for u, c in pending.items() if c.row is None and u not in homes]:
            del pending[uri]  # nothing to delete: the tombstone stands
        if not pending:
            return 0
        pairs = {pair for uri in pending for pair in homes.get(uri, ())}
        wanted = {_pair(table, c.row) for c in pending.values() if c.row is not None}
        pairs |= wanted
        holders = {r[0] for r in located if r[2]}
        if others := pairs.difference(r[1] for r in located if r[2]):
            found = await connection.fetch(merge.winners(table), *_columns(p.split("\n") for p in others))
            holders.update(r[0] for r in found)
        stored = {r[0]: tuple(r) for r in await connection.fetch(merge.lock(table), sorted(holders))}
        if len(stored) < len(holders):
            return 0  # one vanished while we waited: look again
        winners = {_pair(table, row): row for row in stored.values()}
        shadows: dict[str, dict[str, _Member]] = {}
        for r in await connection.fetch(merge.TWINS, table.name, list(pairs)):
            shadows.setdefault(r[1], {})[r[0]] = _Member(r[2], r[0], thaw(table, r[6]), r[3], r[4], r[5])
        for r in located:  # what moved between table and shadow since, or into another pair: look again
            held = winners.get(r[1])
            if (held is None or held[0] != r[0]) if r[2] else r[0] not in shadows.get(r[1], ()):
                return 0
        if not winners.keys() <= pairs:
            return 0
        twins = {uri: member for members in shadows.values() for uri, member in members.items()}
        if table.hot and (strays := twins.keys() - pending.keys()):
            # A twin whose record is in the table too, with another pair, cannot be promoted: settle it with the rest.
            for r in await connection.fetch(merge.versions_of(table), sorted(strays)):
                twin = twins[r[0]]
                pending[r[0]] = Change(
                    table, r[0], derived.did_of(r[0]), twin.rkey, twin.rev, twin.seq, 0, twin.cid, twin.row
                )
            if pending.keys() & strays:
                return 0
        displaced = [row[0] for pair, row in winners.items() if pair in wanted]
        displaced_cids = await self._cids(connection, table, displaced, fx)
        return await self._rearrange(connection, table, pending, fx, pairs, winners, shadows, homes, displaced_cids)

    async def _cids(self, connection: Connection, table: Table, uris: list[str], fx: Effects) -> dict[str, str | None]:
        """CIDs of rows that do not carry their own, from the derived rows that need them, written or about to be."""
        statement = merge.CIDS.get(table.name)
        if statement is None or not uris:
            return {}
        reposts = table.name == "reposts"
        keys = uris if reposts else [uri + "#notification" for uri in uris]
        cids: dict[str, str | None] = {r[0]: r[1] for r in await connection.fetch(statement, keys)}
        for uri, key in zip(uris, keys, strict=True):
            if (row := (fx.feed_added if reposts else fx.notes_added).get(key)) is not None:
                cids[uri] = row[5]
        return cids

    async def _rearrange(
        self,
        connection: Connection,
        table: Table,
        pending: dict[str, Change],
        fx: Effects,
        pairs: Iterable[str],
        winners: dict[str, Row],
        shadows: dict[str, dict[str, _Member]],
        homes: dict[str, list[str]],
        cids: dict[str, str | None],
    ) -> int:
        """Apply the changes to the members of each pair, then make table and shadow say so."""
        before: dict[str, dict[str, _Member]] = {}
        for pair in pairs:
            members = dict(shadows.get(pair, ()))
            if (row := winners.get(pair)) is not None:
                rev, seq = _version(table, row)
                cid = cids.get(row[0]) or (row[1] if "cid" in table.columns else None)
                members[row[0]] = _Member(_rkey(row[0]), row[0], row, rev, seq, cid)
            before[pair] = members
        after = {pair: dict(members) for pair, members in before.items()}
        touched: set[str] = set()
        applied: list[str] = []
        for uri, change in sorted(pending.items()):
            applied.append(uri)
            # The newest of what is there; an older one stayed behind in another pair and goes.
            here = homes.get(uri, [])
            if len(here) == 2 and _is_newer(before[here[0]][uri], before[here[1]][uri]):
                here = here[::-1]
            for pair in here[:-1]:
                after[pair].pop(uri, None)
                touched.add(pair)
            if here:
                current = before[here[-1]][uri]
                touched.add(here[-1])
                if table.hot and not _replaces(change, current.rev, current.seq):
                    continue
                after[here[-1]].pop(uri, None)
            if change.row is not None:
                pair = _pair(table, change.row)
                after[pair][uri] = _Member(change.rkey, uri, change.row, change.rev, change.seq, change.cid)
                touched.add(pair)

        table_deletes: list[str] = []
        twin_deletes: list[str] = []
        updates: list[Row] = []
        inserts: list[tuple[str, _Member]] = []  # (pair, winner)
        twin_puts: dict[str, list[_Member]] = {}
        for pair in sorted(touched):
            old = winners.get(pair)
            members = after[pair]
            best = min(members.values(), default=None, key=lambda m: (m.rkey, m.uri))
            foreign = old is not None and table.hot and _version(table, old) == (None, None)
            if old is not None and (best is None or best.uri != old[0]):
                table_deletes.append(old[0])
                derived.removed(fx, table, old, counted=not foreign)
            elif foreign and best is not None and best.row is old:
                fx.recount.update(derived.subjects(table, old))
            if best is not None and (old is None or best.uri != old[0]):
                inserts.append((pair, best))
            elif best is not None and old is not None and best.row is not old:
                derived.removed(fx, table, old, counted=not foreign)
                derived.added(fx, table, best.row, best.cid)
                updates.append(best.row)
            twin_deletes.extend(
                uri for uri in shadows.get(pair, ()) if uri not in members or (best is not None and uri == best.uri)
            )
            twin_puts[pair] = [
                m
                for m in members.values()
                if best is not None and m.uri != best.uri and shadows.get(pair, {}).get(m.uri) is not m
            ]

        if table_deletes:
            await connection.execute(merge.delete(table), sorted(table_deletes))
        if twin_deletes:
            await connection.execute(merge.TWINS_DELETE, sorted(twin_deletes))
        if updates:
            await connection.execute(merge.update(table), updates)
        if inserts:
            inserts.sort(key=lambda item: item[1].uri)
            got = await connection.fetch(merge.insert(table), [m.row for _, m in inserts])
            placed = {r[0] for r in got}
            for pair, member in inserts:
                if member.uri in placed:
                    derived.added(fx, table, member.row, member.cid)
                    continue
                # Another writer took the empty pair first: those of ours come back and find it.
                if pair in winners:
                    raise _Contended  # another writer put this very uri elsewhere: begin again, and see it
                twin_puts.pop(pair, None)
                applied = [u for u in applied if u not in after[pair]]
        puts = sorted(((m, pair) for pair, members in twin_puts.items() for m in members), key=lambda p: p[0].uri)
        if puts:
            await connection.execute(
                merge.TWINS_PUT,
                *_columns([(m.uri, table.name, pair, m.rkey, m.rev, m.seq, m.cid, _freeze(m.row)) for m, pair in puts]),
            )
        for uri in applied:
            del pending[uri]
        return len(applied)

    async def _derived(self, connection: Connection, fx: Effects, progress: Progress | None) -> dict[Key, datetime]:
        """Derived rows and counters; the counters last, because hot rows stay locked until the commit.

        Returns the keys that are owed now, and since when.
        """
        execute = connection.execute
        if fx.profiles:
            empty = (None,) * len(PROFILES.columns)
            profiles = [(did, *(row or empty)[2:]) for did, row in sorted(fx.profiles.items())]
            await execute(merge.PROFILES, *_columns(profiles))
        if fx.gates_set or fx.gates_removed:
            await self._gates(connection, fx)
        if fx.labels_added:
            await execute(merge.LABEL_EVENTS, sorted(fx.labels_added))
        await self._copy_items(connection, fx)
        arguments = self._items_of(fx) | self._last_of(fx, progress)
        owed_since: Any = (await self._put(connection, arguments))["owed_since"] if arguments else None
        if fx.recount and self._recount is not None:  # a later statement than its lock
            await execute(self._recount, sorted(fx.recount))
        return dict.fromkeys(fx.owed, owed_since)

    async def _items(self, connection: Connection, fx: Effects) -> None:
        """Quotes, feed items, notifications and viewer states. What is written is forgotten: more may follow."""
        await self._copy_items(connection, fx)
        if arguments := self._items_of(fx):
            await self._put(connection, arguments)

    async def _copy_items(self, connection: Connection, fx: Effects) -> None:
        """Those of which there are many: what follows from a new record is new."""
        for table, removed, added in _items_by_table(fx):
            if self._may_copy(len(added)):
                keys = [key for key in sorted(added) if key not in removed]
                await self._copy(connection, table, [added.pop(key) for key in keys])

    def _items_of(self, fx: Effects) -> dict[str, Any]:
        """Arguments of `put`; forgotten by `fx`."""
        arguments: dict[str, Any] = {}
        for table, removed, added in _items_by_table(fx):
            if gone := removed.difference(added):
                arguments["no_" + table.name] = sorted(gone)
            if added:
                arguments["new_" + table.name] = [added[key] for key in sorted(added)]
            removed.clear()
            added.clear()
        if fx.viewers_cleared:
            cleared = [
                (post, viewer, 0 in which, 1 in which, 2 in which)
                for (post, viewer), which in sorted(fx.viewers_cleared.items())
            ]
            arguments.update(zip(merge.UNSEEN, _columns(cleared), strict=True))
        states = [(*key, *state) for key, state in sorted(fx.viewers_set.items()) if state != [None, None, False]]
        if states:
            arguments["new_viewers"] = states
        fx.viewers_set.clear()
        fx.viewers_cleared.clear()
        return arguments

    def _last_of(self, fx: Effects, progress: Progress | None) -> dict[str, Any]:
        """Arguments of `put`: counters, what is owed, how far the group has come."""
        arguments: dict[str, Any] = {}
        if self._recount is not None and (keys := sorted(fx.counts.keys() | fx.recount)):
            none = [0, 0, 0, 0, 0]  # never a delta and a recount for one key: this locks it
            arguments["deltas"] = [(k, *(none if k in fx.recount else fx.counts[k])) for k in keys]
        if fx.owed:
            arguments["owed_kinds"], arguments["owed_keys"] = _columns(sorted(fx.owed))
        if progress is not None:
            arguments["of_stream"], arguments["of_consumer"] = progress.stream, progress.consumer
            arguments["until_seq"], arguments["until_entry"] = progress.seq, progress.entry_id
        return arguments

    async def _gates(self, connection: Connection, fx: Effects) -> None:
        set_rows = [row for _, row in sorted(fx.gates_set.items())]
        threads = {row[2]: derived.thread_gate_row(row) for row in set_rows if row[1] == "thread"}
        posts = {row[2]: derived.post_gate_row(row) for row in set_rows if row[1] == "post"}
        gone = sorted(fx.gates_removed.items())
        no_thread = [p for p, row in threads.items() if row is None]
        no_thread += [post for uri, post in gone if "/app.bsky.feed.threadgate/" in uri and post not in threads]
        no_post = [post for uri, post in gone if "/app.bsky.feed.postgate/" in uri and post not in posts]
        if no_thread:
            await connection.execute(merge.THREAD_GATES_DELETE, sorted(no_thread))
        if live := {post: row for post, row in threads.items() if row is not None}:
            await connection.execute(merge.THREAD_GATES, *_sorted_columns(live))
        if no_post:
            await connection.execute(merge.POST_GATES_DELETE, sorted(no_post))
        if posts:
            await connection.execute(merge.POST_GATES, *_sorted_columns(posts))

    # 5: rows that join two records ----------------------------------------------------------------

    async def _rejoin(self, connection: Connection, upserts: list[Change], joined: set[Key]) -> None:
        """Recompute the joined rows that this batch's upserts may have changed. Those of removals are owed rows."""
        keys = set(joined)
        contexts, flags, services = (name in self._derive for name in ("thread_contexts", "gate_flags", "like_counts"))
        for change in upserts:
            table, row = change.table, change.row
            assert row is not None
            if table is LIKES:
                if services and derived.is_liked_service(row[2]):
                    keys.add(("like_count", row[2]))
            elif table is POSTS:
                if contexts and row[7] is not None and row[7] != row[0]:
                    keys.add(("context", row[0]))
            elif flags and table.name == "fastworker.gates":
                keys.add(("gate", row[2]))
            elif services and (table is FEED_GENERATORS or table.name == "labeler_services"):
                keys.add(("like_count", row[0]))
        if keys:
            await self._recompute(connection, {}, keys, wait=False)

    async def _recompute(
        self, connection: Connection, owed: dict[Key, datetime], fresh: set[Key], *, wait: bool = True
    ) -> None:
        """Recompute joined rows under the lock of the row that carries them; owed keys are paid with it.

        Without `wait`, a post that another flush has locked is left owed instead: `maintain` comes back to it.
        """
        by_kind: dict[str, list[str]] = {kind: [] for kind in merge.JOINED_KINDS}
        for kind, key in sorted(owed.keys() | fresh):
            by_kind[kind].append(key)
        paid = _columns((*key, since) for key, since in sorted(owed.items())) or [()] * 3
        await self._retry(lambda: connection.execute(merge.RECOMPUTE, *by_kind.values(), *paid, wait))

    # Deleted accounts -----------------------------------------------------------------------------

    async def _purge(self, connection: Connection, dead_commit: timedelta) -> int:
        """Remove one bounded piece of a deleted account's records, like deletes of each of them.

        When nothing is left, once more after a while, for the reason of `_look_again`.
        """
        account = await connection.fetchrow(merge.PURGE_NEXT, dead_commit)
        if account is None:
            return 0
        did, deleted_seq = account
        found = await connection.fetch(merge.PURGE_PIECE, did, deleted_seq, PURGE_PIECE)
        tables = {table.name: table for table in TABLES}
        kills = {}  # a twin of a cold table is found twice
        for name, uri in found:
            table = tables[name] if name is not None else collection_table(uri)
            kills[uri] = Change(table, uri, did, _rkey(uri), None, deleted_seq, 0, None, None)
        if kills:
            await self._main(connection, list(kills.values()), set(), None)
            crashpoint(Place.IN_ACCOUNT_DELETION)
        else:
            await connection.execute(merge.PURGED, did, deleted_seq)
        return len(kills) + 1

    async def _retry(self, work: Callable[[], Awaitable[_T]]) -> _T:
        """Run a transaction again that lost a deadlock: the order of locks makes that rare, not impossible."""
        for attempt in range(ATTEMPTS_MAX):
            try:
                return await work()
            except RETRYABLE as error:
                self.conflicts += 1
                if attempt + 1 == ATTEMPTS_MAX:
                    raise StoreUnavailable(f"PostgreSQL: {error} ({ATTEMPTS_MAX} attempts)") from error
                await asyncio.sleep(random.uniform(0, 0.01 * 2 ** min(attempt, 6)))
        raise AssertionError


def _is_left_open(connection: Connection) -> bool:
    try:
        return bool(connection.is_in_transaction())
    except (InterfaceError, AttributeError):  # it is gone already
        return False


async def _refuse_pooler(*connections: Connection | asyncpg.Connection[Any]) -> None:
    """Two connections that share one session are a pooler's that we cannot work with."""
    pids = {await connection.fetchval("SELECT pg_backend_pid()") for connection in connections}
    if len(pids) < len(connections):
        raise Unreachable(POOLER)


def _divide(changes: list[Change], shadowed: set[str]) -> tuple[list[Change], dict[str, Change]]:
    """Upserts that may be new; and what goes by the rows that are there: deletes, and what is in the shadow."""
    new: list[Change] = []
    pending: dict[str, Change] = {}
    for change in changes:
        if change.row is None or change.uri in shadowed:
            pending[change.uri] = change
        else:
            new.append(change)
    return new, pending


def _by_table(changes: Iterable[Change]) -> Iterator[tuple[Table, list[Change]]]:
    """In the order in which every writer locks."""
    found: dict[str, list[Change]] = {}
    for change in changes:
        found.setdefault(change.table.name, []).append(change)
    for table in TABLES:
        if table.name in found:
            yield table, found[table.name]


def _items_by_table(fx: Effects) -> tuple[tuple[Table, set[str], dict[str, Row]], ...]:
    """(table, keys removed, rows added)"""
    return (
        (QUOTES, fx.quotes_removed, fx.quotes_added),
        (FEED_ITEMS, fx.feed_removed, fx.feed_added),
        (NOTIFICATIONS, fx.notes_removed, fx.notes_added),
    )


def _found(upserts: list[Change], rows: list[Any]) -> _Look:
    """What the rows of a look, (kind, key, rev, seq), say about these upserts."""
    look = _Look({}, set(), set(), set())
    tombstones: dict[str, tuple[str | None, int | None]] = {}
    accounts: dict[str, int] = {}
    for kind, key, rev, seq in rows:
        if kind == "tombstone":
            tombstones[key] = (rev, seq)
        elif kind == "account":
            accounts[key] = seq
        elif kind == "twin":
            look.shadowed.add(key)
        elif kind == "forbidden":
            look.forbidden.add(key)
        else:
            look.joined.add((kind, key))
    if tombstones or accounts:
        for change in upserts:
            tombstone = tombstones.get(change.uri)
            if tombstone is not None and not newer(change.rev, change.seq, *tombstone):
                look.kills[change.uri] = _kill(change, *tombstone)
            elif (deleted := accounts.get(change.repo)) is not None and (change.seq is None or change.seq < deleted):
                look.kills[change.uri] = _kill(change, None, deleted)
    return look


def _columns(rows: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Rows to one array per column, as unnest takes them."""
    return list(zip(*rows, strict=True))


def _sorted_rows(rows: dict[str, Row]) -> list[Row]:
    return [row for _, row in sorted(rows.items())]


def _sorted_columns(rows: dict[str, Row]) -> list[tuple[Any, ...]]:
    return _columns(_sorted_rows(rows))


def _newest(events: list[Any]) -> Any:
    """The newest of one DID's account or identity events: by seq within one relay, else by time."""

    def beats(a: Any, b: Any) -> bool:
        if a.event.relay == b.event.relay and a.event.seq is not None and b.event.seq is not None:
            return bool(a.event.seq > b.event.seq)
        return bool(a.at > b.at)

    best = events[0]
    for event in events[1:]:
        if beats(event, best):
            best = event
    return best


def _kill(change: Change, rev: str | None, seq: int | None) -> Change:
    return Change(change.table, change.uri, change.repo, change.rkey, rev, seq, 0, None, None)


def _seq(text: str | None) -> int | None:
    """commit_seq is text in the contract; what is not a number is no version."""
    return int(text) if text is not None and text.isdecimal() else None


def _version(table: Table, row: Row) -> tuple[str | None, int | None]:
    """(rev, seq) of a stored row; nothing for cold tables, whose gate has ordered the writers already."""
    return (row[-1], _seq(row[-2])) if table.hot else (None, None)


def _replaces(change: Change, rev: str | None, seq: int | None) -> bool:
    """Whether a change beats the stored version; at equal versions a delete beats an upsert."""
    if change.row is None:
        return not newer(rev, seq, change.rev, change.seq)
    return newer(change.rev, change.seq, rev, seq)


def _is_newer(a: _Member, b: _Member) -> bool:
    return newer(a.rev, a.seq, b.rev, b.seq)


def _pair(table: Table, row: Row) -> str:
    return "\n".join(row[table.index(column)] for column in table.pair)


def _rkey(uri: str) -> str:
    return uri[uri.rfind("/") + 1 :]


def _freeze(row: Row) -> str:
    return orjson.dumps(row).decode()


def thaw(table: Table, text: str) -> Row:
    """A row as the shadow table keeps it."""
    values = orjson.loads(text)
    return tuple(
        datetime.fromisoformat(value) if kind == "timestamp" and value is not None else value
        for kind, value in zip(table.types, values, strict=True)
    )
