"""Whose history: the accounts of a choice go into the queue. What was chosen is told in words of the command line."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple

from fastworker.errors import ConfigError, Unreachable
from fastworker.event.syntax import is_did
from fastworker.store.repos import CHOSEN, EVERYBODY, Queue, Wanted
from fastworker.sync.hosts import HostError, KnownHost
from fastworker.sync.lists import read_host, read_repos, relay_of
from fastworker.sync.many import Scene
from fastworker.sync.report import Report
from fastworker.table.chosen import Part, is_account_left_out
from fastworker.table.snapshot import tid_of

PIECE: Final = 5_000
REASON: Final = "backfill"
_LOOK_S: Final = 0.5


class Choice(NamedTuple):
    """Which accounts a backfill is about."""

    dids: Path | None = None
    known: bool = False
    follows_of: tuple[str, ...] = ()
    depth: int = 1
    host: str | None = None
    collection: tuple[str, ...] = ()
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
            for piece in pieces_of(choice.dids):
                await self._put(piece)
        if choice.known:
            async for piece in known(scene.queue):
                await self._put(piece)
        if choice.follows_of:
            await self._follows(list(choice.follows_of), choice.depth)
        if choice.host is not None:
            await read_host(scene, choice.host, REASON, CHOSEN, again=choice.again, part=self._part)
        for collection in choice.collection:
            relay = relay_of(scene.config.relay_urls[0])
            await read_repos(scene, relay, REASON, CHOSEN, collection=collection, again=choice.again, part=self._part)
        if choice.everybody:
            async for host in all_hosts(scene):
                try:
                    await read_host(scene, host.hostname, REASON, EVERYBODY, again=choice.again, part=self._part)
                except Unreachable as error:
                    self._report.failed(host.hostname, str(error))

    async def _put(self, dids: list[str]) -> None:
        wanted = [Wanted(did) for did in dids if not is_account_left_out(did)]
        await self._scene.queue.put(wanted, REASON, CHOSEN, again=self._choice.again, part=self._part)

    async def _follows(self, roots: list[str], depth: int) -> None:
        """The accounts, whom they follow as soon as that is known, and so on."""
        level, seen = roots, set(roots)
        for number in range(depth + 1):
            for start in range(0, len(level), PIECE):
                await self._put(level[start : start + PIECE])
            if number == depth:
                return
            await self._ended(level)
            level = [did for did in await self._scene.queue.followed(level) if did not in seen]
            seen.update(level)

    async def _ended(self, dids: list[str]) -> None:
        while True:
            open_ones = await self._scene.queue.value(
                "SELECT count(*) FROM fastworker.repos WHERE did = ANY($1) AND state IN ('waiting', 'fetching')", dids
            )
            if not open_ones:
                return
            await asyncio.sleep(_LOOK_S)


async def known(queue: Queue) -> AsyncIterator[list[str]]:
    last = ""
    while True:
        rows = await queue.rows("SELECT did FROM public.users WHERE did > $1 ORDER BY did LIMIT $2", last, PIECE)
        if not rows:
            return
        yield [row[0] for row in rows if is_did(row[0])]
        last = rows[-1][0]


async def all_hosts(scene: Scene) -> AsyncIterator[KnownHost]:
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


def pieces_of(path: Path) -> Iterator[list[str]]:
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
