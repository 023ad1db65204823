"""`backfill --bulk` and `import --bulk`: history into an empty or nearly empty database, faster than row by row.

Fetch (beside the stream), stage (beside it), load (the stream waits), settle what is left (beside it). Where it is, is
in PostgreSQL (`fastworker.bulk`): after a stop or a kill the same command goes on.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console

from fastworker.commands.imports import files_of, read_whose
from fastworker.config import Config
from fastworker.crashpoint import arm
from fastworker.errors import (
    ConfigError,
    ExitCode,
    RowRejected,
    StoreUnavailable,
    StreamUnavailable,
    Unreachable,
    first_of,
)
from fastworker.event.proof import Unproved
from fastworker.event.repository import Repository, read_head
from fastworker.store.bulk import LOADING, SETTLING, STAGING, Bulk, Counts, File, Load, State, open_bulk
from fastworker.store.migrate import check as check_schema
from fastworker.store.repos import EVERYBODY
from fastworker.store.sizes import row_bytes
from fastworker.store.store import Store
from fastworker.sync.bulk import stage, write_verifications
from fastworker.sync.files import Car, Settings, settle_cars
from fastworker.sync.report import Report, duration, unless_stopped
from fastworker.sync.settle import Settled
from fastworker.table.chosen import WHOLE, Part, chosen_accounts
from fastworker.table.snapshot import Snapshot, tid_moment

if TYPE_CHECKING:  # what talks to Redis and to hosts is imported where it is used: files need neither
    from fastworker.stream.admin import RedisAdmin
    from fastworker.sync.choice import Choice
    from fastworker.sync.hosts import Hosts

OURS: Final = ("fastworker-bulk",)
NEWEST: Final = 2_000
TELL_S: Final = 5.0
LOOK_S, LOOKS = 0.1, 10
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
    from fastworker.stream.admin import open_redis  # noqa: PLC0415
    from fastworker.sync.choice import feed_of  # noqa: PLC0415
    from fastworker.sync.history import TRIES  # noqa: PLC0415
    from fastworker.sync.many import Work, opened, settle_all  # noqa: PLC0415

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
                    rev, seq, taken_at = snapshot.rev, snapshot.seq, snapshot.taken_at
                    await bulk.add([File(did, str(target), rev, seq, entry_id, taken_at, repository.size)])

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
    await read_whose(config, url)
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
        if state.phase == LOADING and not await _staged_again(config, bulk, url, state, asyncio.Event()):
            return ExitCode.NO
        phase = await bulk.give_up()
        if phase == STAGING:
            _remove_spool(state)
            _console.print("The bulk load is cancelled. Nothing of it is in the tables.")
        elif phase == LOADING:
            load = Load(url, state.derive, Told(bulk).step, floor=False)
            try:
                await load.all()
            except* (StoreUnavailable, RowRejected) as group:
                raise Unreachable(str(first_of(group))) from None
            await bulk.release()
            _console.print(
                "The bulk load is given up. What was loaded stays, and writers may go on. Run the command that began "
                "it once more: it settles its accounts one by one."
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
    """Staging reads them whole. Of one account's second file that is done here: a broken one must not take the place of
    a whole one."""
    found: list[File] = []
    seen: set[str] = set()
    for number, path in enumerate(files, 1):
        try:
            commit, size = read_head(path)
            if commit.did in seen:
                Repository(path).close()
        except (Unproved, OSError) as error:
            _console.print(f"{path}: {error}", markup=False)
            continue
        seen.add(commit.did)
        now = datetime.now(UTC).replace(tzinfo=None)
        taken_at = min(tid_moment(commit.rev) or now, now)
        found.append(File(commit.did, str(path.absolute()), commit.rev, 0, None, taken_at, size))
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
        if not await _staged_again(config, bulk, url, state, stop):
            return _stopped()
        if state.phase == STAGING:
            if not await _staged(config, bulk, url, state, stop):
                return _stopped()
            counts = await bulk.counts()
            if why := await _why_not(config, bulk, counts, admin):
                _console.print(f"{why}\nNothing is loaded yet. Run the same command again.", markup=False)
                return ExitCode.NO
            await bulk.hold()
        if state.phase != SETTLING:
            _console.print("Loading: writers wait.")
            is_whole = admin is not None and not config.collections and state.part == WHOLE
            floor = is_whole and await _all_are_ours(config, admin)
            load = Load(url, state.derive, told.step, floor=floor)
            if not await unless_stopped(load.all(), stop):
                return _stopped()
            await bulk.release()
            _console.print("Loaded: writers may go on.")
        done = await _settle_later(config, bulk, url, admin, stop)
    except* (StoreUnavailable, StreamUnavailable, Unreachable) as group:
        raise Unreachable(str(first_of(group))) from None
    return done


async def _staged(config: Config, bulk: Bulk, url: str, state: State, stop: asyncio.Event) -> bool:
    """Whether it has come to its end."""
    told = Told(bulk).staging
    staging = stage(url, state.derive, config.collections, state.part, told, crash=config.crashpoint)
    return await unless_stopped(staging, stop)


async def _staged_again(config: Config, bulk: Bulk, url: str, state: State, stop: asyncio.Event) -> bool:
    """What a crash of the server has taken. Before the load it only waits again. Whether it has come to its end."""
    if state.phase == SETTLING or not await bulk.is_lost():
        return True
    _console.print("The database server has crashed: what was staged is staged again, from the same files.")
    await bulk.stage_again()
    if state.phase == LOADING:
        if not await _staged(config, bulk, url, state, stop):
            return False
        await bulk.staged_again()
    return True


def _stopped() -> ExitCode:
    _console.print("Stopped. Run the same command again: it goes on where it was.")
    return ExitCode.NO


async def _why_not(config: Config, bulk: Bulk, counts: Counts, admin: RedisAdmin | None) -> str:
    """What speaks against loading now; says what it will take."""
    measured = await bulk.measured()
    seconds = counts.records * measured.record_s
    disk = counts.records * await row_bytes(bulk.rows) + measured.staged_bytes
    _console.print(
        f"To load: {counts.staged:,} repositories, {counts.records:,} records; about {duration(seconds)}, "
        f"{disk / 1e9:,.2f} GB in PostgreSQL, of which {measured.staged_bytes / 1e9:,.2f} GB are free again afterwards."
    )
    others = await bulk.others(OURS)
    for _ in range(LOOKS):  # our own sessions of the fetch may need a moment to end
        if not others:
            break
        await asyncio.sleep(LOOK_S)
        others = await bulk.others(OURS)
    if others:
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
    from fastworker.stream.admin import age_s  # noqa: PLC0415

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
    """What was not loaded, beside the stream: verifications, and accounts that need a comparison."""
    state, later = await bulk.state(), await bulk.later()
    part = WHOLE if state is None else state.part
    report = Report(dry_run=False)
    store = await Store.connect(url, application_name=OURS[0], rules=config.rules)
    try:
        for uri, why in await write_verifications(bulk, store):
            report.failed(uri, why)
    finally:
        await store.close()
    if later:
        _console.print(f"{len(later):,} accounts are settled one by one, beside the stream.")
        floor = await _all_are_ours(config, admin)
        cars = [_car(file, part, floor=floor) for file in later]

        async def told(car: Car, became: Settled | str) -> None:
            assert car.snapshot is not None
            why = became if isinstance(became, str) else became.refused
            if not isinstance(became, str):
                report.add(became)
            await bulk.settled(car.snapshot.did, why)
            report.tell(len(later) - report.done)

        async def all_of_them() -> None:
            if admin is not None:
                await _finished(config, admin, later)
            settings = Settings(url, OURS[0], config.rules, config.collections, chosen_accounts())
            await settle_cars(settings, cars, told)

        if not await unless_stopped(all_of_them(), stop):
            report.stopped = f"{report.done} of {len(later)} accounts"
            return report.end()
    for did, why in await bulk.refused():
        report.failed(did, why)
    await bulk.end()
    if state is not None:
        _remove_spool(state)
    return report.end() if later or report.failures else ExitCode.DONE


async def _all_are_ours(config: Config, admin: RedisAdmin | None) -> bool:
    if admin is None:
        return False
    from fastworker.sync.many import Live  # noqa: PLC0415

    return await Live(admin, config).all_are_ours()


async def _finished(config: Config, admin: RedisAdmin, files: Iterable[File]) -> None:
    """Wait until the worker has finished what was on the stream when these were asked for."""
    from fastworker.sync.many import Live, Mark  # noqa: PLC0415

    live = Live(admin, config)
    for file in files:
        if file.entry_id is not None:
            await live.finished(Mark(file.seq, file.entry_id, file.taken_at))


def _car(file: File, part: Part, *, floor: bool) -> Car:
    return Car(file.file, file.size, Snapshot(file.did, file.rev, file.seq, file.taken_at), part, floor)


def _remove_spool(state: State) -> None:
    """What this load has fetched; files that were imported stay."""
    if state.folder != Path():
        for path in state.folder.glob("did_*.car"):
            path.unlink(missing_ok=True)
