"""The path of an entry: read, decode, map, batch, flush, ack. One batch fills, one is written, never a third.

Natural batching: whatever arrived while the last flush ran is the next one, so a quiet stream flushes single entries
at once (no more often than every few milliseconds) and a busy one fills batches. Back-pressure is not reading. An entry
leaves in one of three ways, each ending in one ack: rows committed, nothing to store, set aside. Everything else stays
pending, and is read again by whoever comes next.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Protocol, TypeVar

from fastworker.crashpoint import Step, crashpoint
from fastworker.edge.tracing import OpenSpan, no_span
from fastworker.errors import InvalidEvent, Reason, RowRejected, StoppedItself, StoreUnavailable, StreamUnavailable
from fastworker.event import Account, Commit, Event, Identity, Sync
from fastworker.event.entry import decode_entry, received_ms
from fastworker.process.backoff import Backoff, pause
from fastworker.process.board import Slot, State, now_ms
from fastworker.store.flush import Written
from fastworker.store.upkeep import Ground
from fastworker.stream.consumer import Entry, SetAside, Tally, id_order, original_fields
from fastworker.table.batch import Batch, Change, Limits, Mapped, Progress, Refused
from fastworker.table.dates import moment_of, parse_date
from fastworker.table.mapper import map_commit
from fastworker.worker.overlap import Overlap, keys_of
from fastworker.worker.suspects import CONTROL_ENTRIES, DEATHS_MAX, Quiet, Record, Suspects, say_trying

log = logging.getLogger(__name__)

PACE_S = 0.01  # between the starts of two flushes of a quiet stream: half the work, for a wait of a few milliseconds
BLOCK_MS = 250  # longest wait for a new entry, and so the longest wait of a stop for a quiet stream
TURN_S = 0.008  # decoding at a stretch, before the loop gets its turn
ATTEMPT_S = 120.0  # of one write or ack; a last resort, the edges have tighter bounds of their own
POSTPONED_MS_MAX = 1_000  # that an entry whose records another pipeline holds is postponed, at most
TELL_AGAIN_S = 60.0  # between two log lines about the same outage
MARKS_MAX = 1_024  # reads remembered until the group is seen to have finished them

LETTERS_OF_ACCOUNT_MAX = 20  # a process; what more of its content is refused is kept by name
REFUSING_ACCOUNTS_MAX = 10_000

_COMMIT = Tally("committed", "#commit")
_NOTHING = Tally("nothing_to_store", "#commit")
_IDENTITY = Tally("committed", "#identity")
_ACCOUNT = Tally("committed", "#account")
_SYNC = Tally("committed")
_NEVER = datetime.min.replace(tzinfo=UTC)
UNBOUNDED = Ground(_NEVER, ambiguous=False)
CLOCKS = timedelta(minutes=10)  # by which the clocks of relay, Redis and PostgreSQL may differ
_T = TypeVar("_T")


class Stream(Protocol):
    """What a pipeline needs of `stream.consumer.WorkerStream`."""

    @property
    def name(self) -> str: ...
    @property
    def stream_key(self) -> str: ...
    async def ack(self, tallies: Mapping[Tally, Sequence[str]], more_drops: Sequence[str] = ...) -> int: ...
    async def set_aside(self, letters: Sequence[SetAside], now_ms: int) -> int: ...
    async def pushed_out(self, count: int) -> list[dict[bytes, bytes]]: ...
    async def lowest_pending(self) -> str | None: ...


class Source(Protocol):
    """What a pipeline needs of `worker.intake.Intake`. `backlog`: more is there already. `left_behind`: what
    `next` gave last is what some consumer did not get done."""

    @property
    def backlog(self) -> bool: ...
    @property
    def left_behind(self) -> bool: ...
    async def next(self, block_ms: int) -> list[Entry]: ...
    def look_again(self) -> None: ...


class Store(Protocol):
    """What a pipeline needs of `store.store.Store`."""

    @property
    def sessions(self) -> int: ...
    async def write(self, batch: Batch) -> Written: ...
    async def absent(self, changes: list[Change]) -> set[str]: ...
    async def keep(self, refused: Sequence[Refused]) -> None: ...


class _Turn:
    """Work at a stretch, by the clock: a hostile entry takes as long as a thousand others. Ask after each entry."""

    __slots__ = ("_ends",)

    def __init__(self) -> None:
        self._ends = time.perf_counter() + TURN_S

    def is_over(self) -> bool:
        return time.perf_counter() >= self._ends

    async def next(self) -> None:
        await asyncio.sleep(0)
        self._ends = time.perf_counter() + TURN_S


class DeadLetterLimit:
    """Stops the worker when too much is set aside: a bad release must not empty the stream into the dead letters.

    Entries are counted when they are settled, once. The counts are shared by all processes that are forked after it was
    made; two that count in the same instant may lose a count, which changes nothing.
    """

    def __init__(self, *, run_max: int = 500, ratio_max: float = 0.5, window: int = 4_000) -> None:
        """More than `run_max` in a row, or `ratio_max` and more of about the last `window` entries. Guesses: far
        above what hostile accounts get past the reader, far below what an operator would want to repair."""
        self._run_max = run_max
        self._ratio_max = ratio_max
        self._window = window
        self._counts = memoryview(mmap.mmap(-1, 3 * 8)).cast("q")  # in a row, good, bad

    def good(self, count: int = 1) -> None:
        self._counts[0] = 0
        self._counts[1] += count
        self._fade()

    def bad(self, why: object, count: int = 1, *, in_a_row: int | None = None) -> None:
        """Call before setting entries aside; raises StoppedItself, and they stay pending.

        `in_a_row`: the longest row of them, where others are between them.
        """
        counts = self._counts
        counts[0] = counts[0] + count if in_a_row is None else in_a_row
        counts[2] += count
        run, seen = counts[0], counts[1] + counts[2]
        if run > self._run_max or (seen >= self._window and counts[2] >= self._ratio_max * seen):
            raise StoppedItself(
                f"Too many entries cannot be stored: {run} in a row, {counts[2]} of the last {seen}. They stay "
                f"pending (FASTWORKER_DEAD_LETTERS_IN_A_ROW lets more pass). The last one: {why}"
            )
        self._fade()

    def _fade(self) -> None:
        """Forget half of a full window: old entries fade out."""
        counts = self._counts
        while counts[1] + counts[2] >= 2 * self._window:
            counts[1] //= 2
            counts[2] //= 2


class Refusals:
    """How often each account's content was refused by this process: a few are letters, the others are kept by name.

    So nobody can fill the dead letters, or stop the worker: of each account one counts against the limit.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def add(self, did: str) -> int:
        """How many it are now."""
        if len(self._counts) >= REFUSING_ACCOUNTS_MAX:
            self._counts.clear()
        self._counts[did] += 1
        return self._counts[did]


