"""`backfill --bulk` and `import --bulk`: history into an empty or nearly empty database, faster than row by row.

Fetch (beside the stream), stage (beside it), load (the stream waits), settle what is left (beside it). Where it is, is
in PostgreSQL (`fastworker.bulk`): after a stop or a kill the same command goes on.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from rich.console import Console

from fastworker.commands.backfill import ROW_BYTES, TRIES
from fastworker.commands.imports import files_of
from fastworker.config import Config
from fastworker.crashpoint import arm
from fastworker.errors import ConfigError, ExitCode, StoreUnavailable, StreamUnavailable, Unreachable
from fastworker.event.proof import Unproved
from fastworker.event.repository import Repository
from fastworker.store.bulk import LOADING, SETTLING, STAGING, Bulk, Counts, File, Load, State, open_bulk
from fastworker.store.migrate import check as check_schema
from fastworker.store.repos import EVERYBODY
from fastworker.store.store import Store
from fastworker.store.stored import open_stored
from fastworker.stream.admin import RedisAdmin, age_s, open_redis
from fastworker.sync.bulk import LOAD_ROWS_S, STAGED_ROW_BYTES, file_of, stage
from fastworker.sync.choice import Choice, feed_of
from fastworker.sync.hosts import Hosts
from fastworker.sync.many import Live, Mark, Work, opened, settle_all
from fastworker.sync.settle import Report, Settle, duration, unless_stopped
from fastworker.table.chosen import WHOLE, Part
from fastworker.table.snapshot import Snapshot, tid_moment

OURS: Final = ("fastworker-bulk",)
NEWEST: Final = 2_000
TELL_S: Final = 5.0
_console = Console(highlight=False, soft_wrap=True)


class Told:
    """What happens, one line each."""

    def __init__(self, bulk: Bulk) -> None:
        self._bulk = bulk
        self._told = time.monotonic()

    async def staging(self) -> None:
        if time.monotonic() - self._told > TELL_S:
            self._told = time.monotonic()
            counts = await self._bulk.counts()
            done = counts.staged + counts.refused
            _console.print(f"staged {done:,} of {done + counts.waiting:,} repositories, {counts.records:,} records")

    def step(self, name: str, rows: int, seconds: float) -> None:
        words = "taken out, known before" if name == "new" else "rows"
        _console.print(f"  {name.removeprefix('public.')}: {rows:,} {words}, {seconds:.1f} s")


async def load_choice(
    config: Config, choice: Choice, spool: Path, stop: asyncio.Event, *, hosts: Hosts | None = None
) -> ExitCode:
    """Fetch into `spool`, then all the rest. DONE when everybody who was chosen is in the tables."""
    choice.check()
    url = await _ready(config, "backfill")
    async with open_bulk(url) as bulk:
        state = await _begun(bulk, config, _folder(spool), choice.part)
        if state.phase == STAGING:
            report = Report(dry_run=False)
            async with opened(config, "backfill", hosts, reads_only=True) as scene:

                async def keep(did: str, repository: Repository, snapshot: Snapshot, entry_id: str) -> None:
                    target = state.folder / f"{did.replace(':', '_').replace('/', '_')[:100]}.car"
                    _link(repository.path, target)
                    await bulk.add([file_of(target, repository, snapshot, entry_id)])

                work = Work(priority_max=EVERYBODY, tries=TRIES)
                feed = feed_of(scene, choice, report)
                fetched = await settle_all(scene, report, work, stop, feed=feed, keep=keep)
            if stop.is_set():
                return ExitCode.NO
        else:
            fetched = ExitCode.DONE
        async with open_redis(config.redis_url, config.stream_key, client_name="fastworker-bulk") as admin:
            loaded = await _load(config, bulk, url, admin, stop)
        return loaded if fetched == ExitCode.DONE else ExitCode.NO


async def load_files(config: Config, paths: Sequence[Path], stop: asyncio.Event) -> ExitCode:
    """The same for CAR files that are there already. Signatures are not checked: a file is the operator's."""
    url = await _ready(config, "import")
    async with open_bulk(url) as bulk:
        state = await bulk.state()
        if state is None:
            files = list(files_of(paths))
            if not files:
                raise ConfigError("There is no .car file to import")
            state = await bulk.begin(Path(), config.derive)
        if state.phase == STAGING:
            await _register(bulk, list(files_of(paths)), stop)
            if stop.is_set():
                return ExitCode.NO
        return await _load(config, bulk, url, None, stop)


