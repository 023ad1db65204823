"""`fastworker repair DID...|--recorded|--host|--gap`: accounts made equal to their repositories (sync/many.py)."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from fastworker.config import Config
from fastworker.errors import ConfigError, ExitCode
from fastworker.event.syntax import is_did
from fastworker.store.repos import OPERATOR, REPAIR, Wanted
from fastworker.sync.gaps import close_gaps, read_gaps
from fastworker.sync.hosts import Hosts
from fastworker.sync.lists import read_host, relay_of
from fastworker.sync.many import Scene, Work, opened, settle_all
from fastworker.sync.settle import Report


class Wish(NamedTuple):
    dids: tuple[str, ...]
    dry_run: bool = False
    accept_older: bool = False
    recorded: bool = False  # also those whose #sync said that their state was replaced
    host: str | None = None
    gap: bool = False


async def repair(config: Config, wish: Wish, stop: asyncio.Event, *, hosts: Hosts | None = None) -> ExitCode:
    """DONE: every account is equal to its repository. `hosts`: where tests put their own servers."""
    for did in wish.dids:
        if not is_did(did):
            raise ConfigError(f"{did[:100]!r} is not a DID, such as did:plc:ewvi7nxzyoun6zhxrhs64oiz")
    async with opened(config, "repair", hosts, reads_only=wish.dry_run) as scene:
        return await _repair(scene, wish, stop)


async def _repair(scene: Scene, wish: Wish, stop: asyncio.Event) -> ExitCode:
    records = await scene.admin.recorded_repairs() if wish.recorded else {}
    recorded = [*(await scene.stored.recorded_repairs()), *records] if wish.recorded else []
    report = Report(dry_run=wish.dry_run)
    work = Work(priority_max=REPAIR, accept_older=wish.accept_older)
    if wish.dry_run:
        return await settle_all(scene, report, work, stop, only=[*wish.dids, *recorded])

    async def feed() -> None:
        if wish.host is not None:
            await read_host(scene, wish.host, "operator", REPAIR)
        if wish.gap:
            await read_gaps(scene, relay_of(scene.config.relay_urls[0]))

    async def repaired(did: str, _seq: int) -> None:
        if did in records:
            await scene.admin.forget_repair(did, records[did])

    await scene.queue.put([Wanted(did) for did in wish.dids], "operator", OPERATOR, again=True)
    await scene.queue.put([Wanted(did) for did in recorded], "recorded", REPAIR, again=True)
    code = await settle_all(scene, report, work, stop, feed=feed, repaired=repaired)
    if wish.gap and not stop.is_set():
        code = max(code, await close_gaps(scene))
    return code
