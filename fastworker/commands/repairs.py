"""`fastworker repair DID...|--recorded`: accounts made equal to their repositories, beside the running services.

For each: S0 is the reader's cursor before the request, so everything up to S0 happened before the snapshot. The
repository is fetched and checked (sync/fetch.py). Then the worker must have finished what was on the stream when S0
was read; what comes later is newer, or its version is lower and the writer sees that. Then only the differences are
written (sync/settle.py).
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from fastworker.config import Config
from fastworker.errors import ConfigError, ExitCode, StoreUnavailable, StreamUnavailable, Unreachable
from fastworker.event.syntax import is_did
from fastworker.store.migrate import check as check_schema
from fastworker.store.store import Store
from fastworker.store.stored import open_stored
from fastworker.stream.admin import RedisAdmin, open_redis
from fastworker.sync.fetch import NotFetched, fetched
from fastworker.sync.hosts import Hosts
from fastworker.sync.settle import Report, Settle, unless_stopped
from fastworker.table.snapshot import Snapshot

AT_ONCE: Final = 8
LOOK_S: Final = 0.3
STALL_S: Final = 120.0  # without the worker getting on


class RepairOptions(NamedTuple):
    dids: tuple[str, ...]
    dry_run: bool = False
    accept_older: bool = False
    recorded: bool = False  # also those whose #sync said that their state was replaced


class _Mark(NamedTuple):
    """Where reader and stream were before a request."""

    seq: int
    entry_id: str
    at: datetime


async def repair(
    config: Config, options: RepairOptions, stop: asyncio.Event, *, hosts: Hosts | None = None
) -> ExitCode:
    """DONE: every account is equal to its repository. `hosts`: where tests put their own servers."""
    for did in options.dids:
        if not is_did(did):
            raise ConfigError(f"{did[:100]!r} is not a DID, such as did:plc:ewvi7nxzyoun6zhxrhs64oiz")
    url = config.require_database_url("repair")
    if problems := await check_schema(url):
        raise Unreachable("\n".join(problems))
    report = Report(dry_run=options.dry_run)
    try:
        async with AsyncExitStack() as stack:
            admin = await stack.enter_async_context(
                open_redis(config.redis_url, config.stream_key, client_name="fastworker-repair")
            )
            stored = await stack.enter_async_context(open_stored(url))
            store = None
            if not options.dry_run:
                store = await Store.connect(url, application_name="fastworker-repair", derive=config.derive)
                stack.push_async_callback(store.close)
            if hosts is None:
                hosts = await stack.enter_async_context(Hosts(config.plc_url))
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastworker-repair-")))
            records = await admin.recorded_repairs() if options.recorded else {}
            dids = [*options.dids, *(await stored.recorded_repairs() if options.recorded else ()), *records]

            async def repaired(did: str, seq: int) -> None:
                if store is not None and options.recorded:
                    await store.forget_repair(did, seq)
                    if did in records:
                        await admin.forget_repair(did, records[did])

            run = _Run(config, options, admin, hosts, Settle(stored, store), folder, report, repaired)
            await run.all(list(dict.fromkeys(dids)), stop)
    except (StoreUnavailable, StreamUnavailable) as error:
        raise Unreachable(str(error)) from error
    return report.end()


class _Run:
    def __init__(
        self,
        config: Config,
        options: RepairOptions,
        admin: RedisAdmin,
        hosts: Hosts,
        settle: Settle,
        folder: Path,
        report: Report,
        repaired: Callable[[str, int], Awaitable[None]],
    ) -> None:
        self._config = config
        self._options = options
        self._admin = admin
        self._hosts = hosts
        self._settle = settle
        self._folder = folder
        self._report = report
        self._repaired = repaired
        self._one = asyncio.Lock()  # one account is compared at a time, while others are fetched
        self._done = 0

    async def all(self, dids: list[str], stop: asyncio.Event) -> None:
        waiting = iter(dids)

        async def work() -> None:
            for did in waiting:
                await self._account(did)
                self._done += 1
                self._report.tell(self._done, len(dids))

        async def every() -> None:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(AT_ONCE, len(dids))):
                    tasks.create_task(work())

        try:
            if not await unless_stopped(every(), stop):
                self._report.stopped = f"{self._done} of {len(dids)} accounts"
        except* (StoreUnavailable, StreamUnavailable, Unreachable, ConfigError) as group:
            raise group.exceptions[0] from None

    async def _account(self, did: str) -> None:
        mark = await self._mark()
        try:
            async with fetched(self._hosts, did, self._folder) as repository:
                await self._finished(mark)
                snapshot = Snapshot(did, repository.commit.rev, mark.seq, mark.at)
                async with self._one:
                    settled = await self._settle.settle(repository, snapshot, accept_older=self._options.accept_older)
        except NotFetched as error:
            self._report.failed(did, str(error))
            return
        self._report.add(settled)
        if settled.refused:
            self._report.failed(did, settled.refused)
        else:
            await self._repaired(did, mark.seq)

    async def _mark(self) -> _Mark:
        """The cursor first: what it covers was appended with it."""
        text = await self._admin.cursor(self._config.cursor_key)
        if text is None or not text.isdecimal():
            raise Unreachable(f"{self._config.cursor_key} holds no cursor: start `fastworker reader` first")
        stream = await self._admin.stream()
        last_id = "0-0" if stream is None else stream.last_id
        return _Mark(int(text), last_id, datetime.now(UTC).replace(tzinfo=None))

    async def _finished(self, mark: _Mark) -> None:
        """Wait until the group has finished everything that was on the stream before the request."""
        last, since = "", time.monotonic()
        while True:
            stream = await self._admin.stream()
            group = None if stream is None else stream.group(self._config.group)
            if group is None:
                if stream is None or not stream.length:
                    return
                raise Unreachable(f"{self._config.stream_key} has no group {self._config.group}: start a worker first")
            unfinished = group.unfinished_id
            if unfinished is None or _order(unfinished) > _order(mark.entry_id):
                return
            if unfinished != last:
                last, since = unfinished, time.monotonic()
            elif time.monotonic() - since > STALL_S:
                raise Unreachable(f"the worker has not finished entry {unfinished} for {STALL_S:.0f} s: is it running?")
            await asyncio.sleep(LOOK_S)


def _order(entry_id: str) -> list[int]:
    return [int(part) for part in entry_id.split("-")]
