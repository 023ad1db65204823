"""Before and after the main transaction: what beats the records of a batch.

Both looks read without locks. The first saves work; the second, after the commit, is what makes the result independent
of order: whatever was committed between the two is seen by it, or sees us (docs/invariants.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from fastworker.store import statements as sql
from fastworker.store.session import Connection
from fastworker.store.writer import Writer
from fastworker.table.batch import Change, is_gone, newer
from fastworker.table.rows import LIKE
from fastworker.table.schema import BOOKMARKS, LABELS, LIKES, POSTS

Key = tuple[str, str]  # kind and key of a joined row


class Seen(NamedTuple):
    """What was found about a batch's upserts."""

    beaten: dict[str, Change]  # by uri, deletes of those that a tombstone or a deleted account beats
    superseded: set[str]  # uris of upserts and deletes that are older than their account's floor; only before the flush
    floors: dict[str, tuple[str, int]] | None  # by DID, of those that may matter; None: there are none; only before it
    waiting: set[str]  # uris that are among the twins
    forbidden: set[str]  # DIDs that may not be stored; only before the flush
    joined: set[Key]  # joined rows that may have changed; only after it


def nothing() -> Seen:
    return Seen({}, set(), None, set(), set(), set())


async def look(db: Connection, changes: Iterable[Change], dids: Iterable[str]) -> Seen:
    """What is beaten already, which records are among the twins, and which of `dids` may not be stored.

    Reads versions, accounts, floors, twins and user_settings; locks nothing. Without it beaten records would be written
    and removed again, what a snapshot superseded would come back, and records of people who forbade it would be stored.
    """
    changes, dids = list(changes), list(dids)
    if not changes and not dids:
        return nothing()
    upserts = [c for c in changes if c.row is not None]
    hot = [c.uri for c in upserts if c.table.hot]
    found = await db.fetch(sql.LOOK, hot, list({c.repo for c in changes}), *lowest(changes), dids)
    seen = _seen(upserts, found)
    if seen.floors:
        for change in changes:
            floor = seen.floors.get(change.repo)
            # mutant: floors not looked at
            if floor is not None and _is_below(change, *floor):
                seen.superseded.add(change.uri)
                seen.beaten.pop(change.uri, None)
    return seen


def lowest(changes: Iterable[Change]) -> tuple[str | None, int | None]:
    """The lowest rev; and the lowest seq of what has none."""
    rev = min((c.rev for c in changes if c.rev is not None), default=None)
    return rev, min((c.seq or 0 for c in changes if c.rev is None), default=None)


def _is_below(change: Change, rev: str, seq: int) -> bool:
    """Whether a change is older than a floor: a delete as much as an upsert."""
    if change.table is BOOKMARKS or change.table is LABELS:
        return False
    # mutant: deletes pass a floor
    return change.rev < rev if change.rev is not None else (change.seq or 0) <= seq


async def look_back(writer: Writer, db: Connection, written: list[Change], upserts: list[Change]) -> Seen:
    """What overtook those written since `look`, and which joined rows the upserts may have changed.

    After the commit of the main transaction, in a statement of its own: its snapshot must see what committed before
    ours. Without it a delete that committed between look and commit would leave its record in the table.
    """
    if not upserts:
        return nothing()
    arguments = back_arguments(writer, written, upserts)
    found = await db.fetch(sql.LOOK_BACK, *(arguments[name] for name in sql.LOOK_BACK_ARGUMENTS))
    replies = Counter(r[2] for r in found if r[0] == "context" and r[2] is not None)
    # mutant: no crowd bound
    if crowded := sorted(root for root, count in replies.items() if count > writer.crowd):
        await writer.retry(lambda: db.execute(sql.OWE_ROOTS, crowded))
        found = [r for r in found if r[0] != "context" or r[2] not in crowded]
    return _seen(written, found)


def back_arguments(writer: Writer, written: list[Change], upserts: list[Change]) -> dict[str, Any]:
    """Arguments of `fastworker.look_back`."""
    likes = [c.row for c in upserts if c.table is LIKES and c.row is not None]
    return {
        "uris": [c.uri for c in written if c.table.hot],
        "repos": list({c.repo for c in written}),
        "posts": [c.uri for c in upserts if c.table is POSTS],
        "like_posts": [row[LIKE.post_uri] for row in likes],
        "like_users": [row[LIKE.user_did] for row in likes],
        "crowd": writer.crowd,
        "with_contexts": "thread_contexts" in writer.derive,
        "with_gates": "gate_flags" in writer.derive,
        "with_services": "like_counts" in writer.derive,
    }


def _seen(upserts: list[Change], rows: list[Any]) -> Seen:
    """What the rows of a look, (kind, key, rev, seq), say about these upserts."""
    seen = nothing()
    tombstones: dict[str, tuple[str | None, int | None]] = {}
    accounts: dict[str, tuple[str | None, int | None]] = {}
    floors: dict[str, tuple[str, int]] = {}
    has_floors = False
    for kind, key, rev, seq in rows:
        if kind == "tombstone":
            tombstones[key] = (rev, seq)
        elif kind == "account":
            accounts[key] = (rev, seq)
        elif kind == "twin":
            seen.waiting.add(key)
        elif kind == "forbidden":
            seen.forbidden.add(key)
        elif kind == "floor":
            floors[key] = (rev, seq)
        elif kind == "floors":
            has_floors = True
        else:
            seen.joined.add((kind, key))
    if tombstones or accounts:
        for change in upserts:
            tombstone = tombstones.get(change.uri)
            if tombstone is not None and not newer(change.rev, change.seq, *tombstone):
                seen.beaten[change.uri] = _delete(change, *tombstone)
            # mutant: deleted accounts not looked at
            elif (gone := accounts.get(change.repo)) is not None and is_gone(change.rev, change.seq, *gone):
                seen.beaten[change.uri] = _delete(change, change.rev, change.seq)  # at one version a delete wins
    return seen._replace(floors=floors) if has_floors else seen


def _delete(change: Change, rev: str | None, seq: int | None) -> Change:
    return Change(change.table, change.uri, change.repo, change.rkey, rev, seq, 0, None, None)
