"""Whether accounts are active, by others than #account events: what said it may have been lost.

The relay's list says it of everybody in a gap; the host that an account's document names says it with its answer, and
the directory says who has given up the DID. Each is taken as an event of the cursor's relay at the cursor.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from yarl import URL

from fastworker.event import Account
from fastworker.event.syntax import is_did
from fastworker.store.repos import REPAIR, Wanted
from fastworker.stream.repairs import cursor_relay
from fastworker.sync.hosts import RepoHead
from fastworker.table.batch import Batch

if TYPE_CHECKING:
    from fastworker.store.store import Store
    from fastworker.store.stored import Stored
    from fastworker.sync.many import Scene

_HOSTS_OWN: Final = ("deactivated", "deleted")
"""What only the account's own host decides."""
_KNOWN: Final = "SELECT did, active, status FROM fastworker.accounts WHERE did = ANY($1::varchar[])"


async def take_word(
    stored: Stored, store: Store | None, relay: str | None, seq: int, did: str, status: str | None
) -> bool | None:
    """What an account's host answered: `status` None: it is active. Whether something else is stored; None: unjudged.

    `seq`: the cursor before the host was asked, so that every event after it wins. That a host serves an account says
    nothing about a takedown or a suspension that its relay told.
    """
    active, held = await stored.status(did)
    if status is None and not active and held not in _HOSTS_OWN:
        return None
    differs = active != (status is None) or (not active and held != status)
    if differs and store is not None and relay is not None:
        batch = Batch()
        batch.put_account(Account(seq, did, status is None, status, None, relay), datetime.now(UTC))
        await store.write(batch)
    return differs


async def take_status(scene: Scene, seq: int, repos: list[RepoHead]) -> None:
    """Where the list says otherwise than the newest event, its word is an event of that relay.

    `seq`: the reader's cursor before the list was asked for, so that every event after it wins. Nothing is taken from a
    relay that the cursor does not belong to, nor where a list does not say whether an account is active. Who is active
    again is settled: a deletion has taken its rows away.
    """
    relay = await cursor_relay(scene.admin)
    if scene.store is None or relay is None or relay != URL(scene.config.relay_urls[0]).host:
        return
    told = {one.did: one for one in repos if one.active is not None and is_did(one.did)}
    known = {row[0]: (row[1], row[2]) for row in await scene.queue.rows(_KNOWN, list(told))}
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
