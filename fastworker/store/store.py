"""PostgreSQL as the worker sees it: every operation borrows a connection, and its errors come translated."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Self

import asyncpg
from asyncpg.exceptions import InterfaceError, PostgresError

from fastworker.errors import RowRejected, StoreUnavailable
from fastworker.store import accounts, blame, debts, flush, upkeep, whole
from fastworker.store import statements as sql
from fastworker.store.blame import LockedRow
from fastworker.store.debts import Debts
from fastworker.store.flush import Written
from fastworker.store.rules import DEFAULTS, Rules
from fastworker.store.session import (
    DURABLE,
    NO_HURRY,
    SESSION,
    Connection,
    Pools,
    Time,
    borrow,
    hurried,
    open_pools,
    translating,
)
from fastworker.store.upkeep import DEAD_COMMIT, HORIZON_NOTICE, TOMBSTONES_KEPT, EntryRules
from fastworker.store.writer import Writer
from fastworker.table.batch import Batch, Change, Progress, Refused

PING_S = 3.0


class Store:
    """The connections of one process, and the writer that uses them. Every method raises StoreUnavailable."""

    _pools: Pools

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.sessions = 0
        """How many were begun: what was found out before the newest may be of another server."""

    @classmethod
    async def connect(
        cls,
        database_url: str,
        *,
        rules: Rules = DEFAULTS,
        pool_size: int = 1,
        application_name: str = "fastworker",
        connect_timeout_s: float = 10.0,
        command_timeout_s: float = 90.0,
        meet: Callable[[asyncpg.Connection[Any]], Awaitable[None]] | None = None,
    ) -> Self:
        """Raises StoreUnavailable where the server cannot be reached or refuses.

        `meet` is called before anything is written in a new session.
        """
        store = cls(Writer(rules))

        async def begin(connection: asyncpg.Connection[Any]) -> None:
            if meet is not None:
                await meet(connection)
            store.sessions += 1
            store.writer.forget()

        store._pools = await open_pools(
            database_url,
            size=pool_size,
            application_name=application_name,
            connect_timeout_s=connect_timeout_s,
            command_timeout_s=command_timeout_s,
            settings=SESSION + (DURABLE if rules.synchronous_commit == "on" else ""),
            begin=begin,
        )
        return store

    async def close(self) -> None:
        try:
            async with asyncio.timeout(5):
                await self._pools.close()
        except (TimeoutError, OSError, InterfaceError, PostgresError):
            self._pools.terminate()

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        async with borrow(self._pools.flushes) as db:
            yield db

    @property
    def connections(self) -> tuple[int, int]:
        """Open, and of these at work."""
        pool = self._pools.flushes
        size = pool.get_size()
        return size, size - pool.get_idle_size()

    async def ping(self) -> None:
        """Raises StoreUnavailable unless the server answers within a moment."""
        with translating():
            async with asyncio.timeout(PING_S), self.connection() as db:
                try:
                    await db.fetchval("SELECT 1")
                except BaseException:  # a cancelled query is waited for, which on a hung server has no end
                    db.terminate()
                    raise

    async def write(self, batch: Batch, *, read_before: datetime | None = None, time: Time = NO_HURRY) -> Written:
        """One flush. Raises StoreUnavailable (write the same batch again later), of it RowLocked (what does not touch
        that row may be written now) and TooSlow (write it in pieces), or RowRejected (write it in halves).

        `read_before`: new notifications of records that are older come in read.
        """
        is_sure = False
        tables = {change.table.name for change in batch.changes.values()}
        self.writer.read_before = read_before
        self.writer.unread.clear()
        while True:
            try:
                async with asyncio.timeout(time.all_s):
                    written = await self._write(batch, time.statement_s)
                    await self._mark_read()
            except (StoreUnavailable, TimeoutError) as error:
                self.writer.forget()
                told = await blame.not_in_time(self.writer, self.connection, tables, error)
                if told is error:
                    raise
                raise told from error.__cause__
            except RowRejected as error:
                # mutant: control record not asked
                await blame.refuse_state(self.writer, self.connection, tables, error)
                if is_sure or len(batch.entries) > 1:
                    raise
                is_sure = True  # refused twice, with a control between: nobody mended the database meanwhile
            else:
                return written

    async def _write(self, batch: Batch, statement_s: float | None) -> Written:
        async with self.connection() as db, hurried(db, statement_s):
            if batch.progress is not None and batch.progress.session not in (None, self.sessions):
                batch.progress = None
            await flush.note_relays(self.writer, db, batch)
            written = await whole.write_whole(self.writer, db, batch)
            return written if written is not None else await flush.write(self.writer, db, batch)

    async def still_locked(self, rows: list[LockedRow]) -> set[LockedRow]:
        async with self.connection() as db:
            return await blame.still_locked(db, rows)

    async def maintain(
        self, *, owed_age_s: float = 10.0, dead_commit: timedelta = DEAD_COMMIT, crowds: bool = True
    ) -> int:
        """What is still owed (counters, joined rows, purges of deleted accounts, second looks), in one bounded piece.
        Joined rows that `pay` has left for `owed_age_s` are waited for. Large threads are left to it without `crowds`.

        Returns how much was done; 0 means that nothing is owed. Called at start and on a slow tick. Where no other
        writer is at work, both ages may be 0. Each of the four is tried whatever became of the others; an error is
        raised when nothing else is left to do.
        """
        done = 0
        failure: StoreUnavailable | RowRejected | None = None
        acts: tuple[Callable[[Connection], Awaitable[int]], ...] = (
            partial(debts.pay_apart, self.writer),
            partial(debts.recompute_owed, self.writer, age_s=owed_age_s),
            partial(upkeep.look_again, self.writer, dead_commit=dead_commit),
            partial(upkeep.purge, self.writer, dead_commit=dead_commit),
        )
        for act in acts:
            try:
                async with self.connection() as db:
                    done += await act(db)
            except (StoreUnavailable, RowRejected) as error:
                failure = failure or error
        if crowds:
            try:
                done += await self._pay_crowd()
            except StoreUnavailable as error:
                failure = failure or error
        if failure is not None and not done:
            raise StoreUnavailable(str(failure)) from failure
        return done

    async def pay(self) -> int:
        """What flushes owe who died before they paid, or whose payer had looked already. For a quick tick."""
        async with self.connection() as db:
            paid = await debts.pay_apart(self.writer, db)
        return paid + await self._pay_crowd()

    async def _pay_crowd(self) -> int:
        """The joined rows of one large thread. It takes minutes, in a session of its own: flushes need theirs."""
        async with self.connection() as db:
            crowd = await debts.next_crowd(self.writer, db)
        if crowd is None:
            return 0
        # mutant: a large thread takes a flush's connection
        async with borrow(self._pools.apart) as db:
            return await debts.pay_crowd(self.writer, db, *crowd)

    async def debts(self) -> Debts:
        """What is owed now."""
        async with self.connection() as db:
            return await debts.look(db)

    async def keep(self, refused: Sequence[Refused]) -> None:
        """Remember these records by name: their entries will be in no dead letter."""
        async with self.connection() as db:
            await upkeep.keep(self.writer, db, refused)

    async def prune(
        self,
        *,
        keep: timedelta = TOMBSTONES_KEPT,
        notice: timedelta = HORIZON_NOTICE,
        now: datetime | None = None,
    ) -> int:
        """Forget tombstones that nothing can need any more: one bounded piece. Returns how many went.

        `now`: by another clock than the server's; the earlier of the two counts.
        """
        async with self.connection() as db:
            return await upkeep.prune(db, keep, notice, now)

    async def entry_rules(self) -> EntryRules:
        async with self.connection() as db:
            return await upkeep.entry_rules(db)

    async def absent(self, changes: list[Change]) -> set[str]:
        """uris of the changes of which the database knows nothing, not even that they were deleted."""
        async with self.connection() as db:
            return await upkeep.absent(db, changes)

    async def now(self) -> datetime:
        """By the server's clock."""
        async with self.connection() as db:
            now: datetime = await db.fetchval("SELECT clock_timestamp()")
        return now

    async def finished(self, stream: str) -> Progress | None:
        """The furthest that any consumer saw the stream's group finished: where reader and worker resume."""
        async with self.connection() as db:
            return await upkeep.finished(db, stream)

    async def followed(self, dids: Sequence[str]) -> list[str]:
        """Whom these accounts follow, as far as the tables know."""
        async with self.connection() as db:
            rows = await db.fetch(sql.FOLLOWED, list(dids))
        return [did for (did,) in rows]

    async def note_progress(self, progress: Progress) -> None:
        """Of a stream on which nothing is left. Not noted where a session is newer than what was seen."""
        async with self.connection() as db:
            if progress.session in (None, self.sessions):
                mark = progress.stream, progress.consumer, progress.seq, progress.entry_id
                await self.writer.retry(lambda: db.execute(sql.NOTE_PROGRESS, *mark))

    async def _mark_read(self) -> None:
        """Notifications that did not come in read (`is_read` is not the state law's)."""
        if uris := sorted(self.writer.unread):
            async with self.connection() as db:
                await self.writer.retry(lambda: db.execute(sql.MARK_READ, uris))

    async def forget_repair(self, did: str, until_seq: int) -> None:
        """What a #sync up to then asked for is done."""
        async with self.connection() as db:
            await db.execute(sql.REPAIRED, did, until_seq)

    async def unresolved(self, limit: int) -> list[tuple[str, datetime]]:
        """(did, marked at) of identities without a known handle whose next attempt is due."""
        async with self.connection() as db:
            return await accounts.unresolved(db, limit)

    async def claimed_before(self, after: str, limit: int) -> tuple[str | None, int]:
        """Queue handles that were claimed while the resolver was off, a piece of the DIDs: (the last, how many)."""
        async with self.connection() as db:
            return await accounts.claimed_before(db, after, limit)

    async def resolved(self, rows: list[tuple[str, str | None, datetime, datetime]]) -> int:
        """Store looked-up handles: (did, handle or None, asked at, marked at). One is left out when a newer event came
        meanwhile. Returns how many were stored."""
        async with self.connection() as db:
            return await accounts.resolved(self.writer, db, rows)

    async def unresolvable(self, dids: list[str]) -> None:
        """Put off the next attempt: half a minute, then longer after each failure, a day at most."""
        async with self.connection() as db:
            await accounts.unresolvable(db, dids)
