"""`fastworker backfill`: the history of chosen accounts from their hosts, beside the live stream (sync/many.py)."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

from rich.console import Console
from rich.table import Table
from yarl import URL

from fastworker.config import Config
from fastworker.errors import ConfigError, ExitCode, Unreachable
from fastworker.event.syntax import is_did
from fastworker.store.repos import CHOSEN, EVERYBODY, Wanted
from fastworker.sync.hosts import HostError, Hosts, KnownHost, rate_of
from fastworker.sync.lists import read_host, read_repos, relay_of
from fastworker.sync.many import Scene, Work, opened, settle_all
from fastworker.sync.settle import Report, duration
from fastworker.table.chosen import Part
from fastworker.table.snapshot import tid_of

PIECE: Final = 5_000
TRIES: Final = 5
_REASON: Final = "backfill"
_LOOK_S: Final = 0.5
RECORDS: Final = 435  # of an account of the network, on average
CAR_BYTES: Final = 160_000
ROW_BYTES: Final = 1_300  # with all indexes
WRITES_S: Final = 8_000.0  # records that one process compares and writes in a second


class Choice(NamedTuple):
    """Which accounts a backfill is about."""

    dids: Path | None = None
    known: bool = False
    follows_of: tuple[str, ...] = ()
    depth: int = 1
    host: str | None = None
    collection: str | None = None
    everybody: bool = False
    days: int | None = None
    collections: tuple[str, ...] | None = None
    again: bool = False

    @property
    def part(self) -> Part:
        """What of each account: the last `days`, by the clock of this process, and `collections`."""
        if self.days is None:
            return Part(None, self.collections)
        return Part(tid_of(datetime.now(UTC).replace(tzinfo=None) - timedelta(days=self.days)), self.collections)

    @property
    def is_somebody(self) -> bool:
        return self._replace(depth=1, days=None, collections=None, again=False) != Choice()

    def check(self) -> None:
        for did in self.follows_of:
            if not is_did(did):
                raise ConfigError(f"{did[:100]!r} is not a DID, such as did:plc:ewvi7nxzyoun6zhxrhs64oiz")


async def backfill(config: Config, choice: Choice, stop: asyncio.Event, *, hosts: Hosts | None = None) -> ExitCode:
    """DONE: everybody who was chosen is settled. What others have put into the queue is worked on, too."""
    choice.check()
    report = Report(dry_run=False)
    async with opened(config, "backfill", hosts, reads_only=False) as scene:
        work = Work(priority_max=EVERYBODY, tries=TRIES)
        return await settle_all(scene, report, work, stop, feed=feed_of(scene, choice, report))


def feed_of(scene: Scene, choice: Choice, report: Report) -> Callable[[], Awaitable[None]]:
    """What puts the chosen accounts into the queue."""
    return _Feed(scene, choice, report).everybody


class _Feed:
    """Puts the chosen accounts into the queue. Those that are done already, and have not changed as far as a list
    says, are not put again."""

    def __init__(self, scene: Scene, choice: Choice, report: Report) -> None:
        self._scene = scene
        self._choice = choice
        self._part = choice.part
        self._report = report

    async def everybody(self) -> None:
        choice, scene = self._choice, self._scene
        if choice.dids is not None:
            for piece in _pieces(choice.dids):
                await self._put(piece)
        if choice.known:
            async for piece in _known(scene):
                await self._put(piece)
        if choice.follows_of:
            await self._follows(list(choice.follows_of), choice.depth)
        if choice.host is not None:
            await read_host(scene, choice.host, _REASON, CHOSEN, again=choice.again, part=self._part)
        if choice.collection is not None:
            relay = relay_of(scene.config.relay_urls[0])
            await read_repos(
                scene, relay, _REASON, CHOSEN, collection=choice.collection, again=choice.again, part=self._part
            )
        if choice.everybody:
            async for host in _all_hosts(scene):
                try:
                    await read_host(scene, host.hostname, _REASON, EVERYBODY, again=choice.again, part=self._part)
                except Unreachable as error:
                    self._report.failed(host.hostname, str(error))

    async def _put(self, dids: list[str]) -> None:
        wanted = [Wanted(did) for did in dids]
        await self._scene.queue.put(wanted, _REASON, CHOSEN, again=self._choice.again, part=self._part)

    async def _follows(self, roots: list[str], depth: int) -> None:
        """The accounts, whom they follow as soon as that is known, and so on."""
        level, seen = roots, set(roots)
        for number in range(depth + 1):
            for start in range(0, len(level), PIECE):
                await self._put(level[start : start + PIECE])
            if number == depth:
                return
            await self._ended(level)
            level = [did for did in await _followed(self._scene, level) if did not in seen]
            seen.update(level)

    async def _ended(self, dids: list[str]) -> None:
        while True:
            open_ones = await self._scene.queue.value(
                "SELECT count(*) FROM fastworker.repos WHERE did = ANY($1) AND state IN ('waiting', 'fetching')", dids
            )
            if not open_ones:
                return
            await asyncio.sleep(_LOOK_S)


async def _followed(scene: Scene, dids: list[str]) -> list[str]:
    select = "SELECT DISTINCT following_did FROM public.follows WHERE follower_did = ANY($1)"
    return [row[0] for row in await scene.queue.rows(select, dids)]


async def _known(scene: Scene) -> AsyncIterator[list[str]]:
    last = ""
    while True:
        rows = await scene.queue.rows("SELECT did FROM public.users WHERE did > $1 ORDER BY did LIMIT $2", last, PIECE)
        if not rows:
            return
        yield [row[0] for row in rows if is_did(row[0])]
        last = rows[-1][0]


async def _all_hosts(scene: Scene) -> AsyncIterator[KnownHost]:
    relay, cursor = relay_of(scene.config.relay_urls[0]), None
    while True:
        try:
            found, cursor = await scene.hosts.list_hosts(relay, cursor)
        except HostError as error:
            raise Unreachable(f"the relay's list of hosts cannot be read: {error}") from error
        for host in found:
            if host.status not in ("banned", "offline"):
                yield host
        if cursor is None or not found:
            return


def _pieces(path: Path) -> Iterator[list[str]]:
    """DIDs of a file, one a line; `-` is standard input. `#` begins a comment."""
    piece: list[str] = []
    try:
        with sys.stdin if str(path) == "-" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                did = line.partition("#")[0].strip()
                if not did:
                    continue
                if not is_did(did):
                    raise ConfigError(f"{path}, line {number}: {did[:100]!r} is not a DID")
                piece.append(did)
                if len(piece) >= PIECE:
                    yield piece
                    piece = []
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    yield piece


# Before it begins, and beside it ------------------------------------------------------------------


async def estimate(config: Config, choice: Choice, *, hosts: Hosts | None = None) -> ExitCode:
    """What the choice would cost, by what is known. Reads lists, fetches no repository, stores nothing."""
    choice.check()
    async with opened(config, "backfill", hosts, reads_only=True) as scene:
        accounts, rate = await _count(scene, choice)
        known = (
            await scene.queue.rows(
                "SELECT count(*), avg(records)::float8, avg(bytes)::float8 FROM fastworker.repos WHERE state = 'done'"
            )
        )[0]
        is_known = known[0] >= 20
        records, size = (known[1], known[2]) if is_known else (RECORDS, CAR_BYTES)
    rows = accounts * records
    by_hosts, by_rows = accounts / rate, rows / WRITES_S
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"accounts  {accounts:,}\n"
        f"to fetch  {accounts * size / 1e9:,.2f} GB\n"
        f"rows      {rows:,.0f}\n"
        f"disk      {rows * ROW_BYTES / 1e9:,.2f} GB in PostgreSQL, with all indexes\n"
        f"time      {duration(max(by_hosts, by_rows))}: {duration(by_hosts)} for the hosts at {rate:g} requests/s, "
        f"{duration(by_rows)} for one process to compare and write\n"
        + (
            f"By the average of {known[0]:,} accounts that were fetched: {records:,.0f} records, {size:,.0f} bytes."
            if is_known
            else f"By the network's average: {records:,} records and {size:,} bytes an account."
        )
    )
    return ExitCode.DONE


async def _count(scene: Scene, choice: Choice) -> tuple[int, float]:
    """Accounts, and how many of them may be fetched in a second."""
    directory = rate_of(URL(scene.config.plc_url).authority)
    if choice.everybody:
        return sum([host.accountCount or 0 async for host in _all_hosts(scene)]), directory
    if choice.host is not None:
        origin = scene.hosts.origin(choice.host)
        return await _length(scene, origin, None), min(rate_of(URL(origin).authority), directory)
    if choice.collection is not None:
        return await _length(scene, relay_of(scene.config.relay_urls[0]), choice.collection), directory
    if choice.dids is not None:
        return sum(len(piece) for piece in _pieces(choice.dids)), directory
    if choice.known:
        return int(await scene.queue.value("SELECT count(*) FROM public.users")), directory
    level, seen = list(choice.follows_of), set(choice.follows_of)
    for _ in range(choice.depth):
        level = [did for did in await _followed(scene, level) if did not in seen]
        seen.update(level)
    return len(seen), directory


async def _length(scene: Scene, source: str, collection: str | None) -> int:
    count, cursor = 0, None
    while True:
        try:
            if collection is None:
                found, cursor = await scene.hosts.list_repos(source, cursor)
            else:
                found, cursor = await scene.hosts.list_collection(source, collection, cursor)
        except HostError as error:
            raise Unreachable(f"the list of accounts cannot be read: {error}") from error
        count += len(found)
        if cursor is None or not found:
            return count


_STATES: Final = """
SELECT reason, count(*) FILTER (WHERE state = 'waiting'), count(*) FILTER (WHERE state = 'fetching'),
    count(*) FILTER (WHERE state = 'done'), count(*) FILTER (WHERE state = 'gone'),
    count(*) FILTER (WHERE state = 'refused'), coalesce(sum(records), 0)::bigint, coalesce(sum(differences), 0)::bigint
