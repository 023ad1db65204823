"""The writing half of a pipeline: a batch into PostgreSQL, then the ack of its entries, as often as it takes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from fastworker.crashpoint import Step, crashpoint
from fastworker.edge.tracing import OpenSpan, Span, no_span
from fastworker.errors import Reason, RowRejected, StoreUnavailable, StreamUnavailable
from fastworker.event import Account, Commit, Identity, Sync
from fastworker.process.backoff import Backoff
from fastworker.process.board import Slot, State, now_ms
from fastworker.redact import redact
from fastworker.store.blame import LockedRow, RowLocked, TooSlow
from fastworker.store.flush import Written
from fastworker.store.session import Time
from fastworker.stream.consumer import SetAside, Tally
from fastworker.table.batch import Batch, Change, Progress, Refused
from fastworker.worker.held import NEVER, Held, names_of_letter
from fastworker.worker.limits import DeadLetterLimit
from fastworker.worker.locked import Waiting
from fastworker.worker.slow import Slow
from fastworker.worker.turn import Turn

log = logging.getLogger(__name__)

ATTEMPT_S = 120.0  # of one write or ack; a last resort, the edges have tighter bounds of their own

_T = TypeVar("_T")


class Stream(Protocol):
    """What a pipeline needs of `stream.consumer.WorkerStream`."""

    @property
    def name(self) -> str: ...
    @property
    def stream_key(self) -> str: ...
    @property
    def partition(self) -> int: ...
    async def ack(self, tallies: Mapping[Tally, Sequence[str]], more_drops: Sequence[str] = ...) -> int: ...
    async def set_aside(self, letters: Sequence[SetAside], now_ms: int) -> int: ...
    async def pushed_out(self, count: int) -> list[dict[bytes, bytes]]: ...
    async def lowest_pending(self) -> str | None: ...


class Store(Protocol):
    """What a pipeline needs of `store.store.Store`."""

    @property
    def sessions(self) -> int: ...
    async def write(self, batch: Batch, *, time: Time) -> Written: ...
    async def absent(self, changes: list[Change]) -> set[str]: ...
    async def still_locked(self, rows: list[LockedRow]) -> set[LockedRow]: ...
    async def keep(self, refused: Sequence[Refused]) -> None: ...


class _GoAround(Exception):
    """A row is locked, or the batch is too slow: it is not to be waited for."""

    def __init__(self, found: RowLocked | TooSlow) -> None:
        super().__init__(str(found))
        self.found = found


class Half:
    """One of the two halves of a pipeline, reading or writing: at work, or waiting for a server."""

    def __init__(self, name: str, slot: Slot) -> None:
        self.state = State.RUNNING
        self.progress_ms = now_ms()  # when it last got on: a read, a flush, an attempt
        self._name = name
        self._slot = slot

    def wait(self, state: State, error: Exception, since_s: float) -> None:
        log.debug("%s waits for %.0f s now: %s", self._name, since_s, error)  # the monitor tells of the outage
        self.state = state
        self.progress_ms = now_ms()
        self._slot.failed(error)
        if state is State.WAITING_FOR_STORE:
            self._slot.add(store_retries=1)
        else:
            self._slot.add(stream_retries=1)

    def go_on(self) -> None:
        if self.state is not State.RUNNING:
            log.debug("%s goes on", self._name)
        self.state = State.RUNNING
        self.progress_ms = now_ms()


class Flush:
    """Writes and acknowledges what one pipeline holds."""

    def __init__(
        self,
        stream: Stream,
        store: Store,
        slot: Slot,
        *,
        dead_letters: DeadLetterLimit,
        open_span: OpenSpan = no_span,
        waiting: Waiting | None = None,
    ) -> None:
        self.half = Half(stream.name, slot)
        self.waiting = waiting or Waiting()
        self.slow = Slow()
        self.is_unsure = False  # a write was begun and has not ended: its commit may still arrive
        self.progress: Progress | None = None  # stored with the next batch, and not again
        self.stream = stream
        self.store = store
        self.slot = slot
        self.dead_letters = dead_letters
        self.open_span = open_span

    async def settle(
        self, held: Held, span: Span, *, patient: bool = False
    ) -> RowRejected | RowLocked | TooSlow | None:
        """Write, then ack. Cancelled or killed anywhere, it can be done again.

        Returns the error, and then nothing is written or acked: RowRejected where PostgreSQL refuses a value,
        RowLocked where another transaction has locked a row (`patient`: that is waited for instead), TooSlow where it
        does not get this batch done in time, but others.
        """
        if held.before_horizon:
            await self._judge(held)
        span.set_attribute("fastworker.consumer", self.stream.name)
        span.set_attribute("fastworker.entries", len(held.entries))
        span.set_attribute("fastworker.changes", len(held.batch.changes))
        span.set_attribute("fastworker.set_aside", len(held.rejected))
        if held.rejected:
            in_a_row = held.rejected_in_a_row() if held.batch else None
            self.dead_letters.bad(held.rejected[-1].error, len(held.rejected), in_a_row=in_a_row)
            await self.leave_aside(held.rejected)
        if not held.batch:
            return None
        held.batch.progress = self.progress
        try:
            # mutant: ack before commit
            store_drops = await self.write(held.batch, held, patient=patient)
        except (RowLocked, TooSlow) as found:
            return found
        except RowRejected as error:
            span.set_attribute("fastworker.row_rejected", str(error))
            return error
        # mutant: progress with every flush
        if self.progress is held.batch.progress:
            self.progress = None
        await self._ack(held, store_drops)
        return None

    async def _judge(self, held: Held) -> None:
        """Entries from before the horizon: what the database does not know may have been deleted and forgotten."""
        upserts = [change for changes in held.before_horizon.values() for change in changes]
        absent = await self.persist(State.WAITING_FOR_STORE, lambda: self.store.absent(upserts))
        held.rules = held.rules._replace(pruned_until=NEVER)
        turn = Turn()
        for entry_id, changes in held.before_horizon.items():
            fields = held.entries[entry_id]
            unknown = sorted(change.uri for change in changes if change.uri in absent)
            if unknown:
                held.rejected.append(SetAside(entry_id, fields, Reason.OLDER_THAN_TOMBSTONES, " ".join(unknown[:3])))
            else:
                held.apply(entry_id, fields)
            if turn.is_over():
                await turn.next()

    async def write(self, batch: Batch, held: Held | None = None, *, patient: bool = True) -> list[Reason]:
        """One flush, as often as it takes; the reasons of ops that the store itself dropped.

        `held`: what the batch came from. Raises RowRejected, TooSlow, and, where it is not `patient`, RowLocked.
        """
        if not (batch.changes or batch.dids or batch.accounts or batch.identities or batch.syncs):
            return []
        drops = len(batch.drops)
        started = time.perf_counter()

        async def attempt() -> Written:
            # another pipeline may have found the locked row while this one waited
            if held is not None and not patient and (locked := self.waiting.first_of(held)) is not None:
                raise _GoAround(locked)
            del batch.drops[drops:]  # drops that an earlier attempt added
            self.is_unsure = True
            try:
                written = await self.store.write(batch, time=self.slow.time_for(held))
            except (RowLocked, TooSlow) as found:
                self.is_unsure = isinstance(found, TooSlow) and not found.is_ended
                if isinstance(found, TooSlow) or not patient:
                    raise _GoAround(found) from found
                raise
            except RowRejected:
                self.is_unsure = False
                raise
            self.is_unsure = False
            return written

        try:
            written = await self.persist(State.WAITING_FOR_STORE, attempt)
        except _GoAround as around:
            self.half.go_on()
            raise around.found from around.found.__cause__
        batch.beaten = written.beaten
        took_us = int((time.perf_counter() - started) * 1e6)
        entries = len(batch.entries)
        slot = self.slot
        slot.add(flushes=1, flush_us_total=took_us, flush_entries_total=entries)
        slot.add(rows=written.rows, superseded=written.superseded)
        slot.observe("flush_ms", took_us // 1_000)
        slot.observe("flush_entries", entries)
        slot.set(flush_us_last=took_us, store_ms=now_ms())
        for table, count in Counter(change.table.name for change in batch.changes.values()).items():
            slot.wrote(table, count)
        return [drop.reason for drop in batch.drops[drops:]] + [Reason.FORBIDDEN] * written.forbidden

    async def _ack(self, held: Held, store_drops: list[Reason]) -> None:
        crashpoint(Step.BEFORE_ACK)
        held.uncount()
        await self.persist(State.WAITING_FOR_STREAM, lambda: self.stream.ack(held.tallies, store_drops))
        wall_ms = time.time_ns() // 1_000_000
        slot = self.slot
        for tally, ids in held.tallies.items():
            slot.add(**{tally.outcome: len(ids)})
            for appended_ms, count in Counter([entry_id.partition("-")[0] for entry_id in ids]).items():
                age = max(0, wall_ms - int(appended_ms))
                slot.observe("latency_ms", age, count)
                slot.add(latency_ms_total=age * count)
            for reason in tally.drops:
                slot.drop(Reason(reason), len(ids))
        for reason in store_drops:
            slot.drop(reason)
        self.dead_letters.good(len(held.batch.entries))
        kinds = held.kinds
        slot.add(commits=kinds[Commit], identities=kinds[Identity], accounts=kinds[Account], syncs=kinds[Sync])

    async def leave_aside(self, letters: list[SetAside]) -> None:
        crashpoint(Step.BETWEEN_DEAD_LETTER_AND_ACK)
        pushed = await self.persist(State.WAITING_FOR_STREAM, lambda: self.stream.pushed_out(len(letters)))
        if names := [name for letter in pushed for name in names_of_letter(letter)]:
            await self.persist(State.WAITING_FOR_STORE, lambda: self.store.keep(names))
            log.warning("%d dead letters make room: their records are kept in fastworker.refused", len(pushed))
        wall_ms = time.time_ns() // 1_000_000
        await self.persist(State.WAITING_FOR_STREAM, lambda: self.stream.set_aside(letters, wall_ms))
        self.slot.add(set_aside=len(letters))
        reasons = Counter(letter.reason for letter in letters)
        for reason, count in reasons.items():
            self.slot.drop(reason, count)
        log.warning(
            "Set aside %d entries (%s); the first: %s, %s",
            len(letters), ", ".join(f"{reason} {n}" for reason, n in reasons.items()), letters[0].entry_id,
            letters[0].error,
        )  # fmt: skip
        for letter in letters:
            log.debug("Set aside %s: %s (%s)", letter.entry_id, letter.reason, letter.error)

    async def look_at_locks(self) -> None:
        """Forget the rows that are locked no more."""
        locks = self.waiting.locks
        if locks.rows:
            try:
                locks.keep(await self.store.still_locked(list(locks.rows)))
            except StoreUnavailable:
                return  # the next flush finds it out
        self.tell_what_waits()

    def tell_what_waits(self) -> None:
        self.slot.text("locked", redact(str(next(iter(self.waiting.locks.rows.values()), self.slow.words))))

    async def persist(self, waiting: State, attempt: Callable[[], Awaitable[_T]]) -> _T:
        """Try until it works; a stop cancels it. Reading pauses meanwhile."""
        backoff = Backoff()
        while True:
            try:
                async with asyncio.timeout(ATTEMPT_S):
                    result = await attempt()
            except (StoreUnavailable, StreamUnavailable, TimeoutError) as error:
                self.half.wait(waiting, error, backoff.elapsed)
                await asyncio.sleep(backoff.next())
            else:
                self.half.go_on()
                return result
