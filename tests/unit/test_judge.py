"""What a snapshot says of one record, against what is stored of it."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from fastworker.store.stored import AccountState, Place, Standing
from fastworker.sync.judge import agrees, differing, is_extra, is_unknown
from fastworker.table.batch import Change
from fastworker.table.schema import GENERIC_RECORDS, LIKES, LIST_ITEMS, PROFILES, Table
from fastworker.table.snapshot import Snapshot

AT = datetime(2026, 7, 4)  # noqa: DTZ001 - naive UTC, as in the tables
URI = "at://did:plc:a/com.example.note/3k"
NOBODY = AccountState(None, None, None, is_forbidden=False)
ROW = Standing(URI, "3k", 5, AT)


def row(record: str, created_at: datetime = AT) -> tuple[object, ...]:
    return (URI, "bafy", "did:plc:a", "com.example.note", record, created_at)


def snapshot(taken_at: datetime) -> Snapshot:
    """What a record without a TID is judged by is when it was taken."""
    return Snapshot("did:plc:a", "3z", 9, taken_at)


def change(record: str, table: Table = GENERIC_RECORDS) -> Change:
    return Change(table, URI, "did:plc:a", "3k", "3z", 9, 0, "bafy", row(record))


@pytest.mark.parametrize(
    ("a", "b", "is_same"),
    [
        ('{"a":1,"b":[true,null]}', '{"b": [true, null], "a": 1}', True),
        ('{"a":true}', '{"a": 1}', False),
        ('{"a":[0]}', '{"a": [false]}', False),
        ('{"a":"\\u00e9"}', '{"a": "é"}', True),
        ("null", '{"a": 1}', False),
    ],
)
def test_json_is_compared_as_json(a: str, b: str, *, is_same: bool) -> None:
    assert differing(GENERIC_RECORDS, row(a), row(b)) == ([] if is_same else ["record"])
    assert agrees(change(a), [ROW], row(b), NOBODY, snapshot(AT)) is is_same


def test_what_agrees_needs_no_second_look() -> None:
    asked, one = snapshot(AT), change("{}")
    assert agrees(one, [ROW], row("{}"), NOBODY, asked)
    late = AT + timedelta(days=3)
    assert agrees(one, [ROW], row("{}", late), NOBODY, asked)  # judged by its moment, as the event's was by another
    assert not agrees(one, [ROW], row("{}", late), NOBODY, snapshot(late))
    assert not agrees(one, [ROW], None, NOBODY, asked)
    assert not agrees(one, [], row("{}"), NOBODY, asked)
    for place in (Place.TWIN, Place.TOMBSTONE):
        other = ROW._replace(place=place)
        assert not agrees(one, [other], row("{}"), NOBODY, asked)
        assert not agrees(one, [ROW, other], row("{}"), NOBODY, asked)
    assert not agrees(one, [ROW], row("{}"), NOBODY._replace(deleted_seq=7), asked)


def test_what_nothing_is_known_of() -> None:
    assert is_unknown(change("{}"), [])
    assert is_unknown(change("{}", LIKES), [])
    assert is_unknown(change("{}", PROFILES), [])
    assert not is_unknown(change("{}", LIST_ITEMS), [])  # others' rows are not found by their author
    assert not is_unknown(change("{}"), [ROW._replace(place=Place.TOMBSTONE)])


def test_a_tombstone_is_no_row_to_remove() -> None:
    snapshot = Snapshot("did:plc:a", "3z", 9, AT)
    assert is_extra(ROW, snapshot)
    assert not is_extra(ROW._replace(place=Place.TOMBSTONE), snapshot)
    assert not is_extra(ROW._replace(rev="3zz"), snapshot)