class Held:
    """A batch, the entries it came from (to apply them again in halves), and how each will be counted."""

    __slots__ = (
        "batch",
        "before_horizon",
        "changes",
        "entries",
        "ground",
        "keys",
        "kinds",
        "mark",
        "rejected",
        "since_ms",
        "tallies",
        "told",
    )

    def __init__(self, ground: Ground = UNBOUNDED) -> None:
        self.ground = ground
        self.before_horizon: dict[str, list[Change]] = {}  # upserts of entries that a forgotten delete may beat
        self.batch = Batch()
        self.entries: dict[str, dict[bytes, bytes]] = {}
        self.changes: dict[str, list[Change]] = {}  # by entry
        self.tallies: dict[Tally, list[str]] = {}
        self.keys: list[int] = []  # marked in the overlap
        self.kinds: Counter[type[Event]] = Counter()
        self.rejected: list[SetAside] = []  # never settled: they leave through the dead letters
        self.since_ms = 0  # when its first entry was read
        self.mark: tuple[str, int | None] | None = None  # id and seq of the latest entry understood
        self.told: str | None = None  # its time, as the relay said it

    def __bool__(self) -> bool:
        return bool(self.entries)

    def is_full(self, limits: Limits) -> bool:
        return self.batch.is_full(limits) or len(self.entries) >= limits.entries_max

    def rejected_in_a_row(self) -> int:
        """The longest row of them among the entries."""
        rejected = {letter.entry_id for letter in self.rejected}
        longest = run = 0
        for entry_id in self.entries:
            run = run + 1 if entry_id in rejected else 0
            longest = max(longest, run)
        return longest

    def apply(
        self, entry_id: str, fields: dict[bytes, bytes], overlap: Overlap | None = None, *, postpone: bool = False
    ) -> bool:
        """Put one entry's content into the batch, all of it or nothing, and settle it; or reject it.

        False, and nothing is done: another pipeline holds one of its records, and it may be postponed.
        """
        self.entries[entry_id] = fields
        try:
            event = decode_entry(fields)
            entry_ms = received_ms(entry_id, fields)
            if self.ground.ambiguous and isinstance(event, Commit) and event.rev is None:
                self.rejected.append(SetAside(entry_id, fields, Reason.AMBIGUOUS_SEQ, f"seq {event.seq} without rev"))
                return True
            tally, mapped, at = _understand(event, entry_ms)
        except InvalidEvent as error:
            self.rejected.append(
                SetAside(entry_id, fields, error.reason, error.detail or f"{error.reason}: nothing there")
            )
            return True
        except Exception as error:
            # A bug of ours that some bytes can reach must not stop the stream for everybody else's: the entry waits
            # in the dead letters for the release that mends it, and the limit still stops a worker that is all bug.
            log.exception("Entry %s could not be understood", entry_id)
            self.rejected.append(SetAside(entry_id, fields, Reason.BAD_ENTRY, f"our bug: {error!r}"))
            return True
        batch = self.batch
        if mapped is not None:
            if self.ground.pruned_until > _NEVER and _moment(event, entry_ms) < self.ground.pruned_until + CLOCKS:
                upserts = [change for change in mapped.changes if change.row is not None]
                if upserts:
                    self.before_horizon[entry_id] = upserts
                    return True
            if overlap is not None:
                keys = keys_of(mapped)
                if not overlap.take(keys) and postpone:
                    del self.entries[entry_id]
                    return False
                self.keys += keys
            batch.put(mapped)
            self.changes[entry_id] = mapped.changes
        elif isinstance(event, Identity):
            batch.put_identity(event, at)
        elif isinstance(event, Account):
            batch.put_account(event, at)
        elif isinstance(event, Sync):
            batch.put_sync(event)
        self.mark = (entry_id, event.seq)
        self.told = event.time
        self.kinds[type(event)] += 1
        batch.settle(entry_id, payload_bytes=sum(map(len, fields.values())))
        self.tallies.setdefault(tally, []).append(entry_id)
        return True

    def uncount(self) -> None:
        """Entries of which nothing was stored, since all of it had been deleted, are not counted as committed."""
        beaten = self.batch.beaten
        for tally, ids in list(self.tallies.items()) if beaten else ():
            if tally.kind == _COMMIT.kind and tally.outcome == _COMMIT.outcome:
                gone = {one for one in ids if (of := self.changes[one]) and all(c.uri in beaten for c in of)}
                if gone:
                    del self.tallies[tally]
                    nothing = Tally(_NOTHING.outcome, tally.kind, tally.drops)
                    for one in ids:
                        self.tallies.setdefault(nothing if one in gone else tally, []).append(one)


