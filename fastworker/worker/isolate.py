"""A value that PostgreSQL refuses must cost nothing but its own record: the batch is applied again in halves."""

from __future__ import annotations

import asyncio
import logging

from fastworker.errors import Reason, RowRejected
from fastworker.event import Commit
from fastworker.event.entry import decode_entry, received_ms
from fastworker.process.board import State
from fastworker.store.blame import TooSlow
from fastworker.stream.consumer import Entry, SetAside, Tally
from fastworker.table.batch import Batch, Change, Mapped
from fastworker.table.mapper import map_commit
from fastworker.worker.flush import Flush
from fastworker.worker.held import Held, names_of
from fastworker.worker.limits import Refusals
from fastworker.worker.locked import ROWS_MAX
from fastworker.worker.slow import PIECES
from fastworker.worker.turn import Turn

log = logging.getLogger(__name__)

LETTERS_OF_ACCOUNT_MAX = 20  # in each process; of what is refused beyond that only the names are kept


async def settle(flush: Flush, refusals: Refusals, held: Held, rows_locked: int = 0) -> None:
    """Settle all entries: stored and acked, set aside, or put by until a locked row is free or PostgreSQL quicker.

    `rows_locked`: how many locked rows this flush has found so far.
    """
    with flush.open_span("flush") as span:
        error = await flush.settle(held, span, patient=rows_locked == ROWS_MAX)
        if isinstance(error, RowRejected):
            await _isolate(flush, refusals, held, error)
        elif isinstance(error, TooSlow):
            flush.slow.hurry(len(held.batch.entries), error)
            await _isolate(flush, refusals, held, error)
            flush.tell_what_waits()
        elif error is not None:
            rest = await flush.waiting.put_by(held, error)
            await settle(flush, refusals, rest, ROWS_MAX if rest is held else rows_locked + 1)
        elif len(held.batch.entries) == 1 and flush.slow.forget(held.batch.entries[0]):
            flush.tell_what_waits()


async def _isolate(flush: Flush, refusals: Refusals, held: Held, error: RowRejected | TooSlow) -> None:
    """PostgreSQL refused a value: apply the entries again in halves, until the one that holds it is alone.

    In more pieces where it was too slow: each attempt costs seconds.
    """
    entries = [(entry_id, held.entries[entry_id]) for entry_id in held.batch.entries]
    if len(entries) == 1:
        if isinstance(error, TooSlow) and flush.slow.put_by(*entries[0], held.since_ms, error):
            return
        await _isolate_op(flush, refusals, entries[0], error)
        flush.slow.forget(entries[0][0])
        return
    step = -(-len(entries) // (PIECES if isinstance(error, TooSlow) else 2))
    for first in range(0, len(entries), step):
        part = Held()
        part.since_ms = held.since_ms
        turn = Turn()
        for entry_id, fields in entries[first : first + step]:
            part.apply(entry_id, fields)
            if turn.is_over():
                await turn.next()
        await settle(flush, refusals, part)
        await asyncio.sleep(0)


async def _isolate_op(flush: Flush, refusals: Refusals, entry: Entry, error: RowRejected | TooSlow) -> None:
    """One bad record must not cost the commit: its siblings are stored, then the entry is set aside whole.

    A retry of the dead letter is harmless: the siblings are there already. An account that has many letters gets
    no more of them; the records are kept by name.
    """
    entry_id, fields = entry
    event = decode_entry(fields)
    reason = Reason.TOO_SLOW if isinstance(error, TooSlow) else Reason.ROW_REJECTED
    letter = SetAside(entry_id, fields, reason, str(error))
    did = event.repo if isinstance(event, Commit) else event.did
    mapped = map_commit(event, received_ms(entry_id, fields)) if isinstance(event, Commit) else None
    refused = mapped.changes if mapped is not None else []
    if mapped is not None and len(refused) > 1:
        refused = await _write_parts(flush, mapped, 0, len(refused))
    count = refusals.add(did)
    if count <= LETTERS_OF_ACCOUNT_MAX:
        await flush.leave_aside([letter])
        return
    names = names_of(event, refused, reason, str(error))
    await flush.persist(State.WAITING_FOR_STORE, lambda: flush.store.keep(names))
    tally = Tally("set_aside", drops=(reason,))
    await flush.persist(State.WAITING_FOR_STREAM, lambda: flush.stream.ack({tally: [entry_id]}))
    flush.slot.add(set_aside=1)
    flush.slot.drop(reason)
    log.debug("Kept %s by name: %s (%s)", entry_id, did, error)


async def _write_parts(flush: Flush, mapped: Mapped, first: int, stop: int) -> list[Change]:
    """Write these changes, or their halves; those that are refused alone."""
    batch = Batch()
    batch.put(Mapped(mapped.changes[first:stop], mapped.dids, []))
    try:
        await flush.write(batch)
    except (RowRejected, TooSlow):
        if stop - first == 1:
            return mapped.changes[first:stop]
        middle = (first + stop) // 2
        return await _write_parts(flush, mapped, first, middle) + await _write_parts(flush, mapped, middle, stop)
    return []
