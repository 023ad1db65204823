"""The path of an entry: read, decode, map, batch, flush, ack. One batch fills, one is written, never a third.

Natural batching: whatever arrived while the last flush ran is the next one, so a quiet stream flushes single entries
at once (no more often than every few milliseconds) and a busy one fills batches. Back-pressure is not reading. An entry
leaves in one of three ways, each ending in one ack: rows committed, nothing to store, set aside. Everything else stays
pending, and is read again by whoever comes next.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from fastworker.edge.tracing import OpenSpan, no_span
from fastworker.errors import Reason, StreamUnavailable
from fastworker.process.backoff import Backoff, pause
from fastworker.process.board import Slot, State, now_ms
from fastworker.store.upkeep import EntryRules
from fastworker.stream.consumer import Entry, SetAside
from fastworker.stream.ids import id_order
from fastworker.table.batch import Limits, Progress
from fastworker.worker.flush import Flush, Half, Store, Stream
from fastworker.worker.held import UNBOUNDED, Held
from fastworker.worker.isolate import settle
from fastworker.worker.limits import DeadLetterLimit, Refusals
from fastworker.worker.locked import Locks, Waiting
from fastworker.worker.overlap import Overlap
from fastworker.worker.suspects import CONTROL_ENTRIES, Quiet, Record, Suspects, like_it, name_of, say_trying
from fastworker.worker.turn import Turn

log = logging.getLogger(__name__)

PACE_S = 0.01  # between the starts of two flushes of a quiet stream: half the work, for a wait of a few milliseconds
BLOCK_MS = 250  # longest wait for a new entry, and so the longest wait of a stop for a quiet stream
POSTPONED_MS_MAX = 5_000  # that an entry whose records another pipeline holds is postponed, at most
MARKS_MAX = 1_024  # reads remembered until the group is seen to have finished them


class Source(Protocol):
    """What a pipeline needs of `worker.intake.Intake`. `backlog`: more is there already. `left_behind`: what
    `next` gave last is what some consumer did not get done."""

    @property
    def backlog(self) -> bool: ...
    @property
    def left_behind(self) -> bool: ...
    async def next(self, block_ms: int) -> list[Entry]: ...
    def look_again(self) -> None: ...


class Pipeline:
    """One consumer's loop. `run` returns when it was stopped and everything it held is settled."""

    def __init__(
        self,
        source: Source,
        stream: Stream,
        store: Store,
        slot: Slot,
        *,
        limits: Limits,
        dead_letters: DeadLetterLimit,
        refusals: Refusals | None = None,
        overlap: Overlap | None = None,
        open_span: OpenSpan = no_span,
        suspects: Suspects | None = None,
        quiet: Quiet | None = None,
        locks: Locks | None = None,
    ) -> None:
        self.stream = stream
        self.told: str | None = None  # the time of an event read lately
        self._source = source
        self._waiting = Waiting(locks)  # for rows that somebody else has locked
        self._flush = Flush(stream, store, slot, dead_letters=dead_letters, open_span=open_span, waiting=self._waiting)
        self._reading = Half(stream.name, slot)
        self._slot = slot
        self._limits = limits
        self._dead_letters = dead_letters
        self._refusals = refusals or Refusals()
        self._overlap = overlap
        self._suspects = suspects or Suspects()
        self._quiet = quiet or Quiet()
        self._quiet.members.append(self)
        self._trial: list[Entry] = []  # left behind after a death: tried while this process holds nothing else
        # Those that were held when a process died: tried once this process has settled enough others (suspects.py).
        self._later: dict[str, tuple[Entry, Record]] = {}
        self._is_reading = False
        self._finished_at_start = self._finished()
        self._entry_rules = UNBOUNDED
        self._filling = Held()
        self._writing: Held | None = None
        self._postponed: dict[str, tuple[dict[bytes, bytes], int]] = {}  # id -> fields, since when; the oldest first
        self._flush_at = 0.0  # when the latest flush began
        self._marks: list[tuple[str, int | None]] = []

    # --- what others look at

    @property
    def state(self) -> State:
        """Running, or what one of its two halves waits for."""
        return max(self._reading.state, self._flush.half.state)

    @property
    def progress_ms(self) -> int:
        """When it last got on: a read, a flush, an attempt."""
        return max(self._reading.progress_ms, self._flush.half.progress_ms)

    def got_on(self) -> None:
        self._reading.progress_ms = now_ms()

    @property
    def is_unsure(self) -> bool:
        """A write was begun and has not ended: its commit may still arrive, whatever becomes of us."""
        return self._flush.is_unsure

    @property
    def held_count(self) -> int:
        writing = len(self._writing.entries) if self._writing else 0
        put_by = len(self._waiting.entries) + len(self._flush.slow.entries)
        waiting = len(self._postponed) + put_by + len(self._trial) + len(self._later)
        return len(self._filling.entries) + writing + waiting

    @property
    def is_still(self) -> bool:
        """Whether it holds no entry that it has decoded, and is not reading."""
        return not (self._filling or self._writing or self._postponed or self._is_reading)

    @property
    def oldest_ms(self) -> int:
        """When the oldest unsettled entry was read; 0 if there is none."""
        postponed = next((since_ms for _, since_ms in self._postponed.values()), 0)
        put_by = self._waiting.since_ms, self._flush.slow.since_ms
        since = ((self._writing or self._filling).since_ms, postponed, *put_by)
        return min(filter(None, since), default=0)

    async def note_progress(self) -> None:
        """Look how far the whole group has finished; the next flush stores it. Cheap, for a slow tick."""
        marks = list(self._marks)  # before we ask: what is read meanwhile is not covered by the answer
        if not marks:
            return
        sessions = self._flush.store.sessions
        lowest = await self.stream.lowest_pending()
        if lowest is not None:
            bound = id_order(lowest)
            marks = [mark for mark in marks if id_order(mark[0]) < bound]
        newest = max(marks, key=lambda mark: id_order(mark[0]), default=None)
        if newest is not None:
            self._flush.progress = Progress(self.stream.stream_key, self.stream.name, newest[1], newest[0], sessions)
            self._marks = [mark for mark in self._marks if id_order(mark[0]) > id_order(newest[0])]

    def follow(self, rules: EntryRules) -> None:
        """Rules for the entries that are read from now on."""
        self._entry_rules = self._filling.rules = rules

    # --- the loop

    async def run(self, stopping: asyncio.Event) -> None:
        reading: asyncio.Task[list[Entry]] | None = None
        writing: asyncio.Task[None] | None = None
        try:
            while True:
                if self._later and not self._trial:
                    self._trial = [entry for entry, record in self._later.values() if self._may_try(record)]
                if self._trial and writing is None and self.is_still:
                    await self._try(stopping)
                if writing is None and self._waiting.is_time_to_look:
                    await self._flush.look_at_locks()
                    self._postponed |= self._waiting.take_free()
                if writing is None and self._postponed:
                    await self._bring_back(at_last=stopping.is_set() or bool(self._trial))
                if writing is None and (held := self._next_batch(stopping)):
                    self._writing = held
                    self._flush_at = time.monotonic()
                    writing = asyncio.create_task(
                        settle(self._flush, self._refusals, self._writing), name=f"flush {self.stream.name}"
                    )
                may_read = not (
                    stopping.is_set()
                    or self._filling.is_full(self._limits)
                    or len(self._waiting.entries) + len(self._flush.slow.entries) >= self._limits.entries_max
                    or self.state is not State.RUNNING
                    or self._quiet.wanted
                    or self._trial
                )
                if reading is None and may_read:
                    self._is_reading = True
                    reading = asyncio.create_task(self._read(stopping), name=f"read {self.stream.name}")
                tasks = {task for task in (reading, writing) if task is not None}
                if not tasks:
                    if stopping.is_set():
                        return
                    await self._quiet.tick(self)
                    continue
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if writing is not None and writing.done():
                    writing.result()
                    if self._overlap is not None and self._writing is not None:
                        # mutant: marks are kept
                        self._overlap.give_back(self._writing.keys)
                    self._writing = writing = None
                if reading is not None and reading.done():
                    entries = reading.result()
                    reading = None
                    if entries and self._source.left_behind and self._suspects.alert:
                        self._trial = [one for one in entries if not self._holds(one[0])]
                        self._is_reading = False
                    else:
                        await self._take(entries)
                        self._is_reading = False
        finally:
            for task in (reading, writing):
                if task is not None:
                    task.cancel()
                    await asyncio.wait([task])

    def _next_batch(self, stopping: asyncio.Event) -> Held | None:
        """What is written next: what has filled, or, in turns with it, one entry that was too slow."""
        if not stopping.is_set() and (slow := self._flush.slow.take_due(others=bool(self._filling))) is not None:
            return slow
        if not self._filling:
            return None
        filled, self._filling = self._filling, Held(self._entry_rules)
        return filled

    async def _read(self, stopping: asyncio.Event) -> list[Entry]:
        backoff = Backoff()
        # Without a backlog one read a flush is enough: it finds everything that came meanwhile.
        wait_s = self._flush_at + PACE_S - time.monotonic()
        if wait_s > 0 and not self._source.backlog and await pause(wait_s, stopping):
            return []
        while True:
            try:
                entries = await self._source.next(BLOCK_MS)
            except StreamUnavailable as error:
                self._reading.wait(State.WAITING_FOR_STREAM, error, backoff.elapsed)
                # The reply that did not come may have handed us entries: they are pending in our name now.
                self._source.look_again()
                if await backoff.wait(stopping):
                    return []
            else:
                self._reading.go_on()
                return entries

    def _holds(self, entry_id: str) -> bool:
        return (
            entry_id in self._filling.entries
            or (self._writing is not None and entry_id in self._writing.entries)
            or entry_id in self._postponed
            or entry_id in self._waiting.entries
            or entry_id in self._flush.slow.entries
        )

    async def _take(self, entries: list[Entry]) -> None:
        """Decode and map, in turns short enough for the flush and the heartbeat beside it."""
        filling = self._filling
        if entries and not filling:
            filling.since_ms = now_ms()
        turn = Turn()
        taken = 0
        for entry_id, fields in entries:
            if self._holds(entry_id):
                continue  # read back while we hold it
            if not filling.apply(entry_id, fields, self._overlap, postpone=True):
                # mutant: a postponed entry is forgotten
                self._postponed[entry_id] = (fields, now_ms())
            taken += 1
            if turn.is_over():
                await turn.next()
        if taken:
            self._slot.add(read=taken)
            if filling.mark is not None:
                if len(self._marks) >= MARKS_MAX:
                    del self._marks[1::2]  # the oldest stays: the group may come to it only after others came
                self._marks.append(filling.mark)
                self.told = filling.told or self.told

    async def _bring_back(self, *, at_last: bool) -> None:
        """Postponed entries into the next batch: those whose records are free by now, or that waited long enough."""
        before = now_ms() - POSTPONED_MS_MAX
        turn = Turn()
        for entry_id, (fields, since_ms) in list(self._postponed.items()):
            self._filling.since_ms = self._filling.since_ms or since_ms
            if self._filling.apply(entry_id, fields, self._overlap, postpone=since_ms > before and not at_last):
                del self._postponed[entry_id]
            if turn.is_over():
                await turn.next()

    # --- what somebody left behind, after a death

    def _finished(self) -> int:
        slot = self._slot
        return slot.get("committed") + slot.get("nothing_to_store") + slot.get("set_aside")

    def _may_try(self, record: Record) -> bool:
        return self._has_control() or now_ms() - self._slot.get("started_ms") >= record.patience_ms

    def _has_control(self) -> bool:
        """Whether this process has settled so much that its death would tell something."""
        return self._finished() - self._finished_at_start >= CONTROL_ENTRIES

    async def _try(self, stopping: asyncio.Event) -> None:
        """First those that nobody is known to have died with, all at once; the others one by one."""
        async with self._quiet.alone(self):
            names = {entry_id: name_of(entry_id, self.stream.partition) for entry_id, _ in self._trial}
            told = self._suspects.records(names.values())
            records = {entry_id: told[name] for entry_id, name in names.items() if name in told}
            fresh = [entry for entry in self._trial if entry[0] not in records]
            known = sorted((one for one in self._trial if one[0] in records), key=lambda one: records[one[0]])
            if fresh:
                await self._try_piece(fresh)
            for entry in known:
                if stopping.is_set():
                    break
                record = records[entry[0]]
                self._later.pop(entry[0], None)
                if self._may_try(record):
                    await self._try_piece([entry], poison=record if record.is_poison else None)
                else:
                    self._later[entry[0]] = entry, record
            self._trial = []

    async def _try_piece(self, piece: list[Entry], *, poison: Record | None = None) -> None:
        held = self._writing = Held(self._entry_rules)
        held.since_ms = now_ms()
        if len(piece) == 1 and not self._has_control():
            Held().apply("1-1", like_it(piece[0][1]))
        names = [name_of(entry_id, self.stream.partition) for entry_id, _ in piece]
        say_trying(self._slot, names, with_control=self._has_control())
        try:
            for entry_id, fields in piece:
                if poison is not None:
                    why = f"{poison.alone + poison.quiet} worker processes died that held nothing else"
                    held.entries[entry_id] = fields
                    held.rejected.append(SetAside(entry_id, fields, Reason.KILLS_WORKER, why))
                else:
                    held.apply(entry_id, fields, self._overlap)
            self._slot.add(read=len(piece))
            await settle(self._flush, self._refusals, held)
        except asyncio.CancelledError:
            say_trying(self._slot, [], with_control=False)  # a stop, not a death
            raise
        say_trying(self._slot, [], with_control=False)
        self._writing = None
        if self._overlap is not None:
            self._overlap.give_back(held.keys)
        if len(piece) == 1:
            self._suspects.forget(names[0])
