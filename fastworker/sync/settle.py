"""Settle: how a snapshot of a repository becomes rows. Only the differences are written, by the same flush as events.

The walk of the repository and the stored rows of the account come in the same order, so both directions are compared
in one pass: what is missing or different is written at the snapshot's version, and what is stored, absent and older is
deleted at it. Nothing is written twice: a second settle of the same snapshot finds no difference.

The caller has waited until the worker has finished what was read before the snapshot. What is older and comes later
all the same is kept away by a floor (store/floors.py), where every worker knows of floors.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import timedelta
from typing import Final, NamedTuple

import msgspec

from fastworker.crashpoint import Step
from fastworker.errors import Reason, RowRejected
from fastworker.event.repository import Repository
from fastworker.store.audit import StoredRecord
from fastworker.store.blame import TooSlow
from fastworker.store.floors import all_know_floors, put_floors, readers_are_through
from fastworker.store.session import ALONE, HURRY, NO_HURRY, Time
from fastworker.store.store import Store
from fastworker.store.stored import AccountState, Holding, Standing, StandingRows, Stored
from fastworker.sync.judge import agrees, differing, is_extra, is_same, is_unknown, judge
from fastworker.sync.status import Word, take_handle, take_word
from fastworker.table.batch import Batch, Change, Mapped, Row, is_gone
from fastworker.table.chosen import WHOLE, Part, is_account_left_out, is_choosing, is_left_out
from fastworker.table.derive import did_of
from fastworker.table.mapper import users_of
from fastworker.table.schema import Table, collection_table
from fastworker.table.snapshot import Piece, Snapshot, covered, pieces

log = logging.getLogger(__name__)

PIECE: Final = 2_000
TELL_S: Final = 5.0
FLUSH: Final = 4_000
"""Changes that are written at once."""
FLUSH_BESIDE: Final = 500
"""The same beside a live stream, whose own flush is slower for as long as one of these takes."""
SMALL_BYTES: Final = 2 * 1024 * 1024
STORED_MAX: Final = 20_000
"""Rows of one table that are held at once, for the small accounts that are settled together."""
OLD: Final = timedelta(days=1)
"""Notifications of records that come late are read: nobody wants thousands of unread ones about last year."""
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


class Job(NamedTuple):
    """A repository to settle. It was walked before (`check`), so that it is known to be whole.

    `floor`: it was so at S0, and every worker knows floors. `part`: what is compared; where that is not all of it there
    is no floor. `result`: goes on with it.
    """

    repository: Repository
    snapshot: Snapshot
    part: Part = WHOLE
    floor: bool = False
    accept_older: bool = False
    result: Settled | None = None


class _Look:
    """One account that is being compared: what was found, and what is to be written."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.snapshot = job.snapshot
        self.result = Settled(job.snapshot.did) if job.result is None else job.result
        self.account = AccountState(None, None, None, is_forbidden=False)
        self.changes: list[Change] = []

    def is_extra(self, one: Standing) -> bool:
        return is_extra(one, self.snapshot) and _is_covered(one.uri, self.job.part)

    def remove(self, uri: str) -> None:
        """What is stored and should not be."""
        table, rkey, snapshot = collection_table(uri), uri.rpartition("/")[2], self.snapshot
        self.changes.append(Change(table, uri, snapshot.did, rkey, snapshot.rev, snapshot.seq, 0, cid=None, row=None))
        self.result.extra[table.name] += 1
        _example(self.result, f"{table.name} {uri} extra")

    def put(self, change: Change, problem: str) -> None:
        """What is missing or different."""
        kind = self.result.missing if problem == "missing" else self.result.different
        kind[change.table.name] += 1
        self.changes.append(change)
        _example(self.result, f"{change.table.name} {change.uri} {problem}")

    def take(self) -> list[Change]:
        taken, self.changes = self.changes, []
        return taken