def _understand(event: Event, entry_ms: int) -> tuple[Tally, Mapped | None, datetime]:
    """How an event is counted, what a commit becomes, and when the other kinds happened."""
    if isinstance(event, Commit):
        mapped = map_commit(event, entry_ms)
        tally = _COMMIT if mapped.changes or mapped.dids else _NOTHING
        if mapped.drops:
            tally = Tally(tally.outcome, tally.kind, tuple(sorted(drop.reason for drop in mapped.drops)))
        return tally, mapped, _NEVER
    at = _moment(event, entry_ms)
    if isinstance(event, Identity):
        return _IDENTITY, None, at
    return (_ACCOUNT if isinstance(event, Account) else _SYNC), None, at


def _moment(event: Event, entry_ms: int) -> datetime:
    """When it happened: by its own time where that can be, else when it was received."""
    return moment_of(None if event.time is None else parse_date(event.time), entry_ms).replace(tzinfo=UTC)


def _names(event: Event, changes: Sequence[Change], reason: str, detail: str) -> list[Refused]:
    """What remembers an event without its content: its records, or its account."""
    did = event.repo if isinstance(event, Commit) else event.did
    rev = event.rev if isinstance(event, Commit | Sync) else None
    seq = event.seq if event.seq is None or abs(event.seq) < 2**63 else None
    of = [(change.uri, change.cid) for change in changes] or [(f"at://{did}", None)]
    return [Refused(uri, did, cid, rev, seq, str(reason), detail[:200]) for uri, cid in of]


