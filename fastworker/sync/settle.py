"""Settle: how a snapshot of a repository becomes rows. Only the differences are written, by the same flush as events.

The walk of the repository and the stored rows of the account come in the same order, so both directions are compared
in one pass: what is missing or different is written at the snapshot's version, and what is stored, absent and older is
deleted at it. Nothing is written twice: a second settle of the same snapshot finds no difference.

The caller has waited until the worker has finished what was read before the snapshot. What is older and comes later
all the same is kept away by a floor (store/floors.py), where every worker knows of floors.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import Counter
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import timedelta
from typing import Any, Final

import msgspec
import orjson
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table as Grid
from rich.text import Text

from fastworker.crashpoint import Step
from fastworker.errors import ExitCode, Reason, RowRejected
from fastworker.event.repository import Repository, TreeRecord
from fastworker.store.audit import StoredRecord
from fastworker.store.floors import all_know_floors, put_floor, readers_are_through
from fastworker.store.store import Store
from fastworker.store.stored import Standing, StandingRows, Stored
from fastworker.sync.hosts import handle_in
from fastworker.sync.status import Word, take_handle, take_word
from fastworker.table.batch import Batch, Change, Mapped, Row, is_gone, newer
from fastworker.table.chosen import WHOLE, Part, is_account_left_out, is_choosing, is_left_out
from fastworker.table.derive import FULL, Effects, add
from fastworker.table.schema import Table, collection_table
from fastworker.table.snapshot import Piece, Snapshot, is_judged_date, pieces

log = logging.getLogger(__name__)

PIECE: Final = 2_000
TELL_S: Final = 5.0
YOUNG: Final = timedelta(minutes=10)
"""Rows without a version of ours that are not older than this before the snapshot: the API may have written them."""
OLD: Final = timedelta(days=1)
EXAMPLES: Final = 20


class Settled(msgspec.Struct):
    """What was found of one account, by table, and what was done about it."""

    did: str
    records: int = 0
    compared: Counter[str] = msgspec.field(default_factory=Counter)
    missing: Counter[str] = msgspec.field(default_factory=Counter)
    different: Counter[str] = msgspec.field(default_factory=Counter)
    extra: Counter[str] = msgspec.field(default_factory=Counter)
    drops: Counter[str] = msgspec.field(default_factory=Counter)
    written: int = 0
    refused: str | None = None
    examples: list[str] = []

    @property
    def differences(self) -> int:
        return self.missing.total() + self.different.total() + self.extra.total()


class Settle:
    """`store` None: only look. `pace`: entered for each batch that is written, so that others have their turn."""

    def __init__(
        self, stored: Stored, store: Store | None, pace: AbstractAsyncContextManager[object] | None = None
    ) -> None:
        self._stored = stored
        self._store = store
        self._pace = pace or nullcontext()

    async def settle(
        self,
        repository: Repository,
        snapshot: Snapshot,
        *,
        accept_older: bool = False,
        floor: bool = False,
        part: Part = WHOLE,
        result: Settled | None = None,
    ) -> Settled:
        """The repository was walked before (`check`), so that it is known to be whole. `result`: goes on with it.

        `floor`: it was so at S0, and every worker knows floors. `part`: what is compared; where that is not all of it
        there is no floor.
        """
        result = Settled(snapshot.did) if result is None else result
        result.refused = await self._refusal(snapshot, accept_older)
        is_whole = part == WHOLE and not is_choosing()
        if result.refused is None and floor and is_whole and self._store is not None:
            result.refused = await self._floor(self._store, snapshot, accept_older)
        if result.refused:
            return result
        told = time.monotonic() + TELL_S
        async with self._stored.standing(snapshot.did) as standing:
            for piece in pieces(covered(repository.records(), part), snapshot, PIECE):
                if piece.uris:
                    there = await self._stored_of(piece, standing, piece.uris[-1], snapshot, result, part)
                    await self._piece(piece, there, snapshot, result)
                if time.monotonic() > told:
                    told = time.monotonic() + TELL_S
                    log.info("%s: %s records, %s differences", snapshot.did, result.records, result.differences)
            await self._stored_of(Piece(), standing, None, snapshot, result, part)
        if repository.bad_paths:
            result.drops["bad_path"] += repository.bad_paths
        return result

    async def is_active(self, did: str) -> bool:
        return (await self._stored.status(did))[0]

    async def status(self, word: Word, status: str | None, result: Settled) -> None:
        """What its host says of the account, compared and taken: see sync/status.py."""
        _count(result, "fastworker.accounts", await take_word(self._stored, self._store, word, status))

    async def handle(self, word: Word, document: dict[str, Any], result: Settled) -> None:
        """The same of the handle that its document claims."""
        _count(result, "users", await take_handle(self._stored, self._store, word, handle_in(document)))

    async def may_floor(self) -> bool:
        """Whether every fastworker that is connected to PostgreSQL knows floors."""
        if self._store is None:
            return False
        async with self._store.connection() as db:
            return await all_know_floors(db)

    async def _refusal(self, snapshot: Snapshot, accept_older: bool) -> str | None:
        account = await self._stored.account_state(snapshot.did, snapshot.seq)
        if account.is_forbidden:
            return "the account does not want its data collected"
        if is_gone(snapshot.rev, snapshot.seq, account.deleted_rev, account.deleted_seq):
            return "the account was deleted, and the snapshot may be older"
        if account.newest_rev is not None and account.newest_rev > snapshot.rev and not accept_older:
            return f"its revision {snapshot.rev} is older than what is stored ({account.newest_rev})"
        return None

    async def _floor(self, store: Store, snapshot: Snapshot, accept_older: bool) -> str | None:
        """Commit the floor, and wait for the transactions that may not have seen it. Returns why not, or None."""
        async with store.connection() as db:
            # mutant: no floor
            if not await put_floor(db, snapshot.did, snapshot.rev, snapshot.seq, lower=accept_older):
                return f"its revision {snapshot.rev} is older than one that was settled"
            await store.writer.reach(Step.FLOOR_COMMITTED)
            # mutant: a settle does not wait
            await readers_are_through(db)
        return await self._refusal(snapshot, accept_older)

    async def _stored_of(
        self,
        piece: Piece,
        standing: StandingRows,
        last: str | None,
        snapshot: Snapshot,
        result: Settled,
        part: Part,
    ) -> dict[str, Standing]:
        """What is stored of a piece's records; what is stored beside them up to `last`, and should not be, goes."""
        present = piece.present
        there: dict[str, Standing] = {}
        extra: list[Change] = []
        async for one in standing.up_to(last):
            if one.uri in present:
                there.setdefault(one.uri, one)
            elif _is_extra(one, snapshot) and _is_covered(one.uri, part):
                table, rkey = collection_table(one.uri), one.uri.rpartition("/")[2]
                extra.append(
                    Change(table, one.uri, snapshot.did, rkey, snapshot.rev, snapshot.seq, 0, cid=None, row=None)
                )
                result.extra[table.name] += 1
                _example(result, f"{table.name} {one.uri} extra")
                if len(extra) >= PIECE:
                    await self._write(extra, piece, result)
                    extra = []
        await self._write(extra, piece, result)
        return there

    async def _piece(self, piece: Piece, there: dict[str, Standing], snapshot: Snapshot, result: Settled) -> None:
        """Records that are missing or different."""
        result.records += len(piece.uris)
        result.drops += piece.drops
        wrong: list[Change] = []
        new: list[Change] = []
        for table, changes in _by_table(piece.changes):
            result.compared[table.name] += len(changes)
            held = {one.uri: one for one in await self._stored.held(table, changes)}
            twins = [uri for uri, one in held.items() if one.is_twin]
            waiting = await self._stored.twin_rows(table, twins) if twins else {}
            for change in changes:
                one = held[change.uri]
                row, rev, seq = waiting.get(change.uri, (None, None, None))
                if row is not None and change.row is not None and not one.is_there:
                    differs = _differs(table, change.row, row)
                    one = msgspec.structs.replace(one, is_there=True, rev=rev, seq=seq, differs=differs)
                problem = _judge(change, one, there.get(change.uri), snapshot, piece)
                if problem == "missing":
                    new.append(change)
                    result.missing[table.name] += 1
                elif problem:
                    result.different[table.name] += 1
                else:
                    continue
                wrong.append(change)
                _example(result, f"{table.name} {change.uri} {problem}")
        await self._write(wrong, piece, result)
        if self._store is not None:
            await self._store.mark_read(_old_notifications(new, snapshot))

    async def _write(self, changes: list[Change], piece: Piece, result: Settled) -> None:
        if self._store is None or not changes:
            return
        batch = Batch()
        for change in changes:
            batch.put(Mapped([change], piece.dids.get(change.uri, []), []))
        try:
            async with self._pace:
                result.written += (await self._store.write(batch)).rows
        except RowRejected:
            if len(changes) == 1:  # the database refuses this one: its siblings live
                result.drops["row_rejected"] += 1
                return
            half = len(changes) // 2
            await self._write(changes[:half], piece, result)
            await self._write(changes[half:], piece, result)