class Settle:
    """`store` None: only look. `pace`: entered for each batch that is written, so that others have their turn.
    `at_once`: changes of a batch."""

    def __init__(
        self,
        stored: Stored,
        store: Store | None,
        pace: AbstractAsyncContextManager[object] | None = None,
        at_once: int = FLUSH,
    ) -> None:
        self._stored = stored
        self._store = store
        self._pace = pace or nullcontext()
        self._at_once = at_once

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
        """One account: see Job."""
        return (await self.settle_some([Job(repository, snapshot, part, floor, accept_older, result)]))[0]

    async def settle_some(self, jobs: Sequence[Job]) -> list[Settled]:
        """Several accounts, in one flush as far as they are small: each costs a share of the statements."""
        # mutant: two snapshots of one account in a group
        if len({job.snapshot.did for job in jobs}) < len(jobs):  # the second must see what the first has written
            return [(await self.settle_some([job]))[0] for job in jobs]
        looks = [_Look(job) for job in jobs]
        open_ones = await self._allowed(looks)
        small = [look for look in open_ones if look.job.repository.size <= SMALL_BYTES]
        parts = {look.job.part for look in small}
        together = small and await self._stored.holding([look.snapshot.did for look in small], STORED_MAX, parts)
        if together:
            await self._together(small, together)
        else:
            small = []
        for look in open_ones:
            if look not in small:
                await self._alone(look)
        for look in open_ones:
            if bad := look.job.repository.bad_paths:
                look.result.drops["bad_path"] += bad
        return [look.result for look in looks]

    def beside(self, stored: Stored, store: Store | None) -> Settle:
        """One with connections of its own, which writes in turns with this one."""
        return Settle(stored, store, self._pace, self._at_once)

    def alone(self, dids: Sequence[str]) -> AbstractAsyncContextManager[None]:
        """See Stored.alone."""
        return self._stored.alone(dids)

    async def is_active(self, did: str) -> bool:
        return (await self._stored.status(did))[0]

    async def status(self, word: Word, status: str | None, result: Settled) -> None:
        """What its host says of the account, compared and taken: see sync/status.py."""
        _count(result, "fastworker.accounts", await take_word(self._stored, self._store, word, status))

    async def handle(self, word: Word, handle: str | None, result: Settled) -> None:
        """The same of the handle that its document claims."""
        _count(result, "users", await take_handle(self._stored, self._store, word, handle))

    async def may_floor(self) -> bool:
        """Whether every fastworker that is connected to PostgreSQL knows floors."""
        if self._store is None:
            return False
        async with self._store.connection() as db:
            return await all_know_floors(db)

    async def _allowed(self, looks: list[_Look]) -> list[_Look]:
        """Those that may be settled, with their floors committed. The others' results say why not."""
        looks = await self._not_refused(looks)
        is_whole = not is_choosing()
        floored = [look for look in looks if look.job.floor and is_whole and look.job.part == WHOLE]
        if not floored or self._store is None:
            return looks
        async with self._store.connection() as db:
            wanted = [
                (look.snapshot.did, look.snapshot.rev, look.snapshot.seq, look.job.accept_older) for look in floored
            ]
            # mutant: no floor
            refused = await put_floors(db, wanted)
            await self._store.writer.reach(Step.FLOOR_COMMITTED)
            # mutant: a settle does not wait
            await readers_are_through(db)
        for look in floored:
            if look.snapshot.did in refused:
                look.result.refused = f"its revision {look.snapshot.rev} is older than one that was settled"
        # mutant: who was deleted before the floor
        return await self._not_refused([look for look in looks if not look.result.refused])

    async def _not_refused(self, looks: list[_Look]) -> list[_Look]:
        until = {look.snapshot.did: look.snapshot.seq for look in looks}
        is_newest_asked = not all(look.job.accept_older for look in looks)
        states = await self._stored.account_states(until, is_newest_asked=is_newest_asked)
        for look in looks:
            look.account = states[look.snapshot.did]
            look.result.refused = _refusal(look.job, look.account)
        return [look for look in looks if not look.result.refused]

    async def _together(self, looks: list[_Look], holding: Holding) -> None:
        """Small accounts: all that is stored of them was read at once."""
        # mutant: a deletion while small accounts are read
        await self._states(looks)
        read = [(look, piece) for look in looks for piece in _pieces_of(look, PIECE)]
        absent = {*holding.hot, *holding.standing}.difference(*(piece.present for _, piece in read))
        by_did = {look.snapshot.did: look for look in looks}
        for uri in absent:
            if (look := by_did.get(did_of(uri))) and any(map(look.is_extra, holding.standing_of(uri))):
                # mutant: what small accounts lack stays
                look.remove(uri)
        await self._judge(read, holding)
        await self._write(looks)

    async def _alone(self, look: _Look) -> None:
        """One account in pieces, however large: what is stored comes in the order of its keys, too."""
        told = time.monotonic() + TELL_S
        async with self._stored.standing(look.snapshot.did) as standing:
            for piece in _pieces_of(look, PIECE):
                if piece.records:
                    there = await self._standing_of(look, piece, standing, piece.last)
                    # mutant: a deletion while a large account is read
                    await self._states([look])
                    await self._judge([(look, piece)], await self._rows_of(piece, there))
                    await self._write([look])
                if time.monotonic() > told:
                    told = time.monotonic() + TELL_S
                    result = look.result
                    log.info("%s: %s records, %s differences", result.did, result.records, result.differences)
            await self._standing_of(look, Piece(), standing, None)
        await self._write([look])

    async def _states(self, looks: list[_Look]) -> None:
        """After what is stored was read: a deletion that came before must not be missed."""
        until = {look.snapshot.did: look.snapshot.seq for look in looks}
        states = await self._stored.account_states(until, is_newest_asked=False)
        for look in looks:
            look.account = states[look.snapshot.did]

    async def _standing_of(
        self, look: _Look, piece: Piece, standing: StandingRows, last: str | None
    ) -> dict[str, list[Standing]]:
        """What is stored of a piece's records; what is stored beside them up to `last`, and should not be, goes."""
        there: dict[str, list[Standing]] = {}
        present = piece.present
        async for one in standing.up_to(last):
            if one.uri in present:
                there.setdefault(one.uri, []).append(one)
            elif look.is_extra(one):
                # mutant: what a large account lacks stays
                look.remove(one.uri)
                if len(look.changes) >= PIECE:
                    await self._write([look])
        return there

    async def _rows_of(self, piece: Piece, there: dict[str, list[Standing]]) -> Holding:
        rows: dict[str, Row] = {}
        for table, changes in _by_table(change for change in piece.changes if change.uri in there):
            rows |= await self._stored.table_rows(table, [change.uri for change in changes])
        return Holding(there, rows, {})

    async def _judge(self, read: list[tuple[_Look, Piece]], holding: Holding) -> None:
        """Records that are missing or different. What is neither as it must be nor unknown is looked at once more, by
        the law's own statement."""
        unclear: list[Change] = []
        of: dict[str, _Look] = {}
        hot, others = holding.hot, holding.standing
        for look, piece in read:
            result = look.result
            result.records += piece.records
            result.drops += piece.drops
            result.compared.update(change.table.name for change in piece.changes)
            was_deleted = look.account.deleted_seq is not None or look.account.deleted_rev is not None
            for change in piece.changes:
                uri = change.uri
                if not was_deleted and uri not in others and (row := hot.get(uri)) is not None and is_same(change, row):
                    continue  # nearly all of what is in sync
                standing = holding.standing_of(uri)
                if agrees(change, standing, holding.row_of(uri), look.account, look.snapshot):
                    continue
                if is_unknown(change, standing):
                    look.put(change, "missing")
                else:
                    unclear.append(change)
                    of[change.uri] = look
        for table, changes in _by_table(unclear):
            for change, held in await self._held(table, changes):
                look = of[change.uri]
                standing = holding.standing_of(change.uri)
                if problem := judge(change, held, standing[0] if standing else None, look.snapshot):
                    look.put(change, problem)

    async def _held(self, table: Table, changes: list[Change]) -> list[tuple[Change, StoredRecord]]:
        """What is stored of these records, among the twins or not."""
        held = {one.uri: one for one in await self._stored.held(table, changes)}
        twins = [uri for uri, one in held.items() if one.is_twin]
        waiting = await self._stored.twin_rows(table, twins) if twins else {}
        found = []
        for change in changes:
            one = held[change.uri]
            row, rev, seq = waiting.get(change.uri, (None, None, None))
            if row is not None and change.row is not None and not one.is_there:
                differs = differing(table, change.row, row)
                one = msgspec.structs.replace(one, is_there=True, rev=rev, seq=seq, differs=differs)
            found.append((change, one))
        return found

    async def _write(self, looks: list[_Look]) -> None:
        """In as few flushes as their bound allows."""
        if self._store is None:
            return
        changes: list[Change] = []
        for look in looks:
            changes += look.take()
        by_did = {look.snapshot.did: look for look in looks}
        for start in range(0, len(changes), self._at_once):
            await self._flush(changes[start : start + self._at_once], by_did)

    async def _flush(self, changes: list[Change], looks: dict[str, _Look], time: Time = NO_HURRY) -> None:
        assert self._store is not None
        batch = Batch()
        for change in changes:
            batch.put(Mapped([change], [] if change.row is None else users_of(change), []))
        try:
            old = max(look.snapshot.taken_at for look in looks.values()) - OLD
            async with self._pace:
                written = await self._store.write(batch, read_before=old, time=time)
        except (RowRejected, TooSlow) as error:
            await self._flush_less(changes, looks, time, error)
            return
        for did, count in Counter(change.repo for change in changes).items():
            looks[did].result.written += count
        looks[changes[-1].repo].result.written += written.rows - len(changes)  # what was newer meanwhile

    async def _flush_less(
        self, changes: list[Change], looks: dict[str, _Look], time: Time, error: RowRejected | TooSlow
    ) -> None:
        """Halves of what was refused or not done in time. The one that it is about is dropped: its siblings live.

        Raises TooSlow where that one waits for a lock.
        """
        is_slow = isinstance(error, TooSlow)
        if len(changes) > 1:
            half = len(changes) // 2
            for some in (changes[:half], changes[half:]):
                await self._flush(some, looks, HURRY if is_slow else time)
        elif is_slow and time is not ALONE:
            await self._flush(changes, looks, ALONE)
        elif isinstance(error, TooSlow) and not error.is_contents:
            raise error
        else:
            looks[changes[0].repo].result.drops[Reason.TOO_SLOW if is_slow else Reason.ROW_REJECTED] += 1