def _names_of_letter(letter: dict[bytes, bytes]) -> list[Refused]:
    """Of a letter that goes; nothing of one that no release understands: it names no record."""
    reason, error = (letter.get(name, b"").decode(errors="replace") for name in (b"reason", b"error"))
    try:
        event = decode_entry(original_fields(letter))
        changes = map_commit(event, 0).changes if isinstance(event, Commit) else []
    except Exception:  # noqa: BLE001 - whatever made it a letter
        return []
    return _names(event, changes, reason, error)


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
    ) -> None:
        self.stream = stream
        self.progress_ms = now_ms()  # when it last got on: a read, a flush, an attempt
        self.told: str | None = None  # the time of an event read lately
        self.is_unsure = (
            False  # a write was begun and has not ended: its commit may still arrive, whatever becomes of us
        )
        self._source = source
        self._store = store
        self._slot = slot
        self._limits = limits
        self._dead_letters = dead_letters
        self._refusals = refusals or Refusals()
        self._open_span = open_span
        self._overlap = overlap
        self._suspects = suspects or Suspects()
        self._quiet = quiet or Quiet()
        self._quiet.members.append(self)
        self._trial: list[Entry] = []  # left behind after a death: tried while this process holds nothing else
        # Of these what has killed, where this process has not settled enough yet to learn from its own death.
        self._later: dict[str, tuple[Entry, Record]] = {}
        self._is_reading = False
        self._finished_at_start = self._finished()
        self._ground = UNBOUNDED
        self._filling = Held()
        self._writing: Held | None = None
        self._postponed: dict[str, tuple[dict[bytes, bytes], int]] = {}  # id -> fields, since when; the oldest first
        self._flush_at = 0.0  # when the latest flush began
        self._reading_state = State.RUNNING
        self._writing_state = State.RUNNING
        self._told_at = 0.0  # when the log was last told what is waited for
        self._marks: deque[tuple[str, int | None]] = deque(maxlen=MARKS_MAX)
        self._progress: Progress | None = None

    # --- what others look at

    @property
    def state(self) -> State:
        """Running, or what one of its two halves waits for."""
        return max(self._reading_state, self._writing_state)

    @property
    def held_count(self) -> int:
        writing = len(self._writing.entries) if self._writing else 0
        return len(self._filling.entries) + writing + len(self._postponed) + len(self._trial) + len(self._later)

    @property
    def is_still(self) -> bool:
        """It holds nothing that it has looked at, and reads nothing."""
        return not (self._filling or self._writing or self._postponed or self._is_reading)

    @property
    def oldest_ms(self) -> int:
        """When the oldest unsettled entry was read; 0 if there is none."""
        held = (self._writing or self._filling).since_ms
        postponed = next((since_ms for _, since_ms in self._postponed.values()), 0)
        return min(held or postponed, postponed or held)

    async def note_progress(self) -> None:
        """Look how far the whole group has finished; the next flush stores it. Cheap, for a slow tick."""
        marks = list(self._marks)  # before we ask: what is read meanwhile is not covered by the answer
        if not marks:
            return
        sessions = self._store.sessions
        lowest = await self.stream.lowest_pending()
        if lowest is not None:
            bound = id_order(lowest)
            marks = [mark for mark in marks if id_order(mark[0]) < bound]
        newest = max(marks, key=lambda mark: id_order(mark[0]), default=None)
        if newest is not None:
            self._progress = Progress(self.stream.stream_key, self.stream.name, newest[1], newest[0], sessions)

    def stand_on(self, ground: Ground) -> None:
        """From the next entry on."""
        self._ground = self._filling.ground = ground

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
                if writing is None and self._postponed:
                    await self._bring_back(at_last=stopping.is_set() or bool(self._trial))
                if writing is None and self._filling:
                    self._writing, self._filling = self._filling, Held(self._ground)
                    self._flush_at = time.monotonic()
                    writing = asyncio.create_task(self._flush(self._writing), name=f"flush {self.stream.name}")
                may_read = not (
                    stopping.is_set()
                    or self._filling.is_full(self._limits)
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
                        self._overlap.give_back(self._writing.keys)
                    self._writing = writing = None
                if reading is not None and reading.done():
                    entries = reading.result()
                    reading = None
                    if entries and self._source.left_behind and self._suspects.alert:
                        held = self._filling.entries | (self._writing.entries if self._writing else {})
                        self._trial = [one for one in entries if one[0] not in held and one[0] not in self._postponed]
                        self._is_reading = False
                    else:
                        await self._take(entries)
                        self._is_reading = False
        finally:
            for task in (reading, writing):
                if task is not None:
                    task.cancel()
                    await asyncio.wait([task])

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
                self._reading_state = self._wait(self._reading_state, State.WAITING_FOR_STREAM, error, backoff.elapsed)
                # The reply that did not come may have handed us entries: they are pending in our name now.
                self._source.look_again()
                if await backoff.wait(stopping):
                    return []
            else:
                self._reading_state = self._go_on(self._reading_state)
                return entries

    async def _take(self, entries: list[Entry]) -> None:
        """Decode and map, in turns short enough for the flush and the heartbeat beside it."""
        filling, writing = self._filling, self._writing.entries if self._writing else {}
        if entries and not filling:
            filling.since_ms = now_ms()
        turn = _Turn()
        taken = 0
        for entry_id, fields in entries:
            if entry_id in filling.entries or entry_id in writing or entry_id in self._postponed:
                continue  # read back while we hold it
            if not filling.apply(entry_id, fields, self._overlap, postpone=True):
                self._postponed[entry_id] = (fields, now_ms())
            taken += 1
            if turn.is_over():
                await turn.next()
        if taken:
            self._slot.add(read=taken)
            if filling.mark is not None:
                self._marks.append(filling.mark)
                self.told = filling.told or self.told

    async def _bring_back(self, *, at_last: bool) -> None:
        """Postponed entries into the next batch: those whose records are free by now, or that waited long enough."""
        before = now_ms() - POSTPONED_MS_MAX
        turn = _Turn()
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
            records = self._suspects.records(entry_id for entry_id, _ in self._trial)
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
                    await self._try_piece([entry], is_poison=record.alone >= DEATHS_MAX)
                else:
                    self._later[entry[0]] = entry, record
            self._trial = []

    async def _try_piece(self, piece: list[Entry], *, is_poison: bool = False) -> None:
        held = self._writing = Held(self._ground)
        held.since_ms = now_ms()
        say_trying(self._slot, [entry_id for entry_id, _ in piece], with_control=self._has_control())
        try:
            for entry_id, fields in piece:
                if is_poison:
                    why = f"{DEATHS_MAX} worker processes died that held nothing else"
                    held.entries[entry_id] = fields
                    held.rejected.append(SetAside(entry_id, fields, Reason.KILLS_WORKER, why))
                else:
                    held.apply(entry_id, fields, self._overlap)
            for letter in held.rejected:
                self._dead_letters.bad(letter.error)
            self._dead_letters.good(len(piece) - len(held.rejected))
            self._slot.add(read=len(piece))
            await self._flush(held)
        except asyncio.CancelledError:
            say_trying(self._slot, [], with_control=False)  # an end in good order
            raise
        say_trying(self._slot, [], with_control=False)
        self._writing = None
        if self._overlap is not None:
            self._overlap.give_back(held.keys)
        if len(piece) == 1:
            self._suspects.forget(piece[0][0])

    # --- the flush

    async def _flush(self, held: Held) -> None:
        """Write, then ack. Cancelled or killed anywhere, it can be done again."""
        with self._open_span("flush") as span:
            if held.before_horizon:
                await self._judge(held)
            span.set_attribute("fastworker.consumer", self.stream.name)
            span.set_attribute("fastworker.entries", len(held.entries))
            span.set_attribute("fastworker.changes", len(held.batch.changes))
            span.set_attribute("fastworker.set_aside", len(held.rejected))
            if held.rejected:
                in_a_row = held.rejected_in_a_row() if held.batch else None
                self._dead_letters.bad(held.rejected[-1].error, len(held.rejected), in_a_row=in_a_row)
                await self._leave_aside(held.rejected)
            if not held.batch:
                return
            held.batch.progress = self._progress
            try:
                store_drops = await self._write(held.batch)
            except RowRejected as error:
                span.set_attribute("fastworker.row_rejected", str(error))
                await self._isolate(held, error)
            else:
                await self._ack(held, store_drops)

    async def _judge(self, held: Held) -> None:
        """Entries from before the horizon: what the database does not know may have been deleted and forgotten."""
        upserts = [change for changes in held.before_horizon.values() for change in changes]
        absent = await self._persist(State.WAITING_FOR_STORE, lambda: self._store.absent(upserts))
        held.ground = held.ground._replace(pruned_until=_NEVER)
        turn = _Turn()
        for entry_id, changes in held.before_horizon.items():
            fields = held.entries[entry_id]
            unknown = sorted(change.uri for change in changes if change.uri in absent)
            if unknown:
                held.rejected.append(SetAside(entry_id, fields, Reason.OLDER_THAN_TOMBSTONES, " ".join(unknown[:3])))
            else:
                held.apply(entry_id, fields)
            if turn.is_over():
                await turn.next()

    async def _write(self, batch: Batch) -> list[Reason]:
        """One flush, as often as it takes; the reasons of ops that the store itself dropped."""
        if not (batch.changes or batch.dids or batch.accounts or batch.identities or batch.syncs):
            return []
        drops = len(batch.drops)
        started = time.perf_counter()

        async def attempt() -> Written:
            del batch.drops[drops:]  # an earlier attempt's
            self.is_unsure = True
            try:
                written = await self._store.write(batch)
            except RowRejected:
                self.is_unsure = False
                raise
            self.is_unsure = False
            return written

        written = await self._persist(State.WAITING_FOR_STORE, attempt)
        batch.beaten = written.beaten
        took_us = int((time.perf_counter() - started) * 1e6)
        entries = len(batch.entries)
        slot = self._slot
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
        await self._persist(State.WAITING_FOR_STREAM, lambda: self.stream.ack(held.tallies, store_drops))
        wall_ms = time.time_ns() // 1_000_000
        slot = self._slot
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
        self._dead_letters.good(len(held.batch.entries))
        kinds = held.kinds
        slot.add(commits=kinds[Commit], identities=kinds[Identity], accounts=kinds[Account], syncs=kinds[Sync])

    async def _leave_aside(self, letters: list[SetAside]) -> None:
        crashpoint(Step.BETWEEN_DEAD_LETTER_AND_ACK)
        pushed = await self._persist(State.WAITING_FOR_STREAM, lambda: self.stream.pushed_out(len(letters)))
        if names := [name for letter in pushed for name in _names_of_letter(letter)]:
            await self._persist(State.WAITING_FOR_STORE, lambda: self._store.keep(names))
            log.warning("%d dead letters make room: their records are kept in fastworker.refused", len(pushed))
        wall_ms = time.time_ns() // 1_000_000
        await self._persist(State.WAITING_FOR_STREAM, lambda: self.stream.set_aside(letters, wall_ms))
        self._slot.add(set_aside=len(letters))
        reasons = Counter(letter.reason for letter in letters)
        for reason, count in reasons.items():
            self._slot.drop(reason, count)
        log.warning(
            "Set aside %d entries (%s); the first: %s, %s",
            len(letters), ", ".join(f"{reason} {n}" for reason, n in reasons.items()), letters[0].entry_id,
            letters[0].error,
        )  # fmt: skip
        for letter in letters:
            log.debug("Set aside %s: %s (%s)", letter.entry_id, letter.reason, letter.error)

    async def _isolate(self, held: Held, error: RowRejected) -> None:
        """PostgreSQL refused a value: apply the entries again in halves, until the one that holds it is alone."""
        entries = [(entry_id, held.entries[entry_id]) for entry_id in held.batch.entries]
        if len(entries) == 1:
            await self._isolate_op(entries[0], error)
            return
        middle = len(entries) // 2
        for half in (entries[:middle], entries[middle:]):
            part = Held()
            part.since_ms = held.since_ms
            turn = _Turn()
            for entry_id, fields in half:
                part.apply(entry_id, fields)
                if turn.is_over():
                    await turn.next()
            await self._flush(part)
            await asyncio.sleep(0)

    async def _isolate_op(self, entry: Entry, error: RowRejected) -> None:
        """One bad record must not cost the commit: its siblings are stored, then the entry is set aside whole.

        A retry of the dead letter is harmless: the siblings are there already. An account that has many letters gets
        no more of them; the records are kept by name.
        """
        entry_id, fields = entry
        event = decode_entry(fields)
        letter = SetAside(entry_id, fields, Reason.ROW_REJECTED, str(error))
        did = event.repo if isinstance(event, Commit) else event.did
        mapped = map_commit(event, received_ms(entry_id, fields)) if isinstance(event, Commit) else None
        refused = mapped.changes if mapped is not None else []
        if mapped is not None and len(refused) > 1:
            refused = await self._write_parts(mapped, 0, len(refused))
        count = self._refusals.add(did)
        if count <= LETTERS_OF_ACCOUNT_MAX:
            await self._leave_aside([letter])
            return
        names = _names(event, refused, Reason.ROW_REJECTED, str(error))
        await self._persist(State.WAITING_FOR_STORE, lambda: self._store.keep(names))
        tally = Tally("set_aside", drops=(Reason.ROW_REJECTED,))
        await self._persist(State.WAITING_FOR_STREAM, lambda: self.stream.ack({tally: [entry_id]}))
        self._slot.add(set_aside=1)
        self._slot.drop(Reason.ROW_REJECTED)
        log.debug("Kept %s by name: %s (%s)", entry_id, did, error)

    async def _write_parts(self, mapped: Mapped, first: int, stop: int) -> list[Change]:
        """Write these changes, or their halves; those that are refused alone."""
        batch = Batch()
        batch.put(Mapped(mapped.changes[first:stop], mapped.dids, []))
        try:
            await self._write(batch)
        except RowRejected:
            if stop - first == 1:
                return mapped.changes[first:stop]
            middle = (first + stop) // 2
            return await self._write_parts(mapped, first, middle) + await self._write_parts(mapped, middle, stop)
        return []

    async def _persist(self, waiting: State, attempt: Callable[[], Awaitable[_T]]) -> _T:
        """Try until it works: whoever stops us cancels us. Reading pauses meanwhile."""
        backoff = Backoff()
        while True:
            try:
                async with asyncio.timeout(ATTEMPT_S):
                    result = await attempt()
            except (StoreUnavailable, StreamUnavailable, TimeoutError) as error:
                self._writing_state = self._wait(self._writing_state, waiting, error, backoff.elapsed)
                await asyncio.sleep(backoff.next())
            else:
                self._writing_state = self._go_on(self._writing_state)
                return result

    def _wait(self, before: State, state: State, error: Exception, since_s: float) -> State:
        if before is not state or time.monotonic() - self._told_at >= TELL_AGAIN_S:
            self._told_at = time.monotonic()
            log.debug("%s waits%s: %s", self.stream.name, f", for {since_s:.0f} s now" if since_s else "", error)
        self.progress_ms = now_ms()
        self._slot.failed(error)
        if state is State.WAITING_FOR_STORE:
            self._slot.add(store_retries=1)
        else:
            self._slot.add(stream_retries=1)
        return state

    def _go_on(self, before: State) -> State:
        if before is not State.RUNNING:
            log.debug("%s goes on", self.stream.name)  # the monitor tells of the outage, once for all pipelines
        self.progress_ms = now_ms()
        return State.RUNNING