async def give_up(config: Config) -> ExitCode:
    """`--cancel` of a bulk load."""
    url = await _ready(config, "backfill")
    async with open_bulk(url) as bulk:
        state = await bulk.state()
        if state is None:
            return ExitCode.NO
        phase = await bulk.give_up()
        if phase == STAGING:
            _remove_spool(state)
            _console.print("The bulk load is cancelled. Nothing of it is in the tables.")
        elif phase == LOADING:
            _console.print(
                "The bulk load is given up. What was loaded stays, and writers may go on. Run `fastworker backfill "
                "--bulk` to settle its accounts one by one, then `fastworker verify --repair`."
            )
        else:
            _console.print("It is loaded already: only accounts that are settled one by one are left.")
    return ExitCode.DONE


async def _ready(config: Config, command: str) -> str:
    arm(config.crashpoint)
    url = config.require_database_url(command)
    if problems := await check_schema(url):
        raise Unreachable("\n".join(problems))
    return url


def _folder(spool: Path) -> Path:
    try:
        spool.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--spool {spool}: {error}") from None
    return spool.absolute()


async def _begun(bulk: Bulk, config: Config, folder: Path, part: Part) -> State:
    state = await bulk.state() or await bulk.begin(folder, config.derive, part)
    if state.phase == STAGING and state.folder != folder:
        raise ConfigError(f"A bulk load has begun with --spool {state.folder}: go on with it, or --bulk --cancel")
    return state


