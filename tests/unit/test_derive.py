"""What follows from rows: table/derive.py, and the names of row positions."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from fastworker.table import derive
from fastworker.table.batch import Row
from fastworker.table.derive import FULL, LIKE_COUNT, QUOTE_COUNT, REPLY_COUNT, Effects
from fastworker.table.rows import FEED_ITEM, LIKE, NOTIFICATION, POST, own_cid
from fastworker.table.schema import FOLLOWS, LIKES, POSTS, PROFILES, REPOSTS, TABLES, Table

A, B = "did:plc:a", "did:plc:b"
AT = datetime(2026, 1, 1)  # noqa: DTZ001 - rows hold UTC without a zone
TARGET = f"at://{B}/app.bsky.feed.post/t"


def row(table: Table, **values: Any) -> Row:
    known = {"created_at": AT, "commit_seq": "1", "commit_rev": "3k1"} | values
    return tuple(known.get(column) for column in table.columns)


def like(rkey: str = "l") -> Row:
    return row(LIKES, uri=f"at://{A}/app.bsky.feed.like/{rkey}", user_did=A, post_uri=TARGET)


def post(**values: Any) -> Row:
    return row(POSTS, uri=f"at://{A}/app.bsky.feed.post/p", cid="bafypost", author_did=A, text="x", **values)


def test_positions_are_the_schema_s() -> None:
    for column in POSTS.columns:
        assert getattr(POST, column) == POSTS.index(column)
    with pytest.raises(AttributeError, match="root"):
        _ = POST.root


def test_own_cid_only_where_there_is_a_column() -> None:
    assert own_cid(POSTS, post()) == "bafypost"
    assert own_cid(LIKES, like()) is None


def test_a_like_is_a_count_a_viewer_state_and_a_notification() -> None:
    effects = Effects(FULL)
    derive.added(effects, LIKES, like(), "bafylike")
    assert effects.counts == {TARGET: [1, 0, 0, 0, 0]}
    assert effects.viewers_set == {(TARGET, A): [like()[LIKE.uri], None, False]}
    (note,) = effects.notes_added.values()
    assert note[NOTIFICATION.recipient_did] == B
    assert note[NOTIFICATION.reason] == "like"
    assert note[NOTIFICATION.cid] == "bafylike"
    assert not effects.owed


def test_a_like_that_comes_and_goes_leaves_only_deletes() -> None:
    effects = Effects(FULL)
    derive.added(effects, LIKES, like(), None)
    derive.removed(effects, LIKES, like())
    assert effects.counts[TARGET][LIKE_COUNT] == 0
    assert not effects.notes_added
    assert effects.notes_removed == {like()[LIKE.uri] + "#notification"}
    assert ("aggregate", TARGET) in effects.owed


def test_what_nobody_counted_is_recounted() -> None:
    effects = Effects(FULL)
    derive.removed(effects, LIKES, like(), counted=False)
    assert effects.recount == {TARGET}


def test_a_replaced_row_is_removed_and_added() -> None:
    """One key in both: the row is written once, as the new one says."""
    effects = Effects(FULL)
    old, new = post(parent_uri=TARGET), post(parent_uri=None)
    derive.removed(effects, POSTS, old)
    derive.added(effects, POSTS, new, "bafypost")
    assert effects.counts[TARGET][REPLY_COUNT] == -1
    assert list(effects.feed_added) == [new[POST.uri]]
    assert effects.feed_added[new[POST.uri]][FEED_ITEM.sort_at] == AT
    assert effects.notes_removed == {old[POST.uri] + "#notification/reply"}
    assert not effects.notes_added


def test_nobody_is_told_of_what_he_did_himself() -> None:
    effects = Effects(FULL)
    own = f"at://{A}/app.bsky.feed.post/own"
    derive.added(effects, LIKES, row(LIKES, uri=f"at://{A}/app.bsky.feed.like/l", user_did=A, post_uri=own), None)
    derive.added(effects, POSTS, post(parent_uri=own), None)
    derive.added(effects, FOLLOWS, row(FOLLOWS, uri="at://x/y/z", follower_did=A, following_did=A), None)
    assert not effects.notes_added


def test_a_repost_without_a_cid_takes_its_uri() -> None:
    effects = Effects(FULL)
    repost = row(REPOSTS, uri=f"at://{A}/app.bsky.feed.repost/r", user_did=A, post_uri=TARGET)
    derive.added(effects, REPOSTS, repost, None)
    assert effects.feed_added[repost[0]][FEED_ITEM.cid] == repost[0]


def test_quote_and_its_count() -> None:
    embed = f'{{"$type":"app.bsky.embed.record","record":{{"uri":"{TARGET}","cid":"bafyq"}}}}'
    effects = Effects(FULL)
    derive.added(effects, POSTS, post(embed=embed), None)
    assert effects.counts[TARGET][QUOTE_COUNT] == 1
    assert [note[NOTIFICATION.reason] for note in effects.notes_added.values()] == ["quote"]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_nothing_is_derived_that_was_not_asked_for(table: Table) -> None:
    if table is PROFILES or table.name in ("fastworker.gates", "labels"):
        pytest.skip("their tables follow in any case")
    effects = Effects(frozenset())
    texts = {column: TARGET for column in table.columns if column not in ("embed", "facets", "created_at")}
    derive.added(effects, table, row(table, **texts), None)
    assert not (effects.counts)
    assert not (effects.notes_added)
    assert not (effects.feed_added)
    assert not (effects.quotes_added)
    assert not (effects.viewers_set)
