"""Lists of accounts, read page by page into the queue. A page and its cursor are one transaction: it goes on anywhere.

A list's `rev` is a time: what was settled at that revision, or a later one, is not fetched again.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from yarl import URL

from fastworker.errors import Unreachable
from fastworker.event import Account
from fastworker.event.syntax import is_did
from fastworker.store.repos import REPAIR, Sweep, Wanted
from fastworker.stream.repairs import cursor_relay
from fastworker.sync.hosts import HostError, HostFault, RepoHead
from fastworker.table.batch import Batch
from fastworker.table.chosen import WHOLE, Part, is_account_left_out

if TYPE_CHECKING:
    from fastworker.sync.many import Scene

QUEUED_MAX: Final = 200_000
"""Accounts that wait: the list is read on when there are fewer."""
GAP: Final = "gap"
"""The reason of a list that is read because events were lost."""
_LOOK_S: Final = 5.0
_STATUSES: Final = "SELECT did, active, status FROM fastworker.accounts WHERE did = ANY($1::varchar[])"
_TRIES: Final = 5


def relay_of(url: str) -> str:
    """Where the relay at this WebSocket URL answers requests."""
    given = URL(url)
    scheme = {"ws": "http", "wss": "https"}.get(given.scheme, given.scheme)
    return str(given.with_scheme(scheme).origin())


async def read_host(
    scene: Scene, host: str, reason: str, priority: int, *, again: bool = False, part: Part = WHOLE
) -> None:
    """Every account of a host that has changed since it was settled."""
    origin = scene.hosts.origin(host)
    try:
        authority = URL(origin).authority
    except ValueError:
        raise Unreachable(f"{host[:100]!r} is not the name of a host") from None
    await read_repos(scene, origin, reason, priority, host=authority, again=again, part=part)


async def read_repos(
    scene: Scene,
    source: str,
    reason: str,
    priority: int,
    *,
    host: str = "",
    since_rev: str = "",
    collection: str = "",
    again: bool = False,
    part: Part = WHOLE,
) -> Sweep:
    """Everything that `source` lists, less what is as new here. `host`: of all of them, where it is known."""
    sweep = await scene.queue.sweep(source, reason, priority, collection=collection, host=host, since_rev=since_rev)
    while not sweep.is_done:
        mark = await scene.live.mark() if reason == GAP else None
        repos, cursor = await _page(scene, sweep)
        if mark is not None:
            await _take_status(scene, mark.seq, repos)
        wanted = [
            Wanted(one.did, one.rev or None)
            for one in repos
            if is_did(one.did)
            and not is_account_left_out(one.did)
            and one.active is not False
            and (not one.rev or one.rev >= sweep.since_rev)
        ]
        if cursor is not None and (cursor == sweep.cursor or not repos):
            cursor = None  # a list that goes nowhere is at its end
        sweep = await scene.queue.page(sweep, wanted, len(repos), cursor, reason, priority, again=again, part=part)
        await _room(scene, priority)
    return sweep


async def _room(scene: Scene, priority: int) -> None:
    while True:
        left = await scene.queue.left(priority)
        if left.waiting <= QUEUED_MAX:
            return
        await asyncio.sleep(_LOOK_S)


async def _page(scene: Scene, sweep: Sweep) -> tuple[list[RepoHead], str | None]:
    for number in range(1, _TRIES + 1):
        try:
            if sweep.collection:
                return await scene.hosts.list_collection(sweep.source, sweep.collection, sweep.cursor)
            return await scene.hosts.list_repos(sweep.source, sweep.cursor)
        except HostError as error:
            if number == _TRIES or error.fault not in (HostFault.UNREACHABLE, HostFault.SLOW, HostFault.LIMITED):
                raise Unreachable(f"the list of accounts cannot be read: {error}") from error
            await asyncio.sleep(min(max(error.wait_s, 1.0), 600.0))
    raise AssertionError


async def _take_status(scene: Scene, seq: int, repos: list[RepoHead]) -> None:
    """Where the list says otherwise than the newest event, its word is an event of that relay.

    `seq`: the reader's cursor before the list was asked for, so that every event after it wins. Nothing is taken from a
    relay that the cursor does not belong to, nor where a list does not say whether an account is active. Who is active
    again is settled: a deletion has taken its rows away.
    """
    relay = await cursor_relay(scene.admin)
    if scene.store is None or relay is None or relay != URL(scene.config.relay_urls[0]).host:
        return
    told = {one.did: one for one in repos if one.active is not None and is_did(one.did)}
    known = {row[0]: (row[1], row[2]) for row in await scene.queue.rows(_STATUSES, list(told))}
    batch, now, back = Batch(), datetime.now(UTC), []
    for did, one in told.items():
        active, status = known.get(did, (True, None))
        if one.active == active and (active or one.status == status):
            continue
        batch.put_account(Account(seq, did, bool(one.active), None if one.active else one.status, None, relay), now)
        if one.active:
            back.append(Wanted(did))
    if batch.accounts:
        await scene.store.write(batch)
        await scene.queue.put(back, "reactivated", REPAIR, again=True)
