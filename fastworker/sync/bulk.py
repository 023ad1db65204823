"""A bulk load from beginning to end: repositories on disk become rows of an empty or nearly empty database.

Staging reads them in several processes, each with a connection of its own, beside the live stream. Loading
(store/bulk.py) needs the database to itself. What cannot be told from one repository alone is written as events are
afterwards, and accounts of which something was stored before are settled one by one, as `backfill` does it, beside the
stream again.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

from fastworker.crashpoint import Step, arm, crashpoint
from fastworker.errors import RowRejected, StoreUnavailable
from fastworker.event.proof import Unproved
from fastworker.event.repository import Repository
from fastworker.store.bulk import Bulk
from fastworker.store.staged import ROWS, Job, Rows, Staging, open_staging
from fastworker.store.store import Store
from fastworker.table.batch import Batch, Change, Mapped
from fastworker.table.chosen import Part, choose, choose_accounts, chosen_accounts
from fastworker.table.mapper import users_of
from fastworker.table.snapshot import Snapshot, covered, pieces

CLAIM: Final = 8
PIECE: Final = 2_000
GIANT_BYTES: Final = 64 * 1024 * 1024
"""Larger repositories are settled one by one: their pairs would fill the memory of every process."""


def processes() -> int:
    return max(1, min(4, os.cpu_count() or 1))


async def stage(
    database_url: str,
    derive: frozenset[str],
    collections: tuple[str, ...],
    part: Part,
    told: Callable[[], Awaitable[None]],
    *,
    crash: str | None = None,
) -> None:
    """Everything that waits, in processes of its own. Raises StoreUnavailable when one of them could not go on."""
    context = multiprocessing.get_context("spawn")  # no fork of a process that has loops and sockets
    children = [
        context.Process(
            target=_child, args=(database_url, derive, collections, chosen_accounts(), part, crash), daemon=True
        )
        for _ in range(processes())
    ]
    for child in children:
        child.start()
    try:
        while any(child.exitcode is None for child in children):
            await asyncio.sleep(0.05)
            await told()
    finally:
        for child in children:
            child.terminate()
            child.join()
    if failed := [child.exitcode for child in children if child.exitcode]:
        raise StoreUnavailable(f"Staging ended with exit code {failed[0]}: the lines above say why")


def _child(
    database_url: str,
    derive: frozenset[str],
    collections: tuple[str, ...],
    accounts: frozenset[str] | None,
    part: Part,
    crash: str | None,
) -> None:
    arm(crash)
    choose(collections)
    choose_accounts(accounts)
    asyncio.run(stage_all(database_url, derive, part))


async def stage_all(database_url: str, derive: frozenset[str], part: Part) -> None:
    """One process's share: repositories that wait, until none does."""
    staging = await open_staging(database_url)
    try:
        while await _transaction(staging, derive, part):
            pass
    finally:
        staging.close()


async def _transaction(staging: Staging, derive: frozenset[str], part: Part) -> bool:
    """About `ROWS` rows of whole repositories. Whether there was anything to do.

    A file that cannot be read costs the transaction: it is left out, and the others are read again. Rows that the
    database refuses cost nothing but time: their repositories are settled one by one.
    """
    await staging.begin()
    rows = Rows(derive)
    try:
        return await _fill(staging, rows, part)
    except RowRejected as error:
        await staging.rollback()
        await staging.leave(rows.dids, f"a row was refused: {error}")
        return True


async def _fill(staging: Staging, rows: Rows, part: Part) -> bool:
    done: list[tuple[str, int, str | None]] = []
    staged = 0
    while staged < ROWS:
        jobs = await staging.claim(CLAIM)
        rows.dids += [job.did for job in jobs]
        for job in jobs:
            try:
                records, later = await _repository(staging, rows, job, part)
            except (Unproved, OSError) as error:
                await staging.rollback()
                await staging.refuse(job.did, str(error))
                return True
            done.append((job.did, records, later))
            staged += records
        if not jobs:
            break
    await staging.copy(rows.take())
    crashpoint(Step.BULK_STAGING)
    await staging.commit(done)
    return bool(done)


async def _repository(staging: Staging, rows: Rows, job: Job, part: Part) -> tuple[int, str | None]:
    records = 0
    snapshot = Snapshot(job.did, job.rev, job.seq, job.taken_at)
    with Repository(Path(job.file)) as repository:
        if repository.commit.did != job.did or repository.commit.rev != job.rev:
            raise OSError(f"{job.file}: not the repository that it was")
        if repository.size > GIANT_BYTES:
            return 0, "it is large"
        for piece in pieces(covered(repository.records(), part), snapshot, PIECE):
            rows.put(piece.changes)
            records += len(piece.changes)
            if rows.count >= ROWS:
                await staging.copy(rows.take())
    rows.end_repository()
    return records, None


async def write_verifications(bulk: Bulk, store: Store) -> list[tuple[str, str]]:
    """What `staged.STAGED_VERIFICATIONS` holds, by the law; what is there already stays. Returns the URIs of those that
    the database refuses, and why. Raises StoreUnavailable."""
    changes = await bulk.verifications()
    refused: list[tuple[str, str]] = []
    for start in range(0, len(changes), PIECE):
        refused += await _write(store, changes[start : start + PIECE])
    while await store.maintain():
        pass
    return refused


async def _write(store: Store, changes: Sequence[Change]) -> list[tuple[str, str]]:
    batch = Batch()
    for change in changes:
        batch.put(Mapped([change], users_of(change), []))
    try:
        await store.write(batch)
    except RowRejected as error:  # the database refuses one of them: its siblings live
        if len(changes) == 1:
            return [(changes[0].uri, str(error))]
        half = len(changes) // 2
        return [*await _write(store, changes[:half]), *await _write(store, changes[half:])]
    return []
