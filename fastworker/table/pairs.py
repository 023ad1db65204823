"""Unique pairs: which member of a pair is in the table, and which ones wait in `fastworker.twins` (its twins). Pure.

The members of a pair are live records that name the same two things, for example two likes of one post by one account.
The schema keeps the pair unique, so one of them, the winner, is in the table: the first by `schema.twin_order` (as a
rule the lowest rkey, then URI).
`rearrange` is given what was found under the locks, and says what to write; store/settle.py finds and writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from fastworker.table.batch import Change, Row, newer, replaces, stored_version
from fastworker.table.rows import own_cid
from fastworker.table.schema import TABLES, Table, twin_order

_PAIR_AT = {table.name: tuple(table.index(column) for column in table.pair) for table in TABLES}


class Member(NamedTuple):
    """A live record of one pair, wherever it is. `cid` is the record's own, None where nobody knows it."""

    rkey: str
    uri: str
    row: Row
    rev: str | None
    seq: int | None
    cid: str | None


class Found(NamedTuple):
    """What is stored of some pairs. A URI that changed its pair on the way has two `homes`."""

    winners: dict[str, Row]  # by pair
    twins: dict[str, dict[str, Member]]  # by pair, then URI
    homes: dict[str, list[str]]  # the pairs in which a URI is now
    cids: dict[str, str | None]  # of winners whose rows have no cid column, where something derived needs it


class Arrangement:
    """What to write so that table and twins hold what they should. Deletes first, then updates, then inserts."""

    __slots__ = ("applied", "deletes", "inserts", "members", "recounts", "twin_deletes", "twin_puts", "updates")

    def __init__(self, members: dict[str, dict[str, Member]]) -> None:
        self.members = members  # afterwards, by pair, then URI
        self.applied: list[str] = []  # URIs of changes that are settled by this, whether they won or not
        self.deletes: list[Row] = []  # winners that leave the table
        self.updates: list[tuple[Row, Member]] = []  # winners that stay, with other values: before, after
        self.inserts: list[tuple[str, Member]] = []  # new winners, with their pair
        self.recounts: list[Row] = []  # winners that stay as they are, but nobody of ours had counted
        self.twin_deletes: list[str] = []
        self.twin_puts: dict[str, list[Member]] = {}  # by pair

    def refused(self, pair: str) -> None:
        """Another writer took this empty pair first: its changes come back, and find the other's row."""
        self.twin_puts.pop(pair, None)
        self.applied = [uri for uri in self.applied if uri not in self.members[pair]]


def pair_of(table: Table, row: Row) -> str:
    """The key of a row's pair: the values of its pair columns, one a line."""
    return "\n".join([row[at] for at in _PAIR_AT[table.name]])


def rearrange(
    table: Table,
    pending: dict[str, Change],
    pairs: Iterable[str],
    found: Found,
    trusted: Mapping[str, int] = MappingProxyType({}),
    *,
    many_relays: bool = False,
) -> Arrangement:
    """Apply the changes to the members of each pair; what to write then. `trusted`: places of trusted verifiers."""
    before = {pair: _members(table, pair, found) for pair in pairs}
    result = Arrangement({pair: dict(members) for pair, members in before.items()})
    touched: set[str] = set()
    for uri, change in sorted(pending.items()):
        result.applied.append(uri)
        touched |= _apply(table, change, found.homes.get(uri, []), before, result.members, many_relays=many_relays)
    for pair in sorted(touched):
        _place(table, pair, found, result, trusted)
    result.inserts.sort(key=lambda item: item[1].uri)
    return result


def _members(table: Table, pair: str, found: Found) -> dict[str, Member]:
    members = dict(found.twins.get(pair, ()))
    if (row := found.winners.get(pair)) is not None:
        rev, seq = stored_version(table, row)
        cid = found.cids.get(row[0]) or own_cid(table, row)
        members[row[0]] = Member(row[0].rpartition("/")[2], row[0], row, rev, seq, cid)
    return members


def _apply(
    table: Table,
    change: Change,
    homes: list[str],
    before: dict[str, dict[str, Member]],
    after: dict[str, dict[str, Member]],
    *,
    many_relays: bool,
) -> set[str]:
    """One change to the members. Returns the pairs that it touches."""
    uri = change.uri
    touched = set(homes)
    # The newest of what is there; an older one stayed behind in another pair and goes.
    if len(homes) == 2 and _is_newer(before[homes[0]][uri], before[homes[1]][uri]):
        homes = [homes[1], homes[0]]
    for pair in homes[:-1]:
        after[pair].pop(uri, None)
    if homes:
        current = before[homes[-1]][uri]
        if table.hot and not replaces(change, current.rev, current.seq, many_relays=many_relays):
            return touched
        after[homes[-1]].pop(uri, None)
    if change.row is not None:
        pair = pair_of(table, change.row)
        after[pair][uri] = Member(change.rkey, uri, change.row, change.rev, change.seq, change.cid)
        touched.add(pair)
    return touched


def _place(table: Table, pair: str, found: Found, result: Arrangement, trusted: Mapping[str, int]) -> None:
    """Who is in the table now, and who waits."""
    members = result.members[pair]
    old = found.winners.get(pair)
    twins = found.twins.get(pair, {})
    # mutant: highest rkey wins
    best = min(members.values(), default=None, key=lambda m: twin_order(table, m.uri, m.rkey, trusted))
    if old is not None and (best is None or best.uri != old[0]):
        result.deletes.append(old)
    if best is not None:
        if old is None or best.uri != old[0]:
            result.inserts.append((pair, best))
        elif best.row is not old:
            result.updates.append((old, best))
        elif table.hot and stored_version(table, old) == (None, None):
            result.recounts.append(old)
    result.twin_deletes.extend(uri for uri in twins if uri not in members or (best is not None and uri == best.uri))
    result.twin_puts[pair] = [
        m for m in members.values() if best is not None and m.uri != best.uri and twins.get(m.uri) is not m
    ]


def _is_newer(a: Member, b: Member) -> bool:
    return newer(a.rev, a.seq, b.rev, b.seq)
