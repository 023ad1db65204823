"""Handles that events claim, or that they say to look up again: verified beside the stream, in the monitor's process.

The queue is in PostgreSQL (`fastworker.identities.resolve_pending`), so nothing grows here and nothing is lost. A DID
that cannot be resolved now is asked for again after half a minute, then ever more rarely.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import msgspec

from fastworker.errors import StoreUnavailable, counted
from fastworker.process.backoff import Backoff, pause
from fastworker.store.repos import PooledTurns
from fastworker.store.rules import Rules
from fastworker.store.store import Store

if TYPE_CHECKING:
    from fastworker.sync.identity import Directory

log = logging.getLogger(__name__)

PIECE: Final = 50  # identities taken at once
AT_ONCE: Final = 8
APART_S: Final = 0.05  # 20 a second
IDLE_S: Final = 5.0
AFTER_A_BUG_S: Final = 60.0
EARLIER_PIECE: Final = 5_000


class ResolverSettings(msgspec.Struct, frozen=True):
    """All but the first two are for tests' own servers; `rate`: of every host."""

    database_url: str
    plc_url: str
    well_known: str = "https://{host}/.well-known"
    nameserver: tuple[str, int] | None = None
    own: frozenset[str] = frozenset()
    rate: float | None = None


async def run_resolver(settings: ResolverSettings, stop: asyncio.Event) -> None:
    """Run until `stop`. Never raises: it must not disturb the process that it runs in."""
    backoff = Backoff(1.0, 60.0)
    while not stop.is_set():
        try:
            async with AsyncExitStack() as stack:
                store = await Store.connect(
                    settings.database_url, application_name="fastworker-resolver", rules=Rules(verified_only=True)
                )
                stack.push_async_callback(store.close)
                await _resolve(settings, store, stack, stop, backoff)
        except StoreUnavailable as error:
            log.info("Handles wait for PostgreSQL: %s", error)
            await backoff.wait(stop)
        except Exception:
            log.exception("The resolver of handles failed; it begins again in %.0f s", AFTER_A_BUG_S)
            await pause(AFTER_A_BUG_S, stop)


async def _resolve(
    settings: ResolverSettings, store: Store, stack: AsyncExitStack, stop: asyncio.Event, backoff: Backoff
) -> None:
    directory: Directory | None = None
    await _queue_earlier(store, stop)
    while not stop.is_set():
        waiting = await store.unresolved(PIECE)
        backoff.reset()
        if not waiting:
            await pause(IDLE_S, stop)
            continue
        if directory is None:
            directory = await _directory(settings, store, stack)
        await resolve_once(directory, store, waiting)


async def _queue_earlier(store: Store, stop: asyncio.Event) -> None:
    """What was claimed while handles were not verified is verified now. New claims are queued by who writes them."""
    last: str | None = ""
    queued = 0
    while last is not None and not stop.is_set():
        last, count = await store.claimed_before(last, EARLIER_PIECE)
        queued += count
    if queued:
        log.info("%s that were claimed while nobody verified them are verified now", counted(queued, "handle"))


async def _directory(settings: ResolverSettings, store: Store, stack: AsyncExitStack) -> Directory:
    from fastworker.sync.hosts import Hosts, rate_of  # noqa: PLC0415 - memory, where nothing is to be resolved
    from fastworker.sync.identity import BOUNDS, Directory  # noqa: PLC0415

    rate = settings.rate
    hosts = Hosts(
        settings.plc_url,
        own=settings.own,
        bounds=BOUNDS,
        rate=rate_of if rate is None else lambda _: rate,
        well_known=settings.well_known,
    )
    await stack.enter_async_context(hosts)
    hosts.share(PooledTurns(store))
    return Directory(hosts, nameserver=settings.nameserver)


async def resolve_once(directory: Directory, store: Store, waiting: list[tuple[str, datetime]]) -> None:
    """Look these up, and store what was found."""
    from fastworker.sync.identity import Unresolved, gather  # noqa: PLC0415 - as above

    asked_at = datetime.now(UTC)
    found = await gather(directory, [did for did, _ in waiting], AT_ONCE, APART_S)
    rows = []
    for did, marked_at in waiting:
        answer = found[did]
        if not isinstance(answer, Unresolved):
            rows.append((did, answer, asked_at, marked_at))
    await store.resolved(rows)
    if later := [did for did, answer in found.items() if isinstance(answer, Unresolved)]:
        log.info("%s could not be resolved now: %s", counted(len(later), "handle"), found[later[0]])
        await store.unresolvable(later)
