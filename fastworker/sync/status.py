"""Whether accounts are active, by others than #account events: what said it may have been lost.

The host that an account's document names says it with its answer, and the directory says who has given up the DID; the
relay's list, which says it of everybody in a gap, is read elsewhere (sync/lists.py). Each is taken as an event of the
cursor's relay at the cursor.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, NamedTuple

from fastworker.event import Account
from fastworker.event.frame import identity_of
from fastworker.table.batch import Batch

if TYPE_CHECKING:
    from fastworker.store.store import Store
    from fastworker.store.stored import Stored

HOSTS_OWN: Final = ("deactivated", "deleted")
"""What the account's own host decides, and nobody else."""


class Word(NamedTuple):
    """What others than events say of an account, as an event of `relay` at `seq`, the cursor before they were asked: so
    every event after it wins. `relay` None: nothing is taken."""

    did: str
    relay: str | None
    seq: int


async def take_word(stored: Stored, store: Store | None, word: Word, status: str | None) -> bool | None:
    """What the account's own host says; `status` None: it is active. Returns whether something else was stored; None: a
    takedown or suspension was, which a relay may have decided."""
    active, held = await stored.status(word.did)
    if not active and held not in HOSTS_OWN and held != status:
        return None
    differs = active != (status is None) or (not active and held != status)
    if differs and store is not None and word.relay is not None:
        batch = Batch()
        told = Account(word.seq, word.did, status is None, status, None, word.relay)
        batch.put_account(told, datetime.now(UTC))
        await store.write(batch)
    return differs


async def take_handle(stored: Stored, store: Store | None, word: Word, handle: str | None) -> bool | None:
    """What the account's document claims. Returns whether another handle was claimed; None: no event named one yet."""
    shown, claimed, is_pending = await stored.handle(word.did)
    claim = identity_of(word.did, handle, word.seq, None, word.relay)
    if claim.handle is None or claimed is None or is_pending:
        return None
    differs = claim.handle not in (shown, claimed)
    if differs and store is not None and word.relay is not None:
        batch = Batch()
        batch.put_identity(claim, datetime.now(UTC))
        await store.write(batch)
    return differs
