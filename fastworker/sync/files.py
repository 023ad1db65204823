"""Repositories that are on disk made equal to the tables: small ones in groups, many of them in several processes.

Each process has its own connections; two that write the same rows settle it as any two workers do. A process that dies
costs the group that it had, which the next run settles again.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import msgspec
import uvloop

from fastworker.errors import StoreUnavailable
from fastworker.event.proof import Unproved
from fastworker.event.repository import Repository
from fastworker.store.rules import Rules
from fastworker.store.store import Store
from fastworker.store.stored import open_stored
from fastworker.sync.settle import SMALL_BYTES, Job, Settle, Settled
from fastworker.table.chosen import WHOLE, Part, choose, choose_accounts
from fastworker.table.snapshot import Snapshot, tid_moment

GROUP: Final = 64
"""Accounts that are settled together at most."""
ALONE_BYTES: Final = 16 * 1024 * 1024
"""With less on disk further processes would cost more time than they save."""


class Car(msgspec.Struct, frozen=True):
    """A file to settle. `snapshot` None: what the file says, as (its revision, 0)."""

    path: str
    size: int
    snapshot: Snapshot | None = None
    part: Part = WHOLE
    floor: bool = False


class Settings(msgspec.Struct, frozen=True):
    database_url: str
    application_name: str
    rules: Rules
    collections: tuple[str, ...]
    accounts: frozenset[str] | None = None
    dry_run: bool = False


Told = Callable[[Car, Settled | str], Awaitable[None]]
"""What became of a file: what was found, or why it could not be read."""


def groups(cars: Iterable[Car]) -> Iterator[list[Car]]:
    """As many as are settled together."""
    group: list[Car] = []
    size = 0
    for car in cars:
        if group and (size + car.size > SMALL_BYTES or len(group) >= GROUP):
            yield group
            group, size = [], 0
        group.append(car)
        size += car.size
    if group:
        yield group


async def settle_cars(settings: Settings, cars: Sequence[Car], told: Told) -> None:
    """All of them; `told` of one at a time. Raises StoreUnavailable."""
    waiting = groups(cars)
    telling = asyncio.Lock()

    async def tell(car: Car, became: Settled | str) -> None:
        async with telling:
            await told(car, became)

    if sum(car.size for car in cars) <= ALONE_BYTES:
        async with _settling(settings) as settle:
            for group in waiting:
                for car, became in await _settle(settle, group):
                    await told(car, became)
        return
    async with asyncio.TaskGroup() as tasks:
        for _ in range(max(1, min(4, os.cpu_count() or 1))):
            tasks.create_task(_feed(settings, waiting, tell))


async def _settle(settle: Settle, cars: Sequence[Car]) -> list[tuple[Car, Settled | str]]:
    found: list[tuple[Car, Settled | str]] = []
    jobs: list[Job] = []
    opened: list[Car] = []
    may_floor = any(car.floor for car in cars) and await settle.may_floor()
    with ExitStack() as files:
        for car in cars:
            try:
                repository = files.enter_context(Repository(Path(car.path)))
                repository.check()
            except (Unproved, OSError) as error:
                found.append((car, str(error)))
                continue
            opened.append(car)
            snapshot = car.snapshot or _snapshot_of(repository)
            jobs.append(Job(repository, snapshot, car.part, car.floor and may_floor))
        async with settle.alone([job.snapshot.did for job in jobs]):
            settled = await settle.settle_some(jobs)
        found += zip(opened, settled, strict=True)
    return found


def _snapshot_of(repository: Repository) -> Snapshot:
    """Nobody knows when the file was written."""
    commit, now = repository.commit, datetime.now(UTC).replace(tzinfo=None)
    return Snapshot(commit.did, commit.rev, 0, min(tid_moment(commit.rev) or now, now))


@contextlib.asynccontextmanager
async def _settling(settings: Settings) -> AsyncIterator[Settle]:
    async with AsyncExitStack() as stack:
        stored = await stack.enter_async_context(open_stored(settings.database_url))
        store = None
        if not settings.dry_run:
            store = await Store.connect(
                settings.database_url,
                pool_size=1,
                application_name=settings.application_name,
                rules=settings.rules,
            )
            stack.push_async_callback(store.close)
        yield Settle(stored, store)
        while store is not None and await store.maintain():
            pass


# Processes ------------------------------------------------------------------------------------------


async def _feed(settings: Settings, waiting: Iterator[list[Car]], told: Told) -> None:
    """One process: a group, what became of it, the next one."""
    context = multiprocessing.get_context("spawn")  # no fork of a process that has loops and sockets
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(settings, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        for group in waiting:
            await _ask(ours, group, told)
        await _ask(ours, [], told)
    finally:
        child.terminate()
        child.join()
        ours.close()


async def _ask(ours: Connection, group: list[Car], told: Told) -> None:
    try:
        ours.send(group)
        answer = await asyncio.to_thread(ours.recv)
    except (EOFError, OSError):
        raise StoreUnavailable("A process that settles has ended: the lines above say why") from None
    if isinstance(answer, str):
        raise StoreUnavailable(answer)
    for number, became in answer:
        await told(group[number], became)


def _child(settings: Settings, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    choose(settings.collections)
    choose_accounts(settings.accounts)
    try:
        uvloop.run(_answer(settings, pipe))
    except StoreUnavailable as error:
        with contextlib.suppress(OSError):
            pipe.send(str(error))


async def _answer(settings: Settings, pipe: Connection) -> None:
    async with _settling(settings) as settle:
        while group := pipe.recv():
            became = {car.path: one for car, one in await _settle(settle, group)}
            pipe.send([(number, became[car.path]) for number, car in enumerate(group)])
    pipe.send([])
