"""Handles that changed in a gap: no repository and no list of a relay tells them, the directory's log does.

What a document claims is taken as an #identity event of the cursor's relay at the cursor, so that whoever verifies
handles looks at it as at any other claim. A `did:web` is in no log: it is looked up again.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from fastworker.errors import Unreachable
from fastworker.event import Identity
from fastworker.event.frame import identity_of
from fastworker.event.syntax import is_did
from fastworker.store.repos import REPAIR
from fastworker.stream.repairs import cursor_relay
from fastworker.sync.hosts import HostError, HostFault, Operation
from fastworker.table.batch import Batch
from fastworker.table.snapshot import tid_moment

if TYPE_CHECKING:
    from fastworker.sync.many import Scene

log = logging.getLogger(__name__)

REASON: Final = "handles"
PAGE: Final = 1_000
UNKNOWN: Final = timedelta(days=7)
"""How far back the log is read where nobody knows when a gap began."""
_NO_LOG: Final = (HostFault.NOT_FOUND, HostFault.BAD_ANSWER, HostFault.TOO_LARGE)
_IS_READ: Final = f"""
SELECT EXISTS (SELECT FROM fastworker.sweeps AS g, fastworker.sweeps AS h WHERE g.source = $1 AND g.reason = 'gap'
    AND g.done_at IS NULL AND h.reason = '{REASON}' AND h.done_at IS NOT NULL AND h.started_at >= g.started_at)
"""
_SINCE: Final = "SELECT since_rev FROM fastworker.sweeps WHERE source = $1 AND reason = 'gap' AND done_at IS NULL"
_WEB: Final = "SELECT did FROM public.users WHERE did >= 'did:web:' AND did < 'did:web;' ORDER BY did"


async def read_handles(scene: Scene, relay: str) -> None:
    """For the gaps whose list of `relay` is being read: before it, so that it is not at its end without this."""
    named = await cursor_relay(scene.admin)
    if scene.store is None or named is None or await scene.queue.value(_IS_READ, relay):
        return
    began = tid_moment(await scene.queue.value(_SINCE, relay) or "")
    since = (began or datetime.now(UTC).replace(tzinfo=None) - UNKNOWN).isoformat(timespec="milliseconds") + "Z"
    sweep = await scene.queue.sweep(scene.config.plc_url, REASON, REPAIR)
    while not sweep.is_done:
        mark = await scene.live.mark()
        try:
            found = await scene.hosts.operations(sweep.cursor or since, PAGE)
        except HostError as error:
            if error.fault not in _NO_LOG:
                raise Unreachable(f"the directory's log cannot be read: {error}") from error
            log.warning("Handles that changed in a gap are not known: %s has no log (%s)", scene.config.plc_url, error)
            found = []
        batch = _claims(found, named, mark.seq)
        cursor = found[-1].at if len(found) >= PAGE and found[-1].at != sweep.cursor else None
        if cursor is None:
            for row in await scene.queue.rows(_WEB):
                batch.put_identity(Identity(mark.seq, row[0], None, None, named), datetime.now(UTC))
        if batch.identities:
            await scene.store.write(batch)
        sweep = await scene.queue.page(sweep, [], len(found), cursor, REASON, REPAIR)


def _claims(found: list[Operation], relay: str, seq: int) -> Batch:
    """Of each account the newest."""
    batch = Batch()
    for did, one in {one.did: one for one in found if is_did(one.did)}.items():
        try:
            at = datetime.fromisoformat(one.at)
        except ValueError:
            continue
        claim = identity_of(did, one.handle, seq, None, relay)
        batch.put_identity(claim, at if at.tzinfo else at.replace(tzinfo=UTC))
    return batch