FROM fastworker.repos GROUP BY reason ORDER BY reason
"""
_RATE: Final = """
SELECT count(*) / 300.0::float8, coalesce(sum(records), 0) / 300.0::float8 FROM fastworker.repos
WHERE state = 'done' AND ended_at > now() - interval '5 minutes'
"""
_GAPS: Final = """
SELECT g.relay, g.from_seq, g.to_seq, g.seen_at, (
    SELECT count(*) FROM fastworker.repos AS r
    WHERE r.sweep = g.sweep AND r.state IN ('waiting', 'fetching', 'refused')) AS left, s.done_at IS NOT NULL AS is_read
FROM fastworker.gaps AS g LEFT JOIN fastworker.sweeps AS s ON s.id = g.sweep
WHERE g.closed_at IS NULL ORDER BY g.seen_at
"""


async def show(config: Config, *, hosts: Hosts | None = None) -> ExitCode:
    """What waits, what is done, how fast, and which gaps are open."""
    console = Console(highlight=False, soft_wrap=True)
    async with opened(config, "backfill", hosts, reads_only=True) as scene:
        states, rate = await scene.queue.rows(_STATES), (await scene.queue.rows(_RATE))[0]
        gaps = await scene.queue.rows(_GAPS)
        is_paused = await scene.queue.value("SELECT is_paused FROM fastworker.backfill")
    grid = Table(box=None, pad_edge=False, header_style="bold")
    names = ("queued by", "waiting", "fetching", "done", "gone", "refused", "records", "differences")
    for name in names:
        grid.add_column(name, justify="left" if name == names[0] else "right", no_wrap=True)
    for row in states:
        grid.add_row(row[0], *(f"{cell:,}" if cell else "" for cell in tuple(row)[1:]))
    console.print(grid if states else "Nothing was ever queued.")
    waiting = sum(row[1] for row in states)
    if rate[0]:
        left = f", {duration(waiting / rate[0])} left" if waiting else ""
        console.print(f"In the last five minutes {rate[0]:.1f} accounts/s, {rate[1]:,.0f} records/s{left}.")
    if is_paused:
        console.print("History is paused: `fastworker backfill --resume` lets it go on.")
    for gap in gaps:
        console.print(_gap_words(gap), markup=False)
    return ExitCode.DONE


def _gap_words(gap: Any) -> str:
    words = f"Open gap of {gap['relay']}, seq {gap['from_seq']} to {gap['to_seq']}: "
    if gap["left"]:
        return words + f"{gap['left']:,} accounts are left."
    return words + ("its repairs are done." if gap["is_read"] else "run `fastworker repair --gap`.")


async def cancel(config: Config, *, hosts: Hosts | None = None) -> ExitCode:
    """Forget what a backfill has queued and not begun. Running ones end when nothing is left."""
    async with opened(config, "backfill", hosts, reads_only=True) as scene:
        await scene.queue.execute(
            "UPDATE fastworker.sweeps SET done_at = now() WHERE done_at IS NULL AND reason = $1", _REASON
        )
        tag = await scene.queue.execute(
            "DELETE FROM fastworker.repos WHERE state = 'waiting' AND priority >= $1", CHOSEN
        )
    Console(highlight=False).print(f"{int(tag.rpartition(' ')[2]):,} accounts are not fetched any more.")
    return ExitCode.DONE


async def pause(config: Config, *, is_paused: bool, hosts: Hosts | None = None) -> ExitCode:
    """History waits, on every host, until it is told to go on. Repairs do not."""
    async with opened(config, "backfill", hosts, reads_only=True) as scene:
        await scene.queue.execute("UPDATE fastworker.backfill SET is_paused = $1", is_paused)
    words = "History waits. `fastworker backfill --resume` lets it go on." if is_paused else "History goes on."
    Console(highlight=False).print(words)
    return ExitCode.DONE
