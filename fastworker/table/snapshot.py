"""A repository's records as rows: what a snapshot says of every path, in pieces. Pure.

A full snapshot at revision R counts, for every path of its repository, as one operation of version (R, S0): an upsert
of what it holds, a delete of what it lacks (state law, Snapshots). S0 is a seq up to which everything happened before
the snapshot was taken: the reader's cursor before the request, or 0 where nobody knows when a file was written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from typing import Final

import msgspec

from fastworker.errors import Reason
from fastworker.event import Commit, Op
from fastworker.event.record import cid_text
from fastworker.event.repository import TreeRecord
from fastworker.table.batch import Change, newer
from fastworker.table.chosen import WHOLE, Part
from fastworker.table.dates import EPOCH, SKEW, latest_date
from fastworker.table.mapper import map_at
from fastworker.table.schema import BOOKMARKS, LABELS

_FIRST_TID: Final = datetime(2022, 1, 1)  # noqa: DTZ001 - naive UTC; the protocol is younger
_LETTERS: Final = "234567abcdefghijklmnopqrstuvwxyz"
_AS_PYTHON: Final = bytes(b"0123456789abcdefghijklmnopqrstuv!"[_LETTERS.find(chr(byte))] for byte in range(256))
"""A TID's letters as Python's digits to the base of 32, everything else as none."""
_LAST: Final = "j" + 12 * "z"
PIECE_BYTES: Final = 8 * 1024 * 1024
UNTOUCHED: Final = frozenset((BOOKMARKS.name, LABELS.name))
"""Tables whose rows others write, too: no snapshot touches them."""
REPLACED: Final = frozenset(
    (
        *("app.bsky.feed.threadgate", "app.bsky.feed.postgate"),
        *("app.bsky.graph.list", "app.bsky.feed.generator", "app.bsky.graph.starterpack"),
    )
)
"""Collections whose key says nothing of when a record was written: a gate has its post's, the others are replaced."""


class Snapshot(msgspec.Struct, frozen=True):
    """`taken_at`: naive UTC, when the host was asked."""

    did: str
    rev: str
    seq: int
    taken_at: datetime

    def beats(self, rev: str | None, seq: int | None) -> bool:
        """Whether it is newer than a stored version."""
        return newer(self.rev, self.seq, rev, seq)


class Piece(msgspec.Struct):
    """Records of consecutive keys: `records` of them, up to the URI `last`, also those that cannot be stored, which are
    in `drops`.

    `others`: no changes, but they may be in the tables all the same. What cannot be stored is not there, except where
    only its block is bad.
    """

    records: int = 0
    last: str = ""
    changes: list[Change] = []
    others: set[str] = set()
    drops: Counter[str] = msgspec.field(default_factory=Counter)

    @property
    def present(self) -> set[str]:
        """Records that may be in the tables."""
        return self.others.union([change.uri for change in self.changes])


def covered(records: Iterable[TreeRecord], part: Part) -> Iterable[TreeRecord]:
    return records if part == WHOLE else (one for one in records if part.covers(one.collection, one.rkey))


def pieces(records: Iterable[TreeRecord], snapshot: Snapshot, size: int) -> Iterator[Piece]:
    """In key order, at most `size` records each, fewer where they are large."""
    piece, held = Piece(), 0
    for record in records:
        _put(piece, record, snapshot)
        held += len(record.block or b"")
        if piece.records >= size or held >= PIECE_BYTES:
            yield piece
            piece, held = Piece(), 0
    yield piece


def _put(piece: Piece, record: TreeRecord, snapshot: Snapshot) -> None:
    collection, rkey, cid, block = record
    uri = f"at://{snapshot.did}/{collection}/{rkey}"
    piece.records += 1
    piece.last = uri
    if block is None:
        piece.others.add(uri)
        piece.drops[str(Reason.BAD_HASH)] += 1
        return
    moment = moment_of(collection, rkey, snapshot.taken_at)
    op = Op("create", collection, rkey, cid_text(cid), block)
    mapped = map_at(Commit(snapshot.seq, snapshot.did, snapshot.rev, None, [op], []), moment, moment)
    for drop in mapped.drops:
        piece.drops[str(drop.reason)] += 1
    for change in mapped.changes:
        if change.table.name in UNTOUCHED:
            piece.others.add(uri)
        else:
            piece.changes.append(change)


def moment_of(collection: str, rkey: str, taken_at: datetime) -> datetime:
    """When a record was written, as far as its key tells; else when the snapshot was taken."""
    moment = tid_moment(rkey)
    if moment is None or not _FIRST_TID <= moment <= taken_at + SKEW:
        return taken_at
    # mutant: a gate is as old as its post
    return taken_at if collection in REPLACED else moment


def tid_moment(tid: str) -> datetime | None:
    """The moment that a TID names, as naive UTC."""
    if len(tid) != 13 or tid > _LAST or not tid.isascii():
        return None
    try:
        return EPOCH + timedelta(microseconds=int(tid.encode().translate(_AS_PYTHON), 32) >> 10)
    except ValueError:  # a letter that is none of a TID's
        return None


def tid_of(moment: datetime) -> str:
    """The lowest TID of a moment."""
    number = max(0, (moment - EPOCH) // timedelta(microseconds=1)) << 10
    return "".join(_LETTERS[number >> shift & 31] for shift in range(60, -1, -5))


def is_judged_date(value: object, moment: datetime) -> bool:
    """Whether a date of a row was not the record's own: cut to what its moment allows, or the moment itself.

    The same record that came as an event has another moment, and so another date.
    """
    return value in (moment, latest_date(moment), EPOCH)