def _refusal(job: Job, account: AccountState) -> str | None:
    snapshot = job.snapshot
    # mutant: who does not want it is settled
    if account.is_forbidden:
        return "the account does not want its data collected"
    # mutant: who was deleted is settled
    if is_gone(snapshot.rev, snapshot.seq, account.deleted_rev, account.deleted_seq):
        return "the account was deleted, and the snapshot may be older"
    # mutant: an older repository is taken
    if account.newest_rev is not None and account.newest_rev > snapshot.rev and not job.accept_older:
        return f"its revision {snapshot.rev} is older than what is stored ({account.newest_rev})"
    return None


def _pieces_of(look: _Look, size: int) -> Iterator[Piece]:
    return pieces(covered(look.job.repository.records(), look.job.part), look.snapshot, size)


def _is_covered(uri: str, part: Part) -> bool:
    did, collection, rkey = uri.split("/", 4)[2:]
    # mutant: a partial snapshot deletes what it did not look at
    return not (is_left_out(collection) or is_account_left_out(did)) and part.covers(collection, rkey)


def _by_table(changes: Iterable[Change]) -> list[tuple[Table, list[Change]]]:
    found: dict[str, tuple[Table, list[Change]]] = {}
    for change in changes:
        found.setdefault(change.table.name, (change.table, []))[1].append(change)
    return list(found.values())


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