def _link(source: Path, target: Path) -> None:
    """Within one disk nothing is copied; the fetch removes its own name of it."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


async def _register(bulk: Bulk, files: Sequence[Path], stop: asyncio.Event) -> None:
    found: list[File] = []
    for number, path in enumerate(files, 1):
        try:
            with Repository(path) as repository:
                commit = repository.commit
                now = datetime.now(UTC).replace(tzinfo=None)
                snapshot = Snapshot(commit.did, commit.rev, 0, min(tid_moment(commit.rev) or now, now))
                found.append(file_of(path, repository, snapshot, None))
        except (Unproved, OSError) as error:
            _console.print(f"{path}: {error}", markup=False)
            continue
        if len(found) >= 500 or number == len(files):
            await bulk.add(found)
            found = []
        if number % 100 == 0:
            await asyncio.sleep(0)
            if stop.is_set():
                return
    await bulk.add(found)


# Stage, load, settle ------------------------------------------------------------------------------


async def _load(config: Config, bulk: Bulk, url: str, admin: RedisAdmin | None, stop: asyncio.Event) -> ExitCode:
    state = await bulk.state()
    assert state is not None
    try:
        told = Told(bulk)
        if state.phase == STAGING:
            staging = stage(url, state.derive, config.collections, state.part, told.staging, crash=config.crashpoint)
            if not await unless_stopped(staging, stop):
                return _stopped()
            counts = await bulk.counts()
            if why := await _why_not(config, bulk, counts, admin):
                _console.print(f"{why}\nNothing is loaded yet. Run the same command again.", markup=False)
                return ExitCode.NO
            await bulk.hold()
        if state.phase != SETTLING:
            _console.print("Loading: writers wait.")
            is_whole = admin is not None and not config.collections and state.part == WHOLE
            floor = is_whole and admin is not None and await Live(admin, config).all_are_ours()
            load = Load(url, state.derive, told.step, floor=floor)
            if not await unless_stopped(load.all(), stop):
                return _stopped()
            await bulk.release()
            _console.print("Loaded: writers may go on.")
        done = await _settle_later(config, bulk, url, admin, stop)
    except* (StoreUnavailable, StreamUnavailable, Unreachable) as group:
        raise _first(group) from None
    return done


def _stopped() -> ExitCode:
    _console.print("Stopped. Run the same command again: it goes on where it was.")
    return ExitCode.NO


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return Unreachable(str(first))


async def _why_not(config: Config, bulk: Bulk, counts: Counts, admin: RedisAdmin | None) -> str:
    """What speaks against loading now; says what it will take."""
    seconds = counts.records / LOAD_ROWS_S
    _console.print(
        f"To load: {counts.staged:,} repositories, {counts.records:,} records; about {duration(seconds)}, "
        f"{counts.records * (ROW_BYTES + STAGED_ROW_BYTES) / 1e9:,.2f} GB in PostgreSQL, of which "
        f"{counts.records * STAGED_ROW_BYTES / 1e9:,.2f} GB are free again afterwards."
    )
    if others := await bulk.others(OURS):
        return "Others are connected to this database: stop them first (the reader may run on).\n" + "\n".join(others)
    there = await bulk.rows_there()
    if there > counts.records:
        return f"The tables hold about {there:,} records: with so many, `fastworker backfill` without --bulk is faster."
    if admin is not None:
        runway = await _runway_s(admin, config)
        if seconds > runway / 2:
            return (
                f"The stream has room for {duration(runway)} of events: loading may take half of that. Raise "
                "REDIS_MAX_STREAM_LEN, or choose fewer accounts."
            )
    return ""


async def _runway_s(admin: RedisAdmin, config: Config) -> float:
    """Seconds until the stream is full if nobody finishes anything, as events came of late."""
    stream = await admin.stream(measure=config.stream_bytes_max is not None)
    if stream is None or not stream.length:
        return float("inf")
    newest = await admin.newest(await admin.ends(), NEWEST)
    if len(newest) < 2:
        return float("inf")
    rate = len(newest) / max(age_s(newest[0][1]), 0.001)
    room = float(config.max_stream_len - stream.length)
    if config.stream_bytes_max is not None and stream.bytes:
        room = min(room, (config.stream_bytes_max - stream.bytes) / (stream.bytes / stream.length))
    return max(0.0, room) / rate


async def _settle_later(
    config: Config, bulk: Bulk, url: str, admin: RedisAdmin | None, stop: asyncio.Event
) -> ExitCode:
    """Accounts that need a comparison, one after the other, beside the stream."""
    state, later = await bulk.state(), await bulk.later()
    part = WHOLE if state is None else state.part
    report = Report(dry_run=False)
    if later:
        _console.print(f"{len(later):,} accounts are settled one by one, beside the stream.")
        store = await Store.connect(url, pool_size=1, application_name="fastworker-bulk", derive=config.derive)
        live = None if admin is None else Live(admin, config)
        try:
            async with open_stored(url) as stored:
                settle = Settle(stored, store)
                for number, file in enumerate(later, 1):
                    if not await unless_stopped(_settle(bulk, settle, live, file, part, report), stop):
                        report.stopped = f"{number - 1} of {len(later)} accounts"
                        return report.end()
                    report.tell(len(later) - number)
            while await store.maintain():
                pass
        finally:
            await store.close()
    for did, why in await bulk.refused():
        report.failed(did, why)
    await bulk.end()
    if state is not None:
        _remove_spool(state)
    return report.end() if later or report.failures else ExitCode.DONE


async def _settle(bulk: Bulk, settle: Settle, live: Live | None, file: File, part: Part, report: Report) -> None:
    if live is not None and file.entry_id is not None:
        await live.finished(Mark(file.seq, file.entry_id, file.taken_at))
    try:
        with Repository(Path(file.file)) as repository:
            repository.check()
            floor = live is not None and await settle.may_floor() and await live.all_are_ours()
            snapshot = Snapshot(file.did, file.rev, file.seq, file.taken_at)
            settled = await settle.settle(repository, snapshot, floor=floor, part=part)
    except (Unproved, OSError) as error:
        await bulk.settled(file.did, str(error))
        return
    report.add(settled)
    await bulk.settled(file.did, settled.refused)


def _remove_spool(state: State) -> None:
    """What this load has fetched; files that were imported stay."""
    if state.folder != Path():
        for path in state.folder.glob("did_*.car"):
            path.unlink(missing_ok=True)
