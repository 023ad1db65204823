"""Unique pairs, without a database: who is in the table, who waits (table/pairs.py)."""

from __future__ import annotations

import random
from datetime import datetime

from fastworker.table.batch import Change, Row
from fastworker.table.pairs import Arrangement, Found, Member, pair_of, rearrange
from fastworker.table.schema import LIKES

A = "did:plc:a"
AT = datetime(2026, 1, 1)  # noqa: DTZ001 - rows hold UTC without a zone
POST, OTHER = "at://did:plc:b/app.bsky.feed.post/1", "at://did:plc:b/app.bsky.feed.post/2"


def uri(rkey: str) -> str:
    return f"at://{A}/app.bsky.feed.like/{rkey}"


def row(rkey: str, seq: int | None, post: str = POST) -> Row:
    return (uri(rkey), A, post, "bafysubject", None, AT, AT, None if seq is None else str(seq), None)


def change(rkey: str, seq: int, post: str | None = POST) -> Change:
    values = None if post is None else row(rkey, seq, post)
    return Change(LIKES, uri(rkey), A, rkey, None, seq, 0, None if post is None else "bafylike", values)


def twin(rkey: str, seq: int, post: str = POST) -> Member:
    return Member(rkey, uri(rkey), row(rkey, seq, post), None, seq, "bafytwin")


def pair(post: str = POST) -> str:
    return pair_of(LIKES, row("x", 1, post))


def settle(
    changes: list[Change], winners: list[Row] | None = None, twins: dict[str, list[Member]] | None = None
) -> Arrangement:
    homes: dict[str, list[str]] = {}
    for stored in winners or []:
        homes.setdefault(stored[0], []).append(pair_of(LIKES, stored))
    for key, members in (twins or {}).items():
        for member in members:
            homes.setdefault(member.uri, []).append(key)
    found = Found(
        {pair_of(LIKES, stored): stored for stored in winners or []},
        {key: {member.uri: member for member in members} for key, members in (twins or {}).items()},
        homes,
        {},
    )
    pairs = {pair_of(LIKES, c.row) for c in changes if c.row is not None} | {h for hs in homes.values() for h in hs}
    return rearrange(LIKES, {c.uri: c for c in changes}, pairs, found)


def test_the_lowest_rkey_is_in_the_table_the_others_wait() -> None:
    new = settle([change("b", 2), change("a", 3), change("c", 1)])
    assert [member.rkey for _, member in new.inserts] == ["a"]
    assert [member.rkey for member in new.twin_puts[pair()]] == ["b", "c"]
    assert new.applied == [uri("a"), uri("b"), uri("c")]


def test_a_lower_rkey_takes_the_place_and_the_old_winner_waits() -> None:
    new = settle([change("a", 3)], [row("b", 2)])
    assert [stored[0] for stored in new.deletes] == [uri("b")]
    assert [member.rkey for _, member in new.inserts] == ["a"]
    assert [member.rkey for member in new.twin_puts[pair()]] == ["b"]


def test_the_next_one_takes_the_place_of_a_deleted_winner() -> None:
    new = settle([change("a", 9, None)], [row("a", 1)], {pair(): [twin("c", 3), twin("b", 2)]})
    assert [stored[0] for stored in new.deletes] == [uri("a")]
    assert [member.rkey for _, member in new.inserts] == ["b"]
    assert new.twin_deletes == [uri("b")]


def test_what_is_older_than_what_is_there_changes_nothing() -> None:
    new = settle([change("a", 1, OTHER)], [row("a", 5)])
    assert not (new.deletes)
    assert not (new.inserts)
    assert not (new.updates)
    assert new.applied == [uri("a")]


def test_a_record_that_changes_its_pair_leaves_the_old_one() -> None:
    new = settle([change("a", 9, OTHER)], [row("a", 1)], {pair(): [twin("b", 2)]})
    assert [stored[0] for stored in new.deletes] == [uri("a")]
    assert sorted((key, member.rkey) for key, member in new.inserts) == sorted([(pair(), "b"), (pair(OTHER), "a")])


def test_of_two_homes_the_newer_one_counts() -> None:
    """A record stayed behind as a twin in another pair: the stale one goes."""
    new = settle([change("a", 9, None)], [row("a", 5)], {pair(OTHER): [twin("a", 3, OTHER)]})
    assert [stored[0] for stored in new.deletes] == [uri("a")]
    assert new.twin_deletes == [uri("a")]
    assert not new.inserts


def test_a_winner_that_nobody_of_ours_versioned_is_recounted() -> None:
    new = settle([change("b", 5)], [row("a", None)])
    assert [stored[0] for stored in new.recounts] == [uri("a")]
    assert [member.rkey for member in new.twin_puts[pair()]] == ["b"]


def test_a_refused_pair_comes_back() -> None:
    new = settle([change("a", 1), change("b", 2, OTHER)])
    new.refused(pair())
    assert new.applied == [uri("b")]
    assert pair() not in new.twin_puts


def test_the_order_of_changes_does_not_matter() -> None:
    """Every order, one by one, ends with the same winner and the same twins as all at once."""
    changes = [change("c", 1), change("a", 2), change("b", 3), change("a", 4, None), change("b", 5, OTHER)]
    dice = random.Random(1)
    ends = set()
    for _ in range(50):
        dice.shuffle(changes)
        winners: dict[str, Row] = {}
        twins: dict[str, dict[str, Member]] = {}
        newest: dict[str, int] = {}
        for one in changes:
            if newest.get(one.uri, -1) > (one.seq or 0):  # what a tombstone does: an older one is not given
                continue
            newest[one.uri] = one.seq or 0
            new = settle([one], list(winners.values()), {key: list(members.values()) for key, members in twins.items()})
            for stored in new.deletes:
                del winners[pair_of(LIKES, stored)]
            for gone in new.twin_deletes:
                for members in twins.values():
                    members.pop(gone, None)
            for _, member in new.updates:
                winners[pair_of(LIKES, member.row)] = member.row
            for key, member in new.inserts:
                winners[key] = member.row
            for key, puts in new.twin_puts.items():
                twins.setdefault(key, {}).update({member.uri: member for member in puts})
        ends.add(
            (tuple(sorted(w[0] + k for k, w in winners.items())), tuple(sorted(m for t in twins.values() for m in t)))
        )
    assert len(ends) == 1
