"""Lists of accounts, read page by page into the queue. A page and its cursor are one transaction: it goes on anywhere.

A list's `rev` is a time: what was settled at that revision, or a later one, is not fetched again.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from yarl import URL

from fastworker.errors import Unreachable
from fastworker.event.syntax import is_did
from fastworker.store.repos import Sweep, Wanted
from fastworker.sync.hosts import HostError, HostFault, RepoHead
from fastworker.sync.status import take_status
from fastworker.table.chosen import WHOLE, Part, is_account_left_out

if TYPE_CHECKING:
    from fastworker.sync.many import Scene

QUEUED_MAX: Final = 200_000
"""Accounts that wait: the list is read on when there are fewer."""
GAP: Final = "gap"
"""The reason of a list that is read because events were lost."""
_LOOK_S: Final = 5.0
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
            await take_status(scene, mark.seq, repos)
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