def covered(records: Iterable[TreeRecord], part: Part) -> Iterable[TreeRecord]:
    return records if part == WHOLE else (one for one in records if part.covers(one.collection, one.rkey))


def _is_covered(uri: str, part: Part) -> bool:
    did, collection, rkey = uri.split("/", 4)[2:]
    # mutant: a partial snapshot deletes what it did not look at
    return not (is_left_out(collection) or is_account_left_out(did)) and part.covers(collection, rkey)


def _by_table(changes: Iterable[Change]) -> list[tuple[Table, list[Change]]]:
    found: dict[str, tuple[Table, list[Change]]] = {}
    for change in changes:
        found.setdefault(change.table.name, (change.table, []))[1].append(change)
    return list(found.values())


def _judge(change: Change, held: StoredRecord, standing: Standing | None, snapshot: Snapshot, piece: Piece) -> str:
    """`missing`, `different in ...`, or nothing. What is newer than the snapshot is right."""
    if held.is_gone and not snapshot.beats(held.gone_rev, held.gone_seq):
        return ""
    if not held.is_there:
        return "missing"
    if not snapshot.beats(held.rev, held.seq):
        return ""
    moment = piece.moments[change.uri]
    row = change.row or ()
    differs = [
        column
        for column in held.differs
        if not column.startswith("commit_") and not is_judged_date(row[change.table.index(column)], moment)
    ]
    is_ours = held.rev is not None or held.seq is not None
    if differs and (is_ours or standing is None or not _is_young(standing, snapshot)):
        return f"different in {', '.join(differs)}"
    if is_gone(held.rev, held.seq, held.deleted_rev, held.deleted_seq):
        return "different in its version"  # the account was deleted since: what is older is taken away
    # mutant: an equal row under a tombstone
    if held.is_gone and not newer(held.rev, held.seq, held.gone_rev, held.gone_seq):
        return "different in its tombstone"  # which would take the row away at the next look
    return ""


