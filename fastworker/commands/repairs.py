"""`fastworker repair DID...|--recorded|--host|--gap`: accounts made equal to their repositories (sync/many.py)."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from fastworker.config import Config
from fastworker.errors import ConfigError, ExitCode
from fastworker.event.syntax import is_did
from fastworker.store.repos import OPERATOR, REPAIR, Listed, Wanted
from fastworker.sync.gaps import close_gaps, read_gaps
from fastworker.sync.hosts import Hosts
from fastworker.sync.lists import read_host, relay_of
from fastworker.sync.many import Scene, Work, opened, settle_all
from fastworker.sync.report import Report


class RepairOptions(NamedTuple):
    dids: tuple[str, ...]
    dry_run: bool = False
    accept_older: bool = False
    recorded: bool = False  # also those whose #sync said that their state was replaced
    host: str | None = None
    gap: bool = False


async def repair(
    config: Config, options: RepairOptions, stop: asyncio.Event, *, hosts: Hosts | None = None
) -> ExitCode:
    """DONE: every account is equal to its repository. `hosts`: where tests put their own servers."""
    for did in options.dids:
        if not is_did(did):
            raise ConfigError(f"{did[:100]!r} is not a DID, such as did:plc:ewvi7nxzyoun6zhxrhs64oiz")
    async with opened(config, "repair", hosts, reads_only=options.dry_run) as scene:
        return await _repair(scene, options, stop)


async def _repair(scene: Scene, options: RepairOptions, stop: asyncio.Event) -> ExitCode:
    records = await scene.admin.recorded_repairs() if options.recorded else {}
    recorded = [*(await scene.stored.recorded_repairs()), *records] if options.recorded else []
    report = Report(dry_run=options.dry_run)
    work = Work(priority_max=REPAIR, accept_older=options.accept_older)
    if options.dry_run:
        return await settle_all(scene, report, work, stop, only=Listed([*options.dids, *recorded]))

    async def feed() -> None:
        if options.host is not None:
            await read_host(scene, options.host, "operator", REPAIR)
        if options.gap:
            await read_gaps(scene, relay_of(scene.config.relay_urls[0]))

    async def repaired(did: str, _seq: int) -> None:
        if did in records:
            await scene.admin.forget_repair(did, records[did])

    await scene.queue.put([Wanted(did) for did in options.dids], "operator", OPERATOR, again=True)
    await scene.queue.put([Wanted(did) for did in recorded], "recorded", REPAIR, again=True)
    code = await settle_all(scene, report, work, stop, feed=feed, repaired=repaired)
    if options.gap and not stop.is_set():
        code = max(code, await close_gaps(scene))
    return code