def _is_extra(standing: Standing, snapshot: Snapshot) -> bool:
    if standing.rev is None and standing.seq is None:
        return not _is_young(standing, snapshot)
    return snapshot.beats(standing.rev, standing.seq)


def _is_young(standing: Standing, snapshot: Snapshot) -> bool:
    return standing.indexed_at is None or standing.indexed_at > snapshot.taken_at - YOUNG


def _differs(table: Table, expected: Row, found: Row) -> list[str]:
    """Columns of a row that is among the twins which are not as they must be."""
    return [
        column
        for column, kind, a, b in zip(table.columns, table.types, expected, found, strict=True)
        if (orjson.loads(a or "null") != orjson.loads(b or "null") if kind == "jsonb" else a != b)
    ]


def _old_notifications(changes: list[Change], snapshot: Snapshot) -> list[str]:
    """Those of rows that come late: nobody wants thousands of unread ones about last year."""
    fx = Effects(FULL)
    for table, some in _by_table(changes):
        add(fx, table, some)
    return sorted(uri for uri, row in fx.notes_added.items() if row[-1] < snapshot.taken_at - OLD)


def _count(result: Settled, table: str, differs: bool | None) -> None:
    """One row that may be another one; None: it is not judged."""
    if differs is not None:
        result.compared[table] += 1
    if differs:
        result.different[table] += 1
        _example(result, f"{table} {result.did} different")


def _example(result: Settled, words: str) -> None:
    if len(result.examples) < EXAMPLES:
        result.examples.append(words)


async def unless_stopped(work: Coroutine[Any, Any, None], stop: asyncio.Event) -> bool:
    """Await it, or cancel it at a stop. Whether it came to its end."""
    task = asyncio.create_task(work)
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        task.cancel()
        await asyncio.wait({task, stopping})
    if task.cancelled():
        return False
    task.result()
    return True


class Report:
    """What all accounts of one run came to, for people."""

    def __init__(self, *, dry_run: bool) -> None:
        self.stopped: str | None = None
        self.failures = 0
        self._dry_run = dry_run
        self._accounts = self._records = self._written = self._left = 0
        self._kinds = {kind: Counter[str]() for kind in ("missing", "different", "extra")}
        self._drops: Counter[str] = Counter()
        self._examples: list[str] = []
        self._began = self._told = time.monotonic()
        self._console = Console(highlight=False, soft_wrap=True)
        self._side = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live: Live | None = None

    def add(self, settled: Settled) -> None:
        self._accounts += not settled.refused
        self._records += settled.records
        self._written += settled.written
        for kind, counts in self._kinds.items():
            counts.update(getattr(settled, kind))
        self._drops.update(settled.drops)
        self._examples += settled.examples[: EXAMPLES - len(self._examples)]

    def gone(self, found: Settled) -> None:
        """An account whose host says why it gives no repository."""
        for kind, counts in self._kinds.items():
            counts.update(getattr(found, kind))

    def kept(self) -> None:
        """A repository is on disk, to be loaded."""
        self._accounts += 1

    def failed(self, name: str, why: str) -> None:
        self.failures += 1
        self._side.print(f"{name}: {why}", markup=False)

    def tell(self, left: int, resting: Sequence[str] = ()) -> None:
        """How many are left, and hosts that hold back: a bar on a terminal, else a line from time to time."""
        self._left = left
        now = time.monotonic()
        if now - self._told < (0.5 if self._side.is_terminal else 5.0):
            return
        self._told = now
        words = self._progress(now - self._began, resting)
        if not self._side.is_terminal:
            self._side.print(words, markup=False)
            return
        if self._live is None:
            self._live = Live(console=self._side, auto_refresh=False, transient=True)
            self._live.start()
        bar = ProgressBar(total=max(self.done + left, 1), completed=self.done, width=40)
        self._live.update(Group(bar, Text(words)), refresh=True)

    def _progress(self, seconds: float, resting: Sequence[str]) -> str:
        done, of = self.done, self.done + self._left
        words = (
            f"{done:,} of {of:,} accounts ({done / max(of, 1):.1%}), {self._records:,} records "
            f"({self._records / seconds:,.0f}/s), {self._differences:,} differences"
        )
        if done and self._left:
            words += f", {duration(seconds / done * self._left)} left"
        if resting:
            few = ", ".join(resting[:3]) + (f" and {len(resting) - 3} more" if len(resting) > 3 else "")
            words += f"; holding back: {few}"
        return words

    @property
    def done(self) -> int:
        return self._accounts + self.failures

    def stop(self) -> None:
        self.stopped = f"{self.done} of {self.done + self._left} accounts"

    @property
    def _differences(self) -> int:
        return sum(counts.total() for counts in self._kinds.values())

    def close(self) -> None:
        """Remove the bar."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def end(self) -> ExitCode:
        self.close()
        tables = sorted({table for counts in self._kinds.values() for table in counts})
        if tables:
            grid = Grid(box=None, pad_edge=False, header_style="bold")
            grid.add_column("table", no_wrap=True)
            for kind in self._kinds:
                grid.add_column(kind, justify="right", no_wrap=True)
            for table in tables:
                cells = (counts[table] for counts in self._kinds.values())
                grid.add_row(table, *(f"{cell:,}" if cell else "" for cell in cells))
            self._console.print(grid)
        for line in self._examples if self._dry_run else ():
            self._console.print(f"  {line}"[:300], markup=False)
        words = f"{self._differences:,} differences" if self._differences else "no difference"
        if self._differences:
            words += ", nothing was written" if self._dry_run else f", {self._written:,} rows written"
        if left_out := self._drops.pop(Reason.FILTERED, 0):
            words += f"; left out by FASTWORKER_COLLECTIONS: {left_out:,}"
        if left_out := self._drops.pop(Reason.FILTERED_ACCOUNT, 0):
            words += f"; left out by FASTWORKER_ACCOUNTS: {left_out:,}"
        if self._drops:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(self._drops.items()))
            words += f"; records that cannot be stored: {reasons}"
        seconds = time.monotonic() - self._began
        self._console.print(
            f"{self._accounts:,} accounts, {self._records:,} records in {seconds:.1f} s: {words}", markup=False
        )
        if self.failures:
            self._console.print(f"{self.failures:,} could not be settled: the reasons are above.")
        if self.stopped:
            self._console.print(f"Stopped after {self.stopped}. Run the same command again.")
        sys.stdout.flush()
        is_well = not (self.failures or self.stopped or (self._dry_run and self._differences))
        return ExitCode.DONE if is_well else ExitCode.NO


def duration(seconds: float) -> str:
    """For people: 40 s, 12 min, 5.3 h, 4.1 days."""
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size * (2 if unit == "days" else 1):
            return f"{seconds / size:.{0 if unit == 'min' else 1}f} {unit}"
    return f"{seconds:.0f} s"
